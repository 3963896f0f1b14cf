/* The forms of adapters that other software writes: each is read as what it means or refused, and conversion between them loses no bit. */
#include "adapter_files.h"
#include "kernels/plain.h"

/* ---- PEFT's own files of every family ---- */

static const char *const goldens[] = {"q3a", "q3b", "q3c", "ol", "mx", "vl", "vla", "go1", "go2"};

static esp_model *open_adapter(esp_ctx *ctx, const char *adapter_dir, const char *model_dir, const esp_adapter_config *reading) {
    esp_model *m = NULL;
    esp_dtype dtype;
    OK(espi_adapter_open(&m, &dtype, ctx, adapter_dir, model_dir, reading));
    return m;
}

/* PEFT's own weight delta of the last expert: a wrong order of experts in A or B cannot pass. */
static void check_delta(esp_ctx *ctx, const char *folder) {
    char model_dir[256], adapter_dir[256], name[512];
    snprintf(model_dir, sizeof model_dir, DATA "%s/model", folder);
    snprintf(adapter_dir, sizeof adapter_dir, DATA "%s/adapter", folder);
    snprintf(name, sizeof name, "%s/delta.safetensors", folder);
    esp_model *m = open_adapter(ctx, adapter_dir, model_dir, NULL);
    espi_st_file *file = golden_open(name);
    int layer = 0, found = 0;
    while (m->layers[layer].mlp != ESPI_MLP_MOE) layer++;
    const espi_layer *w = &m->layers[layer];
    const espi_stack *stacks[] = {&w->gate_up, &w->down};
    const espi_lora *loras[] = {&w->lora_gate_up, &w->lora_down};
    for (int i = 0; i < 2; i++, found++) {
        char module[256];
        snprintf(module, sizeof module, m->config.family->experts_module, layer);
        snprintf(name, sizeof name, "%s.%s.expert%lld", module, i ? "down_proj" : "gate_up_proj", (long long)stacks[i]->experts - 1);
        double *want = golden_read(file, name, NULL);
        expect_delta(m, stacks[i], loras[i], stacks[i]->experts - 1, want, name);
        free(want);
    }
    cr_expect_eq(found, 2);
    espi_st_close(file);
    esp_model_destroy(m);
}

Test(adapter_forms, deltas_of_every_family) {
    esp_ctx *ctx = context("ref");
    for (size_t i = 0; i < sizeof goldens / sizeof *goldens; i++) check_delta(ctx, goldens[i]);
    esp_ctx_destroy(ctx);
}

/* ---- every form of fused stacks, made here ---- */

typedef struct shape {
    int64_t experts, r, hidden, width;
} shape;

typedef struct form {
    bool gate_up, down, down_inside, swapped, slowest;
    const char *config; /* more fields of adapter_config.json, "" or ", \"k\": v" */
} form;

static float element(int stack, char matrix, int64_t layer, int64_t e, int64_t k, int64_t i) {
    return (float)espi_uniform(11, ESPI_STREAM_CONTROL, (uint32_t)(stack * 2 + (matrix == 'B')), (uint32_t)layer, (uint32_t)(e * 64 + k),
                               (uint32_t)i);
}

/* q3a's config with other dimensions; no weights. */
static void write_model(const char *dir, const char *family_folder, shape s) {
    char folder[64], number[32];
    snprintf(folder, sizeof folder, "%s/model", family_folder);
    checkpoint *c = checkpoint_open(folder);
    const struct {
        const char *key;
        int64_t value;
    } fields[] = {
        {"num_local_experts", s.experts}, {"num_experts_per_tok", 1}, {"hidden_size", s.hidden}, {"moe_intermediate_size", s.width}};
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++) {
        snprintf(number, sizeof number, "%lld", (long long)fields[i].value);
        checkpoint_set(c, fields[i].key, number);
    }
    checkpoint_write_config(c, dir);
    checkpoint_close(c);
}

