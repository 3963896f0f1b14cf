/* HTTP requests over libcurl's multi interface: one thread, many transfers.  See http.h. */
#include "rl/http.h"

#include "core/bytes.h"
#include "core/log.h"
#include "core/rng.h"
#include "core/status.h"
#include "rl/run.h"

#include <stdlib.h>
#include <string.h>

#if !ESPALIER_HAVE_CURL

esp_status espi_http_create(espi_http **http, const espi_http_config *config) {
    *http = NULL;
    return ESPI_FAIL(
        ESP_ERR_UNSUPPORTED,
        "%s: this build has no libcurl: install it (Debian: libcurl4-openssl-dev), configure with ESPALIER_CURL=ON and build again",
        config->base);
}

void espi_http_destroy(espi_http *http) {
    (void)http;
}

esp_status espi_http_run(espi_http *http, espi_http_call *calls, int64_t n, const espi_http_limits *limits, espi_http_answer answer,
                         void *user) {
    (void)http, (void)calls, (void)n, (void)limits, (void)answer, (void)user;
    return ESPI_FAIL(ESP_ERR_UNSUPPORTED, "this build has no libcurl");
}

int64_t espi_http_retries(const espi_http *http) {
    (void)http;
    return 0;
}

#else

#include <curl/curl.h>
#include <jansson.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>

#define CONNECT_SECONDS 10.0
#define POLL_SECONDS 0.2               /* the longest sleep between two looks at the clock */
#define MOST_BYTES ((size_t)256 << 20) /* of an answer */
#define QUOTE 400                      /* bytes of a server's message in a sentence */

/* One transfer; the handle is used again. */
typedef struct transfer {
    CURL *easy;
    int64_t call; /* -1 = free */
    struct curl_slist *headers;
    espi_bytes body;
    bool too_large, no_memory;
    char error[CURL_ERROR_SIZE];
} transfer;

struct espi_http {
    espi_http_config c;
    char *base, *authorization;
    CURLM *multi;
    transfer *transfers; /* [c.concurrent] */
    int64_t retries;
};

/* A run's view of a call. */
typedef enum call_state { WAITING, IN_FLIGHT, DONE } call_state;
typedef struct progress {
    call_state state;
    double start; /* not before */
} progress;

typedef struct run {
    espi_http *http;
    espi_http_call *calls;
    progress *progress;
    int64_t n, open; /* open: not DONE */
    const espi_http_limits *limits;
    espi_http_answer answer;
    void *user;
    bool over; /* all_or_none, and one has failed */
} run;

static pthread_once_t global_once = PTHREAD_ONCE_INIT;
static CURLcode global_code;

static void global_start(void) {
    global_code = curl_global_init(CURL_GLOBAL_DEFAULT);
}

/* a + b; free() it. */
static esp_status joined(char **out, const char *a, const char *b) {
    const size_t n = strlen(a) + strlen(b) + 1;
    *out = malloc(n);
    if (!*out) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for an address of %zu bytes", n);
    snprintf(*out, n, "%s%s", a, b);
    return ESP_OK;
}

static esp_status check_config(const espi_http_config *c) {
    const char *rest = c->base;
    if (rest && strncmp(rest, "http://", 7) == 0)
        rest += 7;
    else if (rest && strncmp(rest, "https://", 8) == 0)
        rest += 8;
    else
        rest = NULL;
    if (!rest || *rest == '\0' || *rest == '/')
        return ESPI_FAIL(ESP_ERR_ARG, "server: got the address \"%s\", expected one like http://127.0.0.1:8000",
                         c->base ? c->base : "(NULL)");
    if (c->concurrent < 1 || c->retries < 0 || !(c->timeout > 0) || !(c->first_delay >= 0) || !(c->longest_delay >= c->first_delay))
        return ESPI_FAIL(
            ESP_ERR_ARG,
            "server: got %d requests at a time, %d retries, a timeout of %g s and delays from %g to %g s, expected at least one "
            "request, a positive timeout and delays that ascend from 0",
            c->concurrent, c->retries, c->timeout, c->first_delay, c->longest_delay);
    return ESP_OK;
}

