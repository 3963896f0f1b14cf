/* The loader: every weight where it belongs and bit for bit, codes as bitsandbytes has them, every layout the same model, memory as
 * planned. */
#include "core/status.h"
#include "espalier/quant.h"
#include "loaded.h"

#include <math.h>

/* Widens element i of a golden tensor. */
static float value_of(const espi_st_item *item, int64_t i) {
    return espi_plain_value(item->data, item->dtype, i);
}

static void expect_floats(const void *got, checkpoint *c, const char *name) {
    const espi_st_item *item = checkpoint_item(c, name);
    const int64_t n = item->rank == 1 ? item->dims[0] : item->dims[0] * item->dims[1];
    cr_assert_not_null(got, "%s", name);
    for (int64_t i = 0; i < n; i++) {
        const float expected = value_of(item, i);
        cr_assert_eq(memcmp((const float *)got + i, &expected, sizeof expected), 0, "%s element %lld", name, (long long)i);
    }
}

Test(loader, dense_weights_are_exact) {
    loaded l;
    checkpoint *c = checkpoint_open("q3c/model"); /* bf16, biases, tied head */
    loaded_golden(&l, "q3c/model", NULL);
    const esp_model *m = l.model;
    const espi_layer *w = &m->layers[1];
    cr_expect_eq(m->embed.dtype, ESP_BF16);
    cr_expect(m->embed.rows == 160 && m->embed.cols == 48);
    cr_expect_eq(m->head.data, m->embed.data, "tied");
    cr_expect_eq(memcmp(m->embed.data, checkpoint_item(c, "model.embed_tokens.weight")->data, 160 * 48 * 2), 0);
    expect_floats(m->final_norm, c, "model.norm.weight");
    expect_floats(w->norm1, c, "model.layers.1.input_layernorm.weight");
    expect_floats(w->norm2, c, "model.layers.1.post_attention_layernorm.weight");
    expect_floats(w->q_norm, c, "model.layers.1.self_attn.q_norm.weight");
    expect_floats(w->k_norm, c, "model.layers.1.self_attn.k_norm.weight");
    expect_floats(w->q.w.data, c, "model.layers.1.self_attn.q_proj.weight");
    expect_floats(w->k.w.data, c, "model.layers.1.self_attn.k_proj.weight");
    expect_floats(w->v.w.data, c, "model.layers.1.self_attn.v_proj.weight");
    expect_floats(w->o.w.data, c, "model.layers.1.self_attn.o_proj.weight");
    expect_floats(w->q.bias, c, "model.layers.1.self_attn.q_proj.bias");
    expect_floats(w->k.bias, c, "model.layers.1.self_attn.k_proj.bias");
    expect_floats(w->v.bias, c, "model.layers.1.self_attn.v_proj.bias");
    expect_floats(w->o.bias, c, "model.layers.1.self_attn.o_proj.bias");
    expect_floats(w->router.data, c, "model.layers.1.mlp.gate.weight");
    cr_expect_str_empty(l.log, "%s", l.log);
    loaded_free(&l);
    checkpoint_close(c);

    c = checkpoint_open("q3a/model"); /* f32, own head, no bias */
    loaded_golden(&l, "q3a/model", NULL);
    cr_expect_neq(l.model->head.data, l.model->embed.data);
    cr_expect_null(l.model->layers[0].q.bias);
    expect_floats(l.model->embed.data, c, "model.embed_tokens.weight");
    expect_floats(l.model->head.data, c, "lm_head.weight");
    loaded_free(&l);
    checkpoint_close(c);
}

