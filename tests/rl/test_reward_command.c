/* Rewards by child processes: what they are told, what they may do wrong, and that nothing of them is left. */
#include "rewards.h"

#include "core/clock.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <signal.h>
#include <sys/wait.h>
#include <time.h>

/* A command that is scored by again and again. */
typedef struct scorer {
    const char *script; /* the caller's */
    esp_reward r;
    espi_rewards *set;
    double parts[MOST];
} scorer;

static scorer scorer_make(const char *parameters, const char *script, double deadline) {
    scorer s = {.script = script};
    char description[4096];
    snprintf(description, sizeof description, "cmd(name=c%s):%s", parameters, script);
    OK(esp_reward_open(&s.r, description));
    OK(espi_rewards_create(&s.set, &s.r, 1, deadline));
    return s;
}

static void scorer_free(scorer *s) {
    espi_rewards_destroy(s->set);
    esp_reward_close(&s->r);
}

static void score(scorer *s, const texts *t) {
    espi_rewards_reset(s->set);
    OK(espi_rewards_score(s->parts, s->set, &t->batch));
}

/* Completions of 1, 2, 3, .. characters. */
static texts *rows(int64_t n) {
    static texts t;
    static const char all[] = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";
    memset(&t, 0, sizeof t);
    for (int64_t i = 0; i < n; i++) add(&t, all + sizeof all - 2 - i, "x");
    return &t;
}

static void count(const scorer *s, const char *name, double expected) {
    const double got = extra(s->set, name);
    cr_expect_eq(got, expected, "%s: %s: %g, expected %g", s->script, name, got, expected);
}

static void counts(const scorer *s, double timeouts, double restarts, double bad) {
    count(s, "c/timeouts", timeouts);
    count(s, "c/restarts", restarts);
    count(s, "c/bad_replies", bad);
}

/* Row i has i + 1, but for those that are named, which are NaN.  -1 ends the list. */
static void lengths_but(const scorer *s, int64_t n, const int *without) {
    for (int64_t i = 0; i < n; i++) {
        const bool lost = *without == i;
        without += lost;
        cr_expect(lost ? isnan(s->parts[i]) : s->parts[i] == (double)i + 1, "%s: row %d has %g", s->script, (int)i, s->parts[i]);
    }
}
#define NONE ((const int[]){-1})
#define ROWS(...) ((const int[]){__VA_ARGS__, -1})

#define SCORER "exec " ESP_SCORER " "

/* One batch of n rows by this scorer: which of them are lost, and what is counted. */
static void once(const char *script, int64_t n, const int *without, double restarts, double bad) {
    scorer s = scorer_make("", script, 0);
    score(&s, rows(n));
    lengths_but(&s, n, without);
    counts(&s, 0, restarts, bad);
    scorer_free(&s);
}

