/* A model on a device: host code touches none of the device's memory (the fake device faults when it does), every value is put where an op
 * reads it, the bits are those of the reference, the plan is exact, and nothing is taken once a model has run. */
#include "core/status.h"
#include "espalier/adapter.h"
#include "espalier/moe.h"
#include "espalier/optim.h"
#include "espalier/plan.h"
#include "espalier/sampler.h"
#include "fake.h"
#include "io/quantised.h"
#include "models/model.h"
#include "scratch.h"

#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>

typedef struct form {
    const char *folder;
    bool packing;
    esp_model_config config;
} form;

/* Every family and every way of being stored. */
static const form forms[] = {
    {"q3a/model", false, {.struct_size = sizeof(esp_model_config), .lora_rank = 4}},
    {"q3a/model", true, {.struct_size = sizeof(esp_model_config), .lora_rank = 4, .double_quant = true, .train_router = true}},
    {"q3a/model", false, {.struct_size = sizeof(esp_model_config), .lora_rank = 4, .double_quant = true}},
    {"q3a/model", false, {.struct_size = sizeof(esp_model_config), .lora_rank = 4, .experts = ESP_Q_NONE}},
    {"q3a/model_nf4", true, {.struct_size = sizeof(esp_model_config), .lora_rank = 4}},
    {"q3a/model_nf4_dq", true, {.struct_size = sizeof(esp_model_config), .lora_rank = 4, .double_quant = true, .host_layers = 1}},
    {"q3b/model", true, {.struct_size = sizeof(esp_model_config), .lora_rank = 4, .activation_budget = 20000}},
    {"q3b/model", false, {.struct_size = sizeof(esp_model_config), .lora_rank = 4, .activation_budget = 20000, .host_layers = 3}},
    {"q3c/model", false, {.struct_size = sizeof(esp_model_config), .lora_rank = 4, .experts = ESP_FP4}},
    {"q3c/model_fused", true, {.struct_size = sizeof(esp_model_config), .lora_rank = 4}},
    {"vla/model", true, {.struct_size = sizeof(esp_model_config), .lora_rank = 4, .experts = ESP_MXFP4}},
    {"ol/model", true, {.struct_size = sizeof(esp_model_config), .lora_rank = 4}},
    {"go1/model", true, {.struct_size = sizeof(esp_model_config), .lora_rank = 4}},
    {"go2/model", true, {.struct_size = sizeof(esp_model_config), .lora_rank = 4, .train_router = true, .host_layers = 2}},
    {"mx/model", true, {.struct_size = sizeof(esp_model_config), .lora_rank = 4}},
    {"vl/model", true, {.struct_size = sizeof(esp_model_config), .lora_rank = 4}},
    {"vla/model_transposed", false, {.struct_size = sizeof(esp_model_config), .lora_rank = 4}},
    {"gla/model", true, {.struct_size = sizeof(esp_model_config), .lora_rank = 4}},
    {"glb/model", false, {.struct_size = sizeof(esp_model_config), .lora_rank = 4}},
};

enum { TOKENS = 11, NEW = 5 };
static const int32_t ids[TOKENS] = {3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5}, borders[] = {0, 4, 11};

/* What one run gives, in host memory. */
typedef struct results {
    float *params, *grads;
    int64_t n;
    double loss, aux, z;
    float logprob[TOKENS], entropy[TOKENS];
    int32_t tokens[2 * NEW], lengths[2];
    float sampled[2 * NEW];
    uint64_t fingerprint;
    esp_memory memory;
    esp_plan plan;
} results;

static void read_params(esp_model *model, float *data, float *grad) {
    int64_t at = 0;
    for (int64_t i = 0; i < esp_model_param_count(model); i++) {
        esp_param p = ESP_PARAM_INIT;
        OK(esp_model_param_get(model, i, &p));
        const esp_tensor view = esp_tensor_view(p.data, p.dtype, p.rank, p.dims);
        const size_t bytes = (size_t)esp_tensor_count(&view) * sizeof(float);
        if (data) OK(espi_ctx_get(model->ctx, data + at, p.data, bytes));
        if (grad) OK(espi_ctx_get(model->ctx, grad + at, p.grad, bytes));
        at += esp_tensor_count(&view);
    }
}

