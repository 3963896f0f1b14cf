/* Every family on the GPU against the same model in f64: hidden states, log-probabilities and every LoRA gradient within twice the error of
 * a plain bf16 run (the reference with bf16 weights, and every activation and gradient of one rounded as an op leaves it).  Routes are
 * those of the f64 run, so that no near tie decides.  And: the plan holds, two runs have the same bits, a recorded run those of a plain
 * one, nothing is taken once set up, moments in the host's memory.   model [FOLDER OF GOLDEN DATA [BEGINNING OF A NAME [once]]]
 * once: what is only there twice is left out, as under a sanitizer that takes its time. */
#include "check.h"

#include "espalier/adapter.h"
#include "espalier/optim.h"
#include "espalier/plan.h"
#include "espalier/sampler.h"
#include "fake.h"
#include "io/file.h"
#include "models/model.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { TOKENS = 40, SEQS = 3, NEW = 6 };
static const int32_t borders[SEQS + 1] = {0, 7, 8, TOKENS};
static const char *data_dir = ESP_SOURCE_DIR "/tests/golden/data";

typedef struct form {
    const char *folder;
    esp_model_config config;
} form;

static const form forms[] = {
    {"q3a/model", {.struct_size = sizeof(esp_model_config), .lora_rank = 4, .router_aux_coef = 0.01f}},
    {"q3a/model", {.struct_size = sizeof(esp_model_config), .lora_rank = 16, .double_quant = true, .train_router = true}},
    {"q3a/model", {.struct_size = sizeof(esp_model_config), .lora_rank = 4, .experts = ESP_Q_NONE}},
    {"q3a/model", {.struct_size = sizeof(esp_model_config), .lora_rank = 4, .experts = ESP_MXFP4}},
    {"q3a/model_nf4", {.struct_size = sizeof(esp_model_config), .lora_rank = 4}},
    {"q3a/model_nf4_dq", {.struct_size = sizeof(esp_model_config), .lora_rank = 4, .double_quant = true}},
    {"q3b/model", {.struct_size = sizeof(esp_model_config), .lora_rank = 4, .activation_budget = 20000}},
    {"q3b/model", {.struct_size = sizeof(esp_model_config), .lora_rank = 4, .activation_budget = 20000, .host_layers = 3}},
    {"q3c/model", {.struct_size = sizeof(esp_model_config), .lora_rank = 4, .experts = ESP_FP4}},
    {"ol/model", {.struct_size = sizeof(esp_model_config), .lora_rank = 4}},
    {"go1/model", {.struct_size = sizeof(esp_model_config), .lora_rank = 4, .train_router = true}},
    {"go2/model", {.struct_size = sizeof(esp_model_config), .lora_rank = 4}},
    {"mx/model", {.struct_size = sizeof(esp_model_config), .lora_rank = 4}},
    {"vl/model", {.struct_size = sizeof(esp_model_config), .lora_rank = 4}},
    {"vla/model", {.struct_size = sizeof(esp_model_config), .lora_rank = 4}},
    {"gla/model", {.struct_size = sizeof(esp_model_config), .lora_rank = 4}},
    {"glb/model", {.struct_size = sizeof(esp_model_config), .lora_rank = 4}},
};

/* What a run gives, as doubles in host memory. */
typedef struct results {
    double *hidden, *grads;
    int64_t n_hidden, n_params;
    double loss, logprob[TOKENS];
    unsigned char *routes;
    size_t routes_bytes;
    esp_memory memory;
} results;

static void free_results(results *r) {
    free(r->hidden);
    free(r->grads);
    free(r->routes);
}

/* n values of tensor memory as doubles. */
static void read_values(double *out, esp_ctx *ctx, const void *from, esp_dtype dtype, int64_t n) {
    const size_t bytes = (size_t)n * esp_dtype_size(dtype);
    void *raw = malloc(bytes + 1);
    OK(espi_ctx_get(ctx, raw, from, bytes));
    for (int64_t i = 0; i < n; i++) out[i] = dtype == ESP_F64 ? ((const double *)raw)[i] : (double)espi_plain_value(raw, dtype, i);
    free(raw);
}

static double noise(int64_t i) {
    const uint64_t x = ((uint64_t)i + 1) * 0x9e3779b97f4a7c15u;
    return (double)(int64_t)((x ^ x >> 29) * 0xbf58476d1ce4e5b9u) * 0x1p-63;
}

