/* esp_bench_gpu: seconds of whole SFT steps and of decoding on a GPU, random weights of a published shape, and what each op takes.
 *   esp_bench_gpu CONFIG_DIR [experts=nf4|mxfp4] [tokens=2048] [sequences=2] [steps=10] [rank=16] [budget=MiB] [decode=ROWS] [prompt=128]
 *                 [new=128] [adam8=1] [host_moments=1] [host_layers=N] [profile=1] [busy=1] [expert_ranks=N]
 * One line of JSON at the end.  As one rank of several (ESP_WORLD, or mpirun) every rank has tokens of its own, and rank 0 prints. */
#include "busy.h"
#include "core/record.h"
#include "espalier/espalier.h"
#include "kernels/backend.h"
#include "measure.h"
#include "random_model.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define OK(call)                                                                                                                           \
    do {                                                                                                                                   \
        if ((call) != ESP_OK) {                                                                                                            \
            fprintf(stderr, "%s: %s\n", #call, esp_last_error());                                                                          \
            return 1;                                                                                                                      \
        }                                                                                                                                  \
    } while (0)

/* ---- what each op takes: the GPU is waited for around each one ---- */

static const espi_backend *real;
static const espi_device *real_device;
static espi_backend timed;
static double op_seconds[ESPI_OP_COUNT];
static int64_t op_calls[ESPI_OP_COUNT];
static esp_ctx *timed_ctx;

#define ESPI_OP(op, args)                                                                                                                  \
    static esp_status timed_##op(const espi_exec *exec, const args *a) {                                                                   \
        esp_status status = espi_ctx_wait(timed_ctx);                                                                                      \
        const double start = now();                                                                                                        \
        if (status == ESP_OK) status = real->op.run(exec, a);                                                                              \
        if (status == ESP_OK) status = espi_ctx_wait(timed_ctx);                                                                           \
        op_seconds[ESPI_OP_##op] += now() - start;                                                                                         \
        op_calls[ESPI_OP_##op]++;                                                                                                          \
        return status;                                                                                                                     \
    }
#include "kernels/ops.def"
#undef ESPI_OP

/* Ops are to be run one by one, never from a recording. */
static esp_status no_record(void *device) {
    (void)device;
    return ESP_OK;
}
static esp_status no_graph(void *device, void **graph) {
    (void)device;
    *graph = NULL;
    return ESP_OK;
}
static esp_status no_launch(void *device, void *graph) {
    (void)device, (void)graph;
    return ESP_OK;
}

static void profile_begin(esp_ctx *ctx) {
    static espi_device unrecorded;
    espi_recordings_free(ctx);
    unrecorded = *ctx->device_ops;
    unrecorded.record_begin = no_record;
    unrecorded.record_end = no_graph;
    unrecorded.launch = no_launch;
    real_device = ctx->device_ops;
    ctx->device_ops = &unrecorded;
    real = ctx->backends[0];
    timed = *real;
    timed_ctx = ctx;
#define ESPI_OP(op, args)                                                                                                                  \
    if (real->op.run) timed.op.run = timed_##op;
#include "kernels/ops.def"
#undef ESPI_OP
    ctx->backends[0] = &timed;
    memset(op_seconds, 0, sizeof op_seconds);
    memset(op_calls, 0, sizeof op_calls);
}

static void profile_end(esp_ctx *ctx, const char *what) {
    static const char *const names[] = {
#define ESPI_OP(op, args) #op,
#include "kernels/ops.def"
#undef ESPI_OP
    };
    double all = 0;
    ctx->backends[0] = real;
    ctx->device_ops = real_device;
    for (int i = 0; i < ESPI_OP_COUNT; i++) all += op_seconds[i];
    printf("%s, op by op: %.1f ms\n", what, 1e3 * all);
    for (;;) {
        int most = 0;
        for (int i = 1; i < ESPI_OP_COUNT; i++)
            if (op_seconds[i] > op_seconds[most]) most = i;
        if (op_seconds[most] <= 0) break;
        printf("  %-16s %5lld calls %9.3f ms %5.1f %%  %8.1f us each\n", names[most], (long long)op_calls[most], 1e3 * op_seconds[most],
               100 * op_seconds[most] / all, 1e6 * op_seconds[most] / (double)op_calls[most]);
        op_seconds[most] = 0;
    }
}

/* ---- the runs ---- */

typedef struct options {
    const char *dir, *experts;
    int64_t tokens, sequences, steps, rank, budget, decode, profile, eight_bit, host_moments, host_layers, prompt, new_tokens, expert_ranks,
        busy;
} options;

static bool number_option(int64_t *value, const char *argument, const char *name) {
    const size_t n = strlen(name);
    if (strncmp(argument, name, n) != 0 || argument[n] != '=') return false;
    *value = strtoll(argument + n + 1, NULL, 10);
    return true;
}

static bool read_options(options *o, int argc, char **argv) {
    *o = (options){.experts = "nf4", .tokens = 2048, .sequences = 2, .steps = 10, .rank = 16, .prompt = 128, .new_tokens = 128};
    if (argc < 2) return false;
    o->dir = argv[1];
    for (int i = 2; i < argc; i++) {
        const struct {
            const char *name;
            int64_t *value;
        } numbers[] = {{"tokens", &o->tokens},
                       {"sequences", &o->sequences},
                       {"steps", &o->steps},
                       {"rank", &o->rank},
                       {"budget", &o->budget},
                       {"decode", &o->decode},
                       {"profile", &o->profile},
                       {"adam8", &o->eight_bit},
                       {"host_moments", &o->host_moments},
                       {"host_layers", &o->host_layers},
                       {"prompt", &o->prompt},
                       {"new", &o->new_tokens},
                       {"expert_ranks", &o->expert_ranks},
                       {"busy", &o->busy}};
        bool known = strncmp(argv[i], "experts=", 8) == 0;
        if (known) o->experts = argv[i] + 8;
        for (size_t k = 0; k < sizeof numbers / sizeof *numbers; k++)
            known = known || number_option(numbers[k].value, argv[i], numbers[k].name);
        if (!known) return false;
    }
    return o->steps <= 100;
}

static int one_step(esp_model *model, esp_optim *optim, const esp_batch *batch, double *loss, double times[4]) {
    esp_tensor hidden, d_hidden;
    const double start = now();
    OK(esp_model_forward(model, batch, &hidden));
    if (times) OK(espi_ctx_wait(model->ctx));
    const double forward = now();
    OK(esp_model_cross_entropy(model, batch, &hidden, loss, &d_hidden));
    const double head = now();
    OK(esp_model_backward(model, batch, &d_hidden));
    if (times) OK(espi_ctx_wait(model->ctx));
    const double backward = now();
    OK(esp_optim_step(optim));
    OK(espi_ctx_wait(model->ctx));
    if (times) {
        times[0] = forward - start;
        times[1] = head - forward;
        times[2] = backward - head;
        times[3] = now() - backward;
    }
    return 0;
}

/* Medians of a loss and its gradient by the hidden states: cross-entropy, and GRPO with a coefficient a token. */
static int time_losses(esp_model *model, const esp_batch *batch, double *cross_entropy, double *grpo) {
    enum { TIMES = 5 };
    const int64_t n = batch->n_tokens;
    double seconds[2][TIMES], loss;
    float *old = malloc((size_t)n * sizeof *old), *advantage = malloc((size_t)batch->n_seqs * sizeof *advantage);
    esp_batch rollouts = *batch;
    esp_tensor hidden, d_hidden;
    esp_grpo_stats stats = ESP_GRPO_STATS_INIT;
    rollouts.old_logprob = old;
    rollouts.advantage = advantage;
    for (int32_t s = 0; s < batch->n_seqs; s++) advantage[s] = s % 2 ? -0.5f : 0.75f;
    OK(esp_model_forward(model, batch, &hidden));
    OK(esp_model_logprob(model, batch, &hidden, 1.0f, old, NULL));
    for (int64_t i = 0; i < n; i++) old[i] += 3e-3f * (float)(i % 300 - 150); /* some ratios are clipped */
    for (int i = 0; i < TIMES; i++) {
        const double start = now();
        OK(esp_model_cross_entropy(model, batch, &hidden, &loss, &d_hidden));
        const double middle = now();
        OK(esp_grpo_loss(model, &rollouts, &hidden, &d_hidden, &stats));
        seconds[0][i] = middle - start;
        seconds[1][i] = now() - middle;
    }
    *cross_entropy = median(seconds[0], TIMES);
    *grpo = median(seconds[1], TIMES);
    printf("head and loss of %lld tokens: cross-entropy %.3f ms, GRPO %.3f ms (%.2f of the tokens clipped)\n", (long long)n,
           1e3 * *cross_entropy, 1e3 * *grpo, stats.clip_low + stats.clip_high);
    free(old);
    free(advantage);
    return 0;
}

/* What of the time of steps one after the other some kernel is running, and how often the host waits in one: appended to json. */
static int train_busy(esp_ctx *ctx, esp_model *model, esp_optim *optim, const esp_batch *batch, char *json, size_t room) {
    enum { WARM = 3, STEPS = 5 };
    double loss;
    if (!busy_begin()) return 0;
    espi_recordings_free(ctx); /* those made now are traced kernel by kernel */
    for (int i = 0; i < WARM; i++)
        if (one_step(model, optim, batch, &loss, NULL)) return 1;
    busy_restart();
    const double start = now();
    for (int i = 0; i < STEPS; i++)
        if (one_step(model, optim, batch, &loss, NULL)) return 1;
    const double seconds = (now() - start) / STEPS;
    const busy_time b = busy_end();
    espi_recordings_free(ctx);
    printf("%d steps traced: %.4f s each, of which a kernel was running %.4f s and gaps of up to 20 us took %.4f s; %.1f kernels and %.1f "
           "waits of the host a step\n",
           STEPS, seconds, b.running / STEPS, b.gaps / STEPS, (double)b.kernels / STEPS, (double)b.waits / STEPS);
    const size_t used = strlen(json);
    snprintf(json + used, room - used,
             ", \"traced_step_s\": %.5f, \"kernels_s\": %.5f, \"gaps_s\": %.5f, \"kernels\": %.1f, \"host_waits\": %.1f", seconds,
             b.running / STEPS, b.gaps / STEPS, (double)b.kernels / STEPS, (double)b.waits / STEPS);
    return 0;
}

static int train(const options *o, esp_ctx *ctx, esp_model *model, char *json, size_t room) {
    const int64_t n = o->tokens * o->sequences;
    int32_t *ids = malloc((size_t)n * sizeof *ids), *cu = malloc((size_t)(o->sequences + 1) * sizeof *cu);
    for (int64_t i = 0; i < n; i++) ids[i] = (int32_t)((uint64_t)i * 2654435761u % (uint64_t)(model->config.vocab / 2));
    for (int64_t i = 0; i <= o->sequences; i++) cu[i] = (int32_t)(i * o->tokens);
    const esp_batch batch = ESP_BATCH(.tokens = ids, .cu_seqlens = cu, .n_tokens = n, .n_seqs = (int32_t)o->sequences);
    esp_optim *optim;
    OK(esp_adamw_create(&optim, model,
                        &ESP_ADAMW_CONFIG(.lr = 1e-4f, .eight_bit = o->eight_bit != 0, .host_moments = o->host_moments != 0)));
    double seconds[100], parts[4] = {0}, loss = 0, cross_entropy, grpo;
    for (int i = 0; i < 2; i++)
        if (one_step(model, optim, &batch, &loss, NULL)) return 1;
    for (int i = 0; i < o->steps; i++) {
        const double start = now();
        if (one_step(model, optim, &batch, &loss, NULL)) return 1;
        seconds[i] = now() - start;
    }
    if (one_step(model, optim, &batch, &loss, parts) || time_losses(model, &batch, &cross_entropy, &grpo)) return 1;
    esp_memory memory = ESP_MEMORY_INIT;
    OK(esp_ctx_memory(ctx, &memory));
    const double step = median(seconds, (int)o->steps);
    printf("SFT step, %lld x %lld tokens, rank %lld: %.4f s (%.0f tokens/s), loss %.3f; forward %.4f, head %.4f, backward %.4f, optimiser "
           "%.4f s\n",
           (long long)o->sequences, (long long)o->tokens, (long long)o->rank, step, (double)n / step, loss, parts[0], parts[1], parts[2],
           parts[3]);
    printf("memory: peak %.2f GB; weights %.2f, adapter and gradients %.2f, optimiser %.2f, activations %.2f (used %.2f), pinned %.3f GB\n",
           1e-9 * (double)memory.peak, 1e-9 * (double)memory.weights, 1e-9 * (double)memory.adapter, 1e-9 * (double)memory.optimizer,
           1e-9 * (double)memory.activations, 1e-9 * (double)memory.activations_used, 1e-9 * (double)memory.pinned);
    snprintf(json, room,
             "\"step_s\": %.5f, \"tokens_per_s\": %.0f, \"forward_s\": %.5f, \"backward_s\": %.5f, \"optimizer_s\": %.5f, "
             "\"cross_entropy_s\": %.5f, \"grpo_loss_s\": %.5f, \"peak_gb\": %.3f, \"pinned_gb\": %.3f, \"weights_gb\": %.3f, "
             "\"activations_gb\": %.3f",
             step, (double)n / step, parts[0], parts[2], parts[3], cross_entropy, grpo, 1e-9 * (double)memory.peak,
             1e-9 * (double)memory.pinned, 1e-9 * (double)memory.weights, 1e-9 * (double)memory.activations);
    if (o->busy && train_busy(ctx, model, optim, &batch, json, room)) return 1;
    if (o->profile) {
        profile_begin(ctx);
        const int failed = one_step(model, optim, &batch, &loss, NULL);
        profile_end(ctx, "one SFT step");
        if (failed) return 1;
    }
    esp_optim_destroy(optim);
    free(ids);
    free(cu);
    return 0;
}

static int decode(const options *o, esp_ctx *ctx, esp_model *model, char *json, size_t room) {
    const int32_t rows = (int32_t)o->decode, prompt = (int32_t)o->prompt, more = (int32_t)o->new_tokens;
    int32_t *ids = malloc((size_t)(rows * prompt) * sizeof *ids), *cu = malloc((size_t)(rows + 1) * sizeof *cu);
    int32_t *tokens = malloc((size_t)(rows * more) * sizeof *tokens), *lengths = malloc((size_t)rows * sizeof *lengths);
    const int32_t no_stop = -1;
    esp_sampler *sampler;
    for (int32_t i = 0; i < rows * prompt; i++) ids[i] = (int32_t)((uint64_t)i * 2654435761u % (uint64_t)(model->config.vocab / 2));
    for (int32_t i = 0; i <= rows; i++) cu[i] = i * prompt;
    OK(esp_sampler_create(&sampler, model, &ESP_SAMPLER_CONFIG(.max_sequences = rows, .max_length = prompt + more)));
    esp_generate_config request = ESP_GENERATE_CONFIG(.prompts = ids, .cu_prompts = cu, .n_prompts = rows, .max_new_tokens = 2,
                                                      .stop_ids = &no_stop, .n_stop_ids = 1);
    double first = 0, all = 0;
    for (int i = 0; i < 2; i++) { /* the second time counts */
        request.max_new_tokens = 1;
        double start = now();
        OK(esp_sampler_generate(sampler, &request, tokens, NULL, lengths, NULL));
        first = now() - start;
        request.max_new_tokens = more;
        start = now();
        OK(esp_sampler_generate(sampler, &request, tokens, NULL, lengths, NULL));
        all = now() - start;
    }
    const double each = (all - first) / (more - 1);
    printf("decode: %d rows of %d + %d tokens: %.3f ms a step (%.0f tokens/s), prefill and first token %.3f s\n", rows, prompt, more,
           1e3 * each, (double)rows / each, first);
    snprintf(json, room, "\"decode_rows\": %d, \"decode_step_s\": %.6f, \"decode_tokens_per_s\": %.0f, \"prefill_s\": %.4f", rows, each,
             (double)rows / each, first);
    if (o->profile) {
        profile_begin(ctx);
        request.max_new_tokens = more < 9 ? more : 9;
        OK(esp_sampler_generate(sampler, &request, tokens, NULL, lengths, NULL));
        profile_end(ctx, "prefill and up to 8 decode steps");
    }
    esp_sampler_destroy(sampler);
    free(ids);
    free(cu);
    free(tokens);
    free(lengths);
    return 0;
}

int main(int argc, char **argv) {
    options o;
    esp_comm *comm;
    esp_ctx *ctx;
    esp_model *model;
    OK(esp_comm_init(&comm, &argc, &argv));
    if (esp_comm_rank(comm) > 0 && !freopen("/dev/null", "w", stdout)) return 1;
    stopwatch = CLOCK_MONOTONIC;
    char trained[1024] = "\"step_s\": null", decoded[512] = "\"decode_rows\": 0";
    if (!read_options(&o, argc, argv)) {
        fprintf(stderr,
                "usage: %s CONFIG_DIR [experts=nf4|mxfp4] [tokens=] [sequences=] [steps=] [rank=] [budget=MiB] [decode=ROWS] "
                "[prompt=] [new=] [adam8=1] [host_moments=1] [host_layers=N] [profile=1] [busy=1] [expert_ranks=N]\n",
                argv[0]);
        return 2;
    }
    const esp_status made = esp_ctx_create(&ctx, &ESP_CTX_CONFIG(.backend = "cuda", .comm = comm));
    if (made == ESP_ERR_UNSUPPORTED) {
        printf("skipped: %s\n", esp_last_error());
        return 77;
    }
    OK(made);
    const double start = now();
    OK(random_model(&model, ctx, o.dir,
                    &ESP_MODEL_CONFIG(.experts = strcmp(o.experts, "mxfp4") == 0 ? ESP_MXFP4 : ESP_NF4, .lora_rank = (int)o.rank,
                                      .activation_budget = (size_t)o.budget << 20, .host_layers = (int)o.host_layers,
                                      .expert_ranks = (int32_t)o.expert_ranks)));
    printf("%s: %lld layers, made in %.1f s\n", o.dir, (long long)model->config.layers, now() - start);
    if (o.steps > 0 && train(&o, ctx, model, trained, sizeof trained)) return 1;
    if (o.decode > 0 && decode(&o, ctx, model, decoded, sizeof decoded)) return 1;
    printf("{\"config\": \"%s\", \"experts\": \"%s\", \"ranks\": %d, \"expert_ranks\": %lld, \"tokens\": %lld, \"sequences\": %lld, "
           "\"rank\": %lld, %s, %s}\n",
           o.dir, o.experts, esp_comm_size(comm), (long long)o.expert_ranks, (long long)o.tokens, (long long)o.sequences, (long long)o.rank,
           trained, decoded);
    esp_model_destroy(model);
    esp_ctx_destroy(ctx);
    esp_comm_destroy(comm);
    return 0;
}
