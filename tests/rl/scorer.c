/* A reward command for tests: the reward is the length of the completion in bytes.  Arguments say what goes wrong, and at which length:
 *   die=L  garbage=L  stray=L (an id that nobody asked about)  twice=L  sleep=L  null=L  text=L  none=L  huge=L
 *   again=L (answers by id, two times)  late=L (one answer more, 0.1 s later)
 *   dieeven=1 (at every even length)  dieover=L (at every length above)
 *   close=L (stops reading, answers no more, lives on for a while)  silent=0  swap=1 (pairs in reverse, by id)
 *   report=1 (its signals and open descriptors, on standard error)  pad=N (bytes of padding in each reply)
 *   hello=1 (a banner)  half=1 (an extra scalar) */
#include <fcntl.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static int n_arguments;
static char **arguments;

static long option(const char *key) {
    const size_t n = strlen(key);
    for (int i = 1; i < n_arguments; i++)
        if (strncmp(arguments[i], key, n) == 0 && arguments[i][n] == '=') return strtol(arguments[i] + n + 1, NULL, 10);
    return -1;
}

static void pad(long n) {
    if (n < 0) return;
    printf(",\"pad\":\"");
    while (n-- > 0) putchar('x');
    putchar('"');
}

static void reply(long id, long length) {
    printf("{");
    if (id >= 0) printf("\"id\":%ld,", id);
    if (length == option("null"))
        printf("\"reward\":null");
    else if (length == option("text"))
        printf("\"reward\":\"high\"");
    else if (length == option("huge"))
        printf("\"reward\":1e300");
    else if (length == option("none"))
        printf("\"other\":1");
    else
        printf("\"reward\":%ld", length);
    if (option("half") > 0) printf(",\"half\":%g,\"note\":\"x\"", (double)length / 2);
    pad(option("pad"));
    printf("}\n");
    fflush(stdout);
}

/* What goes wrong at this length, before the reply; true: there is none. */
static int misbehave(long id, long length) {
    if (length == option("die") || (option("dieover") >= 0 && length > option("dieover")) || (option("dieeven") > 0 && length % 2 == 0))
        exit(1);
    if (length == option("sleep")) sleep(100);
    if (length == option("close")) {
        close(STDIN_FILENO);
        nanosleep(&(struct timespec){.tv_nsec = 200000000}, NULL);
        exit(0);
    }
    if (length == option("garbage")) printf("Traceback: oh\n");
    if (length == option("stray")) printf("{\"id\":5,\"reward\":1}\n");
    if (length == option("twice")) reply(-1, length);
    if (length == option("again")) reply(id, length), reply(id, length);
    fflush(stdout);
    return length == option("garbage") || length == option("stray") || length == option("again") || option("silent") >= 0;
}

static void report(void) {
    char line[256];
    int open = 3;
    FILE *status = fopen("/proc/self/status", "re");
    while (status && fgets(line, sizeof line, status))
        if (strncmp(line, "Sig", 3) == 0) fputs(line, stderr);
    if (status) fclose(status);
    for (int fd = 3; fd < 256; fd++) open += fcntl(fd, F_GETFD) >= 0;
    fprintf(stderr, "open %d\n", open);
}

int main(int argc, char **argv) {
    char *line = NULL;
    size_t room = 0;
    long kept_id = -1, kept_length = 0;
    n_arguments = argc;
    arguments = argv;
    if (option("report") > 0) report();
    if (option("hello") > 0) printf("Loading the model\n");
    while (getline(&line, &room, stdin) > 0) {
        json_t *request = json_loads(line, 0, NULL);
        const long id = (long)json_integer_value(json_object_get(request, "id"));
        const long length = (long)json_string_length(json_object_get(request, "completion"));
        json_decref(request);
        if (misbehave(id, length)) continue;
        if (option("swap") < 0) {
            reply(-1, length);
            if (length == option("late")) {
                nanosleep(&(struct timespec){.tv_nsec = 100000000}, NULL);
                reply(-1, length);
            }
        } else if (kept_id < 0) {
            kept_id = id;
            kept_length = length;
        } else {
            reply(id, length);
            reply(kept_id, kept_length);
            kept_id = -1;
        }
    }
    free(line);
    return 0;
}
