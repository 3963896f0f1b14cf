/* espalier generate: continues a prompt, with or without an adapter. */
#include "cli/cli.h"

#include "core/status.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

typedef struct generate_options {
    const char *dir, *prompt, *adapter;
    int64_t max_new_tokens, samples, seed;
    double temperature;
    int experts;
} generate_options;

/* Everything a run holds; what is NULL was not made. */
typedef struct session {
    esp_ctx *ctx;
    esp_model *model;
    esp_tokenizer *tokenizer;
    esp_sampler *sampler;
    int32_t *prompt, *tokens, *lengths;
} session;

static void close_session(session *s) {
    esp_sampler_destroy(s->sampler);
    esp_tokenizer_destroy(s->tokenizer);
    esp_model_destroy(s->model);
    esp_ctx_destroy(s->ctx);
    free(s->prompt);
    free(s->tokens);
    free(s->lengths);
}

static esp_status open_session(session *s, const generate_options *o) {
    ESPI_TRY(esp_ctx_create(&s->ctx, NULL));
    ESPI_TRY(esp_tokenizer_load(&s->tokenizer, o->dir));
    ESPI_TRY(esp_model_load(&s->model, s->ctx, o->dir,
                            &ESP_MODEL_CONFIG(.experts = espi_cli_format(o->experts), .adapter_dir = o->adapter,
                                              .lora_targets = o->adapter ? 0 : ESP_LORA_NOTHING)));
    return ESP_OK;
}

static esp_status encode_prompt(session *s, const char *text, int32_t *n) {
    const size_t bytes = strlen(text), capacity = bytes + 16;
    size_t count;
    s->prompt = espi_cli_memory(capacity * sizeof *s->prompt);
    ESPI_TRY(esp_tokenizer_encode(s->tokenizer, text, bytes, true, false, s->prompt, capacity, &count));
    *n = (int32_t)count;
    return ESP_OK;
}

/* The first sample as it is drawn. */
typedef struct stream {
    const esp_tokenizer *tokenizer;
    esp_decode_state state;
} stream;

static esp_status print_token(stream *s, int32_t id) {
    char text[1024];
    size_t bytes;
    ESPI_TRY(esp_tokenizer_decode_next(s->tokenizer, &s->state, id, true, text, sizeof text, &bytes));
    fwrite(text, 1, bytes, stdout);
    fflush(stdout);
    return ESP_OK;
}

static int first_sample(void *user, int32_t row, int32_t index, int32_t id, float logprob) {
    (void)index, (void)logprob;
    return row == 0 && print_token(user, id) != ESP_OK;
}

static esp_status print_sample(const session *s, const generate_options *o, const int32_t *tokens, int32_t length) {
    stream out = {.tokenizer = s->tokenizer};
    printf("%s", o->prompt);
    for (int32_t i = 0; i < length; i++) ESPI_TRY(print_token(&out, tokens[i]));
    printf("\n");
    return ESP_OK;
}

static esp_status generate(session *s, const generate_options *o) {
    int32_t n;
    ESPI_TRY(open_session(s, o));
    ESPI_TRY(encode_prompt(s, o->prompt, &n));
    const int64_t row = o->max_new_tokens;
    ESPI_TRY(esp_sampler_create(&s->sampler, s->model,
                                &ESP_SAMPLER_CONFIG(.max_sequences = (int32_t)o->samples, .max_length = (int32_t)(n + row))));
    s->tokens = espi_cli_memory((size_t)(o->samples * row) * sizeof *s->tokens);
    s->lengths = espi_cli_memory((size_t)o->samples * sizeof *s->lengths);
    const int32_t cu[2] = {0, n};
    stream first = {.tokenizer = s->tokenizer};
    const esp_generate_config config =
        ESP_GENERATE_CONFIG(.prompts = s->prompt, .cu_prompts = cu, .n_prompts = 1, .samples = (int32_t)o->samples,
                            .max_new_tokens = (int32_t)row, .temperature = (float)o->temperature, .greedy = o->temperature == 0,
                            .seed = (uint64_t)o->seed, .on_token = first_sample, .on_token_user = &first);
    printf("%s", o->prompt);
    ESPI_TRY(esp_sampler_generate(s->sampler, &config, s->tokens, NULL, s->lengths, NULL));
    printf("\n");
    for (int64_t i = 1; i < o->samples; i++) ESPI_TRY(print_sample(s, o, s->tokens + i * row, s->lengths[i]));
    return ESP_OK;
}

int espi_cli_generate(int argc, char **argv) {
    generate_options o = {.max_new_tokens = 64, .samples = 1, .temperature = 1};
    const espi_option options[] = {
        {"--prompt", ESPI_OPTION_TEXT, &o.prompt, "TEXT", "what to continue; required"},
        {"--adapter", ESPI_OPTION_TEXT, &o.adapter, "DIR", "a PEFT adapter folder"},
        {"--max-new-tokens", ESPI_OPTION_COUNT, &o.max_new_tokens, "N", "at most so many (64)"},
        {"--temperature", ESPI_OPTION_REAL, &o.temperature, "T", "0 = greedy (1)"},
        {"--samples", ESPI_OPTION_COUNT, &o.samples, "N", "continuations, one a line (1)"},
        {"--seed", ESPI_OPTION_COUNT, &o.seed, "S", "of the draws (0)"},
        {"--experts", ESPI_OPTION_CHOICE, &o.experts, espi_cli_experts,
         "how frozen experts are held (auto: MXFP4 as it is, others as nf4)"},
    };
    const espi_usage usage = {"generate", "Continues a prompt with the model of a Hugging Face folder.",
                              "DIR",      &o.dir,
                              options,    sizeof options / sizeof options[0]};
    int code;
    if (!espi_cli_parse(&code, &usage, argc, argv)) return code;
    if (!o.prompt) return espi_cli_misuse(&usage, "--prompt is missing");
    if (o.max_new_tokens < 1 || o.max_new_tokens > INT32_MAX / 2 || o.samples < 1 || o.samples > INT32_MAX)
        return espi_cli_misuse(&usage, "--max-new-tokens %" PRId64 " and --samples %" PRId64 " must be at least 1", o.max_new_tokens,
                               o.samples);
    if (o.temperature < 0) return espi_cli_misuse(&usage, "--temperature cannot be %g; expected 0 or more", o.temperature);
    session s = {0};
    esp_status status = generate(&s, &o);
    if (status != ESP_OK) code = espi_cli_failed("generate", status);
    close_session(&s);
    return code;
}