/* Parameters that bf16 holds exactly, B not zero: so that every gradient is there, and rounding them is nobody's error. */
static void set_params(esp_model *model) {
    for (int64_t i = 0; i < esp_model_param_count(model); i++) {
        esp_param p = ESP_PARAM_INIT;
        OK(esp_model_param_get(model, i, &p));
        const esp_tensor view = esp_tensor_view(p.data, p.dtype, p.rank, p.dims);
        const int64_t n = esp_tensor_count(&view);
        void *x = malloc((size_t)n * esp_dtype_size(p.dtype));
        for (int64_t j = 0; j < n; j++) {
            const float v = espi_bf16_value(espi_bf16_bits((float)(0.1 * noise(i * 100003 + j))));
            espi_real_set(x, j, v, p.dtype);
        }
        OK(espi_ctx_put(model->ctx, p.data, x, (size_t)n * esp_dtype_size(p.dtype)));
        free(x);
    }
}

static void round_mat(esp_ctx *ctx, const espi_mat *m) {
    if (m->dtype != ESP_F32 || m->rows * m->cols == 0) return;
    const size_t bytes = (size_t)(m->rows * m->cols) * sizeof(float);
    float *x = malloc(bytes);
    OK(espi_ctx_get(ctx, x, m->data, bytes));
    for (int64_t i = 0; i < m->rows * m->cols; i++) x[i] = espi_bf16_value(espi_bf16_bits(x[i]));
    OK(espi_ctx_put(ctx, (void *)m->data, x, bytes));
    free(x);
}

/* What a GPU holds in bf16. */
static void round_weights(esp_model *m) {
    round_mat(m->ctx, &m->embed);
    if (!m->config.tied_head) round_mat(m->ctx, &m->head);
    for (int64_t l = 0; l < m->config.layers; l++) {
        const espi_layer *w = &m->layers[l];
        const espi_mat *all[] = {&w->q.w,          &w->k.w, &w->v.w, &w->o.w, &w->mlp_gate_up.w, &w->mlp_down.w, &w->shared_gate_up.w,
                                 &w->shared_down.w};
        for (int i = 0; i < ESPI_COUNT(all); i++) round_mat(m->ctx, all[i]);
        for (int i = 0; i < 2 && w->gate_up.format == ESP_Q_NONE && w->mlp == ESPI_MLP_MOE; i++) {
            const espi_stack *s = i ? &w->down : &w->gate_up;
            round_mat(m->ctx, &(espi_mat){.data = s->data, .dtype = s->dtype, .rows = s->experts * s->rows, .cols = s->cols});
        }
    }
}

static void fill_ids(int32_t *ids, const esp_model *model) {
    for (int i = 0; i < TOKENS; i++) ids[i] = (int32_t)((i * 7 + i * i * 3) % (model->config.vocab / 2));
}

/* routes: those to replay, or NULL: the run's own are kept, or, when free_routes, nobody asks. */
static void run(results *r, esp_model *model, const results *routes, bool free_routes) {
    const espi_config *c = &model->config;
    int32_t ids[TOKENS];
    fill_ids(ids, model);
    const int64_t n_routed = TOKENS * c->layers * c->top_k;
    *r = (results){.memory = ESP_MEMORY_INIT, .routes_bytes = (size_t)n_routed};
    r->routes = calloc((size_t)n_routed + 1, 1);
    esp_batch batch = ESP_BATCH(.tokens = ids, .cu_seqlens = borders, .n_tokens = TOKENS, .n_seqs = SEQS,
                                .n_routed = free_routes ? 0 : n_routed, .routed_bytes = free_routes ? 0 : 1);
    if (routes)
        batch.routed_experts = routes->routes;
    else if (!free_routes)
        batch.record_experts = r->routes;
    esp_tensor hidden, d_hidden;
    float logprob[TOKENS];
    OK(esp_model_zero_grad(model));
    OK(esp_model_forward(model, &batch, &hidden));
    r->n_hidden = TOKENS * c->hidden;
    r->hidden = calloc((size_t)r->n_hidden, sizeof(double));
    read_values(r->hidden, model->ctx, hidden.data, hidden.dtype, r->n_hidden);
    OK(esp_model_logprob(model, &batch, &hidden, 1.0f, logprob, NULL));
    for (int i = 0; i < TOKENS; i++) r->logprob[i] = logprob[i];
    OK(esp_model_cross_entropy(model, &batch, &hidden, &r->loss, &d_hidden));
    OK(esp_model_backward(model, &batch, &d_hidden));
    esp_model_info info = {.struct_size = sizeof info};
    OK(esp_model_info_get(model, &info));
    r->grads = calloc((size_t)info.adapter_parameters + 1, sizeof(double));
    for (int64_t i = 0; i < esp_model_param_count(model); i++) {
        esp_param p = ESP_PARAM_INIT;
        OK(esp_model_param_get(model, i, &p));
        const esp_tensor view = esp_tensor_view(p.grad, p.dtype, p.rank, p.dims);
        read_values(r->grads + r->n_params, model->ctx, p.grad, p.dtype, esp_tensor_count(&view));
        r->n_params += esp_tensor_count(&view);
    }
    OK(esp_ctx_memory(model->ctx, &r->memory));
}

