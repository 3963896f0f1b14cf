/* What is planned is what is taken, to the byte: for several shapes, budgets and formats; and the head's memory does not grow with T. */
#include "contract/block.h"
#include "dist/comm.h"
#include "espalier/espalier.h"
#include "kernels/backend.h"
#include "models/model.h"
#include "outcome.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define MODEL ESP_SOURCE_DIR "/tests/golden/data/q3a/model"
#define DENSE_MODEL ESP_SOURCE_DIR "/tests/golden/data/q3b/model"

/* n_seqs sequences of about the same length. */
static esp_batch make_batch(int32_t *ids, int32_t *cu, int32_t n_tokens, int32_t n_seqs) {
    for (int32_t t = 0; t < n_tokens; t++) ids[t] = (t * 37 + 11) % 156; /* ids beyond stand for pictures in one family */
    for (int32_t s = 0; s <= n_seqs; s++) cu[s] = (int32_t)((int64_t)n_tokens * s / n_seqs);
    return ESP_BATCH(.tokens = ids, .cu_seqlens = cu, .n_tokens = n_tokens, .n_seqs = n_seqs);
}

static void check(const char *dir, const esp_model_config *config, const esp_adamw_config *adamw, int32_t n_tokens, int32_t n_seqs) {
    esp_ctx *ctx;
    esp_model *model;
    esp_optim *optim;
    esp_plan plan = ESP_PLAN_INIT;
    esp_memory m = ESP_MEMORY_INIT;
    cr_assert_eq(esp_ctx_create(&ctx, NULL), ESP_OK, "%s", esp_last_error());
    cr_assert_eq(esp_plan_folder(&plan, ctx, dir, config, adamw, n_tokens, n_seqs), ESP_OK, "%s", esp_last_error());
    cr_assert_eq(esp_ctx_memory(ctx, &m), ESP_OK);
    cr_expect_eq(m.peak, 0, "planning took %zu bytes of tensor memory", m.peak);

    int32_t *ids = malloc((size_t)n_tokens * sizeof *ids), *cu = malloc(((size_t)n_seqs + 1) * sizeof *cu);
    cr_assert(ids && cu);
    const esp_batch batch = make_batch(ids, cu, n_tokens, n_seqs);
    esp_tensor hidden, d_hidden;
    double loss;
    cr_assert_eq(esp_model_load(&model, ctx, dir, config), ESP_OK, "%s", esp_last_error());
    cr_assert_eq(esp_adamw_create(&optim, model, adamw), ESP_OK, "%s", esp_last_error());
    cr_assert_eq(esp_model_forward(model, &batch, &hidden), ESP_OK, "%s", esp_last_error());
    cr_assert_eq(esp_model_cross_entropy(model, &batch, &hidden, &loss, &d_hidden), ESP_OK, "%s", esp_last_error());
    cr_assert_eq(esp_model_backward(model, &batch, &d_hidden), ESP_OK, "%s", esp_last_error());
    cr_assert_eq(esp_optim_step(optim), ESP_OK, "%s", esp_last_error());
    cr_assert_eq(esp_ctx_memory(ctx, &m), ESP_OK);
    cr_expect_eq(m.weights, plan.dense_weights + plan.expert_weights, "weights: %zu, planned %zu", m.weights,
                 plan.dense_weights + plan.expert_weights);
    cr_expect_eq(m.adapter, plan.adapter + plan.gradients, "adapter: %zu, planned %zu", m.adapter, plan.adapter + plan.gradients);
    cr_expect_eq(m.optimizer, plan.optimizer, "optimizer: %zu, planned %zu", m.optimizer, plan.optimizer);
    cr_expect_eq(m.activations, plan.activations, "activations: %zu, planned %zu", m.activations, plan.activations);
    cr_expect_eq(m.activations_used, plan.activations, "of the activation block %zu bytes were used, planned %zu", m.activations_used,
                 plan.activations);
    cr_expect_eq(m.live, plan.total, "all: %zu, planned %zu", m.live, plan.total);
    cr_expect_eq(m.peak, plan.peak, "peak: %zu, planned %zu", m.peak, plan.peak);
    esp_optim_destroy(optim);
    esp_model_destroy(model);
    cr_assert_eq(esp_ctx_memory(ctx, &m), ESP_OK);
    cr_expect_eq(m.live, 0, "%zu bytes were never given back", m.live);
    esp_ctx_destroy(ctx);
    free(ids);
    free(cu);
}