static void look(void *user, const char *name, int64_t layer, const esp_tensor *t) {
    (void)name, (void)layer;
    double *sum = user;
    int64_t n = 1;
    for (int i = 0; i < t->rank; i++) n *= t->dims[i];
    for (int64_t i = 0; i < n; i++)
        *sum += t->dtype == ESP_F32 ? (double)((const float *)t->data)[i] : (double)((const int32_t *)t->data)[i];
}

static double step(esp_model *model, const esp_batch *batch, double *loss) {
    esp_tensor hidden, d_hidden;
    double seen = 0;
    OK(esp_model_set_probe(model, look, &seen));
    OK(esp_model_forward(model, batch, &hidden));
    OK(esp_model_cross_entropy(model, batch, &hidden, loss, &d_hidden));
    OK(esp_model_backward(model, batch, &d_hidden));
    OK(esp_model_set_probe(model, NULL, NULL));
    return seen;
}

static void run(results *r, esp_ctx *ctx, const form *f) {
    char dir[ESPI_PATH_MAX], saved[ESPI_PATH_MAX];
    const esp_batch batch = ESP_BATCH(.tokens = ids, .cu_seqlens = borders, .n_tokens = TOKENS, .n_seqs = 2);
    const esp_adamw_config adamw = ESP_ADAMW_CONFIG(.lr = 0.01f, .eight_bit = f->packing, .host_moments = (f - forms) % 2);
    esp_model *model;
    esp_optim *optim;
    esp_sampler *sampler;
    esp_tensor hidden;
    *r = (results){.memory = ESP_MEMORY_INIT, .plan = {.struct_size = sizeof(esp_plan)}};
    snprintf(dir, sizeof dir, "%s/tests/golden/data/%s", ESP_SOURCE_DIR, f->folder);
    OK(esp_plan_folder(&r->plan, ctx, dir, &f->config, &adamw, TOKENS, 2));
    OK(esp_model_load(&model, ctx, dir, &f->config));
    const size_t pinned = ctx->pinned;
    OK(esp_adamw_create(&optim, model, &adamw));
    cr_expect_eq(ctx->pinned - pinned, r->plan.host_moments, "%s: moments in host memory", f->folder);
    cr_expect_eq(r->plan.host_moments > 0, ctx->device && adamw.host_moments, "%s: moments in host memory", f->folder);
    OK(esp_model_reserve(model, TOKENS, 2, true));
    for (int i = 0; i < 2; i++) {
        r->z += step(model, &batch, &r->loss); /* the sum of all that probes see, for now */
        OK(esp_optim_step(optim));
    }
    (void)step(model, &batch, &r->loss);
    OK(esp_ctx_memory(ctx, &r->memory));
    double aux, z;
    OK(esp_model_router_losses(model, &aux, &z));
    r->aux = aux;
    r->z += z;
    esp_model_info info = {.struct_size = sizeof info};
    OK(esp_model_info_get(model, &info));
    OK(espi_model_fingerprint(&r->fingerprint, model));
    const size_t table = (size_t)(model->embed.rows * model->embed.cols) * esp_dtype_size(model->embed.dtype);
    size_t in_host = ctx->device && !model->config.tied_head ? table : 0;
    int guests = 0;
    for (int64_t l = 0; l < model->config.layers; l++) guests += model->layers[l].home != NULL;
    for (int64_t l = 0; l < model->config.layers; l++) in_host += model->layers[l].home ? model->layers[l].bytes : 0;
    cr_expect_eq(guests, ctx->device ? f->config.host_layers : 0);
    cr_expect_eq(r->plan.host_weights, in_host, "%s: weights in host memory", f->folder);
    cr_expect_eq(info.weight_bytes + model->guest_bytes - r->memory.weights, in_host,
                 "%s: an embedding that is no head stays in the host's memory, and so do guests", f->folder);
    r->n = info.adapter_parameters;
    r->params = calloc((size_t)r->n, sizeof(float));
    r->grads = calloc((size_t)r->n, sizeof(float));
    read_params(model, NULL, r->grads);
    OK(esp_model_forward_only(model, &batch, &hidden));
    OK(esp_model_logprob(model, &batch, &hidden, 0.7f, r->logprob, r->entropy));
    OK(esp_sampler_create(&sampler, model, &ESP_SAMPLER_CONFIG(.max_sequences = 2, .max_length = 16)));
    OK(esp_sampler_generate(sampler,
                            &ESP_GENERATE_CONFIG(.prompts = ids, .cu_prompts = borders, .n_prompts = 2, .max_new_tokens = NEW, .seed = 3),
                            r->tokens, r->sampled, r->lengths, NULL));
    esp_sampler_destroy(sampler);
    /* Saved, spoilt, loaded. */
    scratch_make(saved);
    OK(esp_model_save_adapter(model, saved));
    OK(esp_optim_step(optim));
    OK(esp_model_load_adapter(model, saved));
    read_params(model, r->params, NULL);
    scratch_remove(saved);
    esp_optim_destroy(optim);
    esp_model_destroy(model);
}