/* One matrix of one stack of both layers, by the rules of the formats and not by ours. */
static void add_matrix(espi_st_item *items, size_t *n, shape s, form f, int stack, char matrix, bool inner) {
    const int64_t in = stack ? s.width : s.hidden, out = stack ? s.hidden : 2 * s.width, ranks = s.r * s.experts;
    for (int64_t layer = 0; layer < 2; layer++) {
        const bool is_a = matrix == 'A', holds_in = is_a != f.swapped; /* does this tensor carry the input width? */
        const int64_t width = holds_in ? in : out;
        float *x = malloc((size_t)(ranks * width) * sizeof *x);
        char *name = malloc(256);
        cr_assert(x && name);
        for (int64_t e = 0; e < s.experts; e++)
            for (int64_t k = 0; k < s.r; k++)
                for (int64_t i = 0; i < width; i++) {
                    const float v = element(stack, holds_in ? 'A' : 'B', layer, e, k, i);
                    if (is_a)
                        x[(e * s.r + k) * width + i] = v;
                    else
                        x[i * ranks + (f.slowest ? e * s.r + k : k * s.experts + e)] = v;
                }
        snprintf(name, 256, "base_model.model.model.layers.%lld.mlp.experts%s.lora_%c.weight", (long long)layer, inner ? ".base_layer" : "",
                 matrix);
        items[(*n)++] = (espi_st_item){.name = name, .dtype = ESP_F32, .rank = 2, .data = x};
        memcpy(items[*n - 1].dims, is_a ? (int64_t[]){ranks, width} : (int64_t[]){width, ranks}, 2 * sizeof(int64_t));
    }
}

static void write_adapter(const char *dir, shape s, form f) {
    espi_st_item items[8];
    size_t n = 0;
    char text[1024], path[ESPI_PATH_MAX];
    for (int stack = 0; stack < 2; stack++) {
        if (!(stack ? f.down : f.gate_up)) continue;
        const bool inner = f.gate_up && f.down && (stack == 1) == f.down_inside;
        add_matrix(items, &n, s, f, stack, 'A', inner);
        add_matrix(items, &n, s, f, stack, 'B', inner);
    }
    snprintf(text, sizeof text,
             "{\"peft_type\": \"LORA\", \"r\": %lld, \"lora_alpha\": 6, \"target_modules\": [], \"target_parameters\": [%s%s%s]%s}",
             (long long)s.r, f.gate_up ? "\"mlp.experts.gate_up_proj\"" : "", f.gate_up && f.down ? ", " : "",
             f.down ? "\"mlp.experts.down_proj\"" : "", f.config ? f.config : "");
    scratch_write(path, dir, "adapter_config.json", text, strlen(text));
    OK(espi_path_join(path, dir, "adapter_model.safetensors"));
    OK(espi_st_write(path, items, n));
    for (size_t i = 0; i < n; i++) {
        free((void *)items[i].name);
        free((void *)items[i].data);
    }
}

/* How many values of the adapter are not where they belong. */
static int64_t wrong_values(const esp_model *m, shape s, form f) {
    int64_t wrong = 0;
    for (int64_t layer = 0; layer < 2; layer++) {
        const espi_lora *loras[] = {&m->layers[layer].lora_gate_up, &m->layers[layer].lora_down};
        for (int stack = 0; stack < 2; stack++) {
            if (!(stack ? f.down : f.gate_up)) continue;
            const int64_t in = stack ? s.width : s.hidden, out = stack ? s.hidden : 2 * s.width;
            for (int64_t e = 0; e < s.experts; e++)
                for (int64_t k = 0; k < s.r; k++) {
                    for (int64_t i = 0; i < in; i++)
                        wrong += value(loras[stack]->a, (e * s.r + k) * in + i, m) != element(stack, 'A', layer, e, k, i);
                    for (int64_t o = 0; o < out; o++)
                        wrong += value(loras[stack]->b, (e * out + o) * s.r + k, m) != element(stack, 'B', layer, e, k, o);
                }
        }
    }
    return wrong;
}

/* Neither square, gate_up square, down square; E odd and not R; one expert. */
static const shape shapes[] = {{8, 4, 64, 48}, {5, 3, 64, 32}, {5, 3, 64, 64}, {1, 3, 64, 48}, {1, 1, 64, 32}};
enum { N_SHAPES = sizeof shapes / sizeof *shapes };

typedef struct place {
    char model[ESPI_PATH_MAX], adapter[ESPI_PATH_MAX];
    esp_ctx *ctx;
} place;

static void place_make(place *p, const char *family_folder, shape s, form f) {
    scratch_make(p->model);
    scratch_make(p->adapter);
    p->ctx = context("ref");
    write_model(p->model, family_folder, s);
    write_adapter(p->adapter, s, f);
}

static void place_remove(place *p) {
    esp_ctx_destroy(p->ctx);
    scratch_remove(p->model);
    scratch_remove(p->adapter);
}