Test(plan, equals_measured) {
    check(MODEL, NULL, NULL, 50, 3);
    check(MODEL, &ESP_MODEL_CONFIG(.lora_rank = 3, .experts = ESP_FP4, .double_quant = true), NULL, 7, 7);
    check(MODEL, &ESP_MODEL_CONFIG(.lora_targets = ESP_LORA_EXPERTS, .experts = ESP_Q_NONE), NULL, 300, 1);
    check(DENSE_MODEL, &ESP_MODEL_CONFIG(.activation_budget = 200000), &ESP_ADAMW_CONFIG(.eight_bit = true), 100, 2);
    check(DENSE_MODEL, &ESP_MODEL_CONFIG(.activation_budget = 1, .train_router = true), NULL, 33, 1);
    check(MODEL, NULL, &ESP_ADAMW_CONFIG(.host_moments = true), 20, 2); /* the same memory on a CPU */
}

/* A library's work memory is planned too, though a plan has no pointers to look at. */
Test(plan, equals_measured_with_a_dense_library) {
    cr_assert_eq(setenv("ESP_DENSE", "onednn", 1), 0);
    esp_ctx *ctx;
    esp_model *model;
    cr_assert_eq(esp_ctx_create(&ctx, NULL), ESP_OK);
    cr_assert_eq(esp_model_load(&model, ctx, MODEL, NULL), ESP_OK);
    esp_tensor hidden;
    const esp_batch one = ESP_BATCH(.tokens = (const int32_t[]){1}, .cu_seqlens = (const int32_t[]){0, 1}, .n_tokens = 1, .n_seqs = 1);
    const esp_status status = esp_model_forward(model, &one, &hidden);
    const bool built_in = status == ESP_OK || !strstr(esp_last_error(), "onednn");
    esp_model_destroy(model);
    esp_ctx_destroy(ctx);
    if (!built_in) cr_skip("oneDNN is not built in: %s", esp_last_error());
    check(MODEL, NULL, NULL, 50, 3);
}

Test(plan, of_every_family_equals_measured) {
    static const char *const folders[] = {"go1/model", "go2/model", "vl/model", "vla/model_transposed", "ol/model", "mx/model"};
    for (size_t i = 0; i < sizeof folders / sizeof *folders; i++) {
        char dir[4096];
        snprintf(dir, sizeof dir, "%s/tests/golden/data/%s", ESP_SOURCE_DIR, folders[i]);
        check(dir, NULL, NULL, 40, 3);
        check(dir, &ESP_MODEL_CONFIG(.activation_budget = 1, .train_router = true), &ESP_ADAMW_CONFIG(.eight_bit = true), 33, 1);
        if (i < 2) continue; /* MXFP4, which is the only form for them */
        check(dir, &ESP_MODEL_CONFIG(.experts = ESP_FP4, .double_quant = true), NULL, 33, 1);
        check(dir, &ESP_MODEL_CONFIG(.experts = ESP_Q_NONE, .lora_rank = 3), NULL, 20, 2);
    }
    check(ESP_SOURCE_DIR "/tests/golden/data/mx/model", &ESP_MODEL_CONFIG(.experts = ESP_MXFP4), NULL, 20, 2);
}

Test(plan, a_budget_trades_memory) {
    esp_ctx *ctx;
    esp_plan all = ESP_PLAN_INIT, none = ESP_PLAN_INIT;
    cr_assert_eq(esp_ctx_create(&ctx, NULL), ESP_OK);
    cr_assert_eq(esp_plan_folder(&all, ctx, DENSE_MODEL, NULL, NULL, 500, 5), ESP_OK);
    cr_assert_eq(esp_plan_folder(&none, ctx, DENSE_MODEL, &ESP_MODEL_CONFIG(.activation_budget = 1), NULL, 500, 5), ESP_OK);
    cr_expect_eq(all.layers_recomputed, 0);
    cr_expect_eq(none.layers_recomputed, 4);
    cr_expect_lt(none.activations, all.activations);
    esp_ctx_destroy(ctx);
}

/* A vocabulary of 151936, as Qwen3 has it, from a config.json alone: the head's memory at 8192 tokens is that at 256 plus a few values a
 * token (9 arrays of 4 bytes), nowhere near 151936 values a token. */
