/* The HTTP layer against a server that misbehaves: what is tried again, what is final, and when it is over. */
#include "mock.h"

static const espi_http_config quick = {.concurrent = 4, .retries = 3, .timeout = 5, .first_delay = 0.001, .longest_delay = 0.01, .seed = 1};

static espi_http *client(const mock *m, espi_http_config c) {
    espi_http *http;
    c.base = m->url;
    OK(espi_http_create(&http, &c));
    return http;
}

typedef struct taken {
    int answers[8];
    esp_status verdict; /* on the first answer of each call */
} taken;

static esp_status take(void *user, int64_t index, const char *body, size_t bytes) {
    taken *t = user;
    (void)bytes;
    if (t->answers[index]++ == 0 && t->verdict != ESP_OK) return espi_fail(t->verdict, __FILE__, __LINE__, "not this: %.20s", body);
    return ESP_OK;
}

/* A request that the mock refuses unless told to misbehave before it looks: enough to see what the layer makes of answers. */
static espi_http_call models = {.path = "/v1/models"};
static espi_http_call adapter = {.path = "/v1/unload_lora_adapter", .body = "{\"lora_name\":\"nobody\"}"};

Test(http, addresses_and_numbers_are_checked) {
    espi_http *http;
    static const char *const wrong[] = {NULL, "", "127.0.0.1:80", "ftp://host", "http://", "https:///v1"};
    for (int i = 0; i < ESPI_COUNT(wrong); i++) {
        espi_http_config c = quick;
        c.base = wrong[i];
        FAILS(ESP_ERR_ARG, "expected one like http://", espi_http_create(&http, &c));
        cr_assert_null(http);
    }
    espi_http_config c = quick;
    c.base = "http://127.0.0.1:1";
    c.concurrent = 0;
    FAILS(ESP_ERR_ARG, "at least one request", espi_http_create(&http, &c));
}

Test(http, an_answer_comes_once) {
    mock m = mock_start(DEMO_MODEL, NULL);
    espi_http *http = client(&m, quick);
    espi_http_call calls[6];
    taken t = {.verdict = ESP_OK};
    for (int i = 0; i < 6; i++) calls[i] = models;
    OK(espi_http_run(http, calls, 6, &(espi_http_limits){.awaited = "lists"}, take, &t));
    for (int i = 0; i < 6; i++) {
        cr_assert_eq(t.answers[i], 1);
        cr_assert_eq(calls[i].tries, 1);
        cr_assert_eq(calls[i].code, 200);
    }
    cr_assert_eq(espi_http_retries(http), 0);
    espi_http_destroy(http);
    mock_stop(&m);
}

Test(http, what_may_pass_is_tried_again) {
    mock m = mock_start(DEMO_MODEL, NULL);
    static const char *const kinds[] = {"error500", "error503", "error429", "dropped", "cut"};
    const double start = espi_seconds();
    for (int k = 0; k < ESPI_COUNT(kinds); k++) {
        espi_http *http = client(&m, quick);
        espi_http_call call = adapter;
        taken t = {.verdict = ESP_OK};
        mock_plan(&m, kinds[k], 2, 0);
        /* The third try reaches the server's own word: 404. */
        FAILS(ESP_ERR_ARG, "'nobody' cannot be found", espi_http_run(http, &call, 1, &(espi_http_limits){.awaited = "it"}, take, &t));
        cr_assert_eq(call.tries, 3, "%s: %d tries", kinds[k], call.tries);
        cr_assert_eq(call.code, 404);
        cr_assert_eq(espi_http_retries(http), 2);
        espi_http_destroy(http);
    }
    cr_assert(espi_seconds() - start < 5, "ten delays of at most 10 ms took %.1f s", espi_seconds() - start);
    mock_stop(&m);
}

