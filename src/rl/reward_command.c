/* Rewards by child processes that speak JSON lines; the protocol: esp_reward_open.  The one place of the library that starts processes:
 * each child has a process group of its own, is never waited for without end, and never left as a zombie. */
#include "rl/reward.h"

#include "core/bytes.h"
#include "core/clock.h"

#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <math.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#define MOST_CHILDREN 1024
#define DEFAULT_DEADLINE 60.0
#define STOP_SECONDS 0.5 /* between two looks whether the run was asked to stop */
#define LONGEST_LINE ((size_t)1 << 20)
#define MOST_STARTS 3   /* of one child in a row without an answer */
#define MOST_SILENT 3   /* batches in a row without a single answer */
#define GRACE_SECONDS 2 /* between the end of a child's input and its kill, at the end of the run */
#define SHOWN 80        /* characters of a bad line that are quoted */

extern char **environ;

typedef struct child {
    pid_t pid;                /* 0: not running */
    int in, out;              /* our ends of its standard input and output */
    espi_bytes input, output; /* what waits to be written, and to become a line */
    size_t sent;
    int64_t first, end, open; /* its rows of the batch, and how many of them are not answered */
    int64_t starts;           /* since its last answer, in this batch */
    bool started;             /* ever */
} child;

typedef struct command {
    espi_reward_head head;
    char *line;
    double deadline;
    int32_t n;
    child *children;
    int64_t batches, silent;
    bool proved; /* answered once: what fails afterwards is counted, before it ends the run */
} command;

/* One batch while it is scored. */
typedef struct scoring {
    command *c;
    const esp_reward_batch *batch;
    float *reward;
    uint8_t *answered; /* [n] answered, or given up */
    double restarts, bad, answers;
    char why[512]; /* of the failure */
} scoring;

static int fail(scoring *s, const char *format, ...) __attribute__((format(printf, 2, 3)));
static int fail(scoring *s, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(s->why, sizeof s->why, format, arguments);
    va_end(arguments);
    return 1;
}

static void close_end(int *fd) {
    if (*fd >= 0) close(*fd);
    *fd = -1;
}

/* Kills what is left of the child's group and takes the child's exit status; the order keeps its id from being somebody else's. */
static int end_child(child *k) {
    int status = 0;
    close_end(&k->in);
    close_end(&k->out);
    if (k->pid > 0) {
        kill(-k->pid, SIGKILL);
        while (waitpid(k->pid, &status, 0) < 0 && errno == EINTR) continue;
    }
    k->pid = 0;
    k->input.used = k->output.used = k->sent = 0;
    return status;
}

/* Out of the way of 0 to 2, which become the child's own, closed on exec. */
static int lift(int fd) {
    const int lifted = fcntl(fd, F_DUPFD_CLOEXEC, 3);
    close(fd);
    return lifted;
}

static bool make_pipe(int ends[2]) {
    if (pipe(ends) != 0) return false;
    ends[0] = lift(ends[0]);
    ends[1] = lift(ends[1]);
    return ends[0] >= 0 && ends[1] >= 0;
}

/* Nothing of this process's signals reaches the child: it starts with none blocked and the usual ones not ignored. */
static int spawn(pid_t *pid, const char *line, int input, int output) {
    static const int usual[] = {SIGPIPE, SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGCHLD};
    char shell[] = "sh", option[] = "-c";
    char *const arguments[] = {shell, option, (char *)line, NULL};
    posix_spawn_file_actions_t actions;
    posix_spawnattr_t attributes;
    sigset_t none, defaults;
    sigemptyset(&none);
    sigemptyset(&defaults);
    for (int i = 0; i < ESPI_COUNT(usual); i++) sigaddset(&defaults, usual[i]);
    posix_spawnattr_init(&attributes);
    posix_spawnattr_setpgroup(&attributes, 0);
    posix_spawnattr_setsigmask(&attributes, &none);
    posix_spawnattr_setsigdefault(&attributes, &defaults);
    posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETPGROUP | POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF);
    posix_spawn_file_actions_init(&actions);
    int code = posix_spawn_file_actions_adddup2(&actions, input, STDIN_FILENO);
    if (code == 0) code = posix_spawn_file_actions_adddup2(&actions, output, STDOUT_FILENO);
    if (code == 0) code = posix_spawn(pid, "/bin/sh", &actions, &attributes, arguments, environ);
    posix_spawn_file_actions_destroy(&actions);
    posix_spawnattr_destroy(&attributes);
    return code;
}

