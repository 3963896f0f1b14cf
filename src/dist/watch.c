/* The calls that a rank remembers, and the thread that watches over them. */
#define _DEFAULT_SOURCE /* gethostname */

#include "dist/watch.h"

#include "core/clock.h"
#include "core/status.h"

#include <errno.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define TURN 0.05 /* seconds between two looks */
#define LINE 1024

enum { KEPT = 16 };

typedef struct remembered {
    uint64_t number; /* 0: none */
    int64_t step, layer;
    char what[40];
    size_t sent, taken;
    double began, seconds; /* seconds: until it returned */
    bool over, failed;
} remembered;

struct espi_watch {
    pthread_mutex_t lock;
    int rank, size;
    char host[64];
    int64_t step;
    remembered ring[KEPT];
    uint64_t calls; /* the last one is ring[calls % KEPT] */
    double patience;
    bool warned;

    pthread_cond_t wake;
    pthread_t thread;
    bool running, stop, leaving;
    bool (*lost)(void *self);
    void *self;
    double lost_since, abort_since; /* 0: not */
    int abort_code;
    esp_log_fn log;
    esp_comm_end_fn end;
    void *user;
};

esp_status espi_watch_make(espi_watch **watch, int rank, int size) {
    espi_watch *w = calloc(1, sizeof *w);
    if (w == NULL) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory to remember calls between ranks");
    *w = (espi_watch){.rank = rank, .size = size};
    if (gethostname(w->host, sizeof w->host - 1) != 0) snprintf(w->host, sizeof w->host, "unknown host");
    pthread_condattr_t clock;
    pthread_condattr_init(&clock);
    pthread_condattr_setclock(&clock, CLOCK_MONOTONIC);
    pthread_mutex_init(&w->lock, NULL);
    pthread_cond_init(&w->wake, &clock);
    pthread_condattr_destroy(&clock);
    *watch = w;
    return ESP_OK;
}

static remembered *last(espi_watch *w) {
    return &w->ring[w->calls % KEPT];
}

static void place_of(espi_watch *w, char *text, size_t bytes) {
    const remembered *c = last(w);
    size_t n = (size_t)snprintf(text, bytes, "rank %d of %d (%s)", w->rank, w->size, w->host);
    if (w->step > 0 && n < bytes) n += (size_t)snprintf(text + n, bytes - n, ", step %lld", (long long)w->step);
    if (c->number == 0) return;
    if (n < bytes) n += (size_t)snprintf(text + n, bytes - n, ", %s \"%s\"", c->over && !c->failed ? "after" : "in", c->what);
    if (c->layer >= 0 && n < bytes) n += (size_t)snprintf(text + n, bytes - n, ", layer %lld", (long long)c->layer);
    if (n < bytes) snprintf(text + n, bytes - n, " (call %llu)", (unsigned long long)c->number);
}

void espi_watch_place(espi_watch *w, char *text, size_t bytes) {
    pthread_mutex_lock(&w->lock);
    place_of(w, text, bytes);
    pthread_mutex_unlock(&w->lock);
}

/* ---- what the rank says ---- */

void espi_watch_enter(espi_watch *w, uint64_t number, espi_place place, size_t sent, size_t taken, double patience) {
    pthread_mutex_lock(&w->lock);
    w->calls++;
    remembered *c = last(w);
    *c = (remembered){.number = number, .step = w->step, .layer = place.layer, .sent = sent, .taken = taken, .began = espi_seconds()};
    snprintf(c->what, sizeof c->what, "%s", place.what);
    w->patience = patience;
    w->warned = false;
    pthread_mutex_unlock(&w->lock);
}

void espi_watch_leave(espi_watch *w, bool failed) {
    pthread_mutex_lock(&w->lock);
    remembered *c = last(w);
    c->seconds = espi_seconds() - c->began;
    c->over = true;
    c->failed = failed;
    pthread_mutex_unlock(&w->lock);
}

void espi_watch_step(espi_watch *w, int64_t step) {
    pthread_mutex_lock(&w->lock);
    w->step = step;
    pthread_mutex_unlock(&w->lock);
}

void espi_watch_leaving(espi_watch *w) {
    pthread_mutex_lock(&w->lock);
    w->leaving = true;
    pthread_mutex_unlock(&w->lock);
}

void espi_watch_abort(espi_watch *w, int code) {
    pthread_mutex_lock(&w->lock);
    w->abort_code = code;
    w->abort_since = espi_seconds();
    w->leaving = true;
    pthread_mutex_unlock(&w->lock);
}