static esp_model *load(esp_ctx *ctx, const form *f) {
    char dir[ESPI_PATH_MAX];
    esp_model *model = NULL;
    snprintf(dir, sizeof dir, "%s/%s", data_dir, f->folder);
    OK(esp_model_load(&model, ctx, dir, &f->config));
    if (model) set_params(model);
    return model;
}

static double error_of(const double *got, const double *want, int64_t n) {
    double difference = 0, size = 0;
    for (int64_t i = 0; i < n; i++) {
        difference += (got[i] - want[i]) * (got[i] - want[i]);
        size += want[i] * want[i];
    }
    return size > 0 ? sqrt(difference / size) : sqrt(difference);
}

/* Rule 9; the floor is a quarter of bf16's last place, for what a plain run has exactly. */
static void within(const char *folder, const char *what, const double *gpu, const double *plain, const double *exact, int64_t n) {
    const double err = error_of(gpu, exact, n), yard = error_of(plain, exact, n), limit = 2 * yard + 0x1p-10;
    printf("    %-18s %-14s %.2e, plain bf16 %.2e\n", folder, what, err, yard);
    EXPECT(!!(err <= limit), "%s: %s: error %g, expected at most %g", folder, what, err, limit);
}

/* Gradients by kind: A and B of attention and of the experts; single tensors of so small a model are too few values for a comparison. */
static void gradients_within(const char *folder, esp_model *model, const double *gpu, const double *plain, const double *exact) {
    static const struct kind {
        const char *in_name, *label;
    } kinds[] = {{"q_proj.lora_A", "d q A"},  {"q_proj.lora_B", "d q B"},        {"v_proj.lora_A", "d v A"},
                 {"o_proj.lora_B", "d o B"},  {"gate_up.lora_A", "d gate_up A"}, {"gate_up.lora_B", "d gate_up B"},
                 {"down.lora_A", "d down A"}, {"down.lora_B", "d down B"}};
    for (int k = 0; k < ESPI_COUNT(kinds); k++) {
        double *of[3];
        const double *from[3] = {gpu, plain, exact};
        int64_t n = 0, at = 0;
        for (int j = 0; j < 3; j++) of[j] = calloc((size_t)1 << 22, sizeof(double));
        for (int64_t i = 0; i < esp_model_param_count(model); i++) {
            esp_param p = ESP_PARAM_INIT;
            OK(esp_model_param_get(model, i, &p));
            const esp_tensor view = esp_tensor_view(p.grad, p.dtype, p.rank, p.dims);
            const int64_t count = esp_tensor_count(&view);
            if (strstr(p.name, kinds[k].in_name)) {
                for (int j = 0; j < 3; j++) memcpy(of[j] + n, from[j] + at, (size_t)count * sizeof(double));
                n += count;
            }
            at += count;
        }
        if (n) within(folder, kinds[k].label, of[0], of[1], of[2], n);
        for (int j = 0; j < 3; j++) free(of[j]);
    }
}

static bool same_bits(const results *a, const results *b) {
    return memcmp(a->hidden, b->hidden, (size_t)a->n_hidden * sizeof(double)) == 0 &&
           memcmp(a->grads, b->grads, (size_t)a->n_params * sizeof(double)) == 0 && memcmp(a->logprob, b->logprob, sizeof a->logprob) == 0;
}