Test(http, tries_have_an_end) {
    mock m = mock_start(DEMO_MODEL, NULL);
    espi_http *http = client(&m, quick);
    espi_http_call call = adapter;
    taken t = {.verdict = ESP_OK};
    mock_plan(&m, "error500", 4, 0);
    FAILS(ESP_ERR_COMM,
          "given up after 4 tries: http://127.0.0.1:", espi_http_run(http, &call, 1, &(espi_http_limits){.awaited = "it"}, take, &t));
    cr_assert_not_null(strstr(esp_last_error(), "answers 500: the engine is not well"));
    cr_assert_eq(call.tries, 4);
    mock_plan(&m, "error400", 1, 0);
    FAILS(ESP_ERR_ARG, "refuses with 400: the engine does not want this",
          espi_http_run(http, &call, 1, &(espi_http_limits){.awaited = "it"}, take, &t));
    cr_assert_eq(call.tries, 1);
    espi_http_destroy(http);
    mock_stop(&m);
}

Test(http, the_verdict_on_an_answer_counts) {
    mock m = mock_start(DEMO_MODEL, NULL);
    espi_http *http = client(&m, quick);
    espi_http_call call = models;
    taken again = {.verdict = ESP_ERR_FORMAT}, last = {.verdict = ESP_ERR_MISMATCH};
    OK(espi_http_run(http, &call, 1, &(espi_http_limits){.awaited = "it"}, take, &again));
    cr_assert_eq(again.answers[0], 2);
    FAILS(ESP_ERR_MISMATCH, "not this: {\"object\":\"list\"",
          espi_http_run(http, &call, 1, &(espi_http_limits){.awaited = "it"}, take, &last));
    cr_assert_eq(last.answers[0], 1);
    espi_http_destroy(http);
    mock_stop(&m);
}

Test(http, one_failure_ends_all_where_all_are_needed) {
    mock m = mock_start(DEMO_MODEL, NULL);
    for (int all = 0; all < 2; all++) {
        espi_http_config c = quick;
        c.concurrent = 1;
        espi_http *http = client(&m, c);
        espi_http_call calls[3] = {models, adapter, models};
        taken t = {.verdict = ESP_OK};
        FAILS(ESP_ERR_ARG, "refuses with 404",
              espi_http_run(http, calls, 3, &(espi_http_limits){.awaited = "it", .all_or_none = all}, take, &t));
        cr_assert_eq(calls[0].status, ESP_OK);
        cr_assert_eq(calls[2].status, all ? ESP_ERR_STATE : ESP_OK);
        cr_assert_eq(t.answers[2], !all);
        espi_http_destroy(http);
    }
    mock_stop(&m);
}

Test(http, a_deadline_is_kept, .timeout = 20) {
    mock m = mock_start(DEMO_MODEL, NULL);
    espi_http *http = client(&m, quick);
    espi_http_call calls[2] = {models, adapter};
    taken t = {.verdict = ESP_OK};
    mock_plan(&m, "slow", 1, 10);
    const double start = espi_seconds();
    FAILS(ESP_ERR_COMM, "the deadline for the slow one passed, request 2 of 2 was still open after 1 tries",
          espi_http_run(http, calls, 2, &(espi_http_limits){.awaited = "the slow one", .deadline = start + 0.4}, take, &t));
    const double seconds = espi_seconds() - start;
    cr_assert(seconds >= 0.39 && seconds < 1.5, "%.3f s", seconds);
    cr_assert_eq(calls[0].status, ESP_OK);
    espi_http_destroy(http);
    mock_stop(&m);
}

Test(http, a_try_has_its_own_time, .timeout = 20) {
    mock m = mock_start(DEMO_MODEL, NULL);
    espi_http_config c = quick;
    c.timeout = 0.3;
    espi_http *http = client(&m, c);
    espi_http_call call = adapter;
    taken t = {.verdict = ESP_OK};
    mock_plan(&m, "slow", 1, 10);
    FAILS(ESP_ERR_ARG, "'nobody' cannot be found", espi_http_run(http, &call, 1, &(espi_http_limits){.awaited = "it"}, take, &t));
    cr_assert_eq(call.tries, 2);
    espi_http_destroy(http);
    mock_stop(&m);
}

Test(http, nobody_there, .timeout = 20) {
    mock m = mock_start(DEMO_MODEL, NULL);
    espi_http *http = client(&m, quick);
    espi_http_call call = models;
    taken t = {.verdict = ESP_OK};
    mock_stop(&m);
    FAILS(ESP_ERR_COMM, "given up after 4 tries", espi_http_run(http, &call, 1, &(espi_http_limits){.awaited = "it"}, take, &t));
    cr_assert_eq(call.code, 0);
    espi_http_destroy(http);
}
