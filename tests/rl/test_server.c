/* Rollouts from a server: against one that has our own sampler behind it and misbehaves when told to. */
#include "core/rng.h"
#include "mock.h"
#include "rl/server.h"
#include "scratch.h"

#include <pthread.h>

#define PROMPTS 3
#define SAMPLES 2
#define NEW_TOKENS 6

typedef struct bench {
    mock mock;
    demo demo;
    char dir[ESPI_PATH_MAX];
    espi_rollout_source source;
    espi_server_config config;
} bench;

/* A server, a model of ours with an adapter that says something, and the config of a source between them. */
static bench bench_make(const char *option, const char *other, float temperature) {
    bench b = {.mock = mock_start(DEMO_MODEL, option, other, NULL), .demo = demo_model(1, true)};
    scratch_make(b.dir);
    b.config = (espi_server_config){.retries = 3,
                                    .concurrent = 4,
                                    .first_delay = 0.001,
                                    .timeout = 5,
                                    .deadline = 20,
                                    .temperature = temperature,
                                    .longest = 32,
                                    .seed = 11};
    return b;
}

static esp_status bench_open(bench *b) {
    b->config.url = b->mock.url;
    b->config.adapter_dir = b->dir;
    return espi_server_open(&b->source, b->demo.model, &b->config);
}

static void bench_free(bench *b) {
    if (b->source.close) b->source.close(b->source.self);
    mock_stop(&b->mock);
    demo_free(&b->demo);
    scratch_remove(b->dir);
}

static espi_server_counts counts_of(const bench *b) {
    espi_server_counts c;
    espi_server_counts_get(&c, &b->source);
    return c;
}

/* Another adapter, by as much as one can see in every log-probability. */
static void train(esp_model *model, int64_t step, float by) {
    for (int64_t i = 0; i < esp_model_param_count(model); i++) {
        esp_param p = ESP_PARAM_INIT;
        OK(esp_model_param_get(model, i, &p));
        const esp_tensor view = esp_tensor_view(p.data, p.dtype, p.rank, p.dims);
        float *x = p.data;
        for (int64_t k = 0; k < esp_tensor_count(&view); k++) x[k] += by * (float)((k * 5 + i + step * 3) % 7 - 3);
    }
}

static const int32_t prompt_ids[] = {1, 5, 6, 7, 1, 9, 8, 7, 6, 1, 12, 13};
static const int32_t prompt_ends[PROMPTS + 1] = {0, 4, 9, 12};
static const int64_t group_ids[PROMPTS] = {100, 101, 102};
static const uint32_t keys[PROMPTS] = {7, 8, 9};

static espi_rollout_request request_of(int64_t version, float temperature) {
    return (espi_rollout_request){.prompts = prompt_ids,
                                  .cu_prompts = prompt_ends,
                                  .group_ids = group_ids,
                                  .keys = keys,
                                  .n_prompts = PROMPTS,
                                  .samples = SAMPLES,
                                  .max_new_tokens = NEW_TOKENS,
                                  .temperature = temperature,
                                  .top_p = 1,
                                  .seed = 3,
                                  .step = (uint32_t)version + 1,
                                  .version = version};
}

static esp_status generate(bench *b, espi_rollouts *r, const espi_rollout_request *q) {
    *r = (espi_rollouts){0};
    return b->source.generate(b->source.self, r, q);
}

/* Largest distance of the batch's log-probabilities from those of the trainer's own pass. */
static double distance(const espi_rollouts *r, esp_model *model, float temperature) {
    const int64_t n = r->shape.tokens;
    int32_t *cu = calloc((size_t)r->shape.rows + 1, sizeof *cu);
    float *ours = calloc((size_t)n, sizeof *ours);
    cr_assert(cu && ours);
    for (int64_t i = 0; i <= r->shape.rows; i++) cu[i] = (int32_t)r->offsets[i];
    const esp_batch batch =
        ESP_BATCH(.tokens = r->tokens, .cu_seqlens = cu, .n_tokens = n, .n_seqs = (int32_t)r->shape.rows, .loss_mask = r->loss_mask);
    esp_tensor hidden;
    OK(esp_model_forward_only(model, &batch, &hidden));
    OK(esp_model_logprob(model, &batch, &hidden, temperature, ours, NULL));
    double worst = 0;
    for (int64_t t = 0; t < n; t++)
        if (r->loss_mask[t] && !(fabs((double)ours[t] - (double)r->sampler_logprob[t]) <= worst))
            worst = fabs((double)ours[t] - (double)r->sampler_logprob[t]);
    free(cu);
    free(ours);
    return worst;
}