static void free_results(results *r) {
    free(r->params);
    free(r->grads);
}

Test(device, every_family_has_the_bits_of_the_reference) {
    for (int i = 0; i < ESPI_COUNT(forms); i++) {
        const form *f = &forms[i];
        esp_ctx *plain, *device;
        results want, got;
        OK(esp_ctx_create(&plain, &ESP_CTX_CONFIG(.backend = "ref", .threads = 2)));
        OK(fake_ctx(&device, &ESP_CTX_CONFIG(.threads = 2)));
        fake_set_packing(f->packing);
        run(&want, plain, f);
        run(&got, device, f);
        cr_expect_eq(got.n, want.n);
        cr_expect(memcmp(got.params, want.params, (size_t)want.n * sizeof(float)) == 0, "%s: parameters", f->folder);
        cr_expect(memcmp(got.grads, want.grads, (size_t)want.n * sizeof(float)) == 0, "%s: gradients", f->folder);
        cr_expect(got.loss == want.loss && got.aux == want.aux && got.z == want.z, "%s: loss %g %g %g, expected %g %g %g", f->folder,
                  got.loss, got.aux, got.z, want.loss, want.aux, want.z);
        cr_expect(memcmp(got.logprob, want.logprob, sizeof want.logprob) == 0, "%s: log-probabilities", f->folder);
        cr_expect(memcmp(got.entropy, want.entropy, sizeof want.entropy) == 0, "%s: entropies", f->folder);
        cr_expect(memcmp(got.tokens, want.tokens, sizeof want.tokens) == 0, "%s: sampled tokens", f->folder);
        cr_expect(memcmp(got.sampled, want.sampled, sizeof want.sampled) == 0, "%s: their log-probabilities", f->folder);
        /* The plan of the device holds there, to the byte. */
        cr_expect_eq(got.memory.live, got.plan.total, "%s: %zu bytes live, planned %zu", f->folder, got.memory.live, got.plan.total);
        cr_expect_eq(got.memory.peak, got.plan.peak, "%s: peak of %zu bytes, planned %zu", f->folder, got.memory.peak, got.plan.peak);
        cr_expect_gt(got.memory.pinned, 0);
        free_results(&want);
        free_results(&got);
        esp_ctx_destroy(plain);
        esp_ctx_destroy(device);
    }
}

/* Layers at home in the host's memory are the same weights: dense layers and such with experts, some of them and all. */
Test(device, guests_do_not_change_the_fingerprint) {
    char dir[ESPI_PATH_MAX];
    const int guests[] = {0, 1, 3, 4}, wrong[] = {-1, 5};
    uint64_t first = 0;
    esp_ctx *ctx;
    esp_model *model;
    snprintf(dir, sizeof dir, "%s/tests/golden/data/q3b/model", ESP_SOURCE_DIR);
    OK(fake_ctx(&ctx, NULL));
    fake_set_packing(true);
    for (int i = 0; i < ESPI_COUNT(guests); i++) {
        uint64_t hash;
        OK(esp_model_load(&model, ctx, dir, &ESP_MODEL_CONFIG(.host_layers = guests[i])));
        OK(espi_model_fingerprint(&hash, model));
        if (i == 0) first = hash;
        cr_expect_eq(hash, first, "with %d guests", guests[i]);
        esp_model_destroy(model);
    }
    for (int i = 0; i < ESPI_COUNT(wrong); i++) {
        cr_expect_eq(esp_model_load(&model, ctx, dir, &ESP_MODEL_CONFIG(.host_layers = wrong[i])), ESP_ERR_ARG);
        cr_expect(strstr(esp_last_error(), "expected 0 to 4"), "%s", esp_last_error());
    }
    esp_ctx_destroy(ctx);
}