Test(reward_command, every_row_is_scored_and_told_whole) {
    char dir[ESPI_PATH_MAX], heard[ESPI_PATH_MAX], script[ESPI_PATH_MAX + 512], *text;
    static const int32_t prompt[3] = {7, 8, 9}, length[2] = {3, 3};
    static const int32_t *prompts[2] = {prompt, prompt};
    scratch_make(dir);
    OK(espi_path_join(heard, dir, "heard"));
    snprintf(script, sizeof script, "tee %s | " SCORER "half=1", heard);
    texts *t = rows(2);
    t->batch.prompt_ids = prompts;
    t->batch.prompt_length = length;
    t->completion[1] = "\"\\\n\xC3\xA9";
    scorer s = scorer_make("", script, 0);
    score(&s, t);
    cr_expect_eq(s.parts[0], 1);
    cr_expect_eq(s.parts[1], 5);
    cr_expect_eq(extra(s.set, "c/half"), 1.5);
    cr_expect(isnan(extra(s.set, "c/note")) && isnan(extra(s.set, "c/reward")));
    counts(&s, 0, 0, 0);
    scorer_free(&s);
    OK(espi_file_read_all(&text, NULL, heard, 1 << 16));
    char *second = strchr(text, '\n');
    cr_assert_not_null(second);
    json_t *line = json_loads(second + 1, JSON_DISABLE_EOF_CHECK, NULL);
    cr_assert_not_null(line, "%s", text);
    cr_expect_str_eq(json_string_value(json_object_get(line, "completion")), "\"\\\n\xC3\xA9");
    cr_expect_str_eq(json_string_value(json_object_get(line, "prompt")), "say:");
    cr_expect_str_eq(json_string_value(json_object_get(line, "answer")), "x");
    cr_expect_eq(json_integer_value(json_object_get(line, "step")), 7);
    cr_expect_eq(json_integer_value(json_object_get(line, "group")), 1);
    cr_expect_eq(json_integer_value(json_object_get(line, "index")), 1);
    cr_expect_eq(json_integer_value(json_object_get(line, "count")), 2);
    cr_expect(json_is_true(json_object_get(line, "stopped")));
    cr_expect_eq(json_array_size(json_object_get(line, "completion_ids")), 2);
    cr_expect_eq(json_integer_value(json_array_get(json_object_get(line, "completion_ids"), 1)), 'a');
    cr_expect_eq(json_integer_value(json_array_get(json_object_get(line, "prompt_ids"), 2)), 9);
    json_decref(line);
    free(text);
    scratch_remove(dir);
}

Test(reward_command, several_children_share_a_batch) {
    scorer s = scorer_make(",children=5", SCORER, 0);
    for (int round = 0; round < 3; round++) {
        const int64_t n = round == 1 ? 3 : 64; /* fewer rows than children, too */
        score(&s, rows(n));
        lengths_but(&s, n, NONE);
        counts(&s, 0, 0, 0);
    }
    scorer_free(&s);
}

Test(reward_command, replies_in_any_order_by_id) {
    scorer s = scorer_make("", SCORER "swap=1", 0);
    score(&s, rows(10));
    lengths_but(&s, 10, NONE);
    score(&s, rows(4));
    lengths_but(&s, 4, NONE);
    counts(&s, 0, 0, 0);
    scorer_free(&s);
}

Test(reward_command, null_and_unusable_rewards) {
    once(SCORER "null=2 text=3 none=4 huge=5", 6, ROWS(1, 2, 3, 4), 0, 3);
}

Test(reward_command, garbage_costs_one_row_and_a_restart) {
    once(SCORER "garbage=3", 6, ROWS(2), 1, 1);
    once(SCORER "stray=3", 6, ROWS(2), 1, 1);
}

Test(reward_command, a_child_that_dies_costs_one_row_and_a_restart) {
    once(SCORER "die=3", 6, ROWS(2), 1, 0);
    once(SCORER "dieover=1", 9, ROWS(1, 2, 3, 4, 5, 6, 7, 8), 3, 0); /* every time */
    once(SCORER "dieeven=1", 15, ROWS(1, 3, 5, 7, 9, 11, 13), 7, 0); /* often, but with answers in between */
}

Test(reward_command, an_answer_too_many_is_noticed) {
    scorer s = scorer_make("", SCORER "twice=3", 0);
    OK(espi_rewards_score(s.parts, s.set, &rows(3)->batch));
    lengths_but(&s, 3, NONE);
    nanosleep(&(struct timespec){.tv_nsec = 50000000}, NULL);
    OK(espi_rewards_score(s.parts, s.set, &rows(2)->batch));
    lengths_but(&s, 2, NONE);
    counts(&s, 0, 1, 1); /* seen in the one batch or in the other */
    scorer_free(&s);
    s = scorer_make("", SCORER "late=3", 0);
    score(&s, rows(3));
    lengths_but(&s, 3, NONE);
    counts(&s, 0, 0, 0);
    nanosleep(&(struct timespec){.tv_nsec = 200000000}, NULL);
    score(&s, rows(2));
    lengths_but(&s, 2, NONE);
    counts(&s, 0, 1, 1);
    scorer_free(&s);
    once(SCORER "again=3", 5, ROWS(3), 1, 1); /* the child is in doubt when the second one comes, and the next row pays */
}