Test(plan, head_is_constant_in_tokens) {
    const char *dir = ESP_BINARY_DIR "/plan-head";
    const char *text = "{\"model_type\":\"qwen3_moe\",\"hidden_size\":2048,\"num_hidden_layers\":2,\"num_attention_heads\":32,"
                       "\"num_key_value_heads\":4,\"head_dim\":128,\"moe_intermediate_size\":768,\"intermediate_size\":6144,"
                       "\"num_experts\":128,\"num_experts_per_tok\":8,\"norm_topk_prob\":true,\"vocab_size\":151936,"
                       "\"max_position_embeddings\":40960,\"rope_theta\":1000000.0,\"torch_dtype\":\"bfloat16\",\"hidden_act\":\"silu\"}";
    char command[1024];
    snprintf(command, sizeof command, "mkdir -p '%s'", dir);
    cr_assert_eq(system(command), 0);
    snprintf(command, sizeof command, "%s/config.json", dir);
    FILE *f = fopen(command, "w");
    cr_assert_not_null(f);
    fputs(text, f);
    fclose(f);
    esp_ctx *ctx;
    esp_plan small = ESP_PLAN_INIT, large = ESP_PLAN_INIT;
    cr_assert_eq(esp_ctx_create(&ctx, NULL), ESP_OK);
    cr_assert_eq(esp_plan_folder(&small, ctx, dir, NULL, NULL, 256, 1), ESP_OK, "%s", esp_last_error());
    cr_assert_eq(esp_plan_folder(&large, ctx, dir, NULL, NULL, 8192, 1), ESP_OK, "%s", esp_last_error());
    const size_t scalars = (size_t)(8192 - 256) * 9 * 4;
    cr_expect_geq(large.head, small.head);
    cr_expect_leq(large.head - small.head, scalars + 9 * 64, "head: %zu bytes at 256 tokens, %zu at 8192", small.head, large.head);
    esp_ctx_destroy(ctx);
}

/* What a layer of experts of the Qwen3-30B-A3B shape holds at 4096 tokens as a GPU has it: at most 0.2 GB, of which the kernels' work memory is
 * at most 32 MB.  Rows on their way from op to op come on top: they are there once, whatever the layers.  Nothing is taken, so no GPU is
 * needed. */
Test(plan, a_layer_of_experts_on_a_gpu) {
    enum { T = 4096, E = 128, K = 8, H = 2048, I = 768, R = 16, ACT = 2 };
    static const char packed;
    const size_t slots = (size_t)T * K, forward_rows = slots * (I + H) * ACT, backward_rows = slots * (2 * I + H) * ACT;
    esp_ctx *ctx;
    OK(esp_ctx_create(&ctx, &ESP_CTX_CONFIG(.backend = "ref")));
    const bool gpu = espi_backends_gpu[0] != NULL; /* are its kernels in this build? */
    if (gpu) ctx->backends[0] = espi_backends_gpu[0];
    ctx->act = ESP_BF16;
    ctx->act_size = ACT;
    esp_model model = {.ctx = ctx, .adapter_on = true, .share = {.ranks = 1, .spread = 1}};
    const espi_router router = {.w = {.dtype = ESP_F32, .rows = E, .cols = H}, .top_k = K};
    const espi_stack nf4 = {.format = ESP_NF4, .experts = E, .parts = 1, .packed = &packed};
    const espi_lora lora = {.r = R, .scale = 1};
    espi_experts experts = {.gate_up = nf4, .down = nf4, .lora_gate_up = lora, .lora_down = lora};
    experts.gate_up.rows = 2 * I;
    experts.gate_up.cols = H;
    experts.down.rows = H;
    experts.down.cols = I;
    espi_arena kept = espi_arena_dry(true), forward = espi_arena_dry(true), backward = espi_arena_dry(true);
    espi_moe_saved saved = {0};
    espi_pass pass = {.model = &model, .ctx = ctx, .arena = &kept, .tokens = T, .adapter = true};
    OK(espi_route_take_saved(&pass, 0, &router, &saved.route));
    OK(espi_experts_take_lasting(&pass, &experts, K, &saved.experts));
    OK(espi_experts_take_saved(&pass, &experts, K, &saved.experts));
    pass.arena = &forward;
    OK(espi_moe_forward(&pass, 0, NULL, NULL, NULL, &router, &experts, &saved, false));
    pass.arena = &backward;
    OK(espi_moe_backward(&pass, 0, NULL, NULL, NULL, &router, &experts, &saved));
    const size_t x = (size_t)T * H * ACT, all_kept = x + kept.main.high;
    const size_t routes = (size_t)T * E * sizeof(float) + (1 << 20); /* the router's probabilities; numbers of tokens and routed rows */
    const size_t work_forward = forward.main.high - forward_rows, work_backward = backward.main.high - backward_rows;
    const size_t work = work_forward > work_backward ? work_forward : work_backward;
    cr_expect_leq(kept.main.high, slots * (2 * I + 2 * R) * ACT + routes, "kept beside the input: %zu bytes", kept.main.high);
    if (gpu) cr_expect_leq(work, 32 << 20, "work memory: %zu bytes forward, %zu backward", work_forward, work_backward);
    cr_expect_leq(all_kept + (gpu ? work : 32 << 20), 200000000, "kept: %zu bytes, work memory: %zu", all_kept, work);
    esp_ctx_destroy(ctx);
}

