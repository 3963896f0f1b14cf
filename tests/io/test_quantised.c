/* Folders with 4-bit experts: what is written loads as the bytes that loading the original makes, for every family and layout; dense
 * tensors are copied; what cannot be is refused. */
#define _DEFAULT_SOURCE /* SIGXFSZ */

#include "core/status.h"
#include "espalier/quant.h"
#include "io/quantised.h"
#include "loaded.h"

#include <signal.h>
#include <sys/resource.h>

static void golden_dir(char dir[ESPI_PATH_MAX], const char *model) {
    snprintf(dir, ESPI_PATH_MAX, "%s/tests/golden/data/%s", ESP_SOURCE_DIR, model);
}

static esp_status write_quantised(const char *out, const char *in, const espi_quantised_spec *spec) {
    esp_ctx *ctx;
    OK(esp_ctx_create(&ctx, &ESP_CTX_CONFIG(.backend = "ref")));
    const esp_status status = espi_quantised_write(ctx, out, in, spec);
    esp_ctx_destroy(ctx);
    return status;
}

/* gpt-oss with plain experts, as its 16-bit copies have them: [E,in,out] under the name of the blocks. */
static void write_plain_gpt_oss(char dir[ESPI_PATH_MAX], const char *model) {
    static const char *const stacks[] = {"gate_up_proj", "down_proj"};
    checkpoint *c = checkpoint_open(model);
    for (int i = 0; i < 4; i++) {
        char blocks_name[128], scales_name[128], name[100];
        snprintf(name, sizeof name, "model.layers.%d.mlp.experts.%s", i / 2, stacks[i % 2]);
        snprintf(blocks_name, sizeof blocks_name, "%s_blocks", name);
        snprintf(scales_name, sizeof scales_name, "%s_scales", name);
        const espi_st_item *blocks = checkpoint_item(c, blocks_name);
        const int64_t experts = blocks->dims[0], out = blocks->dims[1], in = blocks->dims[2] * 32, n = experts * out * in;
        float *rows = malloc((size_t)n * sizeof *rows), *columns = malloc((size_t)n * sizeof *columns);
        cr_assert(rows && columns);
        OK(esp_mxfp4_dequantize(rows, blocks->data, checkpoint_item(c, scales_name)->data, n));
        for (int64_t j = 0; j < n; j++) columns[(j / (out * in) * in + j % in) * out + j / in % out] = rows[j];
        checkpoint_add(c, name, ESP_F32, 3, (int64_t[]){experts, in, out}, columns, (size_t)n * sizeof *columns);
        checkpoint_drop(c, blocks_name);
        checkpoint_drop(c, scales_name);
        free(rows);
        free(columns);
    }
    checkpoint_set(c, "quantization_config", NULL);
    checkpoint_set(c, "dtype", "\"float32\"");
    scratch_make(dir);
    checkpoint_write(c, dir);
    checkpoint_close(c);
}

/* Everything but the experts is there as it was, but for a router that gpt-oss's lists of matrices have under another name. */
static void expect_copied(const char *out, const char *in) {
    espi_st_set *a = NULL, *b = NULL;
    OK(espi_st_set_open(&a, in));
    OK(espi_st_set_open(&b, out));
    for (size_t i = 0; i < espi_st_set_count(a); i++) {
        const espi_st_tensor *t = espi_st_set_at(a, i), *u = espi_st_set_find(b, t->name);
        if (strstr(t->name, ".experts.") || (!u && strstr(t->name, ".router."))) continue;
        cr_assert_not_null(u, "%s is not in %s", t->name, out);
        cr_assert(t->bytes == u->bytes && t->dtype == u->dtype && t->rank == u->rank, "%s", t->name);
        void *x = malloc((size_t)t->bytes + 1), *y = malloc((size_t)t->bytes + 1);
        OK(espi_st_read(t, x, 0, (size_t)t->bytes));
        OK(espi_st_read(u, y, 0, (size_t)t->bytes));
        cr_expect_eq(memcmp(x, y, (size_t)t->bytes), 0, "%s", t->name);
        free(x), free(y);
    }
    espi_st_set_close(a);
    espi_st_set_close(b);
}