/* Each group once and whole, as asked, by this version. */
static void check_groups(const espi_rollouts *r, const espi_rollout_request *q, int64_t version) {
    OK(espi_rollouts_check(r, 64, 8));
    cr_assert_eq(r->shape.rows, (int64_t)q->n_prompts * q->samples, "%lld rows", (long long)r->shape.rows);
    cr_assert_eq(r->shape.group_size, q->samples);
    for (int64_t i = 0; i < r->shape.rows; i++) {
        const int64_t p = i / q->samples, n = q->cu_prompts[p + 1] - q->cu_prompts[p], completion = r->offsets[i + 1] - r->offsets[i] - n;
        cr_assert_eq(r->group[i], q->group_ids[p]);
        cr_assert_eq(r->version[i], version, "version %lld", (long long)r->version[i]);
        cr_assert_eq(r->n_prompt[i], n);
        cr_assert_eq(memcmp(r->tokens + r->offsets[i], q->prompts + q->cu_prompts[p], (size_t)n * sizeof *r->tokens), 0);
        cr_assert(completion >= 1 && completion <= q->max_new_tokens);
        cr_assert_eq(r->finish[i] == ESPI_FINISH_STOP, r->tokens[r->offsets[i + 1] - 1] == 2);
    }
}

/* ---- the distribution ---- */

Test(server, log_probabilities_are_the_trainers, .timeout = 60) {
    static const float temperatures[] = {1, 0.7f};
    for (int i = 0; i < ESPI_COUNT(temperatures); i++) {
        bench b = bench_make("--processed", NULL, temperatures[i]);
        espi_rollouts r;
        OK(bench_open(&b));
        cr_assert(counts_of(&b).logprob_difference < 1e-6);
        const espi_rollout_request q = request_of(0, temperatures[i]);
        OK(generate(&b, &r, &q));
        check_groups(&r, &q, 0);
        const double d = distance(&r, b.demo.model, temperatures[i]);
        cr_assert(d <= 1e-6, "%g at temperature %g", d, (double)temperatures[i]);
        cr_assert_not(b.source.exact);
        espi_rollouts_free(&r);
        bench_free(&b);
    }
}

Test(server, the_same_request_has_the_same_answer, .timeout = 60) {
    bench b = bench_make(NULL, NULL, 1);
    espi_rollouts r, again, other;
    OK(bench_open(&b));
    espi_rollout_request q = request_of(0, 1);
    OK(generate(&b, &r, &q));
    mock_plan(&b.mock, "dropped-after", 2, 0);
    OK(generate(&b, &again, &q));
    cr_assert_eq(r.shape.tokens, again.shape.tokens);
    cr_assert_eq(memcmp(r.tokens, again.tokens, (size_t)r.shape.tokens * sizeof *r.tokens), 0);
    cr_assert_eq(memcmp(r.sampler_logprob, again.sampler_logprob, (size_t)r.shape.tokens * sizeof(float)), 0);
    q.step++; /* other draws: seeds are keyed by step and prompt */
    OK(generate(&b, &other, &q));
    cr_assert(r.shape.tokens != other.shape.tokens || memcmp(r.tokens, other.tokens, (size_t)r.shape.tokens * sizeof *r.tokens) != 0);
    espi_rollouts_free(&r);
    espi_rollouts_free(&again);
    espi_rollouts_free(&other);
    bench_free(&b);
}

/* ---- adapters ---- */

