/* AdamW over a model's adapter: moments in one room of the context, global-norm clipping, learning rate by schedule. */
#include "core/decimal.h"
#include "core/select.h"
#include "espalier/quant.h"
#include "models/passes.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* bitsandbytes' 8-bit form: scale blocks of this many values, and only for tensors of at least EIGHT_BIT_MIN. */
#define EIGHT_BIT_BLOCK 256
#define EIGHT_BIT_MIN 4096
/* Keeps the clip factor finite at norm 0, as torch has it. */
#define CLIP_FLOOR 1e-6

/* Of one trained tensor. */
typedef struct moments {
    int64_t count;
    int64_t parts;  /* experts here, each with its own sum of squares; 1 of others */
    bool by_expert; /* ... or of tensors that are summed in one call, see find_runs */
    bool eight_bit;
    void *m, *v;                /* real [count], or codes u8 [count] */
    float *absmax_m, *absmax_v; /* [blocks] of codes, else NULL */
    int64_t run;                /* how many tensors from this one on are updated by one call; 0: an earlier one's call does it */
} moments;

struct esp_optim {
    esp_model *model;
    espi_adamw_settings set;
    int64_t n;
    moments *tensors;        /* [n] in the order of the model's parameters */
    esp_optim_array *arrays; /* [n_arrays] what a checkpoint keeps */
    int64_t n_arrays;
    espi_room room;
    espi_arena arena;                /* over the room: moments, then the scratch of the ops */
    double *square_sums, *host_sums; /* [n_parts] sums of squares here; room in host memory for find_norm */
    int64_t n_parts, n_sums;         /* parts of all tensors here; of the whole model */
    const float *map1, *map2;        /* of the 8-bit form, where the ops read them */
    int64_t step, skipped;
    double grad_norm, lr;
};

static esp_status check_settings(const espi_adamw_settings *s) {
    if (!(s->lr > 0) || !isfinite(s->lr)) return ESPI_FAIL(ESP_ERR_ARG, "adamw: lr is %g, expected a positive number", s->lr);
    if (!(s->beta1 >= 0 && s->beta1 < 1) || !(s->beta2 >= 0 && s->beta2 < 1))
        return ESPI_FAIL(ESP_ERR_ARG, "adamw: beta1 is %g and beta2 %g, expected numbers in [0, 1)", s->beta1, s->beta2);
    if (!(s->eps > 0) || !isfinite(s->eps)) return ESPI_FAIL(ESP_ERR_ARG, "adamw: eps is %g, expected a positive number", s->eps);
    if (!(s->weight_decay >= 0) || !isfinite(s->weight_decay))
        return ESPI_FAIL(ESP_ERR_ARG, "adamw: weight_decay is %g, expected 0 or a positive number", s->weight_decay);
    if (isnan(s->max_grad_norm)) return ESPI_FAIL(ESP_ERR_ARG, "adamw: max_grad_norm is NaN, expected a number (negative = no clipping)");
    if ((int)s->schedule < ESP_SCHEDULE_CONSTANT || (int)s->schedule > ESP_SCHEDULE_COSINE_WITH_RESTARTS)
        return ESPI_FAIL(ESP_ERR_ARG, "adamw: schedule is %d, expected 0 to 3 (esp_schedule)", (int)s->schedule);
    if (s->warmup_steps < 0 || s->total_steps < 0)
        return ESPI_FAIL(ESP_ERR_ARG, "adamw: warmup_steps is %lld and total_steps %lld, expected 0 or more", (long long)s->warmup_steps,
                         (long long)s->total_steps);
    if (s->schedule != ESP_SCHEDULE_CONSTANT && s->total_steps <= s->warmup_steps)
        return ESPI_FAIL(ESP_ERR_ARG,
                         "adamw: a schedule that is not constant with total_steps %lld and warmup_steps %lld; set total_steps above",
                         (long long)s->total_steps, (long long)s->warmup_steps);
    if (!(s->num_cycles >= 0) || !isfinite(s->num_cycles))
        return ESPI_FAIL(ESP_ERR_ARG, "adamw: num_cycles is %g, expected a positive number (0 = the schedule's default)", s->num_cycles);
    const bool cycles = s->schedule == ESP_SCHEDULE_COSINE || s->schedule == ESP_SCHEDULE_COSINE_WITH_RESTARTS;
    if (s->num_cycles != 0 && !cycles)
        return ESPI_FAIL(ESP_ERR_ARG,
                         "adamw: num_cycles is %g with schedule %d, which has no cycles; set a cosine schedule or num_cycles 0",
                         s->num_cycles, (int)s->schedule);
    return ESP_OK;
}