static void expect_read(shape s, form f, const esp_adapter_config *reading) {
    place p;
    place_make(&p, "q3a", s, f);
    esp_model *m = open_adapter(p.ctx, p.adapter, p.model, reading);
    cr_expect_eq(wrong_values(m, s, f), 0, "E %lld r %lld H %lld I %lld: gate_up %d down %d down_inside %d swapped %d slowest %d",
                 (long long)s.experts, (long long)s.r, (long long)s.hidden, (long long)s.width, f.gate_up, f.down, f.down_inside, f.swapped,
                 f.slowest);
    esp_model_destroy(m);
    place_remove(&p);
}

/* Both stacks: nesting and widths are seen whatever is square, even against a version that would say otherwise. */
Test(adapter_forms, both_stacks_in_every_form) {
    for (int i = 0; i < N_SHAPES * 8; i++) {
        const form f = {true, true, i / N_SHAPES & 1, i / N_SHAPES & 2, i / N_SHAPES & 4, ", \"peft_version\": \"0.18.1\""};
        expect_read(shapes[i % N_SHAPES], f, &ESP_ADAPTER_CONFIG(.columns = f.slowest ? ESP_ADAPTER_EXPERT_SLOWEST : 0));
    }
}

Test(adapter_forms, order_of_columns_is_said_not_seen) {
    const shape s = {5, 3, 64, 48};
    expect_read(s, (form){true, true, .slowest = true, .config = ", \"lora_B_layout\": \"grouped_by_expert\""}, NULL);
    expect_read(s, (form){true, true, .config = ", \"lora_B_layout\": \"rank_major\""}, NULL);
    const form old = {true, true, .slowest = true};
    place p;
    place_make(&p, "q3a", s, old);
    esp_model *m = open_adapter(p.ctx, p.adapter, p.model, NULL);
    cr_expect_gt(wrong_values(m, s, old), 0, "without being told, the columns are PEFT's");
    esp_model_destroy(m);
    place_remove(&p);
    /* the option is above the file */
    expect_read(s, (form){true, true, .config = ", \"lora_B_layout\": \"grouped_by_expert\""},
                &ESP_ADAPTER_CONFIG(.columns = ESP_ADAPTER_EXPERT_FASTEST));
}

Test(adapter_forms, one_stack_alone) {
    for (int i = 0; i < 4; i++) {
        const bool down = i & 1, swapped = i & 2;
        expect_read((shape){5, 3, 64, 48}, (form){!down, down, .swapped = swapped}, NULL);
        const shape square = {5, 3, 64, down ? 64 : 32};
        expect_read(square, (form){!down, down, .swapped = swapped},
                    &ESP_ADAPTER_CONFIG(.widths = swapped ? ESP_ADAPTER_WIDTHS_SWAPPED : ESP_ADAPTER_WIDTHS_TRUE));
        expect_read(square,
                    (form){!down, down, .swapped = swapped,
                           .config = swapped ? ", \"peft_version\": \"0.18.0\"" : ", \"peft_version\": \"0.19.0.dev0\""},
                    NULL);
    }
}

/* ---- what is refused, and with which words ---- */

static void expect_refused(const char *family_folder, shape s, form f, const esp_adapter_config *reading, esp_status status,
                           const char *part) {
    place p;
    place_make(&p, family_folder, s, f);
    esp_model *m = NULL;
    esp_dtype dtype;
    const esp_status got = espi_adapter_open(&m, &dtype, p.ctx, p.adapter, p.model, reading);
    cr_expect_eq(got, status, "%s: got %s: %s", part, esp_status_name(got), esp_last_error());
    cr_expect(strstr(esp_last_error(), part), "no '%s' in: %s", part, esp_last_error());
    place_remove(&p);
}

Test(adapter_forms, what_is_ambiguous_is_refused) {
    const shape square_down = {5, 3, 64, 64}, square_gate_up = {5, 3, 64, 32};
    expect_refused("q3a", square_down, (form){.down = true}, NULL, ESP_ERR_UNSUPPORTED, "pass widths");
    expect_refused("q3a", square_gate_up, (form){.gate_up = true}, NULL, ESP_ERR_UNSUPPORTED, "pass widths");
    /* Classes of gpt-oss have had both orders: there no version tells. */
    expect_refused("go2", (shape){5, 3, 64, 64}, (form){.down = true, .config = ", \"peft_version\": \"0.21.2\""}, NULL,
                   ESP_ERR_UNSUPPORTED, "pass widths");
}