Test(server, a_new_version_changes_the_distribution, .timeout = 60) {
    bench b = bench_make(NULL, NULL, 1);
    espi_rollouts r;
    OK(bench_open(&b));
    for (int64_t version = 1; version <= 3; version++) {
        train(b.demo.model, version, 0.01f);
        OK(b.source.publish(b.source.self, version));
        const espi_rollout_request q = request_of(version, 1);
        OK(generate(&b, &r, &q));
        check_groups(&r, &q, version);
        cr_assert(distance(&r, b.demo.model, 1) <= 1e-6, "%g", distance(&r, b.demo.model, 1));
        train(b.demo.model, version, -0.01f);
        cr_assert(distance(&r, b.demo.model, 1) > 1e-3, "the version before gives the same: %g", distance(&r, b.demo.model, 1));
        train(b.demo.model, version, 0.01f);
        espi_rollouts_free(&r);
    }
    /* One name, one version: the mock answers for a name that it has seen with what it had then. */
    cr_assert_eq(mock_count(&b.mock, "stale"), 0);
    cr_assert_eq(mock_count(&b.mock, "loads"), 4);
    cr_assert_eq(mock_count(&b.mock, "unloads"), 3);
    cr_assert_eq(mock_count(&b.mock, "most_loaded"), 2);
    cr_assert_eq(scratch_count(b.dir), 1, "folders of old versions are left");
    bench_free(&b);
}

/* What names of their own guard against: the mock, as servers do, answers for an adapter that took another's name from what it had. */
Test(server, a_name_that_is_used_again_is_stale, .timeout = 60) {
    bench b = bench_make(NULL, NULL, 1);
    static const char request[] =
        "{\"model\":\"%s\",\"prompt\":[1,5,6,7],\"n\":1,\"max_tokens\":4,\"temperature\":1,\"top_p\":1,\"top_k\":-1,\"min_p\":0,"
        "\"repetition_penalty\":1,\"presence_penalty\":0,\"frequency_penalty\":0,\"min_tokens\":0,\"logprobs\":0,\"seed\":5,"
        "\"ignore_eos\":true,\"return_token_ids\":true,\"add_special_tokens\":false,\"stop_token_ids\":[2]}";
    static const char *const names[] = {"same", "same", "other"};
    mock_answer answers[ESPI_COUNT(names)];
    for (int i = 0; i < ESPI_COUNT(names); i++) {
        char path[ESPI_PATH_MAX], json[1024];
        OK(espi_path_join(path, b.dir, i ? "second" : "first"));
        train(b.demo.model, 1, i == 1 ? 0.02f : 0);
        OK(esp_model_save_adapter(b.demo.model, path));
        mock_tell(&b.mock, "/v1/load_lora_adapter", "{\"lora_name\":\"%s\",\"lora_path\":\"%s\",\"load_inplace\":true}", names[i], path);
        snprintf(json, sizeof json, request, names[i]);
        OK(mock_ask(&answers[i], &b.mock, "/v1/completions", json));
        answers[i].text[strcspn(answers[i].text, "}")] = '\0'; /* up to the end of the log-probabilities; without names */
    }
    const char *first = strstr(answers[0].text, "token_logprobs"), *same = strstr(answers[1].text, "token_logprobs"),
               *other = strstr(answers[2].text, "token_logprobs");
    cr_assert(first && same && other);
    cr_assert_str_eq(same, first);
    cr_assert_str_neq(other, first);
    cr_assert_eq(mock_count(&b.mock, "stale"), 1);
    bench_free(&b);
}

Test(server, nothing_is_left_behind, .timeout = 60) {
    bench b = bench_make(NULL, NULL, 1);
    OK(bench_open(&b));
    b.source.close(b.source.self);
    b.source.close = NULL;
    cr_assert_eq(mock_count(&b.mock, "unloads"), 1);
    cr_assert_eq(scratch_count(b.dir), 0);
    bench_free(&b);
}