static int start_child(scoring *s, child *k) {
    int in[2] = {-1, -1}, out[2] = {-1, -1};
    int code = make_pipe(in) && make_pipe(out) ? 0 : errno;
    if (code == 0) code = spawn(&k->pid, s->c->line, in[0], out[1]);
    close_end(&in[0]);
    close_end(&out[1]);
    k->in = in[1];
    k->out = out[0];
    if (code == 0 && (fcntl(k->in, F_SETFL, O_NONBLOCK) != 0 || fcntl(k->out, F_SETFL, O_NONBLOCK) != 0)) code = errno;
    if (code != 0) {
        k->pid = k->pid > 0 ? k->pid : 0;
        end_child(k);
        return fail(s, "\"%.80s\" cannot be started: %s", s->c->line, strerror(code));
    }
    s->restarts += k->started ? 1 : 0;
    k->started = true;
    return 0;
}

static int64_t row_id(const scoring *s, int64_t row) {
    return (s->c->batches << 32) + row; /* never the same twice in a run */
}

static json_t *id_list(const int32_t *ids, int32_t n) {
    json_t *list = json_array();
    for (int32_t i = 0; list && i < n; i++) json_array_append_new(list, json_integer(ids[i]));
    return list;
}

static int append_request(scoring *s, child *k, int64_t row, int64_t index, int64_t count) {
    const esp_reward_batch *b = s->batch;
    json_t *line =
        json_pack("{s:I, s:I, s:I, s:s*, s:s*, s:s*, s:o*, s:o*, s:b, s:I, s:I}", "id", (json_int_t)row_id(s, row), "step",
                  (json_int_t)b->step, "group", (json_int_t)(row / (b->group_size > 0 ? b->group_size : 1)), "prompt",
                  b->prompt ? b->prompt[row] : NULL, "completion", b->completion[row], "answer", b->answer ? b->answer[row] : NULL,
                  "prompt_ids", b->prompt_ids ? id_list(b->prompt_ids[row], b->prompt_length[row]) : NULL, "completion_ids",
                  b->completion_ids ? id_list(b->completion_ids[row], b->completion_length[row]) : NULL, "stopped",
                  b->stopped ? b->stopped[row] : 0, "index", (json_int_t)index, "count", (json_int_t)count);
    char *text = line ? json_dumps(line, JSON_COMPACT) : NULL;
    json_decref(line);
    if (!text) return fail(s, "completion %lld cannot be written as JSON: not UTF-8, or no memory", (long long)row);
    const bool fits = espi_bytes_add(&k->input, text, strlen(text)) && espi_bytes_add(&k->input, "\n", 1);
    free(text);
    return fits ? 0 : fail(s, "no memory for the lines of a batch");
}

/* Starts the child if need be and queues what it has not answered. */
static int submit(scoring *s, child *k) {
    int64_t index = 0;
    if (k->pid == 0 && start_child(s, k) != 0) return 1;
    k->input.used = k->sent = k->output.used = 0;
    for (int64_t row = k->first; row < k->end; row++)
        if (!s->answered[row] && append_request(s, k, row, index++, k->open) != 0) return 1;
    return 0;
}

static void settle(scoring *s, child *k, int64_t row, float reward) {
    s->reward[row] = reward;
    s->answered[row] = 1;
    k->open--;
}

