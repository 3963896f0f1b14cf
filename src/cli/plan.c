/* espalier plan: memory of a training step by part and its peak, and ways to place the experts of several ranks, from config.json alone. */
#include "cli/cli.h"

#include <inttypes.h>
#include <string.h>

static void print_part(const char *part, size_t bytes) {
    printf("%-22s %14zu  %10.2f MiB\n", part, bytes, (double)bytes / (1 << 20));
}

static void print_plan(const esp_plan *plan) {
    print_part("dense weights", plan->dense_weights);
    print_part("expert weights", plan->expert_weights);
    if (plan->host_weights) print_part("  and in host memory", plan->host_weights);
    print_part("adapter", plan->adapter);
    print_part("gradients", plan->gradients);
    print_part("optimizer", plan->optimizer);
    if (plan->host_moments) print_part("  and in host memory", plan->host_moments);
    print_part("activations", plan->activations);
    print_part("  of these the head", plan->head);
    printf("%-22s %14" PRId64 "\n", "layers recomputed", plan->layers_recomputed);
    print_part("training", plan->total);
    print_part("staging while loading", plan->staging);
    print_part("predicted peak", plan->peak);
}

typedef struct plan_options {
    const char *dir, *backend;
    int64_t tokens, sequences, ranks, expert_ranks, micro_batches;
    double gflops, gbytes, microseconds, gweights, skew; /* of a rank; 0 = as stated below */
    size_t memory;
    esp_model_config model;
    esp_adamw_config adamw;
} plan_options;

static esp_status print_memory(esp_ctx *ctx, const plan_options *o) {
    esp_plan plan = ESP_PLAN_INIT;
    const esp_status status = esp_plan_folder(&plan, ctx, o->dir, &o->model, &o->adamw, o->tokens, (int32_t)o->sequences);
    if (status == ESP_OK) print_plan(&plan);
    return status;
}

/* What is assumed of a rank where no option says better: a GPU of the H200 class in a node with NVLink; two cores and shared memory. */
static esp_machine machine_of(const esp_ctx *ctx, const plan_options *o) {
    const bool gpu = strcmp(esp_ctx_backend(ctx), "cuda") == 0;
    return ESP_MACHINE(.flops = 1e9 * (o->gflops > 0 ? o->gflops
                                       : gpu         ? 350e3
                                                     : 100),
                       .memory = o->memory, .weights_per_second = 1e9 * o->gweights, .skew = o->skew,
                       .bytes_per_second = 1e9 * (o->gbytes > 0 ? o->gbytes
                                                  : gpu         ? 340
                                                                : 2),
                       .seconds_per_call = 1e-6 * (o->microseconds > 0 ? o->microseconds
                                                   : gpu               ? 20
                                                                       : 12));
}

static void print_placement(const esp_placement *p) {
    printf("%12d %14.2f %12.3f %12.3f %10.4f %10.4f %10.4f %10.4f  %s\n", p->expert_ranks, (double)p->plan.peak / (1 << 20),
           p->exchange_bytes / (1 << 20), p->sum_bytes / (1 << 20), p->seconds_compute, p->seconds_exchange, p->seconds_sum, p->seconds,
           p->fits ? "" : "does not fit");
}

/* The fastest that fits; of equals the one that spreads least. */
static esp_status print_placements(esp_ctx *ctx, const plan_options *o) {
    const esp_machine machine = machine_of(ctx, o);
    esp_placement best = ESP_PLACEMENT(.ranks = 0);
    printf("%d ranks, %d micro-batches of %" PRId64 " tokens each; a rank: %.0f GFLOP/s, %.1f GB/s, %.0f us a call%s\n", (int)o->ranks,
           (int)o->micro_batches, o->tokens, machine.flops / 1e9, machine.bytes_per_second / 1e9, machine.seconds_per_call * 1e6,
           o->gflops > 0 && o->gbytes > 0 ? "" : " (assumed; --gflops, --gbytes, --latency say better)");
    printf("%12s %14s %12s %12s %10s %10s %10s %10s\n", "expert ranks", "peak MiB", "layer MiB", "sums MiB", "compute s", "exchange s",
           "sums s", "step s");
    for (int32_t spread = 1; spread <= o->ranks; spread++) {
        if (o->ranks % spread != 0 || (o->expert_ranks > 0 && spread != o->expert_ranks)) continue;
        esp_model_config config = o->model;
        esp_placement p = ESP_PLACEMENT(.ranks = (int32_t)o->ranks, .micro_batches = (int32_t)o->micro_batches);
        config.expert_ranks = spread;
        const esp_status status = esp_plan_placement(&p, ctx, o->dir, &config, &o->adamw, o->tokens, (int32_t)o->sequences, &machine);
        if (status != ESP_OK) return status;
        print_placement(&p);
        if (p.fits && (best.ranks == 0 || p.seconds < best.seconds)) best = p;
    }
    if (best.ranks == 0)
        printf("nothing fits in %zu bytes a rank: more ranks, fewer tokens, --activation-budget, --8bit-adam\n", o->memory);
    else
        printf("choose: --expert-ranks %d, the fastest that fits\n", best.expert_ranks);
    return ESP_OK;
}