Test(server, what_a_killed_run_left_is_cleared, .timeout = 60) {
    bench b = bench_make(NULL, NULL, 1);
    char path[ESPI_PATH_MAX], other[ESPI_PATH_MAX];
    OK(espi_path_join(path, b.dir, "run-0badcafe-v7"));
    OK(espi_path_join(other, b.dir, "mine"));
    OK(esp_model_save_adapter(b.demo.model, path));
    OK(esp_model_save_adapter(b.demo.model, other));
    mock_tell(&b.mock, "/v1/load_lora_adapter", "{\"lora_name\":\"run-0badcafe-v7\",\"lora_path\":\"%s\"}", path);
    mock_tell(&b.mock, "/v1/load_lora_adapter", "{\"lora_name\":\"mine\",\"lora_path\":\"%s\"}", other);
    OK(bench_open(&b));
    cr_assert_eq(mock_count(&b.mock, "unloads"), 1, "it unloads its own, and no other's");
    cr_assert_not(espi_dir_exists(path));
    cr_assert(espi_dir_exists(other));
    bench_free(&b);
}

Test(server, a_load_whose_answer_is_lost_counts_as_loaded, .timeout = 60) {
    static const char *const kinds[] = {"dropped-after", "cut", "error500", "dropped"};
    bench b = bench_make(NULL, NULL, 1);
    espi_rollouts r;
    OK(bench_open(&b));
    for (int i = 0; i < ESPI_COUNT(kinds); i++) {
        train(b.demo.model, i + 1, 0.01f);
        mock_plan(&b.mock, kinds[i], 2, 0); /* a load, and the load or the unload after it */
        OK(b.source.publish(b.source.self, i + 1));
        const espi_rollout_request q = request_of(i + 1, 1);
        OK(generate(&b, &r, &q));
        check_groups(&r, &q, i + 1);
        cr_assert(distance(&r, b.demo.model, 1) <= 1e-6);
        espi_rollouts_free(&r);
    }
    cr_assert_eq(counts_of(&b).published, 5);
    mock_plan(&b.mock, "none", 1, 0);
    mock_plan(&b.mock, "dropped-after", 1, 0); /* an unload */
    OK(b.source.publish(b.source.self, 9));
    cr_assert_eq(counts_of(&b).unloaded, 5, "%lld", (long long)counts_of(&b).unloaded);
    cr_assert_eq(scratch_count(b.dir), 1);
    cr_assert_eq(mock_count(&b.mock, "stale"), 0);
    bench_free(&b);
}

Test(server, a_server_started_again_gets_the_adapter_again, .timeout = 60) {
    for (int drop = 0; drop < 2; drop++) {
        bench b = bench_make(NULL, NULL, 1);
        espi_rollouts r;
        b.config.drop_lost = drop;
        OK(bench_open(&b));
        const espi_rollout_request q = request_of(0, 1);
        mock_tell(&b.mock, "/mock/forget", "{}");
        OK(generate(&b, &r, &q));
        check_groups(&r, &q, 0);
        cr_assert(distance(&r, b.demo.model, 1) <= 1e-6);
        cr_assert_eq(mock_count(&b.mock, "loads"), 2);
        cr_assert_eq(counts_of(&b).lost, 0);
        espi_rollouts_free(&r);
        bench_free(&b);
    }
}

Test(server, an_older_version_serves_as_long_as_it_may, .timeout = 60) {
    bench b = bench_make(NULL, NULL, 1);
    espi_rollouts r;
    b.config.max_staleness = 1;
    OK(bench_open(&b));
    train(b.demo.model, 1, 0.01f);
    mock_plan(&b.mock, "error500", 8, 0); /* two publications, of four tries each */
    OK(b.source.publish(b.source.self, 1));
    espi_rollout_request q = request_of(1, 1);
    OK(generate(&b, &r, &q)); /* tries to publish once more, and goes on without */
    check_groups(&r, &q, 0);
    espi_rollouts_free(&r);
    mock_plan(&b.mock, "error500", 4, 0);
    FAILS(ESP_ERR_COMM, "answers 500", b.source.publish(b.source.self, 2));
    OK(b.source.publish(b.source.self, 2));
    q = request_of(2, 1);
    OK(generate(&b, &r, &q));
    check_groups(&r, &q, 2);
    espi_rollouts_free(&r);
    bench_free(&b);
}