esp_status espi_adamw_settings_read(espi_adamw_settings *s, const esp_adamw_config *config) {
    esp_adamw_config given;
    ESPI_TRY(espi_struct_read(&given, sizeof given, config, "esp_adamw_config"));
    *s = (espi_adamw_settings){.lr = espi_decimal_or(given.lr, 1e-3),
                               .beta1 = espi_decimal_or(given.beta1, 0.9),
                               .beta2 = espi_decimal_or(given.beta2, 0.999),
                               .eps = espi_decimal_or(given.eps, 1e-8),
                               .weight_decay = espi_decimal(given.weight_decay),
                               .max_grad_norm = espi_decimal_or(given.max_grad_norm, 1),
                               .num_cycles = espi_decimal(given.num_cycles),
                               .schedule = given.schedule,
                               .warmup_steps = given.warmup_steps,
                               .total_steps = given.total_steps,
                               .eight_bit = given.eight_bit,
                               .host_moments = given.host_moments};
    return check_settings(s);
}

static void add_branch(esp_optim *o, const espi_lora *lora, int64_t experts, bool of_experts, int64_t in, int64_t out) {
    if (lora->r == 0) return;
    const int64_t each[] = {lora->r * in, out * lora->r}, whole = of_experts ? o->model->share.experts : 1;
    for (int i = 0; i < ESPI_COUNT(each); i++)
        o->tensors[o->n++] = (moments){.count = experts * each[i],
                                       .parts = experts,
                                       .by_expert = of_experts,
                                       .eight_bit = o->set.eight_bit && whole * each[i] >= EIGHT_BIT_MIN};
}

static void add_linear(esp_optim *o, const espi_linear *linear) {
    add_branch(o, &linear->lora, 1, false, linear->w.cols, linear->w.rows);
}

static void add_stack(esp_optim *o, const espi_lora *lora, const espi_stack *w) {
    add_branch(o, lora, w->experts, true, w->cols, w->rows);
}

/* On a device each call costs more than a small tensor: for a rank that is alone those that stand behind one another without a gap, and whose blocks end with them,
 * are updated as one.  Parameters do so where no gradient of another kind stands between theirs.  (On a CPU every tensor has its own call:
 * the norm is then summed tensor by tensor.) */
static void find_runs(esp_optim *o) {
    const esp_model *model = o->model;
    const bool merge = model->ctx->device && !model->options.train_router && model->share.ranks == 1;
    for (int64_t i = 0, n; i < o->n; i += n) {
        n = 1;
        for (const moments *t = &o->tensors[i]; merge && i + n < o->n; n++) {
            const moments *last = &o->tensors[i + n - 1];
            const bool whole = (size_t)last->count * model->ctx->real_size % ESPI_ALIGN == 0 && last->count % EIGHT_BIT_BLOCK == 0;
            if (!whole || t->eight_bit != o->tensors[i + n].eight_bit) break;
        }
        o->tensors[i].run = n;
    }
}

