/* espalier generate: continues a prompt, with or without an adapter. */
#include "cli/cli.h"

#include "core/status.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#define LEAST_TEMPERATURE 1e-6 /* logits are divided by it in 32 bits */

typedef struct generate_options {
    const char *dir, *prompt, *adapter, *device;
    int64_t max_new_tokens, samples, seed, batch, top_k;
    double temperature, top_p, min_p;
    espi_words stops, stop_tokens;
    int experts;
} generate_options;

/* Everything a run holds; what is NULL was not made. */
typedef struct session {
    esp_ctx *ctx;
    esp_model *model;
    esp_tokenizer *tokenizer;
    esp_sampler *sampler;
    int32_t *prompt, *tokens, *lengths;
    char **texts; /* [samples] of the samples that wait for those before them */
    int64_t samples;
} session;

static void close_session(session *s) {
    esp_sampler_destroy(s->sampler);
    esp_tokenizer_destroy(s->tokenizer);
    esp_model_destroy(s->model);
    esp_ctx_destroy(s->ctx);
    free(s->prompt);
    free(s->tokens);
    free(s->lengths);
    for (int64_t i = 0; s->texts && i < s->samples; i++) free(s->texts[i]);
    free(s->texts);
}

static esp_status open_session(session *s, const generate_options *o) {
    ESPI_TRY(esp_ctx_create(&s->ctx, &ESP_CTX_CONFIG(.backend = espi_cli_device(o->device))));
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

/* The first sample is printed as it is drawn, the others are kept until it is their turn. */
static int take_text(void *user, int32_t row, const char *text, size_t bytes, bool last) {
    session *s = user;
    (void)last;
    if (row == 0) {
        fwrite(text, 1, bytes, stdout);
        fflush(stdout);
        return 0;
    }
    const size_t used = s->texts[row] ? strlen(s->texts[row]) : 0;
    char *grown = realloc(s->texts[row], used + bytes + 1);
    if (!grown) return 1;
    memcpy(grown + used, text, bytes);
    grown[used + bytes] = '\0';
    s->texts[row] = grown;
    return 0;
}

/* Ids of the tokens that are named; without any, the model's own end counts. */
static esp_status stop_ids(int32_t ids[ESPI_MAX_WORDS], const session *s, const generate_options *o) {
    for (int32_t i = 0; i < o->stop_tokens.n; i++) {
        ids[i] = esp_tokenizer_id(s->tokenizer, o->stop_tokens.text[i]);
        if (ids[i] < 0)
            return ESPI_FAIL(ESP_ERR_ARG, "--stop-token: got '%s', expected one token of this model's tokenizer; for other text use --stop",
                             o->stop_tokens.text[i]);
    }
    return ESP_OK;
}

static esp_status generate(session *s, const generate_options *o) {
    int32_t n, ids[ESPI_MAX_WORDS];
    ESPI_TRY(open_session(s, o));
    ESPI_TRY(encode_prompt(s, o->prompt, &n));
    ESPI_TRY(stop_ids(ids, s, o));
    const int64_t row = o->max_new_tokens, together = o->batch ? o->batch : o->samples < 128 ? o->samples : 128;
    ESPI_TRY(esp_sampler_create(&s->sampler, s->model,
                                &ESP_SAMPLER_CONFIG(.max_sequences = (int32_t)together, .max_length = (int32_t)(n + row),
                                                    .max_kept = (int32_t)o->top_k, .max_new_tokens = (int32_t)row, .max_prompts = 1)));
    s->samples = o->samples;
    s->texts = espi_cli_memory((size_t)o->samples * sizeof *s->texts);
    s->tokens = espi_cli_memory((size_t)(o->samples * row) * sizeof *s->tokens);
    s->lengths = espi_cli_memory((size_t)o->samples * sizeof *s->lengths);
    const int32_t cu[2] = {0, n};
    const esp_generate_config config =
        ESP_GENERATE_CONFIG(.prompts = s->prompt, .cu_prompts = cu, .n_prompts = 1, .samples = (int32_t)o->samples,
                            .max_new_tokens = (int32_t)row, .temperature = (float)o->temperature, .greedy = o->temperature == 0,
                            .seed = (uint64_t)o->seed, .top_k = (int32_t)o->top_k, .top_p = (float)o->top_p, .min_p = (float)o->min_p,
                            .tokenizer = s->tokenizer, .stop_strings = o->stops.text, .n_stop_strings = o->stops.n,
                            .stop_ids = o->stop_tokens.n > 0 ? ids : NULL, .n_stop_ids = o->stop_tokens.n, .on_text = take_text,
                            .on_text_user = s);
    printf("%s", o->prompt);
    ESPI_TRY(esp_sampler_generate(s->sampler, &config, s->tokens, NULL, s->lengths, NULL));
    printf("\n");
    for (int64_t i = 1; i < o->samples; i++) printf("%s%s\n", o->prompt, s->texts[i] ? s->texts[i] : "");
    return ESP_OK;
}

int espi_cli_generate(int argc, char **argv) {
    generate_options o = {.max_new_tokens = 64, .samples = 1, .temperature = 1};
    const espi_option options[] = {
        {"--prompt", ESPI_OPTION_TEXT, &o.prompt, "TEXT", "what to continue; required"},
        {"--adapter", ESPI_OPTION_TEXT, &o.adapter, "DIR", "a PEFT adapter folder"},
        {"--max-new-tokens", ESPI_OPTION_COUNT, &o.max_new_tokens, "N", "at most so many (64)"},
        {"--temperature", ESPI_OPTION_REAL, &o.temperature, "T", "0 = greedy (1)"},
        {"--top-k", ESPI_OPTION_COUNT, &o.top_k, "K", "draw from the K most likely tokens only"},
        {"--top-p", ESPI_OPTION_REAL, &o.top_p, "P", "... from the fewest that have P of the probability"},
        {"--min-p", ESPI_OPTION_REAL, &o.min_p, "P", "... from those with at least P of the largest probability"},
        {"--stop", ESPI_OPTION_LIST, &o.stops, "TEXT", "end before this text; may be given several times"},
        {"--stop-token", ESPI_OPTION_LIST, &o.stop_tokens, "TOKEN", "end at this token instead of the model's; several times too"},
        {"--batch", ESPI_OPTION_COUNT, &o.batch, "N", "so many continuations at a time (all, at most 128); changes no result"},
        {"--samples", ESPI_OPTION_COUNT, &o.samples, "N", "continuations, one a line (1)"},
        {"--seed", ESPI_OPTION_COUNT, &o.seed, "S", "of the draws (0)"},
        {"--device", ESPI_OPTION_TEXT, &o.device, "NAME", "cuda, cpu, or auto: a GPU where one is usable (cpu)"},
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
        return espi_cli_misuse(&usage, "--max-new-tokens %" PRId64 " and --samples %" PRId64 " must be from 1 to %d and %d",
                               o.max_new_tokens, o.samples, INT32_MAX / 2, INT32_MAX);
    if (o.batch > INT32_MAX || o.top_k > INT32_MAX)
        return espi_cli_misuse(&usage, "--batch %" PRId64 " and --top-k %" PRId64 " must be smaller", o.batch, o.top_k);
    if (o.temperature < 0) return espi_cli_misuse(&usage, "--temperature cannot be %g; expected 0 or more", o.temperature);
    if (o.temperature != 0 && !(o.temperature >= LEAST_TEMPERATURE && o.temperature <= 1 / LEAST_TEMPERATURE))
        return espi_cli_misuse(&usage, "--temperature cannot be %g; expected 0, which is greedy, or %g to %g", o.temperature,
                               LEAST_TEMPERATURE, 1 / LEAST_TEMPERATURE);
    session s = {0};
    esp_status status = generate(&s, &o);
    if (status != ESP_OK) code = espi_cli_failed("generate", status);
    close_session(&s);
    return code;
}