Test(adapter_forms, what_contradicts_is_refused) {
    const shape s = {5, 3, 64, 48};
    const form both = {true, true};
    expect_refused("q3a", s, both, &ESP_ADAPTER_CONFIG(.widths = ESP_ADAPTER_WIDTHS_SWAPPED), ESP_ERR_SHAPE, "base_layer.lora_A");
    expect_refused("q3a", s, (form){.down = true, .config = ", \"target_parameters\": null"}, NULL, ESP_ERR_FORMAT, "adapter_config.json");
    expect_refused("q3a", s, both, &ESP_ADAPTER_CONFIG(.widths = 7), ESP_ERR_ARG, "widths");
    expect_refused("q3a", s, (form){true, true, .config = ", \"rank_pattern\": {\"gate_up_proj\": 4}"}, NULL, ESP_ERR_SHAPE,
                   "[15,64], expected [20,64]");
}

/* target_parameters names both, but the file has one wrapper's tensors: as if base_layer had been lost. */
Test(adapter_forms, missing_base_layer_is_named) {
    char dir[ESPI_PATH_MAX];
    scratch_make(dir);
    checkpoint *c = adapter_open("q3a/adapter");
    for (size_t i = c->n; i-- > 0;)
        if (strstr(c->items[i].name, "base_layer")) checkpoint_drop(c, c->items[i].name);
    checkpoint_write(c, dir);
    esp_ctx *ctx = context("ref");
    esp_model *m = NULL;
    esp_dtype dtype;
    cr_expect_eq(espi_adapter_open(&m, &dtype, ctx, dir, DATA "q3a/model", NULL), ESP_ERR_FORMAT);
    cr_expect(strstr(esp_last_error(), "layers.0.mlp.experts.base_layer.lora_A"), "%s", esp_last_error());
    esp_ctx_destroy(ctx);
    checkpoint_close(c);
    scratch_remove(dir);
}

/* ---- patterns ---- */

Test(adapter_forms, patterns_by_first_match) {
    const shape s = {5, 3, 64, 48};
    place p;
    place_make(&p, "q3a", s,
               (form){true, true,
                      .config = ", \"alpha_pattern\": {\"ers.*down_proj\": 1, \"mlp.*.down_proj\": 12, \"down_proj\": 24, "
                                "\".*gate_up_proj\": 3}"});
    esp_model *m = open_adapter(p.ctx, p.adapter, p.model, NULL);
    /* "ers.*" would have to begin a part of the name; "mlp.*" does, and comes before "down_proj" */
    cr_expect(fabs(m->lora[ESPI_T_DOWN].scale - 4) < 1e-15, "%g", m->lora[ESPI_T_DOWN].scale);
    cr_expect(fabs(m->lora[ESPI_T_GATE_UP].scale - 1) < 1e-15, "%g", m->lora[ESPI_T_GATE_UP].scale);
    esp_model_destroy(m);
    place_remove(&p);
}

/* A rank of their own for two targets, with rsLoRA: what we write says so and is read alike. */
static void ranks_of_their_own(bool rslora) {
    char dir[ESPI_PATH_MAX], other[ESPI_PATH_MAX];
    scratch_make(dir);
    scratch_make(other);
    esp_ctx *ctx = context("ref");
    checkpoint *c = adapter_open("q3a/adapter");
    for (size_t i = 0; i < c->n; i++) {
        espi_st_item *item = &c->items[i];
        if (!strstr(item->name, "base_layer")) continue;
        item->dims[strstr(item->name, "lora_A") ? 0 : 1] /= 2; /* rank 2, of the same values */
    }
    checkpoint_set(c, "rank_pattern", "{\"gate_up_proj\": 2}");
    checkpoint_set(c, "alpha_pattern", "{\"gate_up_proj\": 5}");
    checkpoint_set(c, "use_rslora", rslora ? "true" : "false");
    checkpoint_write(c, dir);
    esp_model *m = open_adapter(ctx, dir, DATA "q3a/model", NULL);
    cr_assert_eq(m->lora[ESPI_T_GATE_UP].r, 2);
    cr_assert_eq(m->lora[ESPI_T_DOWN].r, 4);
    cr_expect(fabs(m->lora[ESPI_T_GATE_UP].scale - (rslora ? 5 / sqrt(2) : 2.5)) < 1e-15);
    cr_expect(fabs(m->lora[ESPI_T_Q].scale - (rslora ? 4 : 2)) < 1e-15);
    for (int form = ESP_ADAPTER_2D; form <= ESP_ADAPTER_3D; form++) {
        OK(esp_model_save_adapter_as(m, other, &ESP_ADAPTER_CONFIG(.form = (esp_adapter_form)form)));
        esp_model *again = open_adapter(ctx, other, DATA "q3a/model", NULL);
        expect_equal(m, again);
        for (int t = 0; t < ESPI_T_COUNT; t++) cr_expect_eq(m->lora[t].scale, again->lora[t].scale, "form %d target %d", form, t);
        esp_model_destroy(again);
    }
    esp_model_destroy(m);
    esp_ctx_destroy(ctx);
    checkpoint_close(c);
    scratch_remove(dir);
    scratch_remove(other);
}