/* Settings, and the size of every trained tensor from the layers' shapes, which a plan has too: in the order of model.params. */
static esp_status describe(esp_optim *o, esp_model *model, const esp_adamw_config *config) {
    o->model = model;
    ESPI_TRY(espi_adamw_settings_read(&o->set, config));
    o->tensors = calloc((size_t)(model->config.layers * ESPI_T_COUNT * 2), sizeof *o->tensors);
    if (!o->tensors) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for the optimiser's list of %lld layers", (long long)model->config.layers);
    for (int64_t l = 0; l < model->config.layers; l++) {
        const espi_layer *layer = &model->layers[l];
        add_linear(o, &layer->q);
        add_linear(o, &layer->k);
        add_linear(o, &layer->v);
        add_linear(o, &layer->o);
        add_stack(o, &layer->lora_gate_up, &layer->gate_up);
        add_stack(o, &layer->lora_down, &layer->down);
    }
    find_runs(o);
    for (int64_t i = 0; i < o->n; i += o->tensors[i].run) {
        moments *t = &o->tensors[i];
        if (t->run > 1) {
            t->parts = 1;
            t->by_expert = false;
        }
        o->n_parts += t->parts;
        o->n_sums += t->by_expert ? model->share.experts : 1;
        const int64_t each = t->parts ? t->count / t->parts : 0;
        if (t->eight_bit && t->by_expert && espi_share_travels(&model->share) && each % EIGHT_BIT_BLOCK != 0)
            return ESPI_FAIL(
                ESP_ERR_UNSUPPORTED,
                "adamw: eight_bit with experts spread over %d ranks: an expert has %lld values of a tensor, expected a multiple "
                "of %d, as a block of scales would be cut where a rank's share ends: set expert_ranks to 1 or eight_bit to false",
                model->share.spread, (long long)each, EIGHT_BIT_BLOCK);
    }
    return ESP_OK;
}

static int64_t run_count(const esp_optim *o, int64_t first) {
    int64_t count = 0;
    for (int64_t i = 0; i < o->tensors[first].run; i++) count += o->tensors[first + i].count;
    return count;
}

static void *after(void *p, size_t bytes) {
    return p ? (unsigned char *)p + bytes : NULL;
}

static esp_status take(esp_optim *o, size_t bytes, void *out) {
    return o->set.host_moments ? espi_arena_take_host(&o->arena, bytes, out) : espi_arena_take(&o->arena, bytes, out);
}

/* Those of a run in one piece each. */
static esp_status take_moments(esp_optim *o, int64_t first) {
    moments *t = &o->tensors[first];
    const int64_t all = run_count(o, first);
    const size_t size = t->eight_bit ? 1 : o->model->ctx->real_size;
    ESPI_TRY(take(o, (size_t)all * size, &t->m));
    ESPI_TRY(take(o, (size_t)all * size, &t->v));
    if (t->eight_bit) {
        const size_t scales = (size_t)((all + EIGHT_BIT_BLOCK - 1) / EIGHT_BIT_BLOCK) * sizeof(float);
        ESPI_TRY(take(o, scales, &t->absmax_m));
        ESPI_TRY(take(o, scales, &t->absmax_v));
    }
    for (int64_t i = 1; i < t->run; i++) {
        const size_t count = (size_t)t[i - 1].count, scales = count / EIGHT_BIT_BLOCK * sizeof(float);
        t[i].m = after(t[i - 1].m, count * size);
        t[i].v = after(t[i - 1].v, count * size);
        t[i].absmax_m = after(t[i - 1].absmax_m, scales);
        t[i].absmax_v = after(t[i - 1].absmax_v, scales);
    }
    return ESP_OK;
}

/* The parameter of tensor i; without pointers in a plan, which has no parameters yet. */
static esp_param param(const esp_optim *o, int64_t i) {
    return o->model->params ? o->model->params[i] : (esp_param){0};
}

static esp_status square_sums(esp_optim *o) {
    if (!o->arena.dry) ESPI_TRY(espi_ctx_zero(o->model->ctx, o->square_sums, (size_t)o->n_parts * sizeof *o->square_sums));
    double *out = o->square_sums;
    for (int64_t i = 0; i < o->n; i += o->tensors[i].run) {
        const int64_t parts = o->tensors[i].parts;
        espi_sumsq args = {.out = out, .x = param(o, i).grad, .n = run_count(o, i), .parts = parts};
        ESPI_TRY(espi_op_sumsq(o->model->ctx, &o->arena, &args));
        out = after(out, (size_t)parts * sizeof *out);
    }
    return ESP_OK;
}