static esp_status build(espi_http *h, const espi_http_config *config) {
    pthread_once(&global_once, global_start);
    if (global_code != CURLE_OK) return ESPI_FAIL(ESP_ERR_COMM, "libcurl does not start: %s", curl_easy_strerror(global_code));
    h->c = *config;
    ESPI_TRY(joined(&h->base, config->base, ""));
    for (size_t n = strlen(h->base); h->base[n - 1] == '/'; n--) h->base[n - 1] = '\0';
    h->c.base = h->base;
    if (config->api_key) ESPI_TRY(joined(&h->authorization, "Authorization: Bearer ", config->api_key));
    h->c.api_key = NULL;
    h->multi = curl_multi_init();
    h->transfers = calloc((size_t)config->concurrent, sizeof *h->transfers);
    if (!h->multi || !h->transfers) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for %d transfers", config->concurrent);
    for (int32_t i = 0; i < config->concurrent; i++) {
        h->transfers[i].call = -1;
        h->transfers[i].easy = curl_easy_init();
        if (!h->transfers[i].easy) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for %d transfers", config->concurrent);
    }
    return ESP_OK;
}

esp_status espi_http_create(espi_http **http, const espi_http_config *config) {
    *http = NULL;
    ESPI_TRY(check_config(config));
    espi_http *h = calloc(1, sizeof *h);
    if (!h) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for an HTTP client");
    const esp_status status = build(h, config);
    if (status != ESP_OK) {
        espi_http_destroy(h);
        return status;
    }
    *http = h;
    return ESP_OK;
}

void espi_http_destroy(espi_http *http) {
    if (!http) return;
    for (int32_t i = 0; http->transfers && i < http->c.concurrent; i++) {
        if (http->transfers[i].easy) curl_easy_cleanup(http->transfers[i].easy);
        curl_slist_free_all(http->transfers[i].headers);
        free(http->transfers[i].body.data);
    }
    if (http->multi) curl_multi_cleanup(http->multi);
    free(http->transfers);
    free(http->base);
    free(http->authorization);
    free(http);
}

int64_t espi_http_retries(const espi_http *http) {
    return http->retries;
}

/* ---- one transfer ---- */

static size_t receive(char *data, size_t size, size_t count, void *user) {
    transfer *t = user;
    const size_t n = size * count;
    t->too_large = n > MOST_BYTES - t->body.used;
    t->no_memory = !t->too_large && !espi_bytes_add(&t->body, data, n);
    return t->too_large || t->no_memory ? 0 : n;
}

static esp_status add_header(struct curl_slist **list, const char *line) {
    struct curl_slist *longer = curl_slist_append(*list, line);
    if (!longer) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for the headers of a request");
    *list = longer;
    return ESP_OK;
}

static esp_status set_headers(const espi_http *h, transfer *t, const espi_http_call *call) {
    curl_slist_free_all(t->headers);
    t->headers = NULL;
    /* curl would wait for the server's consent before it sends a long body. */
    ESPI_TRY(add_header(&t->headers, "Expect:"));
    if (call->body) ESPI_TRY(add_header(&t->headers, "Content-Type: application/json"));
    if (h->authorization) ESPI_TRY(add_header(&t->headers, h->authorization));
    if (!call->request_id) return ESP_OK;
    char line[256];
    const int length = snprintf(line, sizeof line, "X-Request-Id: %s-%d", call->request_id, call->tries);
    if (length < 0 || (size_t)length >= sizeof line)
        return ESPI_FAIL(ESP_ERR_ARG, "request id \"%.60s...\": longer than %zu bytes, expected a shorter one", call->request_id,
                         sizeof line);
    return add_header(&t->headers, line);
}