/* Tokens drawn with the cache, then the same tokens through a training forward: the log-probabilities agree as far as bf16 goes. */
static void sampled(const form *f, esp_model *model) {
    int32_t ids[TOKENS], tokens[SEQS * NEW], lengths[SEQS];
    float drawn[SEQS * NEW], logprob[TOKENS + SEQS * NEW];
    int32_t all[TOKENS + SEQS * NEW], cu[SEQS + 1] = {0};
    esp_sampler *sampler;
    esp_tensor hidden;
    fill_ids(ids, model);
    OK(esp_sampler_create(&sampler, model, &ESP_SAMPLER_CONFIG(.max_sequences = 2, .max_length = 64)));
    const esp_generate_config request =
        ESP_GENERATE_CONFIG(.prompts = ids, .cu_prompts = borders, .n_prompts = SEQS, .max_new_tokens = NEW, .seed = 5);
    OK(esp_sampler_generate(sampler, &request, tokens, drawn, lengths, NULL));
    int32_t again[SEQS * NEW];
    float drawn_again[SEQS * NEW];
    OK(esp_sampler_generate(sampler, &request, again, drawn_again, lengths, NULL));
    EXPECT(memcmp(again, tokens, sizeof tokens) == 0 && memcmp(drawn, drawn_again, sizeof drawn) == 0, "%s: samples differ run to run",
           f->folder);
    int32_t n = 0;
    for (int s = 0; s < SEQS; s++) {
        for (int32_t i = borders[s]; i < borders[s + 1]; i++) all[n++] = ids[i];
        for (int32_t i = 0; i < lengths[s]; i++) all[n++] = tokens[s * NEW + i];
        cu[s + 1] = n;
    }
    const esp_batch batch = ESP_BATCH(.tokens = all, .cu_seqlens = cu, .n_tokens = n, .n_seqs = SEQS);
    OK(esp_model_forward_only(model, &batch, &hidden));
    OK(esp_model_logprob(model, &batch, &hidden, 1.0f, logprob, NULL));
    double most = 0;
    for (int s = 0; s < SEQS; s++)
        for (int32_t i = 0; i < lengths[s]; i++)
            most = fmax(most, fabs((double)drawn[s * NEW + i] - (double)logprob[cu[s + 1] - lengths[s] + i]));
    printf("    %-18s %-14s %.2e\n", f->folder, "sampler-train", most);
    EXPECT(!!(most <= 0.25), "%s: sampled log-probabilities are %g off those of a forward", f->folder, most);
    esp_sampler_destroy(sampler);
}

/* ---- recordings and allocations ---- */

static espi_device counted;
static int64_t allocations;

static esp_status counting_alloc(void *device, size_t bytes, void **out) {
    allocations++;
    return espi_backends_gpu[0]->device->alloc(device, bytes, out);
}

static esp_status counting_alloc_host(void *device, size_t bytes, void **out) {
    allocations++;
    return espi_backends_gpu[0]->device->alloc_host(device, bytes, out);
}

/* The first time a shape comes its passes run as they are, the second time they are recorded, from the third on only launched. */
static void recorded(const form *f, esp_model *model) {
    enum { RUNS = 4 };
    results r[RUNS];
    int64_t before = 0;
    counted = *model->ctx->device_ops;
    counted.alloc = counting_alloc;
    counted.alloc_host = counting_alloc_host;
    model->ctx->device_ops = &counted;
    for (int i = 0; i < RUNS; i++) {
        if (i == 1) before = allocations;
        run(&r[i], model, NULL, true);
        EXPECT(i == 0 || same_bits(&r[0], &r[i]), "%s: run %d has other bits than the plain one", f->folder, i);
    }
    EXPECT(allocations == before, "%s: %lld allocations after the first step", f->folder, (long long)(allocations - before));
    for (int i = 0; i < RUNS; i++) free_results(&r[i]);
    model->ctx->device_ops = espi_backends_gpu[0]->device;
}