Test(server, groups_beyond_the_staleness_are_dropped_and_counted, .timeout = 60) {
    bench b = bench_make(NULL, NULL, 1);
    espi_rollouts r;
    b.config.max_staleness = 1;
    b.config.concurrent = 1;
    OK(bench_open(&b));
    OK(b.source.publish(b.source.self, 1));
    mock_plan(&b.mock, "older-model", 1, 0);
    espi_rollout_request q = request_of(1, 1);
    OK(generate(&b, &r, &q));
    cr_assert_eq(r.shape.rows, PROMPTS * SAMPLES);
    cr_assert_eq(r.version[0], 0);
    cr_assert_eq(r.version[SAMPLES], 1);
    espi_rollouts_free(&r);
    /* Version 0 stays: the server does not let it be unloaded.  It is two behind then, and its group is left out. */
    mock_plan(&b.mock, "none", 1, 0);
    mock_plan(&b.mock, "error500", 4, 0);
    OK(b.source.publish(b.source.self, 2));
    mock_plan(&b.mock, "none", 1, 0);
    mock_plan(&b.mock, "older-model", 1, 0);
    q = request_of(2, 1);
    OK(generate(&b, &r, &q));
    cr_assert_eq(r.shape.rows, 2 * SAMPLES);
    cr_assert_eq(r.group[SAMPLES], 102);
    cr_assert_eq(counts_of(&b).stale, 1);
    cr_assert_eq(counts_of(&b).lost, 0);
    espi_rollouts_free(&r);
    mock_plan(&b.mock, "older-model", PROMPTS, 0);
    FAILS(ESP_ERR_MISMATCH, "no group of 3 came: all came from older versions", generate(&b, &r, &q));
    bench_free(&b);
}

/* ---- the opening ---- */

Test(server, temperature_must_be_in_the_log_probabilities, .timeout = 60) {
    static const float temperatures[] = {0.7f, 1.5f};
    for (int i = 0; i < ESPI_COUNT(temperatures); i++) {
        bench raw = bench_make(NULL, NULL, temperatures[i]), processed = bench_make("--processed", NULL, temperatures[i]);
        FAILS(ESP_ERR_UNSUPPORTED, "--logprobs-mode processed_logprobs", bench_open(&raw));
        OK(bench_open(&processed));
        bench_free(&raw);
        bench_free(&processed);
    }
}

Test(server, another_model_is_seen, .timeout = 60) {
    bench b = bench_make("--deaf", NULL, 1);
    train(b.demo.model, 1, 0.1f);
    FAILS(ESP_ERR_MISMATCH, "it serves other weights, or answers without the adapter", bench_open(&b));
    bench_free(&b);
}

Test(server, model_context_and_adapters_are_checked_first, .timeout = 60) {
    bench b = bench_make("--context", "31", 1);
    FAILS(ESP_ERR_MISMATCH, "its context is 31 tokens, expected at least 32", bench_open(&b));
    b.config.model = "another";
    FAILS(ESP_ERR_MISMATCH, "server_model: got another, expected one of those that http://127.0.0.1:", bench_open(&b));
    cr_assert_not_null(strstr(esp_last_error(), "serves: base"));
    b.config.model = "base";
    b.config.longest = 31;
    OK(bench_open(&b));
    bench_free(&b);
    b = bench_make("--no-lora", NULL, 1);
    FAILS(ESP_ERR_UNSUPPORTED, "start it with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True", bench_open(&b));
    cr_assert_eq(scratch_count(b.dir), 0);
    bench_free(&b);
    b = bench_make(NULL, NULL, 1);
    b.config.adapter_path = "/nowhere";
    FAILS(ESP_ERR_ARG, "adapter /nowhere/run-", bench_open(&b));
    mock_stop(&b.mock);
    b.config.adapter_path = NULL;
    FAILS(ESP_ERR_COMM, "/health", bench_open(&b));
    b.mock = mock_start(DEMO_MODEL, NULL);
    bench_free(&b);
}

Test(server, the_key_is_sent, .timeout = 60) {
    bench b = bench_make("--key", "s3cret", 1);
    unsetenv("ESP_SERVER_KEY");
    FAILS(ESP_ERR_ARG, "/v1/models refuses with 401: Unauthorized", bench_open(&b));
    setenv("ESP_SERVER_KEY", "s3cret", 1);
    OK(bench_open(&b));
    bench_free(&b);
}