static esp_status start(run *r, transfer *t, int64_t index, double now) {
    espi_http *h = r->http;
    espi_http_call *call = &r->calls[index];
    double seconds = h->c.timeout;
    if (r->limits->deadline > 0 && r->limits->deadline - now < seconds) seconds = r->limits->deadline - now;
    const long ms = seconds * 1000 > 1 ? (long)fmin(seconds * 1000, 1e9) : 1;
    char *url = NULL;
    call->tries++;
    call->code = 0;
    if (call->tries > 1) h->retries++;
    curl_easy_reset(t->easy);
    t->body.used = 0;
    t->too_large = t->no_memory = false;
    t->error[0] = '\0';
    ESPI_TRY(set_headers(h, t, call));
    ESPI_TRY(joined(&url, h->base, call->path));
    /* A connection each: on a kept one that turns out to be dead curl sends the request again by itself, and one try would be two. */
    bool set = curl_easy_setopt(t->easy, CURLOPT_URL, url) == CURLE_OK && curl_easy_setopt(t->easy, CURLOPT_NOSIGNAL, 1L) == CURLE_OK &&
               curl_easy_setopt(t->easy, CURLOPT_HTTPHEADER, t->headers) == CURLE_OK &&
               curl_easy_setopt(t->easy, CURLOPT_FRESH_CONNECT, 1L) == CURLE_OK &&
               curl_easy_setopt(t->easy, CURLOPT_FORBID_REUSE, 1L) == CURLE_OK &&
               curl_easy_setopt(t->easy, CURLOPT_ERRORBUFFER, t->error) == CURLE_OK &&
               curl_easy_setopt(t->easy, CURLOPT_WRITEFUNCTION, receive) == CURLE_OK &&
               curl_easy_setopt(t->easy, CURLOPT_WRITEDATA, t) == CURLE_OK && curl_easy_setopt(t->easy, CURLOPT_PRIVATE, t) == CURLE_OK &&
               curl_easy_setopt(t->easy, CURLOPT_TIMEOUT_MS, ms) == CURLE_OK &&
               curl_easy_setopt(t->easy, CURLOPT_CONNECTTIMEOUT_MS, (long)fmin((double)ms, CONNECT_SECONDS * 1000)) == CURLE_OK;
    if (set && call->body)
        set = curl_easy_setopt(t->easy, CURLOPT_POSTFIELDSIZE_LARGE, (curl_off_t)strlen(call->body)) == CURLE_OK &&
              curl_easy_setopt(t->easy, CURLOPT_POSTFIELDS, call->body) == CURLE_OK;
    free(url);
    if (!set || curl_multi_add_handle(h->multi, t->easy) != CURLM_OK)
        return ESPI_FAIL(ESP_ERR_COMM, "%s%s: libcurl does not take the request", h->base, call->path);
    t->call = index;
    r->progress[index].state = IN_FLIGHT;
    return ESP_OK;
}

static void release(espi_http *h, transfer *t) {
    if (t->call < 0) return;
    curl_multi_remove_handle(h->multi, t->easy);
    t->call = -1;
}

/* ---- the verdict ---- */

/* out: the server's own words: {"error":{"message":..}}, {"message":..}, {"detail":..}, else how the body begins. */
static void quote(char out[QUOTE], const char *body, size_t bytes) {
    json_t *root = json_loadb(body, bytes, JSON_ALLOW_NUL, NULL);
    const json_t *error = json_object_get(root, "error");
    const char *words = json_string_value(json_object_get(error, "message"));
    if (!words) words = json_string_value(error);
    if (!words) words = json_string_value(json_object_get(root, "message"));
    if (!words) words = json_string_value(json_object_get(root, "detail"));
    if (!words) words = bytes ? body : "(no message)";
    snprintf(out, QUOTE, "%s", words);
    for (char *p = out; *p; p++)
        if ((unsigned char)*p < ' ') *p = ' ';
    json_decref(root);
}

typedef enum verdict { ACCEPTED, AGAIN, FINAL } verdict;

/* Of an answer that came whole; a failure leaves its sentence in esp_last_error(). */
static verdict judge_answer(const run *r, const transfer *t, const espi_http_call *call, esp_status *status) {
    if (call->code >= 200 && call->code < 300) {
        *status = r->answer(r->user, t->call, t->body.used ? t->body.data : "", t->body.used);
        return *status == ESP_OK ? ACCEPTED : *status == ESP_ERR_FORMAT ? AGAIN : FINAL;
    }
    char words[QUOTE];
    quote(words, t->body.used ? t->body.data : "", t->body.used);
    if (call->code >= 500 || call->code == 408 || call->code == 425 || call->code == 429) {
        *status = ESPI_FAIL(ESP_ERR_COMM, "%s%s answers %d: %s", r->http->base, call->path, call->code, words);
        return AGAIN;
    }
    *status = ESPI_FAIL(ESP_ERR_ARG, "%s%s refuses with %d: %s", r->http->base, call->path, call->code, words);
    return FINAL;
}