Test(adapter_forms, ranks_of_their_own) {
    ranks_of_their_own(false);
    ranks_of_their_own(true);
}

/* ---- conversion ---- */

/* The same tensors, byte for byte. */
static void expect_same_file(const char *a_dir, const char *b_dir) {
    char path[ESPI_PATH_MAX];
    espi_st_file *a, *b;
    OK(espi_path_join(path, a_dir, "adapter_model.safetensors"));
    OK(espi_st_open(&a, path));
    OK(espi_path_join(path, b_dir, "adapter_model.safetensors"));
    OK(espi_st_open(&b, path));
    cr_assert_eq(espi_st_count(a), espi_st_count(b));
    for (size_t i = 0; i < espi_st_count(a); i++) {
        const espi_st_tensor *x = espi_st_at(a, i), *y = espi_st_at(b, i);
        cr_assert_str_eq(x->name, y->name);
        OK(espi_st_expect(y, x->dtype, x->rank, x->dims));
        void *p = malloc(x->bytes + 1), *q = malloc(x->bytes + 1);
        OK(espi_st_read(x, p, 0, x->bytes));
        OK(espi_st_read(y, q, 0, x->bytes));
        cr_expect_eq(memcmp(p, q, x->bytes), 0, "%s", x->name);
        free(p), free(q);
    }
    espi_st_close(a), espi_st_close(b);
}

/* There and back; what lies between is the other form. */
static void expect_round_trip(const char *adapter, const char *model, esp_adapter_form back, const esp_adapter_config *between) {
    char there[ESPI_PATH_MAX], again[ESPI_PATH_MAX];
    scratch_make(there);
    scratch_make(again);
    esp_ctx *ctx = context("ref");
    OK(esp_adapter_convert(ctx, there, adapter, model, NULL, between));
    OK(esp_adapter_convert(ctx, again, there, model, NULL, &ESP_ADAPTER_CONFIG(.form = back)));
    expect_same_file(adapter, again);
    esp_model *a = open_adapter(ctx, adapter, model, NULL), *b = open_adapter(ctx, there, model, NULL),
              *c = open_adapter(ctx, again, model, NULL);
    expect_equal(a, b);
    expect_equal(a, c);
    for (int t = 0; t < ESPI_T_COUNT; t++) {
        cr_expect_eq(a->lora[t].scale, b->lora[t].scale, "%s target %d", adapter, t);
        cr_expect_eq(a->lora[t].scale, c->lora[t].scale, "%s target %d", adapter, t);
    }
    esp_model_destroy(a), esp_model_destroy(b), esp_model_destroy(c);
    esp_ctx_destroy(ctx);
    scratch_remove(there);
    scratch_remove(again);
}

Test(adapter_forms, there_and_back) {
    const esp_adapter_config to_2d = ESP_ADAPTER_CONFIG(.form = ESP_ADAPTER_2D), to_3d = ESP_ADAPTER_CONFIG(.form = ESP_ADAPTER_3D);
    const esp_adapter_config slowest = ESP_ADAPTER_CONFIG(.form = ESP_ADAPTER_3D, .columns = ESP_ADAPTER_EXPERT_SLOWEST);
    expect_round_trip(DATA "q3a/adapter", DATA "q3a/model", ESP_ADAPTER_3D, &to_2d);
    expect_round_trip(DATA "q3b/adapter", DATA "q3b/model", ESP_ADAPTER_3D, &to_2d); /* rsLoRA, dense layers */
    expect_round_trip(DATA "mx/adapter", DATA "mx/model", ESP_ADAPTER_3D, &to_2d);   /* w1, w3, w2 */
    expect_round_trip(DATA "ol/adapter", DATA "ol/model", ESP_ADAPTER_3D, &slowest);
    expect_round_trip(DATA "go1/adapter", DATA "go1/model", ESP_ADAPTER_3D, &slowest);
    expect_round_trip(DATA "q3a/adapter_2d", DATA "q3a/model", ESP_ADAPTER_2D, &to_3d); /* gate and up with an A each */
}