/* After the first step of a shape nothing more is taken, and the host waits twice a step, for the loss and for the norm: never for a layer. */
static void expect_set_up(const char *folder) {
    char dir[ESPI_PATH_MAX];
    const esp_batch batch = ESP_BATCH(.tokens = ids, .cu_seqlens = borders, .n_tokens = TOKENS, .n_seqs = 2);
    esp_ctx *ctx;
    esp_model *model;
    esp_optim *optim;
    esp_tensor hidden, d_hidden;
    double loss;
    snprintf(dir, sizeof dir, "%s/tests/golden/data/%s", ESP_SOURCE_DIR, folder);
    OK(fake_ctx(&ctx, NULL));
    OK(esp_model_load(&model, ctx, dir, NULL));
    OK(esp_adamw_create(&optim, model, NULL));
    fake_counts before = {0};
    for (int i = 0; i < 3; i++) {
        if (i == 1) before = fake_counted(ctx);
        OK(esp_model_forward(model, &batch, &hidden));
        OK(esp_model_cross_entropy(model, &batch, &hidden, &loss, &d_hidden));
        OK(esp_model_backward(model, &batch, &d_hidden));
        OK(esp_optim_step(optim));
    }
    const fake_counts after = fake_counted(ctx);
    cr_expect_eq(after.allocations, before.allocations, "%s: %lld allocations in two steps", folder,
                 (long long)(after.allocations - before.allocations));
    cr_expect_eq(after.pinned, before.pinned);
    cr_expect_eq(after.gets + after.waits, before.gets + before.waits + 4, "%s, %lld layers: %lld waits in two steps, expected 4", folder,
                 (long long)model->config.layers, (long long)(after.gets + after.waits - before.gets - before.waits));
    esp_optim_destroy(optim);
    esp_model_destroy(model);
    esp_ctx_destroy(ctx);
}

Test(device, nothing_is_taken_once_set_up) {
    expect_set_up("q3a/model");
    expect_set_up("q3b/model"); /* twice as many layers */
}

/* A process may have several devices, and a thread may call now of this one, now of that one. */
Test(device, two_take_turns) {
    char dir[ESPI_PATH_MAX];
    const esp_batch batch = ESP_BATCH(.tokens = ids, .cu_seqlens = borders, .n_tokens = TOKENS, .n_seqs = 2);
    esp_ctx *ctx[2];
    esp_model *model[2];
    esp_optim *optim[2];
    esp_tensor hidden[2], d_hidden[2];
    double loss[2];
    snprintf(dir, sizeof dir, "%s/tests/golden/data/q3a/model", ESP_SOURCE_DIR);
    for (int d = 0; d < 2; d++) OK(fake_ctx(&ctx[d], NULL));
    for (int d = 0; d < 2; d++) OK(esp_model_load(&model[d], ctx[d], dir, NULL));
    for (int d = 0; d < 2; d++) OK(esp_adamw_create(&optim[d], model[d], NULL));
    for (int step = 0; step < 4; step++) {
        for (int d = 0; d < 2; d++) OK(esp_model_forward(model[d], &batch, &hidden[d]));
        for (int d = 0; d < 2; d++) OK(esp_model_cross_entropy(model[d], &batch, &hidden[d], &loss[d], &d_hidden[d]));
        for (int d = 0; d < 2; d++) OK(esp_model_backward(model[d], &batch, &d_hidden[d]));
        for (int d = 0; d < 2; d++) OK(esp_optim_step(optim[d]));
        cr_expect_eq(loss[0], loss[1], "step %d: losses %g and %g", step, loss[0], loss[1]);
    }
    for (int d = 0; d < 2; d++) {
        esp_optim_destroy(optim[d]);
        esp_model_destroy(model[d]);
        esp_ctx_destroy(ctx[d]);
    }
}

