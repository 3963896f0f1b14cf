/* The mock server as a child of a test: it ends with the test, however that ends, since it reads the test's end of a pipe. */
#ifndef TESTS_SUPPORT_MOCK_H
#define TESTS_SUPPORT_MOCK_H

#include "demo.h"
#include "rl/http.h"

#include <signal.h>
#include <stdarg.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

typedef struct mock {
    pid_t pid;
    int input; /* open as long as it is to live */
    char url[64];
} mock;

/* arguments: up to five of its options, then NULL. */
static inline mock mock_start(const char *model, ...) {
    mock m = {.pid = -1};
    int in[2], out[2];
    char *arguments[8] = {(char *)(uintptr_t)ESP_MOCK_SERVER, (char *)(uintptr_t)model};
    va_list list;
    va_start(list, model);
    for (int i = 2; i < 7 && (arguments[i] = va_arg(list, char *)); i++) continue;
    va_end(list);
    cr_assert_eq(pipe(in), 0);
    cr_assert_eq(pipe(out), 0);
    m.pid = fork();
    cr_assert(m.pid >= 0);
    if (m.pid == 0) {
        dup2(in[0], STDIN_FILENO);
        dup2(out[1], STDOUT_FILENO);
        for (int i = 3; i < 256; i++) close(i);
        execv(arguments[0], arguments);
        _exit(127);
    }
    close(in[0]);
    close(out[1]);
    m.input = in[1];
    char line[64] = "";
    int port = 0;
    for (size_t n = 0; n + 1 < sizeof line && read(out[0], line + n, 1) == 1 && line[n] != '\n';) n++;
    cr_assert_eq(sscanf(line, "port %d", &port), 1, "the mock server says \"%s\"", line);
    close(out[0]);
    snprintf(m.url, sizeof m.url, "http://127.0.0.1:%d", port);
    return m;
}

static inline void mock_stop(mock *m) {
    close(m->input);
    kill(m->pid, SIGKILL);
    waitpid(m->pid, NULL, 0);
}

/* A thread's: the server dies 0.3 s from now. */
static inline void *mock_kill_soon(void *user) {
    const mock *m = user;
    nanosleep(&(struct timespec){0, 300000000}, NULL);
    kill(m->pid, SIGKILL);
    return NULL;
}

typedef struct mock_answer {
    char text[8192];
} mock_answer;

static inline esp_status mock_keep(void *user, int64_t index, const char *body, size_t bytes) {
    mock_answer *a = user;
    (void)index;
    cr_assert(bytes < sizeof a->text);
    memcpy(a->text, body, bytes + 1);
    return ESP_OK;
}

/* One request beside those of the code under test; json NULL = GET. */
static inline esp_status mock_ask(mock_answer *a, const mock *m, const char *path, const char *json) {
    espi_http *http;
    espi_http_call call = {.path = path, .body = json};
    OK(espi_http_create(&http, &(espi_http_config){.base = m->url, .concurrent = 1, .timeout = 20}));
    const esp_status status = espi_http_run(http, &call, 1, &(espi_http_limits){.awaited = "the mock"}, mock_keep, a);
    espi_http_destroy(http);
    return status;
}

static inline void mock_tell(const mock *m, const char *path, const char *format, ...) {
    char json[1024];
    mock_answer a;
    va_list list;
    va_start(list, format);
    vsnprintf(json, sizeof json, format, list);
    va_end(list);
    OK(mock_ask(&a, m, path, json));
}

/* The next `count` requests that this kind of mishap fits. */
static inline void mock_plan(const mock *m, const char *kind, int count, double seconds) {
    mock_tell(m, "/mock/misbehave", "{\"kind\":\"%s\",\"count\":%d,\"seconds\":%g}", kind, count, seconds);
}

/* A number of its statistics. */
static inline long long mock_count(const mock *m, const char *name) {
    mock_answer a;
    OK(mock_ask(&a, m, "/mock/stats", NULL));
    char key[64];
    snprintf(key, sizeof key, "\"%s\":", name);
    const char *at = strstr(a.text, key);
    cr_assert_not_null(at, "no %s in %s", name, a.text);
    return atoll(at + strlen(key));
}

#endif