/* Does the process of this file run no more?  It takes the system a moment; a zombie is the business of whoever adopted it. */
static bool is_gone(const char *pid_file) {
    char *pid, path[64];
    OK(espi_file_read_all(&pid, NULL, pid_file, 64));
    cr_assert_gt(atoi(pid), 1);
    snprintf(path, sizeof path, "/proc/%d/status", atoi(pid));
    free(pid);
    bool gone = false;
    for (int i = 0; i < 100 && !gone; i++) {
        FILE *f = fopen(path, "r");
        char text[512] = "";
        gone = !f || fread(text, 1, sizeof text - 1, f) == 0 || strstr(text, "State:\tZ");
        if (f) fclose(f);
        nanosleep(&(struct timespec){.tv_nsec = 10000000}, NULL);
    }
    return gone;
}

Test(reward_command, the_deadline_kills_the_group) {
    char dir[ESPI_PATH_MAX], pid_file[ESPI_PATH_MAX], script[ESPI_PATH_MAX + 512];
    scratch_make(dir);
    OK(espi_path_join(pid_file, dir, "pid"));
    /* The grandchild ignores every polite signal and keeps the pipe open. */
    snprintf(script, sizeof script,
             "trap \"\" TERM INT HUP; sh -c \"trap '' TERM INT HUP; echo \\$\\$ > %s; sleep 100\" & " SCORER "sleep=3", pid_file);
    scorer s = scorer_make("", script, 0.3);
    const double start = espi_seconds();
    score(&s, rows(5));
    const double took = espi_seconds() - start;
    cr_expect(took >= 0.3 && took < 0.6, "%g s", took);
    lengths_but(&s, 5, ROWS(2, 3, 4));
    counts(&s, 3, 0, 0);
    cr_expect(is_gone(pid_file), "the grandchild is left");
    score(&s, rows(2)); /* and a new one answers */
    lengths_but(&s, 2, NONE);
    counts(&s, 0, 1, 0);
    scorer_free(&s);
    cr_expect(is_gone(pid_file), "the grandchild is left at the end");
    scratch_remove(dir);
}

Test(reward_command, its_own_deadline_holds_too) {
    scorer s = scorer_make(",deadline=0.2", SCORER "sleep=2", 0);
    const double start = espi_seconds();
    score(&s, rows(2));
    cr_expect_lt(espi_seconds() - start, 0.6);
    lengths_but(&s, 2, ROWS(1));
    scorer_free(&s);
}

Test(reward_command, a_child_that_never_answered_ends_the_run) {
    static const struct {
        const char *script, *words;
    } cases[] = {{"no-such-program-at-all", "ended (exit status 127) before its first answer"},
                 {"kill -9 $$", "ended (signal 9) before its first answer"},
                 {SCORER "hello=1", "wrote \"Loading the model\", expected a JSON object"}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        scorer s = scorer_make("", cases[i].script, 0);
        FAILS(ESP_ERR_CALLBACK, cases[i].words, espi_rewards_score(s.parts, s.set, &rows(3)->batch));
        scorer_free(&s);
    }
    scorer s = scorer_make(",deadline=0.05", SCORER "silent=0", 0);
    for (int i = 0; i < 2; i++) score(&s, rows(2));
    FAILS(ESP_ERR_CALLBACK, "gave no answer in 3 batches in a row", espi_rewards_score(s.parts, s.set, &rows(2)->batch));
    scorer_free(&s);
}

static char *long_text(size_t n) {
    char *text = malloc(n + 1);
    cr_assert_not_null(text);
    memset(text, 'q', n);
    text[n] = 0;
    return text;
}