/* A dense layer's gate and up are one matrix: gate rows, then up rows. */
Test(loader, dense_layers_join_gate_and_up) {
    loaded l;
    loaded_golden(&l, "q3b/model", NULL);
    espi_st_set *set = NULL;
    OK(espi_st_set_open(&set, ESP_SOURCE_DIR "/tests/golden/data/q3b/model"));
    static const char *const names[] = {"model.layers.2.mlp.gate_proj.weight", "model.layers.2.mlp.up_proj.weight",
                                        "model.layers.2.mlp.down_proj.weight"};
    const espi_layer *w = &l.model->layers[2];
    const float *joined = w->mlp_gate_up.w.data, *got[] = {joined, joined + 96 * 64, w->mlp_down.w.data};
    cr_assert_eq(w->mlp, ESPI_MLP_DENSE);
    cr_expect(w->mlp_gate_up.w.rows == 192 && w->mlp_gate_up.w.cols == 64 && w->mlp_down.w.rows == 64 && w->mlp_down.w.cols == 96);
    for (int i = 0; i < 3; i++) {
        uint16_t bits[96 * 64];
        OK(espi_st_read(espi_st_set_find(set, names[i]), bits, 0, sizeof bits));
        for (int j = 0; j < 96 * 64; j++) cr_assert_eq(got[i][j], espi_bf16_value(bits[j]), "%s element %d", names[i], j);
    }
    espi_st_set_close(set);
    loaded_free(&l);
}

/* ---- 4 bits ---- */

static const char *const kinds[] = {"gate_proj", "up_proj", "down_proj"};

/* The stack and part that hold matrix `kind` of an expert. */
static const espi_stack *find_part(const esp_model *m, int layer, int expert, int kind, int64_t *part) {
    const espi_layer *w = &m->layers[layer];
    *part = kind == 2 ? expert : 2 * expert + kind;
    return kind == 2 ? &w->down : &w->gate_up;
}

static const uint8_t *part_codes(const espi_stack *s, int64_t part) {
    return (const uint8_t *)s->data + (size_t)part * s->part_bytes;
}

static espi_st_item *expert_item(checkpoint *c, int layer, int expert, int kind, const char *suffix) {
    char name[200];
    snprintf(name, sizeof name, "model.layers.%d.mlp.experts.%d.%s.weight%s", layer, expert, kinds[kind], suffix);
    return checkpoint_item(c, name);
}

/* Quantised while loading, the experts are what bitsandbytes made of the same values; and its own file loads as the same bytes. */
Test(loader, nf4_codes_are_those_of_bitsandbytes) {
    loaded ours, theirs;
    checkpoint *c = checkpoint_open("q3a/model_nf4");
    loaded_golden(&ours, "q3a/model", NULL);
    loaded_golden(&theirs, "q3a/model_nf4", NULL);
    for (int i = 0; i < 2 * 8 * 3; i++) {
        const int layer = i / 24, expert = i / 3 % 8, kind = i % 3;
        int64_t part;
        const espi_stack *s = find_part(ours.model, layer, expert, kind, &part);
        cr_assert(s->part_bytes == 1024 && s->part_blocks == 32 && s->format == ESP_NF4 && !s->absmax8);
        cr_expect_eq(memcmp(part_codes(s, part), expert_item(c, layer, expert, kind, "")->data, 1024), 0, "codes of %d.%d.%s", layer,
                     expert, kinds[kind]);
        cr_expect_eq(memcmp(s->absmax + part * 32, expert_item(c, layer, expert, kind, ".absmax")->data, 32 * sizeof(float)), 0,
                     "absmax of %d.%d.%s", layer, expert, kinds[kind]);
    }
    cr_expect(loaded_same(&ours, &theirs));
    cr_expect_str_empty(theirs.log, "%s", theirs.log);
    loaded_free(&ours);
    loaded_free(&theirs);
    checkpoint_close(c);
}

/* bitsandbytes looks 8-bit codes of absmax up in 2^16 cells of [-1,1] on the CPU: a code may not be the nearest where the value lies
 * within 1.6e-5 of a midpoint.  So theirs may be farther off than ours by that much of a nested scale, never the reverse. */