static bool same_bytes(const void *a, const void *b, int64_t n) {
    return memcmp(a, b, (size_t)n) == 0;
}

/* One array for a whole stack has one offset and nested blocks that run through: codes are those of loading, scales those of
 * double-quantising all of the stack's at once; and a model that wants nested scales takes them only where its matrices do not share any.
 */
static void expect_fused_nested(const char *out, const char *in, const espi_quantised_spec *spec) {
    loaded plain, restored, nested;
    OK(loaded_try(&plain, in, &ESP_MODEL_CONFIG(.experts = spec->format)));
    OK(loaded_try(&restored, out, &ESP_MODEL_CONFIG(.experts = spec->format)));
    const esp_status status = loaded_try(&nested, out, &ESP_MODEL_CONFIG(.experts = spec->format, .double_quant = true));
    bool shared = false;
    for (int64_t l = 0; l < plain.model->config.layers; l++)
        for (int down = 0; plain.model->layers[l].mlp == ESPI_MLP_MOE && down < 2; down++) {
            const espi_layer *a = &plain.model->layers[l], *b = &restored.model->layers[l], *c = &nested.model->layers[l];
            const espi_stack *p = down ? &a->down : &a->gate_up, *r = down ? &b->down : &b->gate_up, *s = down ? &c->down : &c->gate_up;
            const int64_t parts = p->experts * p->parts, blocks = parts * p->part_blocks;
            uint8_t *codes = malloc((size_t)blocks);
            float *scales = malloc((size_t)blocks * sizeof *scales), *own = malloc((size_t)(blocks / 256 + 1) * sizeof *own), offset;
            OK(esp_absmax_quantize(codes, own, &offset, p->absmax, blocks));
            OK(esp_absmax_dequantize(scales, codes, own, offset, NULL, blocks));
            cr_expect(same_bytes(p->data, r->data, parts * (int64_t)p->part_bytes));
            cr_expect(same_bytes(scales, r->absmax, blocks * (int64_t)sizeof *scales));
            for (int64_t part = 0; part < parts; part++) /* no matrix of these models has more than 256 scales */
                shared |= part * p->part_blocks / 256 != ((part + 1) * p->part_blocks - 1) / 256;
            if (status == ESP_OK) {
                cr_expect(same_bytes(codes, s->absmax8, blocks));
                for (int64_t part = 0; part < parts; part++) {
                    cr_expect_eq(s->offset[part], offset);
                    cr_expect_eq(s->nested[part * s->part_nested], own[part * s->part_blocks / 256]);
                }
            }
            free(codes), free(scales), free(own);
        }
    cr_expect_eq(status, shared ? ESP_ERR_UNSUPPORTED : ESP_OK, "%s", esp_last_error());
    loaded_free(&plain);
    loaded_free(&restored);
    loaded_free(&nested);
}

static void check_round_trip(const char *in, const espi_quantised_spec *spec) {
    char out[ESPI_PATH_MAX];
    loaded a, b;
    scratch_make(out);
    const esp_model_config options =
        ESP_MODEL_CONFIG(.experts = spec->format, .double_quant = spec->double_quant, .mxfp4_rule = spec->rule);
    esp_status status = loaded_try(&a, in, &options);
    if (status == ESP_ERR_UNSUPPORTED) { /* sizes that are no blocks of MXFP4 */
        cr_expect_eq(spec->format, ESP_MXFP4, "%s", esp_last_error());
        cr_expect_eq(write_quantised(out, in, spec), ESP_ERR_UNSUPPORTED);
    } else {
        OK(status);
        OK(write_quantised(out, in, spec));
        expect_copied(out, in);
        if (spec->fused && spec->double_quant) {
            expect_fused_nested(out, in, spec);
        } else {
            OK(loaded_try(&b, out, &options));
            cr_expect(loaded_same(&a, &b), "%s format %d, nested %d, fused %d", in, spec->format, spec->double_quant, spec->fused);
            cr_expect_str_empty(b.log, "%s", b.log);
            loaded_free(&b);
        }
    }
    loaded_free(&a);
    scratch_remove(out);
}