/* Every expert of every tensor counts once, whoever holds it, and in the order of the model: the same norm on every rank, for any number
 * of them. */
static esp_status find_norm(esp_optim *o) {
    const espi_share *share = &o->model->share;
    double *here = o->host_sums, *const mine = here + o->n_parts, *const all = mine + o->n_sums, *place = mine;
    ESPI_TRY(square_sums(o));
    ESPI_TRY(espi_ctx_get(o->model->ctx, here, o->square_sums, (size_t)o->n_parts * sizeof *here));
    memset(mine, 0, 2 * (size_t)o->n_sums * sizeof *mine);
    for (int64_t i = 0; i < o->n; i += o->tensors[i].run) {
        const moments *t = &o->tensors[i];
        const int64_t first = t->by_expert ? share->first : 0;
        if (espi_share_speaks(share, t->by_expert)) memcpy(place + first, here, (size_t)t->parts * sizeof *mine);
        here += t->parts;
        place += t->by_expert ? share->experts : 1;
    }
    ESPI_TRY(espi_share_add(share, "squares of gradients", all, mine, o->n_sums, all + o->n_sums));
    double total = 0;
    for (int64_t i = 0; i < o->n_sums; i++) total += all[i];
    o->grad_norm = sqrt(total);
    return ESP_OK;
}

static esp_status update(esp_optim *o, double lr, double grad_scale) {
    const espi_adamw_settings *s = &o->set;
    for (int64_t i = 0; i < o->n; i += o->tensors[i].run) {
        const moments *t = &o->tensors[i];
        const esp_param p = param(o, i);
        const int64_t count = run_count(o, i);
        if (t->eight_bit) {
            espi_adamw8 args = {.p = p.data,
                                .state1 = t->m,
                                .state2 = t->v,
                                .absmax1 = t->absmax_m,
                                .absmax2 = t->absmax_v,
                                .g = p.grad,
                                .map1 = o->map1,
                                .map2 = o->map2,
                                .n = count,
                                .step = o->step + 1,
                                .lr = lr,
                                .beta1 = s->beta1,
                                .beta2 = s->beta2,
                                .eps = s->eps,
                                .weight_decay = s->weight_decay,
                                .grad_scale = grad_scale};
            ESPI_TRY(espi_op_adamw8(o->model->ctx, &o->arena, &args));
        } else {
            espi_adamw args = {.p = p.data,
                               .m = t->m,
                               .v = t->v,
                               .g = p.grad,
                               .n = count,
                               .step = o->step + 1,
                               .lr = lr,
                               .beta1 = s->beta1,
                               .beta2 = s->beta2,
                               .eps = s->eps,
                               .weight_decay = s->weight_decay,
                               .grad_scale = grad_scale,
                               .host_moments = s->host_moments};
            ESPI_TRY(espi_op_adamw(o->model->ctx, &o->arena, &args));
        }
    }
    return ESP_OK;
}

/* A table of the 8-bit form where the ops read it. */
static esp_status take_map(const float **map, esp_optim *o, bool is_signed) {
    esp_ctx *ctx = o->model->ctx;
    *map = esp_dynamic_map(is_signed);
    if (!ctx->device || !o->set.eight_bit) return ESP_OK;
    void *there;
    ESPI_TRY(espi_arena_take(&o->arena, 256 * sizeof(float), &there));
    if (!o->arena.dry) ESPI_TRY(espi_ctx_put(ctx, there, *map, 256 * sizeof(float)));
    *map = there;
    return ESP_OK;
}

/* Everything the optimiser ever takes from its block: walked dry for the plan, then over the memory. */
static esp_status take_all(esp_optim *o) {
    ESPI_TRY(take_map(&o->map1, o, true));
    ESPI_TRY(take_map(&o->map2, o, false));
    for (int64_t i = 0; i < o->n; i += o->tensors[i].run) ESPI_TRY(take_moments(o, i));
    return espi_arena_take(&o->arena, (size_t)o->n_parts * sizeof *o->square_sums, &o->square_sums);
}