Test(loader, double_quantisation) {
    const esp_model_config dq = ESP_MODEL_CONFIG(.double_quant = true);
    loaded plain, ours, theirs, restored, shrunk;
    checkpoint *c = checkpoint_open("q3a/model_nf4_dq");
    loaded_golden(&plain, "q3a/model", NULL);
    loaded_golden(&ours, "q3a/model", &dq);
    loaded_golden(&theirs, "q3a/model_nf4_dq", &dq);
    loaded_golden(&restored, "q3a/model_nf4_dq", NULL);
    loaded_golden(&shrunk, "q3a/model_nf4", &dq);
    cr_expect(loaded_same(&ours, &shrunk), "scales of a file are shrunk as our own are");
    cr_expect_lt(ours.model->weights.extent.main, plain.model->weights.extent.main + 1024);
    for (int i = 0; i < 2 * 8 * 3; i++) {
        const int layer = i / 24, expert = i / 3 % 8, kind = i % 3;
        int64_t part;
        const espi_stack *p = find_part(plain.model, layer, expert, kind, &part), *o = find_part(ours.model, layer, expert, kind, &part);
        const espi_stack *t = find_part(theirs.model, layer, expert, kind, &part),
                         *r = find_part(restored.model, layer, expert, kind, &part);
        const uint8_t *file_codes = expert_item(c, layer, expert, kind, ".absmax")->data;
        const float *file_nested = expert_item(c, layer, expert, kind, ".nested_absmax")->data;
        const float *file_map = expert_item(c, layer, expert, kind, ".nested_quant_map")->data;
        cr_assert(o->absmax8 && t->absmax8 && !o->absmax && !t->absmax && r->absmax && !r->absmax8);
        cr_expect_eq(memcmp(part_codes(o, part), part_codes(p, part), 1024), 0);
        cr_expect_eq(memcmp(part_codes(t, part), part_codes(p, part), 1024), 0);
        cr_expect_eq(memcmp(t->absmax8 + part * 32, file_codes, 32), 0);
        cr_expect_eq(memcmp(t->map, file_map, 256 * sizeof(float)), 0);
        cr_expect_eq(t->nested[part], file_nested[0]);
        float theirs32[32], ours32[32];
        OK(esp_absmax_dequantize(theirs32, file_codes, file_nested, t->offset[part], file_map, 32));
        OK(esp_absmax_dequantize(ours32, o->absmax8 + part * 32, o->nested + part, o->offset[part], o->map, 32));
        cr_expect_eq(memcmp(r->absmax + part * 32, theirs32, sizeof theirs32), 0, "restored scales");
        cr_expect_float_eq(o->offset[part], t->offset[part], 1e-6f);
        for (int b = 0; b < 32; b++) {
            const float exact = p->absmax[part * 32 + b], off = fabsf(ours32[b] - exact), their_off = fabsf(theirs32[b] - exact);
            cr_expect(off <= their_off + 1e-6f && their_off <= off + 3.2e-5f * file_nested[0] + 1e-6f,
                      "block %d: ours %g, theirs %g, exact %g", b, (double)ours32[b], (double)theirs32[b], (double)exact);
        }
    }
    loaded_free(&plain);
    loaded_free(&ours);
    loaded_free(&theirs);
    loaded_free(&restored);
    loaded_free(&shrunk);
    checkpoint_close(c);
}

/* FP4, and experts left plain. */
Test(loader, other_formats) {
    loaded fp4, none;
    checkpoint *c = checkpoint_open("q3c/model");
    loaded_golden(&fp4, "q3c/model", &ESP_MODEL_CONFIG(.experts = ESP_FP4));
    loaded_golden(&none, "q3c/model", &ESP_MODEL_CONFIG(.experts = ESP_Q_NONE));
    for (int i = 0; i < 2 * 6 * 3; i++) {
        const int layer = i / 18, expert = i / 3 % 6, kind = i % 3;
        const espi_st_item *item = expert_item(c, layer, expert, kind, "");
        int64_t part;
        const espi_stack *s = find_part(fp4.model, layer, expert, kind, &part), *n = find_part(none.model, layer, expert, kind, &part);
        uint8_t codes[576];
        float absmax[18];
        OK(esp_quantize(codes, absmax, item->data, ESP_BF16, 24 * 48, 64, ESP_FP4));
        cr_assert(s->part_bytes == sizeof codes && s->part_blocks == 18);
        cr_expect_eq(memcmp(part_codes(s, part), codes, sizeof codes), 0);
        cr_expect_eq(memcmp(s->absmax + part * 18, absmax, sizeof absmax), 0);
        cr_assert(n->format == ESP_Q_NONE && n->dtype == ESP_BF16 && n->part_bytes == 24 * 48 * 2);
        cr_expect_eq(memcmp(part_codes(n, part), item->data, 24 * 48 * 2), 0);
    }
    loaded_free(&fp4);
    loaded_free(&none);
    checkpoint_close(c);
}