static void one_form(const form *f, bool once) {
    esp_ctx *exact_ctx, *plain_ctx, *gpu_ctx;
    results exact, plain, gpu, again;
    OK(esp_ctx_create(&exact_ctx, &ESP_CTX_CONFIG(.backend = "ref64")));
    OK(fake_ctx(&plain_ctx, NULL));
    OK(esp_ctx_create(&gpu_ctx, &ESP_CTX_CONFIG(.backend = "cuda")));
    if (!gpu_ctx) return;
    esp_plan plan = {.struct_size = sizeof plan};
    char dir[ESPI_PATH_MAX];
    snprintf(dir, sizeof dir, "%s/%s", data_dir, f->folder);
    OK(esp_plan_folder(&plan, gpu_ctx, dir, &f->config, NULL, TOKENS, SEQS));
    esp_model *exact_model = load(exact_ctx, f), *plain_model = load(plain_ctx, f), *gpu_model = load(gpu_ctx, f);
    if (!exact_model || !plain_model || !gpu_model) return;
    round_weights(plain_model);
    run(&exact, exact_model, NULL, false);
    fake_set_rounding(true);
    run(&plain, plain_model, &exact, false);
    fake_set_rounding(false);
    /* The plan is that of a batch which brings no routes: those of layers without experts take room beside it. */
    results unrouted;
    OK(esp_model_reserve(gpu_model, TOKENS, SEQS, true));
    run(&unrouted, gpu_model, NULL, true);
    EXPECT(unrouted.memory.live + plan.optimizer == plan.total, "%s: %zu bytes live, planned %zu", f->folder, unrouted.memory.live,
           plan.total - plan.optimizer);
    free_results(&unrouted);
    run(&gpu, gpu_model, &exact, false);
    if (!once) {
        run(&again, gpu_model, &exact, false);
        EXPECT(same_bits(&gpu, &again), "%s: two runs differ", f->folder);
        free_results(&again);
    }
    within(f->folder, "hidden", gpu.hidden, plain.hidden, exact.hidden, exact.n_hidden);
    within(f->folder, "logprob", gpu.logprob, plain.logprob, exact.logprob, TOKENS);
    gradients_within(f->folder, gpu_model, gpu.grads, plain.grads, exact.grads);
    sampled(f, gpu_model);
    if (!once) recorded(f, gpu_model);
    free_results(&exact);
    free_results(&plain);
    free_results(&gpu);
    esp_model_destroy(exact_model);
    esp_model_destroy(plain_model);
    esp_model_destroy(gpu_model);
    esp_ctx_destroy(exact_ctx);
    esp_ctx_destroy(plain_ctx);
    esp_ctx_destroy(gpu_ctx);
}

/* ---- moments in the host's memory ---- */

/* Parameters and moments after a few steps. */
static unsigned char *trained(size_t *bytes, const form *f, const esp_adamw_config *adamw) {
    esp_ctx *ctx;
    esp_optim *optim;
    unsigned char *all = malloc((size_t)1 << 26);
    OK(esp_ctx_create(&ctx, &ESP_CTX_CONFIG(.backend = "cuda")));
    esp_model *model = load(ctx, f);
    OK(esp_adamw_create(&optim, model, adamw));
    *bytes = 0;
    for (int i = 0; i < 3; i++) {
        results r;
        run(&r, model, NULL, true);
        OK(esp_optim_step(optim));
        free_results(&r);
    }
    for (int64_t i = 0; i < model->n_params; i++) {
        const esp_param *p = &model->params[i];
        const esp_tensor view = esp_tensor_view(p->data, p->dtype, p->rank, p->dims);
        const size_t n = (size_t)esp_tensor_count(&view) * esp_dtype_size(p->dtype);
        OK(espi_ctx_get(ctx, all + *bytes, p->data, n));
        *bytes += n;
    }
    for (int64_t i = 0; i < esp_optim_array_count(optim); i++) {
        esp_optim_array a = ESP_OPTIM_ARRAY_INIT;
        OK(esp_optim_array_get(optim, i, &a));
        const size_t n = (size_t)a.count * esp_dtype_size(a.dtype);
        OK(espi_ctx_get(ctx, all + *bytes, a.data, n));
        *bytes += n;
    }
    esp_optim_destroy(optim);
    esp_model_destroy(model);
    esp_ctx_destroy(ctx);
    return all;
}

static void moments_in_host_memory(const form *f, bool eight_bit) {
    size_t here_bytes, there_bytes;
    unsigned char *here = trained(&here_bytes, f, &ESP_ADAMW_CONFIG(.lr = 0.01f, .eight_bit = eight_bit));
    unsigned char *there = trained(&there_bytes, f, &ESP_ADAMW_CONFIG(.lr = 0.01f, .eight_bit = eight_bit, .host_moments = true));
    EXPECT(here_bytes > 0 && here_bytes == there_bytes && memcmp(here, there, here_bytes) == 0,
           "%s: %d-bit moments in the host's memory: other bits than on the GPU", f->folder, eight_bit ? 8 : 32);
    free(here);
    free(there);
}

int main(int argc, char **argv) {
    const espi_backend *backend = espi_backends_gpu[0];
    if (backend == NULL || !backend->available()) {
        puts("skipped: no GPU, or a build without one");
        return 77;
    }
    if (argc > 1) data_dir = argv[1];
    for (int i = 0; i < ESPI_COUNT(forms); i++) {
        if (argc > 2 && strstr(forms[i].folder, argv[2]) != forms[i].folder) continue;
        printf("%s\n", forms[i].folder);
        RUN(one_form(&forms[i], argc > 3));
    }
    for (int eight_bit = 0; eight_bit < 2 && argc <= 2; eight_bit++) RUN(moments_in_host_memory(&forms[1], eight_bit));
    return check_end();
}