static void say(espi_watch *w, esp_log_level level, const char *format, ...) __attribute__((format(printf, 3, 4)));
static void say(espi_watch *w, esp_log_level level, const char *format, ...) {
    char line[LINE];
    if (w->log == NULL) return;
    va_list args;
    va_start(args, format);
    vsnprintf(line, sizeof line, format, args);
    va_end(args);
    w->log(w->user, level, line);
}

void espi_watch_tell(espi_watch *w) {
    pthread_mutex_lock(&w->lock);
    for (uint64_t i = w->calls < KEPT ? 1 : w->calls - KEPT + 1; i <= w->calls; i++) {
        const remembered *c = &w->ring[i % KEPT];
        char layer[32] = "";
        if (c->layer >= 0) snprintf(layer, sizeof layer, ", layer %lld", (long long)c->layer);
        say(w, ESP_LOG_ERROR, "rank %d, step %lld: call %llu, \"%s\"%s: %zu bytes out, %zu in, %.6f s%s", w->rank, (long long)c->step,
            (unsigned long long)c->number, c->what, layer, c->sent, c->taken, c->seconds, c->failed ? ", failed" : "");
    }
    pthread_mutex_unlock(&w->lock);
}

/* ---- the thread ---- */

/* Why this process should end, and with what; false: it should not. */
static bool must_end(espi_watch *w, double now, int *code, char *why, size_t bytes) {
    const remembered *c = last(w);
    const bool calling = c->number > 0 && !c->over;
    if (w->abort_since > 0) {
        if (now - w->abort_since < ESPI_WATCH_ABORT) return false;
        *code = w->abort_code;
        snprintf(why, bytes, "the job was aborted, and this rank did not end within %.0f s", ESPI_WATCH_ABORT);
        return true;
    }
    if (calling) {
        if (!w->warned && now - c->began > w->patience / 4) {
            char where[LINE / 2];
            w->warned = true;
            place_of(w, where, sizeof where);
            say(w, ESP_LOG_WARN, "%s: has waited for the other ranks for a quarter of its %.0f s", where, w->patience);
        }
        *code = 75;
        snprintf(why, bytes, "the call did not return within %.0f s of its deadline", ESPI_WATCH_OVERTIME);
        return now - c->began > w->patience + ESPI_WATCH_OVERTIME;
    }
    if (w->leaving || w->lost == NULL || !w->lost(w->self)) return false;
    if (w->lost_since <= 0) w->lost_since = now;
    *code = 74;
    snprintf(why, bytes, "another rank has ended the job, and this one made no call within %.0f s to notice", ESPI_WATCH_GRACE);
    return now - w->lost_since > ESPI_WATCH_GRACE;
}

static void *watch_over(void *user) {
    espi_watch *w = user;
    char why[LINE / 2], where[LINE / 2], line[LINE + 8];
    int code = 0;
    bool ends = false;
    pthread_mutex_lock(&w->lock);
    while (!w->stop && !ends) {
        const double until = espi_seconds() + TURN;
        struct timespec moment = {.tv_sec = (time_t)until};
        moment.tv_nsec = (long)((until - (double)moment.tv_sec) * 1e9);
        (void)pthread_cond_timedwait(&w->wake, &w->lock, &moment);
        ends = !w->stop && must_end(w, espi_seconds(), &code, why, sizeof why);
    }
    place_of(w, where, sizeof where);
    pthread_mutex_unlock(&w->lock);
    if (!ends || w->end == NULL) return NULL;
    snprintf(line, sizeof line, "%s: %s", where, why);
    w->end(w->user, code, line);
    return NULL;
}

esp_status espi_watch_start(espi_watch *w, bool (*lost)(void *self), void *self, esp_log_fn log, esp_comm_end_fn end, void *user) {
    if (w->running) return ESPI_FAIL(ESP_ERR_STATE, "esp_comm_watch: these ranks are watched already");
    w->lost = lost;
    w->self = self;
    w->log = log;
    w->end = end;
    w->user = user;
    const int error = pthread_create(&w->thread, NULL, watch_over, w);
    if (error != 0) return ESPI_FAIL(ESP_ERR_MEMORY, "no thread to watch over the ranks: %s", strerror(error));
    w->running = true;
    return ESP_OK;
}

void espi_watch_free(espi_watch *w) {
    if (w == NULL) return;
    if (w->running) {
        pthread_mutex_lock(&w->lock);
        w->stop = true;
        pthread_cond_signal(&w->wake);
        pthread_mutex_unlock(&w->lock);
        pthread_join(w->thread, NULL);
    }
    pthread_cond_destroy(&w->wake);
    pthread_mutex_destroy(&w->lock);
    free(w);
}