/* BF16 stays BF16. */
Test(adapter_forms, narrow_values_stay_narrow) {
    char dir[ESPI_PATH_MAX];
    scratch_make(dir);
    checkpoint *c = adapter_open("q3c/adapter");
    for (size_t i = 0; i < c->n; i++) {
        const int64_t n = c->items[i].dims[0] * c->items[i].dims[1];
        float *x = (float *)c->items[i].data;
        for (int64_t j = 0; j < n; j++) espi_plain_store(x, ESP_BF16, j, x[j]);
        c->items[i].dtype = ESP_BF16;
    }
    checkpoint_write(c, dir);
    expect_round_trip(dir, DATA "q3c/model", ESP_ADAPTER_3D, &ESP_ADAPTER_CONFIG(.form = ESP_ADAPTER_2D));
    checkpoint_close(c);
    scratch_remove(dir);
}

Test(adapter_forms, what_cannot_be_written_is_refused) {
    char dir[ESPI_PATH_MAX];
    scratch_make(dir);
    esp_ctx *ctx = context("ref");
    const struct {
        const char *folder;
        esp_adapter_config writing;
        esp_status status;
        const char *part;
    } cases[] = {
        {"go1", ESP_ADAPTER_CONFIG(.form = ESP_ADAPTER_2D), ESP_ERR_UNSUPPORTED, "no module per expert"},
        {"vl", ESP_ADAPTER_CONFIG(.form = ESP_ADAPTER_2D), ESP_ERR_UNSUPPORTED, "no module per expert"},
        {"q3a", ESP_ADAPTER_CONFIG(.form = ESP_ADAPTER_2D, .columns = ESP_ADAPTER_EXPERT_SLOWEST), ESP_ERR_UNSUPPORTED, "expert-slowest"},
        {"q3a", ESP_ADAPTER_CONFIG(.widths = ESP_ADAPTER_WIDTHS_SWAPPED), ESP_ERR_UNSUPPORTED, "swapped"},
        {"q3a", ESP_ADAPTER_CONFIG(.form = 9), ESP_ERR_ARG, "form"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char adapter[256], model[256];
        snprintf(adapter, sizeof adapter, DATA "%s/adapter", cases[i].folder);
        snprintf(model, sizeof model, DATA "%s/model", cases[i].folder);
        cr_expect_eq(esp_adapter_convert(ctx, dir, adapter, model, NULL, &cases[i].writing), cases[i].status, "%zu", i);
        cr_expect(strstr(esp_last_error(), cases[i].part), "%zu: %s", i, esp_last_error());
    }
    cr_expect_eq(scratch_count(dir), 0, "nothing was written");
    esp_ctx_destroy(ctx);
    scratch_remove(dir);
}

/* What vLLM loads: per expert or fused by family; target_modules always there; a whole alpha without a point. */
Test(adapter_forms, default_form_of_every_family) {
    esp_ctx *ctx = context("ref");
    for (size_t i = 0; i < sizeof goldens / sizeof *goldens; i++) {
        char dir[ESPI_PATH_MAX], adapter[256], model[256], path[ESPI_PATH_MAX];
        scratch_make(dir);
        snprintf(adapter, sizeof adapter, DATA "%s/adapter", goldens[i]);
        snprintf(model, sizeof model, DATA "%s/model", goldens[i]);
        OK(esp_adapter_convert(ctx, dir, adapter, model, NULL, NULL));
        OK(espi_path_join(path, dir, "adapter_config.json"));
        json_t *root = json_load_file(path, 0, NULL);
        const bool fused = goldens[i][0] == 'g' || goldens[i][0] == 'v';
        cr_expect_eq(json_array_size(json_object_get(root, "target_parameters")), fused ? 2 : 0, "%s", goldens[i]);
        cr_expect_eq(json_array_size(json_object_get(root, "target_modules")), fused ? 4 : 7, "%s", goldens[i]);
        const bool rslora = strcmp(goldens[i], "q3b") == 0; /* 2-D: 8 / sqrt(4) is stated as 16 / 4 */
        cr_expect_eq(json_integer_value(json_object_get(root, "lora_alpha")), rslora ? 16 : 8, "%s", goldens[i]);
        cr_expect(json_is_false(json_object_get(root, "use_rslora")), "%s", goldens[i]);
        if (fused) expect_same_file(adapter, dir);
        json_decref(root);
        scratch_remove(dir);
    }
    esp_ctx_destroy(ctx);
}