static verdict judge(const run *r, transfer *t, CURLcode code, esp_status *status) {
    espi_http_call *call = &r->calls[t->call];
    long answered = 0;
    curl_easy_getinfo(t->easy, CURLINFO_RESPONSE_CODE, &answered);
    call->code = (int32_t)answered;
    if (t->no_memory) {
        *status =
            ESPI_FAIL(ESP_ERR_MEMORY, "%s%s: no memory for an answer of more than %zu bytes", r->http->base, call->path, t->body.used);
        return FINAL;
    }
    if (t->too_large) {
        *status =
            ESPI_FAIL(ESP_ERR_FORMAT, "%s%s: an answer of more than %zu bytes, expected fewer", r->http->base, call->path, MOST_BYTES);
        return FINAL;
    }
    if (code == CURLE_OK) return judge_answer(r, t, call, status);
    *status = ESPI_FAIL(ESP_ERR_COMM, "%s%s: %s", r->http->base, call->path, t->error[0] ? t->error : curl_easy_strerror(code));
    switch (code) {
    case CURLE_URL_MALFORMAT:
    case CURLE_UNSUPPORTED_PROTOCOL:
    case CURLE_OUT_OF_MEMORY:
    case CURLE_PEER_FAILED_VERIFICATION:
    case CURLE_SSL_CACERT_BADFILE:
        return FINAL;
    default:
        return AGAIN;
    }
}

static void close_call(run *r, int64_t index, esp_status status, const char *why) {
    espi_http_call *call = &r->calls[index];
    call->status = status;
    snprintf(call->why, sizeof call->why, "%s", why);
    r->progress[index].state = DONE;
    r->open--;
    if (status != ESP_OK && r->limits->all_or_none) r->over = true;
}

static void finish(run *r, transfer *t, CURLcode code, double now) {
    espi_http *h = r->http;
    const int64_t index = t->call;
    espi_http_call *call = &r->calls[index];
    esp_status status;
    const verdict verdict = judge(r, t, code, &status);
    release(h, t);
    if (verdict == ACCEPTED) {
        close_call(r, index, ESP_OK, "");
    } else if (verdict == FINAL) {
        close_call(r, index, status, esp_last_error());
    } else if (call->tries > h->c.retries) {
        ESPI_FAIL(status, "given up after %d tries: %s", call->tries, esp_last_error());
        close_call(r, index, status, esp_last_error());
    } else {
        const double u = espi_uniform(h->c.seed, ESPI_STREAM_BACKOFF, r->limits->step, (uint32_t)index, (uint32_t)call->tries, 0);
        const double delay = fmin(h->c.first_delay * exp2(call->tries - 1), h->c.longest_delay) * (0.5 + 0.5 * u);
        r->progress[index].state = WAITING;
        r->progress[index].start = now + delay;
        snprintf(call->why, sizeof call->why, "%s", esp_last_error());
        if (h->c.ctx)
            espi_log(h->c.ctx, ESP_LOG_WARN, "try %d of %d failed, the next in %.2f s: %s", call->tries, h->c.retries + 1, delay,
                     call->why);
    }
}

/* ---- the run ---- */

static transfer *free_transfer(espi_http *h) {
    for (int32_t i = 0; i < h->c.concurrent; i++)
        if (h->transfers[i].call < 0) return &h->transfers[i];
    return NULL;
}

/* Starts what is due, in order; *next: when the first of the others is. */
static esp_status start_due(run *r, double now, double *next) {
    for (int64_t i = 0; i < r->n; i++) {
        if (r->progress[i].state != WAITING) continue;
        if (r->progress[i].start > now) {
            *next = fmin(*next, r->progress[i].start);
            continue;
        }
        transfer *t = free_transfer(r->http);
        if (!t) return ESP_OK; /* the end of a transfer wakes the loop */
        ESPI_TRY(start(r, t, i, now));
    }
    return ESP_OK;
}