/* ---- contract ---- */

static const struct {
    const char *kind, *words;
} breaches[] = {
    {"truncated", "that is no JSON"},
    {"empty", "an answer of 0 bytes that is no JSON"},
    {"not-json", "that is no JSON"},
    {"few-choices", "an answer with 1 choices, expected 2"},
    {"many-choices", "an answer with 3 choices, expected 2"},
    {"twice-choice", "two choices have the index 0"},
    {"missing-ids", "choice 0 has no token_ids"},
    {"missing-logprobs", "choice 0 has no logprobs.token_logprobs"},
    {"short-logprobs", "token_ids, expected as many"},
    {"bad-id", "is 64, expected 0 to 63 (the vocabulary)"},
    {"positive-logprob", "token_logprobs[0] is 0.25, expected a finite number of at most 0"},
    {"null-logprob", "token_logprobs[0] is nan, expected a finite number"},
    {"no-tokens", "has 0 token_ids, expected 1 to 6"},
    {"too-long", "token_ids, expected 1 to 6 (max_tokens)"},
    {"wrong-finish", "finish_reason is "},
    {"aborted", "finish_reason is \"abort\", expected stop or length"},
    {"wrong-model", "an answer by model \"another\", expected one of the adapters of this run"},
    {"wrong-prompt", "the server cut or changed the prompt"},
    {"short-routes", "routed_experts have the shape"},
    {"bad-route", "routed_experts say expert 8 for token"},
    {"torn-routes", "bytes of routed_experts, expected"},
};

Test(server, every_breach_of_the_contract_has_its_sentence, .timeout = 60) {
    bench b = bench_make("--routes", NULL, 1);
    espi_rollouts r;
    b.config.retries = 0;
    b.config.concurrent = 1;
    OK(bench_open(&b));
    espi_rollout_request q = request_of(0, 1);
    q.routes = true;
    for (int i = 0; i < ESPI_COUNT(breaches); i++) {
        mock_plan(&b.mock, breaches[i].kind, 1, 0);
        FAILS(ESP_ERR_FORMAT, breaches[i].words, generate(&b, &r, &q));
        cr_assert_null(r.tokens);
    }
    OK(generate(&b, &r, &q));
    espi_rollouts_free(&r);
    bench_free(&b);
}

Test(server, a_breach_is_tried_again, .timeout = 60) {
    bench b = bench_make("--routes", NULL, 1);
    espi_rollouts r, whole;
    OK(bench_open(&b));
    espi_rollout_request q = request_of(0, 1);
    q.routes = true;
    OK(generate(&b, &whole, &q));
    for (int i = 0; i < ESPI_COUNT(breaches); i++) {
        mock_plan(&b.mock, breaches[i].kind, 2, 0);
        OK(generate(&b, &r, &q));
        check_groups(&r, &q, 0);
        cr_assert_eq(memcmp(r.tokens, whole.tokens, (size_t)whole.shape.tokens * sizeof *r.tokens), 0);
        espi_rollouts_free(&r);
    }
    cr_assert_eq(counts_of(&b).retries, 2 * ESPI_COUNT(breaches));
    cr_assert_eq(mock_count(&b.mock, "ids_twice"), 0);
    cr_assert_eq(mock_count(&b.mock, "without_id"), 0);
    espi_rollouts_free(&whole);
    bench_free(&b);
}

Test(server, filters_are_refused, .timeout = 60) {
    bench b = bench_make(NULL, NULL, 1);
    espi_rollouts r;
    OK(bench_open(&b));
    for (int i = 0; i < 3; i++) {
        espi_rollout_request q = request_of(0, 1);
        if (i == 0) q.top_k = 5;
        if (i == 1) q.top_p = 0.9f;
        if (i == 2) q.min_p = 0.1f;
        FAILS(ESP_ERR_UNSUPPORTED, "a server does not say which ids they left", generate(&b, &r, &q));
    }
    bench_free(&b);
}