static esp_status print_all(const plan_options *o) {
    esp_ctx *ctx;
    esp_status status = esp_ctx_create(&ctx, &ESP_CTX_CONFIG(.backend = o->backend));
    if (status != ESP_OK) return status;
    status = o->ranks > 0 ? print_placements(ctx, o) : print_memory(ctx, o);
    esp_ctx_destroy(ctx);
    return status;
}

int espi_cli_plan(int argc, char **argv) {
    int64_t rank = 8, host_layers = 0;
    int experts = 0, code;
    plan_options o = {.backend = "auto", .sequences = 1, .micro_batches = 1, .model = ESP_MODEL_CONFIG(), .adamw = ESP_ADAMW_CONFIG()};
    const espi_option options[] = {
        {"--tokens", ESPI_OPTION_COUNT, &o.tokens, "N", "tokens of one forward/backward; required"},
        {"--sequences", ESPI_OPTION_COUNT, &o.sequences, "S", "in how many sequences (1)"},
        {"--rank", ESPI_OPTION_COUNT, &rank, "R", "LoRA rank (8)"},
        {"--experts", ESPI_OPTION_CHOICE, &experts, espi_cli_experts, "how frozen experts are held (auto: MXFP4 as it is, others as nf4)"},
        {"--double-quant", ESPI_OPTION_FLAG, &o.model.double_quant, NULL, "block scales through 8 bits"},
        {"--8bit-adam", ESPI_OPTION_FLAG, &o.adamw.eight_bit, NULL, "moments in 8 bits"},
        {"--host-moments", ESPI_OPTION_FLAG, &o.adamw.host_moments, NULL, "moments in the host's memory, of a GPU"},
        {"--host-layers", ESPI_OPTION_COUNT, &host_layers, "N", "layers whose weights stay in the host's memory, of a GPU (0)"},
        {"--activation-budget", ESPI_OPTION_BYTES, &o.model.activation_budget, "BYTES", "saved activations; K, M, G allowed (no bound)"},
        {"--backend", ESPI_OPTION_TEXT, &o.backend, "NAME", "cpu, cuda, ref or ref64 (auto)"},
        {"--ranks", ESPI_OPTION_COUNT, &o.ranks, "R",
         "of a job: bytes, memory of a rank and predicted time of every placement of the experts"},
        {"--expert-ranks", ESPI_OPTION_COUNT, &o.expert_ranks, "S", "only this placement (all divisors of R)"},
        {"--micro-batches", ESPI_OPTION_COUNT, &o.micro_batches, "M", "of each rank in a step (1)"},
        {"--gflops", ESPI_OPTION_REAL, &o.gflops, "X", "of a rank, in products (CPU 100, GPU 350000)"},
        {"--gbytes", ESPI_OPTION_REAL, &o.gbytes, "X", "a second that a rank sends (CPU 2, GPU 340)"},
        {"--latency", ESPI_OPTION_REAL, &o.microseconds, "US", "of an exchange of nothing (CPU 12, GPU 20)"},
        {"--gweights", ESPI_OPTION_REAL, &o.gweights, "X", "weights of experts that a rank unpacks a second (not counted)"},
        {"--skew", ESPI_OPTION_REAL, &o.skew, "X", "routed rows of the busiest rank over the mean (1)"},
        {"--memory", ESPI_OPTION_BYTES, &o.memory, "BYTES", "that each rank has; K, M, G allowed (not looked at)"},
    };
    const espi_usage usage = {"plan",  "Memory of one training step by part, and its peak.  Reads config.json, no weights.",
                              "DIR",   &o.dir,
                              options, sizeof options / sizeof options[0]};
    if (!espi_cli_parse(&code, &usage, argc, argv)) return code;
    if (o.tokens < 1 || o.sequences < 1 || o.sequences > INT32_MAX || o.sequences > o.tokens)
        return espi_cli_misuse(&usage, "--tokens %" PRId64 " in --sequences %" PRId64 " is no batch: every sequence has a token", o.tokens,
                               o.sequences);
    if (rank < 1 || rank > INT32_MAX) return espi_cli_misuse(&usage, "--rank cannot be %" PRId64 "; expected at least 1", rank);
    if (host_layers > INT32_MAX) return espi_cli_misuse(&usage, "--host-layers cannot be %" PRId64 "; expected fewer", host_layers);
    o.model.lora_rank = (int)rank;
    o.model.host_layers = (int)host_layers;
    o.model.experts = espi_cli_format(experts);
    if (o.ranks > 4096 || o.micro_batches < 1 || o.micro_batches > INT32_MAX ||
        (o.expert_ranks > 0 && (o.ranks < 1 || o.ranks % o.expert_ranks != 0)))
        return espi_cli_misuse(&usage,
                               "--ranks %" PRId64 " with --expert-ranks %" PRId64 " and --micro-batches %" PRId64
                               ": expected at most 4096 ranks, a divisor of them, and at least 1",
                               o.ranks, o.expert_ranks, o.micro_batches);
    const esp_status status = print_all(&o);
    return status == ESP_OK ? ESPI_EXIT_OK : espi_cli_failed("plan", status);
}