/* Has any transfer ended? */
static bool read_ended(run *r) {
    int left;
    bool any = false;
    for (CURLMsg *m; (m = curl_multi_info_read(r->http->multi, &left));) {
        if (m->msg != CURLMSG_DONE) continue;
        const CURLcode code = m->data.result;
        char *owner = NULL;
        curl_easy_getinfo(m->easy_handle, CURLINFO_PRIVATE, &owner);
        finish(r, (transfer *)(void *)owner, code, espi_seconds());
        any = true;
    }
    return any;
}

static void pass_deadline(run *r) {
    for (int64_t i = 0; i < r->n; i++) {
        if (r->progress[i].state == DONE) continue;
        const espi_http_call *call = &r->calls[i];
        const char *last = call->why[0] ? call->why : call->tries ? "no answer yet" : "not sent yet";
        ESPI_FAIL(
            ESP_ERR_COMM,
            "%s%s: the deadline for %s passed, request %lld of %lld was still open after %d tries (%s): raise the deadline, or see what "
            "keeps the server",
            r->http->base, call->path, r->limits->awaited, (long long)i + 1, (long long)r->n, call->tries, last);
        close_call(r, i, ESP_ERR_COMM, esp_last_error());
    }
}

static void give_up(run *r) {
    for (int64_t i = 0; i < r->n; i++)
        if (r->progress[i].state != DONE) close_call(r, i, ESP_ERR_CALLBACK, "given up: the run was asked to stop");
}

static esp_status drive(run *r) {
    CURLM *multi = r->http->multi;
    while (r->open > 0 && !r->over) {
        const double now = espi_seconds(), deadline = r->limits->deadline;
        double next = now + POLL_SECONDS;
        int running;
        if (deadline > 0 && now >= deadline) {
            pass_deadline(r);
            return ESP_OK;
        }
        if (r->limits->stop && r->limits->stop(r->limits->stop_user) != 0) {
            give_up(r);
            return ESP_OK;
        }
        if (deadline > 0) next = fmin(next, deadline);
        ESPI_TRY(start_due(r, now, &next));
        CURLMcode code = curl_multi_perform(multi, &running);
        const bool ended = read_ended(r);
        const double wait = next - espi_seconds();
        /* After an end there may be something to start at once, or sooner than `next`. */
        if (code == CURLM_OK && !ended && wait > 0) code = curl_multi_poll(multi, NULL, 0, (int)ceil(wait * 1000), NULL);
        if (code != CURLM_OK) return ESPI_FAIL(ESP_ERR_COMM, "%s: libcurl fails: %s", r->http->base, curl_multi_strerror(code));
    }
    return ESP_OK;
}

/* Of calls that did not come to an end of their own: another one failed. */
static void close_rest(run *r) {
    for (int64_t i = 0; i < r->n; i++)
        if (r->progress[i].state != DONE) close_call(r, i, ESP_ERR_STATE, "given up because another request failed");
}

static esp_status verdict_of(const run *r) {
    for (int pass = 0; pass < 2; pass++)
        for (int64_t i = 0; i < r->n; i++) {
            const espi_http_call *call = &r->calls[i];
            if (call->status != ESP_OK && (pass == 1 || call->status != ESP_ERR_STATE)) return ESPI_FAIL(call->status, "%s", call->why);
        }
    return ESP_OK;
}

esp_status espi_http_run(espi_http *http, espi_http_call *calls, int64_t n, const espi_http_limits *limits, espi_http_answer answer,
                         void *user) {
    run r = {.http = http, .calls = calls, .n = n, .open = n, .limits = limits, .answer = answer, .user = user};
    ESPI_TRY(espi_take_array(&r.progress, n, sizeof *r.progress));
    for (int64_t i = 0; i < n; i++) {
        calls[i].status = ESP_ERR_STATE;
        calls[i].code = calls[i].tries = 0;
        calls[i].why[0] = '\0';
    }
    esp_status status = drive(&r);
    for (int32_t i = 0; i < http->c.concurrent; i++) release(http, &http->transfers[i]);
    close_rest(&r);
    free(r.progress);
    return status == ESP_OK ? verdict_of(&r) : status;
}

#endif