/* ---- routed experts ---- */

typedef struct chosen {
    const espi_rollouts *r;
    int64_t differ, compared;
} chosen;

static void compare_routes(void *user, const char *name, int64_t layer, const esp_tensor *tensor) {
    chosen *c = user;
    if (strcmp(name, "topk_idx") != 0) return;
    const espi_rollouts_shape *s = &c->r->shape;
    const int32_t *ids = tensor->data;
    for (int64_t row = 0; row < s->rows; row++)
        for (int64_t t = c->r->offsets[row]; t < c->r->offsets[row + 1]; t++)
            for (int64_t k = 0; k < s->top_k; k++) {
                const uint8_t route = c->r->routes[(t * s->layers + layer) * s->top_k + k];
                const bool last = t + 1 == c->r->offsets[row + 1];
                c->differ += last ? route != ESPI_ROUTE_NATIVE_U8 : route != ids[t * s->top_k + k];
                c->compared++;
            }
}

Test(server, routed_experts_are_those_of_the_forward, .timeout = 60) {
    bench b = bench_make("--routes", NULL, 1), without = bench_make(NULL, NULL, 1);
    espi_rollouts r;
    OK(bench_open(&b));
    OK(bench_open(&without));
    cr_assert(b.source.routes && !without.source.routes);
    espi_rollout_request q = request_of(0, 1);
    q.routes = true;
    OK(generate(&b, &r, &q));
    check_groups(&r, &q, 0);
    cr_assert_eq(r.shape.route_bytes, 1);
    cr_assert_eq(r.shape.layers, 3);
    cr_assert_eq(r.shape.top_k, 2);
    chosen c = {.r = &r};
    OK(esp_model_set_probe(b.demo.model, compare_routes, &c));
    distance(&r, b.demo.model, 1);
    OK(esp_model_set_probe(b.demo.model, NULL, NULL));
    cr_assert_eq(c.compared, r.shape.tokens * 3 * 2);
    cr_assert_eq(c.differ, 0, "%lld of %lld", (long long)c.differ, (long long)c.compared);
    espi_rollouts_free(&r);
    FAILS(ESP_ERR_UNSUPPORTED, "--enable-return-routed-experts", generate(&without, &r, &q));
    bench_free(&b);
    bench_free(&without);
}

/* ---- what is lost, and when it is over ---- */

Test(server, a_lost_group_is_dropped_or_fails_the_step, .timeout = 60) {
    for (int drop = 0; drop < 2; drop++) {
        bench b = bench_make(NULL, NULL, 1);
        espi_rollouts r;
        b.config.drop_lost = drop;
        b.config.concurrent = 1;
        OK(bench_open(&b));
        espi_rollout_request q = request_of(0, 1);
        mock_plan(&b.mock, "none", 1, 0);
        mock_plan(&b.mock, "error400", 1, 0); /* the second group's */
        if (drop) {
            OK(generate(&b, &r, &q));
            cr_assert_eq(r.shape.rows, 2 * SAMPLES);
            cr_assert_eq(r.group[0], 100);
            cr_assert_eq(r.group[SAMPLES], 102);
            cr_assert_eq(counts_of(&b).lost, 1);
            cr_assert_eq(counts_of(&b).groups, 3);
            espi_rollouts_free(&r);
            mock_plan(&b.mock, "error400", 3, 0);
            FAILS(ESP_ERR_ARG, "no group of 3 came: ", generate(&b, &r, &q));
        } else {
            FAILS(ESP_ERR_ARG, "refuses with 400: the engine does not want this", generate(&b, &r, &q));
            cr_assert_eq(mock_count(&b.mock, "completions"), 4 + 2, "the third is not asked for any more");
        }
        bench_free(&b);
    }
}

