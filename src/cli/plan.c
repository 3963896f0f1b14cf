/* espalier plan: memory of a training step by part and its peak, from config.json alone. */
#include "cli/cli.h"

#include <inttypes.h>

static void print_part(const char *part, size_t bytes) {
    printf("%-22s %14zu  %10.2f MiB\n", part, bytes, (double)bytes / (1 << 20));
}

static void print_plan(const esp_plan *plan) {
    print_part("dense weights", plan->dense_weights);
    print_part("expert weights", plan->expert_weights);
    print_part("adapter", plan->adapter);
    print_part("gradients", plan->gradients);
    print_part("optimizer", plan->optimizer);
    print_part("activations", plan->activations);
    print_part("  of these the head", plan->head);
    printf("%-22s %14" PRId64 "\n", "layers recomputed", plan->layers_recomputed);
    print_part("training", plan->total);
    print_part("staging while loading", plan->staging);
    print_part("predicted peak", plan->peak);
}

typedef struct plan_options {
    const char *dir, *backend;
    int64_t tokens, sequences;
    esp_model_config model;
    esp_adamw_config adamw;
} plan_options;

static esp_status make_plan(esp_plan *plan, const plan_options *o) {
    esp_ctx *ctx;
    esp_status status = esp_ctx_create(&ctx, &ESP_CTX_CONFIG(.backend = o->backend));
    if (status != ESP_OK) return status;
    status = esp_plan_folder(plan, ctx, o->dir, &o->model, &o->adamw, o->tokens, (int32_t)o->sequences);
    esp_ctx_destroy(ctx);
    return status;
}

int espi_cli_plan(int argc, char **argv) {
    int64_t rank = 8;
    int experts = 0, code;
    plan_options o = {.backend = "auto", .sequences = 1, .model = ESP_MODEL_CONFIG(), .adamw = ESP_ADAMW_CONFIG()};
    const espi_option options[] = {
        {"--tokens", ESPI_OPTION_COUNT, &o.tokens, "N", "tokens of one forward/backward; required"},
        {"--sequences", ESPI_OPTION_COUNT, &o.sequences, "S", "in how many sequences (1)"},
        {"--rank", ESPI_OPTION_COUNT, &rank, "R", "LoRA rank (8)"},
        {"--experts", ESPI_OPTION_CHOICE, &experts, espi_cli_experts, "how frozen experts are held (auto: MXFP4 as it is, others as nf4)"},
        {"--double-quant", ESPI_OPTION_FLAG, &o.model.double_quant, NULL, "block scales through 8 bits"},
        {"--8bit-adam", ESPI_OPTION_FLAG, &o.adamw.eight_bit, NULL, "moments in 8 bits"},
        {"--activation-budget", ESPI_OPTION_BYTES, &o.model.activation_budget, "BYTES", "saved activations; K, M, G allowed (no bound)"},
        {"--backend", ESPI_OPTION_TEXT, &o.backend, "NAME", "cpu, cuda, ref or ref64 (auto)"},
    };
    const espi_usage usage = {"plan",  "Memory of one training step by part, and its peak.  Reads config.json, no weights.",
                              "DIR",   &o.dir,
                              options, sizeof options / sizeof options[0]};
    if (!espi_cli_parse(&code, &usage, argc, argv)) return code;
    if (o.tokens < 1 || o.sequences < 1 || o.sequences > INT32_MAX || o.sequences > o.tokens)
        return espi_cli_misuse(&usage, "--tokens %" PRId64 " in --sequences %" PRId64 " is no batch: every sequence has a token", o.tokens,
                               o.sequences);
    if (rank < 1 || rank > INT32_MAX) return espi_cli_misuse(&usage, "--rank cannot be %" PRId64 "; expected at least 1", rank);
    o.model.lora_rank = (int)rank;
    o.model.experts = espi_cli_format(experts);
    esp_plan plan = ESP_PLAN_INIT;
    esp_status status = make_plan(&plan, &o);
    if (status != ESP_OK) return espi_cli_failed("plan", status);
    print_plan(&plan);
    return ESPI_EXIT_OK;
}