static int64_t next_open(const scoring *s, const child *k) {
    int64_t row = k->first;
    while (row < k->end && s->answered[row]) row++;
    return row;
}

static void tell_end(char out[64], int status) {
    if (WIFEXITED(status))
        snprintf(out, 64, "exit status %d", WEXITSTATUS(status));
    else
        snprintf(out, 64, "signal %d", WIFSIGNALED(status) ? WTERMSIG(status) : 0);
}

/* The child ended, or said what cannot be understood (line: what).  The row that it was at is given up, the others go to a new one. */
static int replace_child(scoring *s, child *k, const char *line) {
    char end[64];
    tell_end(end, end_child(k));
    if (!s->c->proved && line)
        return fail(
            s, "\"%.80s\" wrote \"%.*s\", expected a JSON object with \"reward\" a line: what else it has to say belongs on standard error",
            s->c->line, SHOWN, line);
    if (!s->c->proved) return fail(s, "\"%.80s\" ended (%s) before its first answer: try it by hand", s->c->line, end);
    s->bad += line ? 1 : 0;
    if (k->open == 0) return 0;
    settle(s, k, next_open(s, k), NAN);
    if (k->open == 0) return 0;
    if (k->starts++ < MOST_STARTS) return submit(s, k);
    while (k->open > 0) settle(s, k, next_open(s, k), NAN);
    return 0;
}

/* The row that a reply is about, -1: none that waits for one. */
static int64_t replied_row(const scoring *s, const child *k, const json_t *reply) {
    const json_t *id = json_object_get(reply, "id");
    if (!id) return k->open > 0 ? next_open(s, k) : -1;
    const int64_t row = json_is_integer(id) ? (int64_t)json_integer_value(id) - row_id(s, 0) : -1;
    return row >= k->first && row < k->end && !s->answered[row] ? row : -1;
}

static void take_reply(scoring *s, child *k, const json_t *reply, int64_t row) {
    const json_t *given = json_object_get(reply, "reward");
    const float reward = json_is_number(given) ? (float)json_number_value(given) : NAN;
    const bool good = json_is_null(given) || isfinite(reward);
    s->bad += good ? 0 : 1;
    s->answers += good ? 1 : 0;
    s->c->proved = s->c->proved || good;
    k->starts = good ? 0 : k->starts;
    settle(s, k, row, good ? reward : NAN);
    const char *key;
    json_t *value;
    json_object_foreach((json_t *)reply, key, value) {
        if (json_is_number(value) && strcmp(key, "reward") != 0 && strcmp(key, "id") != 0)
            esp_reward_log(s->batch, key, json_number_value(value));
    }
}

static int take_line(scoring *s, child *k, const char *line) {
    json_t *reply = json_loads(line, 0, NULL);
    const int64_t row = json_is_object(reply) ? replied_row(s, k, reply) : -1;
    const bool understood = row >= 0;
    if (understood) take_reply(s, k, reply, row);
    json_decref(reply);
    return understood ? 0 : replace_child(s, k, line);
}

/* The whole lines among what was read.  A child that is replaced on the way loses the rest. */
static int take_lines(scoring *s, child *k) {
    for (char *end; k->output.used > 0 && (end = memchr(k->output.data, '\n', k->output.used)) != NULL;) {
        const pid_t pid = k->pid;
        const size_t length = (size_t)(end - k->output.data);
        char *line = k->output.data;
        line[length] = '\0';
        if (length > 0 && strspn(line, " \t\r") < length && take_line(s, k, line) != 0) return 1;
        if (k->pid != pid) return 0;
        k->output.used -= length + 1;
        memmove(line, line + length + 1, k->output.used);
    }
    if (k->output.used <= LONGEST_LINE) return 0;
    k->output.data[SHOWN] = '\0';
    return replace_child(s, k, k->output.data);
}