static esp_status plan_bytes(espi_extent *bytes, esp_optim *o) {
    *bytes = (espi_extent){0};
    if (o->n == 0) return ESP_OK;
    o->arena = espi_ctx_dry(o->model->ctx);
    ESPI_TRY(take_all(o));
    ESPI_TRY(square_sums(o));
    ESPI_TRY(update(o, 0, 0));
    *bytes = espi_arena_high(&o->arena);
    return ESP_OK;
}

esp_status espi_adamw_plan(espi_extent *bytes, const esp_model *model, const esp_adamw_config *config) {
    esp_model shape = *model;
    esp_optim o = {0};
    esp_status status = describe(&o, &shape, config);
    if (status == ESP_OK) status = plan_bytes(bytes, &o);
    free(o.tensors);
    return status;
}

/* ---- the arrays of a checkpoint ---- */

static esp_status add_array(esp_optim *o, int64_t tensor, const char *suffix, void *data, int64_t count, esp_dtype dtype) {
    const char *of = o->model->params[tensor].name;
    const size_t bytes = strlen(of) + strlen(suffix) + 1;
    char *name = malloc(bytes);
    if (!name) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for the name of a moment of %s", of);
    snprintf(name, bytes, "%s%s", of, suffix);
    o->arrays[o->n_arrays++] =
        (esp_optim_array){.struct_size = sizeof(esp_optim_array), .name = name, .data = data, .count = count, .dtype = dtype};
    return ESP_OK;
}

static esp_status list_arrays(esp_optim *o) {
    o->arrays = calloc((size_t)o->n * 4, sizeof *o->arrays);
    if (!o->arrays) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for the list of %lld moments", (long long)o->n * 4);
    for (int64_t i = 0; i < o->n; i++) {
        const moments *t = &o->tensors[i];
        esp_dtype dtype = t->eight_bit ? ESP_U8 : o->model->ctx->real;
        ESPI_TRY(add_array(o, i, "/m", t->m, t->count, dtype));
        ESPI_TRY(add_array(o, i, "/v", t->v, t->count, dtype));
        if (!t->eight_bit) continue;
        int64_t blocks = (t->count + EIGHT_BIT_BLOCK - 1) / EIGHT_BIT_BLOCK;
        ESPI_TRY(add_array(o, i, "/absmax_m", t->absmax_m, blocks, ESP_F32));
        ESPI_TRY(add_array(o, i, "/absmax_v", t->absmax_v, blocks, ESP_F32));
    }
    return ESP_OK;
}

int64_t esp_optim_array_count(const esp_optim *optim) {
    return optim ? optim->n_arrays : 0;
}

esp_status esp_optim_array_get(esp_optim *optim, int64_t index, esp_optim_array *out) {
    if (!optim || index < 0 || index >= optim->n_arrays)
        return ESPI_FAIL(ESP_ERR_ARG, "esp_optim_array_get: index %lld, expected 0 to %lld of an optimiser", (long long)index,
                         optim ? (long long)optim->n_arrays - 1 : -1);
    return espi_struct_write(out, &optim->arrays[index], sizeof optim->arrays[index], "esp_optim_array");
}

/* ---- public ---- */

static esp_status check_params(const esp_optim *o) {
    if (o->n == 0) return ESPI_FAIL(ESP_ERR_ARG, "esp_adamw_create: the model has nothing to train; load it with LoRA targets");
    if (o->n != o->model->n_params)
        return ESPI_FAIL(ESP_ERR_INTERNAL, "esp_adamw_create: %lld tensors by the layers, %lld parameters", (long long)o->n,
                         (long long)o->model->n_params);
    for (int64_t i = 0; i < o->n; i++) {
        const esp_param *p = &o->model->params[i];
        const esp_tensor view = esp_tensor_view(p->data, p->dtype, p->rank, p->dims);
        if (esp_tensor_count(&view) != o->tensors[i].count)
            return ESPI_FAIL(ESP_ERR_INTERNAL, "esp_adamw_create: %s has %lld values, expected %lld by its layer", p->name,
                             (long long)esp_tensor_count(&view), (long long)o->tensors[i].count);
    }
    return ESP_OK;
}