/* One step, by what it gives: the loss, and every gradient. */
static double grads_of(esp_model *model, const esp_batch *batch, float *grads) {
    esp_tensor hidden, d_hidden;
    double loss;
    OK(esp_model_zero_grad(model));
    OK(esp_model_forward(model, batch, &hidden));
    OK(esp_model_cross_entropy(model, batch, &hidden, &loss, &d_hidden));
    OK(esp_model_backward(model, batch, &d_hidden));
    read_params(model, NULL, grads);
    return loss;
}

/* The second time that a batch of one shape comes its passes are recorded, from then on launched: with the bits of a plain run, whatever
 * tokens it has, also after batches of another shape. */
Test(device, recordings_have_the_bits_of_plain_runs) {
    char dir[ESPI_PATH_MAX];
    int32_t other[TOKENS];
    const int32_t one[] = {0, TOKENS}, *cuts[] = {borders, borders, borders, one, borders, one, one, borders};
    const int32_t seqs[] = {2, 2, 2, 1, 2, 1, 1, 2};
    esp_ctx *plain, *device;
    esp_model *want_model, *got_model;
    snprintf(dir, sizeof dir, "%s/tests/golden/data/q3a/model", ESP_SOURCE_DIR);
    OK(esp_ctx_create(&plain, &ESP_CTX_CONFIG(.backend = "ref")));
    OK(fake_ctx(&device, NULL));
    OK(esp_model_load(&want_model, plain, dir, NULL));
    OK(esp_model_load(&got_model, device, dir, NULL));
    esp_model_info info = {.struct_size = sizeof info};
    OK(esp_model_info_get(want_model, &info));
    const size_t n = (size_t)info.adapter_parameters;
    float *want = calloc(n, sizeof *want), *got = calloc(n, sizeof *got);
    for (int i = 0; i < ESPI_COUNT(cuts); i++) {
        for (int j = 0; j < TOKENS; j++) other[j] = (ids[j] + 3 * i) % 50;
        const esp_batch batch = ESP_BATCH(.tokens = other, .cu_seqlens = cuts[i], .n_tokens = TOKENS, .n_seqs = seqs[i]);
        const double want_loss = grads_of(want_model, &batch, want), got_loss = grads_of(got_model, &batch, got);
        cr_expect_eq(got_loss, want_loss, "step %d: loss %g, expected %g", i, got_loss, want_loss);
        cr_expect(memcmp(got, want, n * sizeof *want) == 0, "step %d: gradients", i);
    }
    const fake_counts counts = fake_counted(device);
    cr_expect_eq(counts.recordings, 4, "%lld recordings, expected forward and backward of two shapes", (long long)counts.recordings);
    cr_expect_eq(counts.launches, 2 * (4 + 2), "%lld launches", (long long)counts.launches);
    free(want);
    free(got);
    esp_model_destroy(want_model);
    esp_model_destroy(got_model);
    esp_ctx_destroy(plain);
    esp_ctx_destroy(device);
}

/* What replays, records and filters, on one side. */
typedef struct told {
    uint8_t routes[TOKENS * 9], sampled[64 * 9];
    float *grads, logprob[TOKENS], drawn[2 * NEW];
    int32_t tokens[2 * NEW], lengths[2], kept[256];
    int64_t flips, replayed, n_kept, n_sampled;
    size_t width;
} told;

static int take_drawn(void *user, const esp_drawn *d) {
    told *t = user;
    memcpy(t->kept + t->n_kept, d->kept, (size_t)d->n_kept * sizeof *d->kept);
    t->n_kept += d->n_kept;
    memcpy(t->sampled + (size_t)t->n_sampled * t->width, d->routed_experts, (size_t)d->n_routed * t->width);
    t->n_sampled += d->n_routed;
    return 0;
}