static int read_child(scoring *s, child *k) {
    char piece[65536];
    const ssize_t n = read(k->out, piece, sizeof piece);
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) return 0;
    if (n <= 0) return replace_child(s, k, NULL);
    if (!espi_bytes_add(&k->output, piece, (size_t)n)) return fail(s, "no memory for what \"%.80s\" wrote", s->c->line);
    return take_lines(s, k);
}

/* write() that raises no SIGPIPE: the signal is this thread's, so it can be kept back and taken away again. */
static ssize_t write_quietly(int fd, const void *data, size_t n) {
    static const struct timespec at_once;
    sigset_t pipe_signal, before, pending;
    sigemptyset(&pipe_signal);
    sigaddset(&pipe_signal, SIGPIPE);
    sigpending(&pending);
    const bool was_pending = sigismember(&pending, SIGPIPE) == 1;
    pthread_sigmask(SIG_BLOCK, &pipe_signal, &before);
    const ssize_t written = write(fd, data, n);
    const int error = errno;
    if (written < 0 && error == EPIPE && !was_pending)
        while (sigtimedwait(&pipe_signal, NULL, &at_once) < 0 && errno == EINTR) continue;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    errno = error;
    return written;
}

/* A child that no longer reads may still have answers to give: its end is seen on the other pipe. */
static void write_child(child *k) {
    const ssize_t n = write_quietly(k->in, k->input.data + k->sent, k->input.used - k->sent);
    if (n > 0)
        k->sent += (size_t)n;
    else if (errno != EAGAIN && errno != EINTR)
        k->sent = k->input.used;
}

/* Waits for what children can do next, and does it; who has answered all is left alone until the next batch. */
static int exchange(scoring *s, struct pollfd *fds, double seconds) {
    const command *c = s->c;
    for (int32_t i = 0; i < c->n; i++) {
        const child *k = &c->children[i];
        fds[2 * i] = (struct pollfd){.fd = k->open > 0 ? k->out : -1, .events = POLLIN};
        fds[2 * i + 1] = (struct pollfd){.fd = k->open > 0 && k->sent < k->input.used ? k->in : -1, .events = POLLOUT};
    }
    const double wait = ceil(fmin(seconds, STOP_SECONDS) * 1e3);
    if (poll(fds, 2 * (nfds_t)c->n, (int)wait) < 0 && errno != EINTR) return fail(s, "poll: %s", strerror(errno));
    for (int32_t i = 0; i < c->n; i++) {
        child *k = &c->children[i];
        const pid_t pid = k->pid;
        if (fds[2 * i].revents && read_child(s, k) != 0) return 1;
        if (fds[2 * i + 1].revents && k->pid == pid && k->open > 0) write_child(k);
    }
    return 0;
}

/* Between batches a child has nothing to say: one that did is out of step, one that ended is gone. */
static void look_after(scoring *s, child *k) {
    struct pollfd fd = {.fd = k->out, .events = POLLIN};
    char byte;
    if (k->pid == 0) return;
    const bool spoke = k->output.used > 0 || (poll(&fd, 1, 0) > 0 && read(k->out, &byte, 1) == 1);
    if (!spoke && fd.revents == 0) return;
    s->bad += spoke ? 1 : 0;
    end_child(k);
}

static int64_t all_open(const command *c) {
    int64_t open = 0;
    for (int32_t i = 0; i < c->n; i++) open += c->children[i].open;
    return open;
}

static int run_batch(scoring *s, struct pollfd *fds) {
    const double own = s->c->deadline, given = s->batch->seconds_left, start = espi_seconds();
    const double allowed = given > 0 && given < own ? given : own;
    for (int32_t i = 0; i < s->c->n; i++) {
        child *k = &s->c->children[i];
        k->first = s->batch->n * i / s->c->n;
        k->end = s->batch->n * (i + 1) / s->c->n;
        k->open = k->end - k->first;
        k->starts = 0;
        look_after(s, k);
        if (k->open > 0 && submit(s, k) != 0) return 1;
    }
    for (double left; all_open(s->c) > 0 && (left = start + allowed - espi_seconds()) > 0;) {
        if (espi_reward_stopped(s->batch)) return fail(s, "given up: the run was asked to stop");
        if (exchange(s, fds, left) != 0) return 1;
    }
    return 0;
}