static void check_every_form(const char *in) {
    for (int i = 0; i < 8; i++)
        check_round_trip(in, &(espi_quantised_spec){.format = i & 1 ? ESP_FP4 : ESP_NF4, .double_quant = i & 2, .fused = i & 4});
    check_round_trip(in, &(espi_quantised_spec){.format = ESP_MXFP4});
    check_round_trip(in, &(espi_quantised_spec){.format = ESP_MXFP4, .rule = ESP_MXFP4_ROUND_UP});
}

Test(quantised, every_family_and_layout) {
    static const char *const models[] = {"q3a/model", "q3b/model", "q3c/model", "q3c/model_fused",     "ol/model",
                                         "mx/model",  "vl/model",  "vla/model", "vla/model_transposed"};
    for (int i = 0; i < ESPI_COUNT(models); i++) {
        char in[ESPI_PATH_MAX];
        golden_dir(in, models[i]);
        check_every_form(in);
    }
}

Test(quantised, gpt_oss) {
    static const char *const models[] = {"go1/model", "go2/model"};
    for (int i = 0; i < 2; i++) {
        char in[ESPI_PATH_MAX];
        write_plain_gpt_oss(in, models[i]);
        check_every_form(in);
        scratch_remove(in);
    }
}

/* The golden files of gpt-oss were made by OCP's rule: made plain and MXFP4 again, they are what they were. */
Test(quantised, mxfp4_again_is_the_same) {
    static const char *const models[] = {"go1/model", "go2/model"};
    for (int i = 0; i < 2; i++) {
        char in[ESPI_PATH_MAX], out[ESPI_PATH_MAX];
        loaded a, b;
        write_plain_gpt_oss(in, models[i]);
        scratch_make(out);
        OK(write_quantised(out, in, &(espi_quantised_spec){.format = ESP_MXFP4}));
        loaded_golden(&a, models[i], NULL);
        OK(loaded_try(&b, out, NULL)); /* config.json says MXFP4 */
        for (int64_t l = 0; l < a.model->config.layers; l++) {
            const espi_stack *x[] = {&a.model->layers[l].gate_up, &a.model->layers[l].down};
            const espi_stack *y[] = {&b.model->layers[l].gate_up, &b.model->layers[l].down};
            for (int s = 0; s < 2; s++) {
                const int64_t parts = x[s]->experts * x[s]->parts;
                cr_assert(y[s]->format == ESP_MXFP4 && y[s]->part_bytes == x[s]->part_bytes);
                cr_expect(same_bytes(x[s]->data, y[s]->data, parts * (int64_t)x[s]->part_bytes), "%s codes of layer %lld", models[i],
                          (long long)l);
                cr_expect(same_bytes(x[s]->scales, y[s]->scales, parts * x[s]->part_blocks), "%s scales of layer %lld", models[i],
                          (long long)l);
            }
        }
        loaded_free(&a);
        loaded_free(&b);
        scratch_remove(in);
        scratch_remove(out);
    }
}

/* The rule reaches the quantiser. */
Test(quantised, rules_of_mxfp4_differ) {
    loaded ocp, up;
    loaded_golden(&ocp, "q3a/model", &ESP_MODEL_CONFIG(.experts = ESP_MXFP4));
    loaded_golden(&up, "q3a/model", &ESP_MODEL_CONFIG(.experts = ESP_MXFP4, .mxfp4_rule = ESP_MXFP4_ROUND_UP));
    cr_expect(!loaded_same(&ocp, &up));
    loaded_free(&ocp);
    loaded_free(&up);
    cr_expect_eq(loaded_try(&up, ESP_SOURCE_DIR "/tests/golden/data/q3a/model", &ESP_MODEL_CONFIG(.mxfp4_rule = (esp_mxfp4_rule)7)),
                 ESP_ERR_ARG);
    loaded_free(&up);
}