static void replay_on(told *t, esp_ctx *ctx, const char *folder) {
    char dir[ESPI_PATH_MAX];
    esp_model *model;
    esp_sampler *sampler;
    esp_tensor hidden;
    int64_t kept_offsets[TOKENS + 1];
    int32_t kept_ids[2 * TOKENS];
    *t = (told){.grads = NULL};
    snprintf(dir, sizeof dir, "%s/tests/golden/data/%s/model", ESP_SOURCE_DIR, folder);
    OK(esp_model_load(&model, ctx, dir, &ESP_MODEL_CONFIG(.lora_rank = 4)));
    esp_model_info info = {.struct_size = sizeof info};
    OK(esp_model_info_get(model, &info));
    t->width = (size_t)(info.layers * info.top_k);
    t->grads = calloc((size_t)info.adapter_parameters, sizeof *t->grads);
    for (int i = 0; i <= TOKENS; i++) kept_offsets[i] = 2 * i;
    for (int i = 0; i < TOKENS; i++) {
        kept_ids[2 * i] = ids[i];
        kept_ids[2 * i + 1] = ids[i] + 7;
    }
    esp_batch batch = ESP_BATCH(.tokens = ids, .cu_seqlens = borders, .n_tokens = TOKENS, .n_seqs = 2, .record_experts = t->routes,
                                .n_routed = TOKENS * info.layers * info.top_k, .routed_bytes = 1, .kept_offsets = kept_offsets,
                                .kept_ids = kept_ids, .n_kept = 2 * TOKENS);
    OK(esp_model_forward_only(model, &batch, &hidden));
    OK(esp_model_logprob(model, &batch, &hidden, 1, t->logprob, NULL));
    batch.record_experts = NULL;
    for (int64_t i = 0; i < batch.n_routed; i += info.top_k) /* other experts, where there are some */
        for (int64_t k = 0; t->routes[i] != 255 && k < info.top_k; k++) t->routes[i + k] = (uint8_t)((t->routes[i + k] + 1) % info.experts);
    batch.routed_experts = t->routes;
    for (int i = 0; i < 3; i++) (void)grads_of(model, &batch, t->grads);
    OK(esp_model_route_flips(model, &t->flips, &t->replayed));
    OK(esp_sampler_create(&sampler, model,
                          &ESP_SAMPLER_CONFIG(.max_sequences = 2, .max_length = 16, .max_kept = 12, .record_routes = true)));
    OK(esp_sampler_generate(sampler,
                            &ESP_GENERATE_CONFIG(.prompts = ids, .cu_prompts = borders, .n_prompts = 2, .max_new_tokens = NEW, .seed = 3,
                                                 .top_k = 12, .min_p = 0.3f, .on_drawn = take_drawn, .on_drawn_user = t),
                            t->tokens, t->drawn, t->lengths, NULL));
    esp_sampler_destroy(sampler);
    esp_model_destroy(model);
    float *grads = t->grads; /* compared apart */
    t->grads = NULL;
    for (int64_t i = 0; i < info.adapter_parameters; i++) t->logprob[i % TOKENS] += grads[i];
    free(grads);
}

/* Routes and kept ids cross the border in one piece each way, and a pass that replays is recorded like any other. */
Test(device, replays_and_filters_have_the_bits_of_the_reference) {
    static const char *const folders[] = {"q3a", "gla"};
    for (int i = 0; i < ESPI_COUNT(folders); i++) {
        static told want, got;
        esp_ctx *plain, *device;
        OK(esp_ctx_create(&plain, &ESP_CTX_CONFIG(.backend = "ref")));
        OK(fake_ctx(&device, NULL));
        replay_on(&want, plain, folders[i]);
        replay_on(&got, device, folders[i]);
        cr_expect(memcmp(&got, &want, sizeof want) == 0, "%s", folders[i]);
        cr_expect_gt(want.flips, 0);
        cr_expect_gt(want.n_kept, 2 * NEW);
        cr_expect_eq(want.n_sampled, TOKENS + want.lengths[0] + want.lengths[1] - 2);
        cr_expect_gt(fake_counted(device).recordings, 1, "%s: forward and backward of the replay", folders[i]);
        esp_ctx_destroy(plain);
        esp_ctx_destroy(device);
    }
}