Test(server, a_hanging_server_ends_at_the_deadline, .timeout = 60) {
    for (int drop = 0; drop < 2; drop++) {
        bench b = bench_make(NULL, NULL, 1);
        espi_rollouts r;
        b.config.drop_lost = drop;
        OK(bench_open(&b));
        mock_plan(&b.mock, "slow", 1, 30);
        espi_rollout_request q = request_of(0, 1);
        const double start = espi_seconds();
        q.deadline = start + 0.6;
        if (drop) {
            OK(generate(&b, &r, &q));
            cr_assert_eq(r.shape.rows, 2 * SAMPLES);
            cr_assert_eq(counts_of(&b).lost, 1);
            espi_rollouts_free(&r);
        } else {
            FAILS(ESP_ERR_COMM, "the deadline for the completions of step 1 passed", generate(&b, &r, &q));
        }
        cr_assert(espi_seconds() - start < 2, "%.2f s", espi_seconds() - start);
        bench_free(&b);
    }
}

Test(server, a_server_killed_in_the_middle, .timeout = 60) {
    bench b = bench_make(NULL, NULL, 1);
    espi_rollouts r;
    pthread_t killer;
    OK(bench_open(&b));
    mock_plan(&b.mock, "slow", PROMPTS, 30);
    espi_rollout_request q = request_of(0, 1);
    const double start = espi_seconds();
    q.deadline = start + 10;
    cr_assert_eq(pthread_create(&killer, NULL, mock_kill_soon, &b.mock), 0);
    FAILS(ESP_ERR_COMM, "given up after 4 tries: http://127.0.0.1:", generate(&b, &r, &q));
    cr_assert(espi_seconds() - start < 5, "%.2f s", espi_seconds() - start);
    pthread_join(killer, NULL);
    bench_free(&b);
}

/* ---- a long run ---- */

/* Every step another adapter; a quarter of all requests goes wrong in one of many ways.  No group is lost, none comes twice, and each is of its own
 * step's adapter. */
Test(server, a_thousand_steps_against_a_server_on_a_bad_day, .timeout = 170) {
    bench b = bench_make(NULL, NULL, 1);
    espi_rollouts r;
    b.config.retries = 12;
    if (access("/dev/shm", W_OK) == 0) { /* a thousand adapters flushed to a disk would be most of the time */
        scratch_remove(b.dir);
        snprintf(b.dir, sizeof b.dir, "/dev/shm/espalier-test-XXXXXX");
        cr_assert_not_null(mkdtemp(b.dir));
    }
    OK(bench_open(&b));
    mock_tell(
        &b.mock, "/mock/random",
        "{\"rate\":0.25,\"seed\":5,\"kinds\":[\"error500\",\"error503\",\"error429\",\"slow\",\"dropped\",\"dropped-after\",\"cut\","
        "\"truncated\",\"empty\",\"not-json\",\"short-logprobs\",\"few-choices\",\"many-choices\",\"twice-choice\",\"missing-ids\","
        "\"bad-id\",\"positive-logprob\",\"null-logprob\",\"too-long\",\"wrong-finish\",\"aborted\",\"wrong-model\",\"wrong-prompt\"]}");
    double slowest = 0, worst = 0;
    for (int64_t step = 1; step <= 1000; step++) {
        const double start = espi_seconds();
        train(b.demo.model, step, step % 2 ? 0.001f : -0.001f);
        OK(b.source.publish(b.source.self, step));
        espi_rollout_request q = request_of(step, 1);
        q.n_prompts = 2;
        q.max_new_tokens = 3;
        OK(generate(&b, &r, &q));
        check_groups(&r, &q, step);
        worst = fmax(worst, distance(&r, b.demo.model, 1));
        espi_rollouts_free(&r);
        slowest = fmax(slowest, espi_seconds() - start);
    }
    const espi_server_counts c = counts_of(&b);
    cr_assert(worst <= 1e-6, "%g", worst);
    cr_assert_eq(c.groups, 2000);
    cr_assert_eq(c.lost + c.stale, 0);
    cr_assert_eq(c.published, 1001);
    cr_assert_eq(mock_count(&b.mock, "stale"), 0);
    cr_assert_eq(mock_count(&b.mock, "ids_twice"), 0);
    cr_assert_eq(mock_count(&b.mock, "without_id"), 0);
    cr_assert(c.retries > 500, "%lld", (long long)c.retries);
    cr_assert(slowest < 10, "%.2f s", slowest);
    bench_free(&b);
}