/* Name by name and byte by byte the file that bitsandbytes' own codes were assembled to; its quant_state included. */
Test(quantised, is_the_file_of_bitsandbytes) {
    char in[ESPI_PATH_MAX], out[ESPI_PATH_MAX], theirs[ESPI_PATH_MAX];
    espi_st_set *a = NULL, *b = NULL;
    golden_dir(in, "q3a/model");
    golden_dir(theirs, "q3a/model_nf4");
    scratch_make(out);
    OK(write_quantised(out, in, &(espi_quantised_spec){.format = ESP_NF4}));
    OK(espi_st_set_open(&a, out));
    OK(espi_st_set_open(&b, theirs));
    cr_assert_eq(espi_st_set_count(a), espi_st_set_count(b));
    for (size_t i = 0; i < espi_st_set_count(a); i++) {
        const espi_st_tensor *t = espi_st_set_at(a, i), *u = espi_st_set_at(b, i);
        char x[65536], y[65536];
        cr_assert_str_eq(t->name, u->name);
        cr_assert(t->bytes == u->bytes && t->bytes <= sizeof x && t->dtype == u->dtype && t->rank == u->rank, "%s", t->name);
        OK(espi_st_read(t, x, 0, (size_t)t->bytes));
        OK(espi_st_read(u, y, 0, (size_t)t->bytes));
        cr_expect_eq(memcmp(x, y, (size_t)t->bytes), 0, "%s", t->name);
    }
    espi_st_set_close(a);
    espi_st_set_close(b);
    scratch_remove(out);
}

/* config.json says what was made, keeps what it said, and names what was left as it was; other files come along, weights do not. */
Test(quantised, config_and_other_files) {
    char dir[ESPI_PATH_MAX], out[ESPI_PATH_MAX], path[ESPI_PATH_MAX];
    checkpoint *c = checkpoint_open("q3a/model");
    scratch_make(dir);
    scratch_make(out);
    checkpoint_write(c, dir);
    scratch_write(path, dir, "tokenizer.json", "{}", 2);
    scratch_write(path, dir, "pytorch_model.bin", "old", 3);
    OK(write_quantised(out, dir, &(espi_quantised_spec){.format = ESP_FP4, .double_quant = true}));
    OK(espi_path_join(path, out, "tokenizer.json"));
    cr_expect(espi_file_exists(path));
    OK(espi_path_join(path, out, "pytorch_model.bin"));
    cr_expect(!espi_file_exists(path));
    OK(espi_path_join(path, out, "config.json"));
    json_t *config = json_load_file(path, 0, NULL), *q = json_object_get(config, "quantization_config");
    cr_expect_str_eq(json_string_value(json_object_get(q, "quant_method")), "bitsandbytes");
    cr_expect_str_eq(json_string_value(json_object_get(q, "bnb_4bit_quant_type")), "fp4");
    cr_expect(json_is_true(json_object_get(q, "load_in_4bit")) && json_is_true(json_object_get(q, "bnb_4bit_use_double_quant")));
    const json_t *skipped = json_object_get(q, "llm_int8_skip_modules");
    cr_expect_eq(json_array_size(skipped), 1 + 2 * 5);
    cr_expect_str_eq(json_string_value(json_array_get(skipped, 0)), "lm_head");
    cr_expect_str_eq(json_string_value(json_array_get(skipped, 10)), "model.layers.1.mlp.gate");
    /* The folder says its own form: nobody need repeat it to load it. */
    esp_ctx *ctx;
    esp_model *model;
    OK(esp_ctx_create(&ctx, NULL));
    OK(esp_model_load(&model, ctx, out, NULL));
    cr_expect_eq(model->layers[0].gate_up.format, ESP_FP4);
    esp_model_destroy(model);
    esp_ctx_destroy(ctx);
    json_object_del(config, "quantization_config");
    cr_expect(json_equal(config, c->config));
    json_decref(config);
    checkpoint_close(c);
    scratch_remove(dir);
    scratch_remove(out);

    write_plain_gpt_oss(dir, "go1/model");
    scratch_make(out);
    OK(write_quantised(out, dir, &(espi_quantised_spec){.format = ESP_MXFP4}));
    OK(espi_path_join(path, out, "config.json"));
    config = json_load_file(path, 0, NULL);
    json_t *golden = json_load_file(ESP_SOURCE_DIR "/tests/golden/data/go1/model/config.json", 0, NULL);
    const json_t *ours = json_object_get(json_object_get(config, "quantization_config"), "modules_to_not_convert");
    const json_t *published = json_object_get(json_object_get(golden, "quantization_config"), "modules_to_not_convert");
    cr_expect(json_equal(ours, published));
    json_decref(config);
    json_decref(golden);
    scratch_remove(dir);
    scratch_remove(out);
}