/* ---- layouts ---- */

static const esp_model_config layout_options[] = {{.struct_size = sizeof(esp_model_config)},
                                                  {.struct_size = sizeof(esp_model_config), .double_quant = true},
                                                  {.struct_size = sizeof(esp_model_config), .experts = ESP_FP4},
                                                  {.struct_size = sizeof(esp_model_config), .experts = ESP_Q_NONE}};

Test(loader, fused_and_per_expert_are_one_model) {
    for (int i = 0; i < ESPI_COUNT(layout_options); i++) {
        loaded a, b;
        loaded_golden(&a, "q3c/model", &layout_options[i]);
        loaded_golden(&b, "q3c/model_fused", &layout_options[i]);
        cr_expect(loaded_same(&a, &b), "options %d", i);
        cr_expect_str_empty(b.log, "%s", b.log);
        loaded_free(&a);
        loaded_free(&b);
    }
}

/* Every third tensor in each shard, so that a layer and even an expert is spread over all. */
static void write_shards(const checkpoint *c, const char *dir) {
    json_t *map = json_object();
    for (int shard = 0; shard < 3; shard++) {
        char name[40], path[ESPI_PATH_MAX];
        espi_st_item items[CHECKPOINT_MAX];
        size_t n = 0;
        snprintf(name, sizeof name, "model-%05d-of-00003.safetensors", shard + 1);
        for (size_t i = (size_t)shard; i < c->n; i += 3) {
            items[n++] = c->items[i];
            json_object_set_new(map, c->items[i].name, json_string(name));
        }
        OK(espi_path_join(path, dir, name));
        OK(espi_st_write(path, items, n));
    }
    char path[ESPI_PATH_MAX];
    json_t *index = json_pack("{s:{s:i}, s:o}", "metadata", "total_size", 0, "weight_map", map);
    OK(espi_path_join(path, dir, "model.safetensors.index.json"));
    cr_assert_eq(json_dump_file(index, path, 0), 0);
    json_decref(index);
    checkpoint_write_config(c, dir);
}

Test(loader, shards_are_the_same_model) {
    char dir[ESPI_PATH_MAX];
    loaded a, b;
    checkpoint *c = checkpoint_open("q3a/model");
    scratch_make(dir);
    write_shards(c, dir);
    loaded_golden(&a, "q3a/model", NULL);
    OK(loaded_try(&b, dir, NULL));
    cr_expect(loaded_same(&a, &b));
    loaded_free(&a);
    loaded_free(&b);
    checkpoint_close(c);
    scratch_remove(dir);
}

/* Layer 0 per expert, layer 1 fused. */
Test(loader, layers_may_differ_in_layout) {
    char dir[ESPI_PATH_MAX], name[100];
    loaded a, b;
    checkpoint *c = checkpoint_open("q3c/model"), *fused = checkpoint_open("q3c/model_fused");
    scratch_make(dir);
    for (int e = 0; e < 6; e++)
        for (int kind = 0; kind < 3; kind++) {
            snprintf(name, sizeof name, "model.layers.1.mlp.experts.%d.%s.weight", e, kinds[kind]);
            checkpoint_drop(c, name);
        }
    c->items[c->n++] = *checkpoint_item(fused, "model.layers.1.mlp.experts.gate_up_proj");
    c->items[c->n++] = *checkpoint_item(fused, "model.layers.1.mlp.experts.down_proj");
    checkpoint_write(c, dir);
    loaded_golden(&a, "q3c/model", NULL);
    OK(loaded_try(&b, dir, NULL));
    cr_expect(loaded_same(&a, &b));
    loaded_free(&a);
    loaded_free(&b);
    checkpoint_close(c);
    checkpoint_close(fused);
    scratch_remove(dir);
}

