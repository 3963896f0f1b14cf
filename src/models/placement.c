/* What a job of several ranks would take of each, what they would send, and how long a step would last, for a way to place the experts. */
#include "espalier/plan.h"
#include "models/passes.h"

#include <math.h>

/* A context whose communicator says that it is `rank` of `ranks`, and no more; *before is what it had. */
static esp_status imagine(esp_comm **before, esp_ctx *ctx, int rank, int ranks) {
    esp_comm *comm;
    ESPI_TRY(espi_comm_imagine(&comm, rank, ranks));
    *before = ctx->comm;
    ctx->comm = comm;
    return ESP_OK;
}

static void wake(esp_ctx *ctx, esp_comm *before) {
    esp_comm_destroy(ctx->comm);
    ctx->comm = before;
}

/* The sizes of a model that the figures below are made of. */
typedef struct sizes {
    double dense_lora, expert_lora; /* trained values: of attention; of one expert in all layers */
    double active, routed;          /* weights that a token is multiplied with; those of experts among them */
    double expert;                  /* weights of one expert in all layers */
    int64_t experts, hidden, top_k, moe_layers, layers;
} sizes;

static double weights_of(const espi_linear *linear) {
    return (double)linear->w.rows * (double)linear->w.cols;
}

static void measure(sizes *s, esp_model *model) {
    const espi_config *c = &model->config;
    *s = (sizes){.experts = c->experts, .hidden = c->hidden, .top_k = c->top_k, .moe_layers = c->moe_layers, .layers = c->layers};
    s->active = (double)c->vocab * (double)c->hidden;
    for (int64_t l = 0; l < c->layers; l++) {
        const espi_layer *w = &model->layers[l];
        s->active += weights_of(&w->q) + weights_of(&w->k) + weights_of(&w->v) + weights_of(&w->o);
        const espi_linear *const attention[] = {&w->q, &w->k, &w->v, &w->o};
        for (int i = 0; i < 4; i++) s->dense_lora += (double)attention[i]->lora.r * (double)(attention[i]->w.rows + attention[i]->w.cols);
        if (w->mlp == ESPI_MLP_DENSE) {
            s->active += weights_of(&w->mlp_gate_up) + weights_of(&w->mlp_down);
            continue;
        }
        s->active += (double)(w->router.rows * w->router.cols) + weights_of(&w->shared_gate_up) + weights_of(&w->shared_down);
        s->expert += (double)(w->gate_up.rows * w->gate_up.cols + w->down.rows * w->down.cols);
        s->expert_lora += (double)w->lora_gate_up.r * (double)(w->gate_up.rows + w->gate_up.cols) +
                          (double)w->lora_down.r * (double)(w->down.rows + w->down.cols);
    }
    s->routed = (double)c->top_k * s->expert;
    s->active += s->routed;
}

static esp_status sizes_of(sizes *s, esp_ctx *ctx, const char *dir, const esp_model_config *config) {
    esp_model model;
    const esp_status status = espi_model_outline(&model, ctx, dir, config);
    if (status == ESP_OK) measure(s, &model);
    espi_model_outline_free(&model);
    return status;
}

/* The member of a group that holds most experts, and how many those are. */
static int busiest(int64_t *most, int64_t experts, int spread) {
    int member = 0;
    *most = -1;
    for (int m = 0; m < spread; m++) {
        const int64_t n = experts * (m + 1) / spread - experts * m / spread;
        if (n <= *most) continue;
        *most = n;
        member = m;
    }
    return member;
}

/* What travels: rows forward and back, then gradients there and back with the rows' weights.  The others wait for the rank that most rows
 * come to.  Experts are run once for every rank that rows come from. */