/* ---- refusals ---- */

static void expect_refused(const char *out, const char *in, espi_quantised_spec spec, esp_status status, const char *said) {
    cr_expect_eq(write_quantised(out, in, &spec), status, "%s", esp_last_error());
    cr_expect(strstr(esp_last_error(), said), "'%s' not said: %s", said, esp_last_error());
}

Test(quantised, refused) {
    char in[ESPI_PATH_MAX], out[ESPI_PATH_MAX], path[ESPI_PATH_MAX];
    const espi_quantised_spec nf4 = {.format = ESP_NF4};
    scratch_make(out);
    golden_dir(in, "q3a/model_nf4");
    expect_refused(out, in, nf4, ESP_ERR_UNSUPPORTED, "quantised already");
    golden_dir(in, "go1/model");
    expect_refused(out, in, (espi_quantised_spec){.format = ESP_MXFP4}, ESP_ERR_UNSUPPORTED, "quantised already");
    golden_dir(in, "q3a/model");
    expect_refused(out, in, (espi_quantised_spec){.format = ESP_Q_NONE}, ESP_ERR_ARG, "expected ESP_NF4");
    expect_refused(out, in, (espi_quantised_spec){.format = ESP_MXFP4, .double_quant = true}, ESP_ERR_ARG, "has 8 bits already");
    expect_refused(out, "/nonexistent", nf4, ESP_ERR_IO, "/nonexistent");
    scratch_write(path, out, "notes.txt", "x", 1);
    expect_refused(out, in, nf4, ESP_ERR_ARG, "holds notes.txt, expected a new or empty folder");
    expect_refused(path, in, nf4, ESP_ERR_IO, "notes.txt"); /* a file stands there */
    scratch_remove(out);
}

/* quantization_config alone does not decide: experts that are codes are refused under a config that does not say so. */
Test(quantised, codes_that_config_does_not_mention) {
    char dir[ESPI_PATH_MAX], out[ESPI_PATH_MAX];
    checkpoint *c = checkpoint_open("q3a/model_nf4");
    checkpoint_set(c, "quantization_config", NULL);
    scratch_make(dir);
    scratch_make(out);
    checkpoint_write(c, dir);
    expect_refused(out, dir, (espi_quantised_spec){.format = ESP_NF4, .fused = true}, ESP_ERR_UNSUPPORTED, "is quantised already");
    checkpoint_close(c);
    scratch_remove(dir);
    scratch_remove(out);
}

/* A value that cannot be quantised, and a full disk: told, and no folder is left that looks like a model. */
Test(quantised, failures_leave_no_model) {
    char dir[ESPI_PATH_MAX], out[ESPI_PATH_MAX], path[ESPI_PATH_MAX];
    checkpoint *c = checkpoint_open("q3a/model");
    scratch_make(dir);
    scratch_make(out);
    ((float *)checkpoint_item(c, "model.layers.1.mlp.experts.3.up_proj.weight")->data)[7] = NAN;
    checkpoint_write(c, dir);
    expect_refused(out, dir, (espi_quantised_spec){.format = ESP_NF4}, ESP_ERR_NONFINITE, "experts.3.up_proj.weight: element 7");
    golden_dir(path, "q3a/model");
    signal(SIGXFSZ, SIG_IGN);
    cr_assert_eq(setrlimit(RLIMIT_FSIZE, &(struct rlimit){20000, RLIM_INFINITY}), 0);
    expect_refused(out, path, (espi_quantised_spec){.format = ESP_NF4}, ESP_ERR_IO, "cannot write");
    cr_assert_eq(setrlimit(RLIMIT_FSIZE, &(struct rlimit){RLIM_INFINITY, RLIM_INFINITY}), 0);
    OK(espi_path_join(path, out, "config.json"));
    cr_expect(!espi_file_exists(path));
    OK(espi_path_join(path, out, "model.safetensors"));
    cr_expect(!espi_file_exists(path));
    checkpoint_close(c);
    scratch_remove(dir);
    scratch_remove(out);
}