/* q3a with every value replaced by a finite f16 pattern, subnormals and signed zeros among them. */
static checkpoint *half_checkpoint(void) {
    checkpoint *c = checkpoint_open("q3a/model");
    checkpoint_set(c, "dtype", "\"float16\"");
    uint32_t state = 1;
    for (size_t i = 0; i < c->n; i++) {
        espi_st_item *item = &c->items[i];
        const int64_t n = item->rank == 1 ? item->dims[0] : item->dims[0] * item->dims[1];
        uint16_t *bits = checkpoint_own(c, malloc((size_t)n * sizeof *bits));
        for (int64_t j = 0; j < n; j++) {
            state = state * 1664525u + 1013904223u;
            bits[j] = (uint16_t)(state >> 16);
            if ((bits[j] & 0x7c00u) == 0x7c00u) bits[j] &= 0x83ffu;
        }
        item->dtype = ESP_F16;
        item->data = bits;
    }
    return c;
}

Test(loader, half_precision) {
    char dir[ESPI_PATH_MAX];
    loaded l;
    checkpoint *c = half_checkpoint();
    scratch_make(dir);
    checkpoint_write(c, dir);
    OK(loaded_try(&l, dir, NULL));
    cr_expect_eq(l.model->embed.dtype, ESP_F16);
    expect_floats(l.model->layers[1].q.w.data, c, "model.layers.1.self_attn.q_proj.weight");
    uint8_t codes[1024];
    float absmax[32];
    OK(esp_quantize(codes, absmax, expert_item(c, 1, 7, 1, "")->data, ESP_F16, 2048, 64, ESP_NF4));
    cr_expect_eq(memcmp(part_codes(&l.model->layers[1].gate_up, 15), codes, sizeof codes), 0);
    loaded_free(&l);
    /* Narrow values under a config that says float32 are widened, embedding and plain experts too. */
    checkpoint_set(c, "dtype", "\"float32\"");
    checkpoint_write(c, dir);
    OK(loaded_try(&l, dir, &ESP_MODEL_CONFIG(.experts = ESP_Q_NONE)));
    expect_floats(l.model->embed.data, c, "model.embed_tokens.weight");
    expect_floats(part_codes(&l.model->layers[0].down, 3), c, "model.layers.0.mlp.experts.3.down_proj.weight");
    loaded_free(&l);
    checkpoint_close(c);
    scratch_remove(dir);
}

/* ---- memory ---- */

static void expect_memory(const loaded *l, size_t staging, const char *what) {
    espi_weight_plan plan;
    OK(espi_weight_plan_make(&plan, l->ctx, &l->model->config, &l->model->options, l->model->lora));
    esp_memory m = ESP_MEMORY_INIT;
    OK(esp_ctx_memory(l->ctx, &m));
    cr_expect_eq(m.weights, plan.dense + plan.experts, "%s: weights %zu, planned %zu", what, m.weights, plan.dense + plan.experts);
    cr_expect_eq(l->model->weights.extent.main, m.weights, "%s", what);
    cr_expect_eq(m.live, m.weights, "%s: %zu bytes stay besides the weights", what, m.live - m.weights);
    cr_expect_eq(m.peak, m.weights + staging, "%s: peak %zu, expected %zu weights + %zu staging", what, m.peak, m.weights, staging);
    cr_expect_leq(staging, (size_t)64 << 20);
    cr_expect_eq(plan.staging, staging, "%s: staging %zu, planned %zu", what, staging, plan.staging);
}

Test(loader, peak_memory_is_weights_and_one_staging_buffer) {
    static const char *const models[] = {"q3a/model", "q3a/model_nf4_dq", "q3b/model", "q3c/model_fused"};
    /* The largest matrix is the vocabulary's, 160 rows of f32; double quantisation adds the scales of one expert matrix. */
    static const size_t table[] = {160 * 64 * 4, 160 * 64 * 4, 2 * 96 * 64 * 4, 160 * 48 * 4}, scales[] = {128, 128, 192, 128};
    for (int i = 0; i < ESPI_COUNT(models); i++)
        for (int j = 0; j < ESPI_COUNT(layout_options); j++) {
            if (i == 1 && j > 1) continue; /* quantised already: NF4 only */
            loaded l;
            loaded_golden(&l, models[i], &layout_options[j]);
            expect_memory(&l, table[i] + (j == 1 ? scales[i] : 0), models[i]);
            loaded_free(&l);
        }
}