static void predict(esp_placement *p, const sizes *s, const esp_ctx *ctx, int64_t own, int64_t tokens, const esp_machine *machine) {
    const int copies = p->ranks / p->expert_ranks;
    const double spread = p->expert_ranks, real = (double)ctx->real_size, act = (double)ctx->act_size;
    const double skew = p->expert_ranks > 1 && machine->skew > 0 ? machine->skew : 1;
    const double rows = skew * (double)(tokens * s->top_k) * (spread - 1) / spread;
    enum { CALLS = 5, TENSORS = 12 }; /* of a layer: its counts and four exchanges; its matrices of LoRA */
    p->exchange_bytes = rows * (4 * (double)s->hidden * act + 2 * real);
    p->sum_bytes =
        real * (s->dense_lora * 2 * (p->ranks - 1) / p->ranks + s->expert_lora * (double)own * (spread + 1) * (copies - 1) / copies);
    p->seconds_compute = 4 * (s->active + (skew - 1) * s->routed) * (double)tokens / machine->flops;
    if (machine->weights_per_second > 0) p->seconds_compute += 2 * s->expert * (double)own * spread / machine->weights_per_second;
    if (p->expert_ranks > 1)
        p->seconds_exchange = (double)s->moe_layers * (p->exchange_bytes / machine->bytes_per_second + CALLS * machine->seconds_per_call);
    if (p->ranks > 1)
        p->seconds_sum = p->sum_bytes / machine->bytes_per_second +
                         2 * ceil((double)(TENSORS * s->layers) / ESPI_SUMS_TOGETHER) * machine->seconds_per_call;
    p->seconds = p->micro_batches * (p->seconds_compute + p->seconds_exchange + p->seconds_sum);
    p->fits = machine->memory == 0 || p->plan.peak <= machine->memory;
}

esp_status esp_plan_placement(esp_placement *out, esp_ctx *ctx, const char *dir, const esp_model_config *config,
                              const esp_adamw_config *adamw, int64_t n_tokens, int32_t n_seqs, const esp_machine *given) {
    if (!out || !ctx || !dir || !given)
        return ESPI_FAIL(ESP_ERR_ARG, "esp_plan_placement: out, ctx, dir or machine is NULL, expected all four");
    esp_placement p = {.ranks = out->ranks, .micro_batches = out->micro_batches > 0 ? out->micro_batches : 1};
    esp_model_config options;
    esp_machine machine;
    ESPI_TRY(espi_struct_read(&options, sizeof options, config, "esp_model_config"));
    ESPI_TRY(espi_struct_read(&machine, sizeof machine, given, "esp_machine"));
    if (p.ranks < 1 || !(machine.flops > 0) || !(machine.bytes_per_second > 0) || !(machine.seconds_per_call >= 0) ||
        !(machine.weights_per_second >= 0) || !(machine.skew == 0 || machine.skew >= 1))
        return ESPI_FAIL(
            ESP_ERR_ARG,
            "esp_plan_placement: got %d ranks; %g operations, %g bytes and %g weights a second; %g seconds a call; a skew of %g, expected "
            "positive numbers, weights and skew may be 0, a skew is at least 1",
            p.ranks, machine.flops, machine.bytes_per_second, machine.weights_per_second, machine.seconds_per_call, machine.skew);
    p.expert_ranks = options.expert_ranks > 0 ? options.expert_ranks : p.ranks;
    esp_comm *before;
    sizes s;
    int64_t own = 0;
    ESPI_TRY(imagine(&before, ctx, 0, p.ranks));
    esp_status status = sizes_of(&s, ctx, dir, &options);
    wake(ctx, before);
    ESPI_TRY(status);
    ESPI_TRY(imagine(&before, ctx, busiest(&own, s.experts, p.expert_ranks), p.ranks));
    p.plan = (esp_plan)ESP_PLAN_INIT;
    status = esp_plan_folder(&p.plan, ctx, dir, &options, adamw, n_tokens, n_seqs);
    wake(ctx, before);
    ESPI_TRY(status);
    predict(&p, &s, ctx, own, n_tokens, &machine);
    return espi_struct_write(out, &p, sizeof p, "esp_placement");
}