/* The block level: the caller's tensors lie on the device too. */
Test(device, a_block_has_the_bits_of_the_reference) {
    enum { T = 5, H = 64, E = 4, I = 64, R = 2 };
    static float x[T * H], weights[3][I * H], router[E * H], out[2][T * H], d_x[2][T * H], d_b[2][E * R * H];
    for (int i = 0; i < T * H; i++) x[i] = (float)((i * 37 % 101) - 50) / 50;
    for (int i = 0; i < E * H; i++) router[i] = (float)((i * 53 % 97) - 48) / 97;
    for (int side = 0; side < 2; side++) {
        esp_ctx *ctx;
        esp_moe *moe;
        esp_moe_memory sizes = ESP_MOE_MEMORY_INIT;
        void *there[4], *saved, *scratch, *grad;
        int64_t n;
        OK(side ? fake_ctx(&ctx, NULL) : esp_ctx_create(&ctx, &ESP_CTX_CONFIG(.backend = "ref")));
        OK(esp_moe_create(&moe, ctx, &ESP_MOE_CONFIG(.hidden = H, .experts = E, .width = I, .top_k = 2, .lora_rank = R, .seed = 4)));
        OK(esp_moe_set_router(moe, router));
        for (int e = 0; e < E; e++) {
            for (int m = 0; m < 3; m++)
                for (int i = 0; i < I * H; i++) weights[m][i] = (float)(((i + 11 * e + 7 * m) * 29 % 61) - 30) / 200;
            OK(esp_moe_set_expert(moe, e, weights[0], weights[1], weights[2]));
        }
        OK(esp_moe_sizes(moe, T, &sizes));
        for (int i = 0; i < 3; i++) OK(espi_ctx_alloc(ctx, ESPI_MEM_ACTIVATIONS, sizeof x, &there[i]));
        OK(espi_ctx_alloc(ctx, ESPI_MEM_ACTIVATIONS, sizes.saved, &saved));
        OK(espi_ctx_alloc(ctx, ESPI_MEM_ACTIVATIONS, sizes.scratch, &scratch));
        OK(espi_ctx_put(ctx, there[0], x, sizeof x));
        OK(esp_moe_forward(moe, there[1], there[0], T, saved, scratch));
        OK(espi_ctx_get(ctx, out[side], there[1], sizeof x));
        OK(esp_moe_backward(moe, there[2], there[1], there[0], T, saved, scratch));
        OK(espi_ctx_get(ctx, d_x[side], there[2], sizeof x));
        OK(esp_moe_param_get(moe, ESP_MOE_DOWN_B, NULL, &grad, &n));
        cr_assert_eq(n, E * R * H);
        OK(espi_ctx_get(ctx, d_b[side], grad, sizeof d_b[side]));
        for (int i = 0; i < 3; i++) espi_ctx_free(ctx, ESPI_MEM_ACTIVATIONS, there[i], sizeof x);
        espi_ctx_free(ctx, ESPI_MEM_ACTIVATIONS, saved, sizes.saved);
        espi_ctx_free(ctx, ESPI_MEM_ACTIVATIONS, scratch, sizes.scratch);
        esp_moe_destroy(moe);
        esp_ctx_destroy(ctx);
    }
    cr_expect(memcmp(out[0], out[1], sizeof x) == 0);
    cr_expect(memcmp(d_x[0], d_x[1], sizeof x) == 0);
    cr_expect(memcmp(d_b[0], d_b[1], sizeof d_b[0]) == 0);
}

/* What writes files from a checkpoint works in host memory: on a device it is refused, not done by halves. */
Test(device, tools_for_files_want_a_cpu) {
    char model[ESPI_PATH_MAX], adapter[ESPI_PATH_MAX];
    esp_ctx *ctx;
    snprintf(model, sizeof model, "%s/tests/golden/data/q3a/model", ESP_SOURCE_DIR);
    snprintf(adapter, sizeof adapter, "%s/tests/golden/data/q3a/adapter", ESP_SOURCE_DIR);
    OK(fake_ctx(&ctx, NULL));
    cr_expect_eq(espi_quantised_write(ctx, "out", model, &(espi_quantised_spec){.format = ESP_NF4}), ESP_ERR_UNSUPPORTED);
    cr_expect_not_null(strstr(esp_last_error(), "on a GPU"), "%s", esp_last_error());
    cr_expect_eq(esp_adapter_merge(ctx, NULL, "out", model, adapter, NULL), ESP_ERR_UNSUPPORTED);
    cr_expect_not_null(strstr(esp_last_error(), "on a GPU"), "%s", esp_last_error());
    esp_ctx_destroy(ctx);
}