/* Far more than a pipe holds, in both directions, several lines at a time. */
Test(reward_command, long_lines_do_not_block) {
    enum { LONG = 200000 };
    texts *t = rows(8);
    char *longest = long_text(LONG);
    for (int i = 0; i < 8; i++) t->completion[i] = longest;
    scorer s = scorer_make("", SCORER "pad=120000", 20);
    score(&s, t);
    for (int i = 0; i < 8; i++) cr_expect_eq(s.parts[i], LONG, "row %d: %g", i, s.parts[i]);
    counts(&s, 0, 0, 0);
    scorer_free(&s);
    free(longest);
}

/* A child that closes its input and dies while it is written to: the SIGPIPE must reach nobody. */
Test(reward_command, a_broken_pipe_is_no_signal) {
    enum { LONG = 300000 };
    texts *t = rows(4);
    char *longest = long_text(LONG);
    scorer s = scorer_make("", SCORER "close=300000", 5);
    signal(SIGPIPE, SIG_DFL);
    for (int i = 1; i < 4; i++) t->completion[i] = longest;
    score(&s, t);
    cr_expect_eq(s.parts[0], 1);
    sigset_t pending;
    sigpending(&pending);
    cr_expect_eq(sigismember(&pending, SIGPIPE), 0);
    scorer_free(&s);
    free(longest);
}

static int open_descriptors(void) {
    int n = 0;
    DIR *d = opendir("/proc/self/fd");
    if (!d) return 0;
    while (readdir(d)) n++;
    closedir(d);
    return n;
}

Test(reward_command, nothing_is_left) {
    const int before = open_descriptors();
    for (int round = 0; round < 5; round++) {
        scorer s = scorer_make(",children=3", SCORER "die=2 garbage=30 sleep=50", 0.3);
        for (int i = 0; i < 2; i++) score(&s, rows(60));
        scorer_free(&s);
        cr_expect_eq(open_descriptors(), before, "round %d: %d descriptors, %d before", round, open_descriptors(), before);
        cr_expect(waitpid(-1, NULL, WNOHANG) == -1 && errno == ECHILD, "a child or its zombie is left");
    }
    scorer s = scorer_make(",children=3", SCORER, 0); /* never asked */
    scorer_free(&s);
    cr_expect_eq(open_descriptors(), before);
}

/* "/proc/self/status" of the child says "SigIgn:\t0000000000000000" in hexadecimal, bit i-1 for signal i. */
static unsigned long long signals(const char *status, const char *key) {
    const char *line = strstr(status, key);
    cr_assert_not_null(line, "%s", status);
    return strtoull(line + strlen(key), NULL, 16) & 0x7FFFFFFF; /* the C library keeps 32 and above for itself */
}

Test(reward_command, children_start_clean) {
    /* Signals that are blocked or ignored here are neither there; standard error is the caller's; no pipe of a sister is open. */
    char dir[ESPI_PATH_MAX], errors[ESPI_PATH_MAX], *text;
    scratch_make(dir);
    OK(espi_path_join(errors, dir, "errors"));
    int file = open(errors, O_WRONLY | O_CREAT, 0600), kept = dup(STDERR_FILENO), inherited = 3;
    sigset_t all, old;
    sigfillset(&all);
    signal(SIGPIPE, SIG_IGN);
    sigprocmask(SIG_BLOCK, &all, &old);
    dup2(file, STDERR_FILENO);
    close(file);
    for (int fd = 3; fd < 256; fd++) inherited += fcntl(fd, F_GETFD) == 0;
    scorer s = scorer_make(",children=2", SCORER "report=1", 0);
    score(&s, rows(2));
    lengths_but(&s, 2, NONE);
    scorer_free(&s);
    dup2(kept, STDERR_FILENO);
    close(kept);
    sigprocmask(SIG_SETMASK, &old, NULL);
    OK(espi_file_read_all(&text, NULL, errors, 4096));
    cr_expect_eq(signals(text, "SigBlk:"), 0, "%s", text);
    cr_expect_eq(signals(text, "SigIgn:"), 0, "%s", text);
    for (const char *p = text; (p = strstr(p, "open ")) != NULL; p++) cr_expect_eq(atoi(p + 5), inherited, "%s, expected %d", p, inherited);
    free(text);
    scratch_remove(dir);
}