/* Matrices larger than the staging buffer: taken in pieces, the same codes as in one go. */
Test(loader, large_matrices_go_through_in_pieces, .timeout = 60) {
    enum { WIDTH = 2081, HIDDEN = 1056, ROWS = 16, BLOCKS = (WIDTH * HIDDEN + 63) / 64 };
    const size_t n = (size_t)WIDTH * HIDDEN;
    char dir[ESPI_PATH_MAX];
    loaded l;
    checkpoint *c = checkpoint_open("q3a/model");
    scratch_make(dir);
    static const struct {
        const char *key, *value;
    } settings[] = {{"hidden_size", "1056"},    {"moe_intermediate_size", "2081"}, {"num_hidden_layers", "1"},
                    {"vocab_size", "16"},       {"num_attention_heads", "2"},      {"num_key_value_heads", "1"},
                    {"num_local_experts", "1"}, {"num_experts_per_tok", "1"},      {"head_dim", "4"}};
    for (int i = 0; i < ESPI_COUNT(settings); i++) checkpoint_set(c, settings[i].key, settings[i].value);
    c->n = 0;
    float *values = malloc(n * sizeof *values);
    uint8_t *codes = malloc(n / 2 + 1), *absmax8 = malloc(BLOCKS);
    float *absmax = malloc(BLOCKS * sizeof *absmax), nested[BLOCKS / 256 + 1], offset;
    cr_assert(values && codes && absmax && absmax8);
    uint32_t state = 7;
    for (size_t i = 0; i < n; i++) {
        state = state * 1664525u + 1013904223u;
        values[i] = (float)(int32_t)state * 0x1p-31f;
    }
    static const struct {
        const char *name;
        int64_t rows, cols;
    } tensors[] = {{"model.embed_tokens.weight", ROWS, HIDDEN},
                   {"lm_head.weight", ROWS, HIDDEN},
                   {"model.norm.weight", HIDDEN, 0},
                   {"model.layers.0.input_layernorm.weight", HIDDEN, 0},
                   {"model.layers.0.post_attention_layernorm.weight", HIDDEN, 0},
                   {"model.layers.0.self_attn.q_norm.weight", 4, 0},
                   {"model.layers.0.self_attn.k_norm.weight", 4, 0},
                   {"model.layers.0.self_attn.q_proj.weight", 8, HIDDEN},
                   {"model.layers.0.self_attn.k_proj.weight", 4, HIDDEN},
                   {"model.layers.0.self_attn.v_proj.weight", 4, HIDDEN},
                   {"model.layers.0.self_attn.o_proj.weight", HIDDEN, 8},
                   {"model.layers.0.mlp.gate.weight", 1, HIDDEN},
                   {"model.layers.0.mlp.experts.0.gate_proj.weight", WIDTH, HIDDEN},
                   {"model.layers.0.mlp.experts.0.up_proj.weight", WIDTH, HIDDEN},
                   {"model.layers.0.mlp.experts.0.down_proj.weight", HIDDEN, WIDTH}};
    for (int i = 0; i < ESPI_COUNT(tensors); i++) {
        espi_st_item *item = &c->items[c->n++];
        *item = (espi_st_item){.name = tensors[i].name, .dtype = ESP_F32, .rank = tensors[i].cols ? 2 : 1, .data = values};
        item->dims[0] = tensors[i].rows;
        item->dims[1] = tensors[i].cols;
    }
    checkpoint_write(c, dir);
    OK(esp_quantize(codes, absmax, values, ESP_F32, (int64_t)n, 64, ESP_NF4));
    OK(loaded_try(&l, dir, NULL));
    expect_memory(&l, (size_t)8 << 20, "large");
    cr_expect_eq(l.model->layers[0].gate_up.part_bytes, n / 2);
    for (int part = 0; part < 2; part++) {
        cr_expect_eq(memcmp(part_codes(&l.model->layers[0].gate_up, part), codes, n / 2), 0);
        cr_expect_eq(memcmp(l.model->layers[0].gate_up.absmax + part * BLOCKS, absmax, BLOCKS * sizeof *absmax), 0);
    }
    cr_expect_eq(memcmp(part_codes(&l.model->layers[0].down, 0), codes, n / 2), 0);
    loaded_free(&l);
    OK(esp_absmax_quantize(absmax8, nested, &offset, absmax, BLOCKS));
    OK(loaded_try(&l, dir, &ESP_MODEL_CONFIG(.double_quant = true)));
    expect_memory(&l, ((size_t)8 << 20) + ESPI_ALIGNED(BLOCKS * sizeof(float)), "large, double quantisation");
    cr_expect_eq(memcmp(l.model->layers[0].down.absmax8, absmax8, BLOCKS), 0);
    cr_expect_eq(memcmp(l.model->layers[0].down.nested, nested, sizeof nested), 0);
    cr_expect_eq(l.model->layers[0].down.offset[0], offset);
    loaded_free(&l);
    /* A wrong value in the last piece is named by its place in the tensor. */
    char says[100];
    values[n - 1] = NAN;
    snprintf(says, sizeof says, "tensor model.layers.0.mlp.experts.0.gate_proj.weight: element %zu is", n - 1);
    checkpoint_write(c, dir);
    cr_expect_eq(loaded_try(&l, dir, NULL), ESP_ERR_NONFINITE);
    cr_expect_not_null(strstr(esp_last_error(), says), "\"%s\" not said: %s", says, esp_last_error());
    loaded_free(&l);
    free(values);
    free(codes);
    free(absmax);
    free(absmax8);
    checkpoint_close(c);
    scratch_remove(dir);
}