static esp_status build(esp_optim *o, esp_model *model, const esp_adamw_config *config) {
    ESPI_TRY(describe(o, model, config));
    ESPI_TRY(check_params(o));
    espi_extent bytes;
    ESPI_TRY(plan_bytes(&bytes, o));
    ESPI_TRY(espi_room_take(&o->room, model->ctx, ESPI_MEM_OPTIMIZER, bytes));
    o->arena = espi_room_arena(&o->room, model->ctx);
    ESPI_TRY(take_all(o));
    o->host_sums = malloc((size_t)(o->n_parts + 2 * o->n_sums) * sizeof *o->host_sums + espi_share_add_bytes(&model->share));
    if (!o->host_sums) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for the norms of %lld tensors", (long long)o->n);
    return list_arrays(o);
}

esp_status esp_adamw_create(esp_optim **optim, esp_model *model, const esp_adamw_config *config) {
    if (!optim || !model) return ESPI_FAIL(ESP_ERR_ARG, "esp_adamw_create: optim and model must not be NULL");
    *optim = NULL;
    esp_optim *o = calloc(1, sizeof *o);
    if (!o) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for an optimiser's bookkeeping");
    esp_status status = build(o, model, config);
    if (status == ESP_OK)
        *optim = o;
    else
        esp_optim_destroy(o);
    return status;
}

void esp_optim_destroy(esp_optim *optim) {
    if (!optim) return;
    espi_room_free(&optim->room, optim->model->ctx);
    for (int64_t i = 0; i < optim->n_arrays; i++) free((void *)optim->arrays[i].name);
    free(optim->arrays);
    free(optim->tensors);
    free(optim->host_sums);
    free(optim);
}

esp_status esp_optim_step(esp_optim *optim) {
    if (!optim) return ESPI_FAIL(ESP_ERR_ARG, "esp_optim_step: optim is NULL");
    const espi_adamw_settings *s = &optim->set;
    ESPI_TRY(find_norm(optim));
    optim->lr = s->lr * esp_schedule_multiplier(s->schedule, optim->step, s->warmup_steps, s->total_steps, s->num_cycles);
    if (isfinite(optim->grad_norm)) {
        double clip = s->max_grad_norm < 0 ? 1 : fmin(1, s->max_grad_norm / (optim->grad_norm + CLIP_FLOOR));
        ESPI_TRY(update(optim, optim->lr, clip));
        optim->step++;
    } else {
        optim->skipped++;
        espi_log(optim->model->ctx, ESP_LOG_WARN, "optimiser step %lld skipped: the gradient norm is %g", (long long)optim->step + 1,
                 optim->grad_norm);
    }
    return esp_model_zero_grad(optim->model);
}

esp_status esp_optim_stats_get(const esp_optim *optim, esp_optim_stats *out) {
    if (!optim) return ESPI_FAIL(ESP_ERR_ARG, "esp_optim_stats_get: optim is NULL");
    esp_optim_stats stats = {.step = optim->step, .skipped = optim->skipped, .grad_norm = optim->grad_norm, .lr = optim->lr};
    return espi_struct_write(out, &stats, sizeof stats, "esp_optim_stats");
}

esp_status esp_optim_restore(esp_optim *optim, int64_t step, int64_t skipped) {
    if (!optim || step < 0 || skipped < 0)
        return ESPI_FAIL(ESP_ERR_ARG, "esp_optim_restore: step %lld and skipped %lld, expected an optimiser and counts of 0 or more",
                         (long long)step, (long long)skipped);
    optim->step = step;
    optim->skipped = skipped;
    return ESP_OK;
}