/* What the deadline left open is given up, with the children that were at it. */
static double give_up(command *c) {
    double late = 0;
    for (int32_t i = 0; i < c->n; i++) {
        child *k = &c->children[i];
        late += (double)k->open;
        if (k->open > 0) end_child(k);
        k->open = 0;
    }
    return late;
}

static int check_life(scoring *s) {
    command *c = s->c;
    c->silent = s->answers > 0 || s->batch->n == 0 ? 0 : c->silent + 1;
    if (c->silent < MOST_SILENT) return 0;
    return fail(s, "\"%.80s\" gave no answer in %d batches in a row, with %g seconds for each: raise its deadline, or try it by hand",
                c->line, MOST_SILENT, c->deadline);
}

static int score_command(void *user, const esp_reward_batch *batch, float *reward) {
    command *c = user;
    scoring s = {.c = c, .batch = batch, .reward = reward, .answered = calloc((size_t)batch->n + 1, 1)};
    struct pollfd *fds = calloc(2 * (size_t)c->n, sizeof *fds);
    for (int64_t i = 0; i < batch->n; i++) reward[i] = NAN;
    c->batches++;
    int code = s.answered && fds ? run_batch(&s, fds) : fail(&s, "no memory for a batch's bookkeeping");
    const double late = give_up(c);
    if (code == 0) code = check_life(&s);
    free(s.answered);
    free(fds);
    if (code != 0) return esp_reward_fail(batch, s.why);
    espi_reward_count(batch, "timeouts", late);
    espi_reward_count(batch, "restarts", s.restarts);
    espi_reward_count(batch, "bad_replies", s.bad);
    return 0;
}

/* Has it ended?  Its exit status stays to be taken. */
static bool has_ended(const child *k) {
    siginfo_t info = {.si_pid = 0};
    return waitid(P_PID, (id_t)k->pid, &info, WEXITED | WNOHANG | WNOWAIT) != 0 || info.si_pid == k->pid;
}

static void close_command(void *user) {
    static const struct timespec nap = {.tv_nsec = 5000000};
    command *c = user;
    for (int32_t i = 0; c->children && i < c->n; i++) close_end(&c->children[i].in);
    const double start = espi_seconds();
    for (int32_t i = 0; c->children && i < c->n; i++) {
        child *k = &c->children[i];
        while (k->pid > 0 && !has_ended(k) && espi_seconds() - start < GRACE_SECONDS) nanosleep(&nap, NULL);
        end_child(k);
        free(k->input.data);
        free(k->output.data);
    }
    free(c->children);
    free(c->line);
    free(c);
}

esp_status espi_reward_open_command(esp_reward *reward, const espi_reward_description *d) {
    double children = 1, deadline = DEFAULT_DEADLINE;
    const espi_reward_number numbers[] = {{"children", &children, 1, MOST_CHILDREN, true}, {"deadline", &deadline, 1e-3, 1e9, false}};
    ESPI_TRY(espi_reward_numbers(d, numbers, ESPI_COUNT(numbers)));
    ESPI_TRY(espi_reward_take(reward, d, sizeof(command), score_command));
    reward->close = close_command;
    command *c = reward->user;
    c->deadline = deadline;
    c->n = (int32_t)children;
    c->line = malloc(strlen(d->argument) + 1);
    c->children = calloc((size_t)c->n, sizeof *c->children);
    if (!c->line || !c->children) return ESPI_FAIL(ESP_ERR_MEMORY, "reward cmd: no memory for %d children", c->n);
    memcpy(c->line, d->argument, strlen(d->argument) + 1);
    for (int32_t i = 0; i < c->n; i++) c->children[i] = (child){.in = -1, .out = -1};
    return ESP_OK;
}