/* What the adapter and its gradients will take: every A and B a tensor of its own, attention and experts. */
Test(loader, adapter_plan) {
    loaded l;
    loaded_golden(&l, "q3a/model", &ESP_MODEL_CONFIG(.lora_rank = 4, .lora_targets = ESP_LORA_Q | ESP_LORA_DOWN, .train_router = true));
    espi_weight_plan plan;
    OK(espi_weight_plan_make(&plan, l.ctx, &l.model->config, &l.model->options, l.model->lora));
    const size_t q = 4 * (64 + 128) * sizeof(float), down = 8 * 4 * (32 + 64) * sizeof(float);
    cr_expect_eq(plan.adapter, 2 * (q + down), "%zu", plan.adapter);
    cr_expect_eq(plan.gradients, plan.adapter + 2 * 8 * 64 * sizeof(float), "%zu", plan.gradients);
    loaded_free(&l);
}

/* Tensors outside of the model are named in a warning; inverse frequencies of old files are not worth one. */
Test(loader, foreign_tensors_are_reported) {
    char dir[ESPI_PATH_MAX];
    const float value = 1;
    loaded l;
    checkpoint *c = checkpoint_open("q3c/model");
    scratch_make(dir);
    checkpoint_add(c, "vision.patch.weight", ESP_F32, 1, (int64_t[]){1}, &value, sizeof value);
    checkpoint_add(c, "lm_head.weight", ESP_F32, 1, (int64_t[]){1}, &value, sizeof value);
    checkpoint_add(c, "model.layers.0.self_attn.rotary_emb.inv_freq", ESP_F32, 1, (int64_t[]){1}, &value, sizeof value);
    checkpoint_write(c, dir);
    OK(loaded_try(&l, dir, NULL));
    cr_expect_not_null(strstr(l.log, "tensor vision.patch.weight is not used"), "%s", l.log);
    cr_expect_not_null(strstr(l.log, "tensor lm_head.weight is not used"), "%s", l.log);
    cr_expect_null(strstr(l.log, "inv_freq"), "%s", l.log);
    loaded_free(&l);
    checkpoint_close(c);
    scratch_remove(dir);
}