/* A placement's memory is that of a rank of such a job; what travels, counted by hand. */
Test(plan, placements) {
    enum { RANKS = 3, SPREAD = 3, T = 90, LORA = 4 };
    const esp_machine machine = ESP_MACHINE(.flops = 1e9, .bytes_per_second = 1e6, .seconds_per_call = 1e-3, .memory = 1);
    esp_comm *comms[RANKS];
    esp_ctx *alone, *ranked;
    esp_model *model;
    esp_model_info info = ESP_MODEL_INFO_INIT;
    esp_plan plan = ESP_PLAN_INIT;
    esp_placement p = ESP_PLACEMENT(.ranks = RANKS, .micro_batches = 2);
    const esp_model_config config = ESP_MODEL_CONFIG(.lora_rank = LORA, .expert_ranks = SPREAD);
    cr_assert_eq(esp_ctx_create(&alone, NULL), ESP_OK);
    cr_assert_eq(esp_plan_placement(&p, alone, MODEL, &config, NULL, T, 3, &machine), ESP_OK, "%s", esp_last_error());
    cr_expect(p.expert_ranks == SPREAD && !p.fits);
    cr_assert_eq(espi_comm_simulate(comms, RANKS), ESP_OK);
    size_t most = 0;
    for (int r = 0; r < RANKS; r++) {
        cr_assert_eq(esp_ctx_create(&ranked, &ESP_CTX_CONFIG(.comm = comms[r])), ESP_OK);
        cr_assert_eq(esp_plan_folder(&plan, ranked, MODEL, &config, NULL, T, 3), ESP_OK, "%s", esp_last_error());
        most = plan.peak > most ? plan.peak : most;
        esp_ctx_destroy(ranked);
        esp_comm_destroy(comms[r]);
    }
    cr_expect_eq(p.plan.peak, most, "planned %zu, a rank has %zu", p.plan.peak, most);

    cr_assert_eq(esp_model_load(&model, alone, MODEL, &ESP_MODEL_CONFIG(.lora_rank = LORA)), ESP_OK, "%s", esp_last_error());
    cr_assert_eq(esp_model_info_get(model, &info), ESP_OK);
    double dense = 0;
    for (int64_t i = 0; i < esp_model_param_count(model); i++) {
        esp_param param = ESP_PARAM_INIT;
        cr_assert_eq(esp_model_param_get(model, i, &param), ESP_OK);
        if (param.rank == 2) dense += (double)(param.dims[0] * param.dims[1]);
    }
    cr_expect_eq(p.sum_bytes, 4 * dense * 2 * (RANKS - 1) / RANKS);
    cr_expect_eq(p.exchange_bytes, (double)(T * info.top_k) * (SPREAD - 1) / SPREAD * (double)(4 * info.hidden * 4 + 2 * 4));
    cr_expect(fabs(p.seconds - 2 * (p.seconds_compute + p.seconds_exchange + p.seconds_sum)) < 1e-12);
    esp_model_destroy(model);

    /* What the busiest rank does beyond its share, and experts unpacked for every rank that sends rows, forward and back. */
    const esp_machine loaded = ESP_MACHINE(.flops = 1e9, .bytes_per_second = 1e6, .seconds_per_call = 1e-3, .skew = 1.5,
                                           .weights_per_second = 1e8),
                      even = ESP_MACHINE(.flops = 1e9, .bytes_per_second = 1e6, .seconds_per_call = 1e-3, .skew = 0.9);
    const double expert = (double)(info.layers * 3 * info.hidden * info.expert_width), own = (double)((info.experts + SPREAD - 1) / SPREAD);
    esp_placement q = ESP_PLACEMENT(.ranks = RANKS, .micro_batches = 2);
    cr_assert_eq(esp_plan_placement(&q, alone, MODEL, &config, NULL, T, 3, &loaded), ESP_OK, "%s", esp_last_error());
    cr_expect_float_eq(q.exchange_bytes, 1.5 * p.exchange_bytes, 1e-3);
    cr_expect_float_eq(q.seconds_compute - p.seconds_compute,
                       4 * 0.5 * (double)info.top_k * expert * T / 1e9 + 2 * expert * own * SPREAD / 1e8, 1e-9);
    cr_expect_eq(esp_plan_placement(&q, alone, MODEL, &config, NULL, T, 3, &even), ESP_ERR_ARG);

    const esp_model_config uneven = ESP_MODEL_CONFIG(.expert_ranks = 2);
    cr_expect_eq(esp_plan_placement(&p, alone, MODEL, &uneven, NULL, T, 3, &machine), ESP_ERR_ARG);
    esp_ctx_destroy(alone);
}
