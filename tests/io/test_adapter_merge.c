/* Merging: the merged model without an adapter is the model with it, in every layout; what is missing or too large is named. */
#include "adapter_files.h"
#include "espalier/quant.h"
#include "io/quantised.h"
#include "kernels/plain.h"

enum { TOKENS = 9 };

/* Hidden states of a few tokens; free() them. */
static double *hidden_of(esp_ctx *ctx, const char *model_dir, const char *adapter_dir, esp_qformat experts, int64_t *n) {
    static const int32_t tokens[TOKENS] = {3, 14, 15, 92, 65, 35, 89, 79, 32}, ends[] = {0, TOKENS};
    esp_model *m =
        load(ctx, model_dir,
             &ESP_MODEL_CONFIG(.experts = experts, .adapter_dir = adapter_dir, .lora_targets = adapter_dir ? 0 : ESP_LORA_NOTHING));
    esp_tensor hidden;
    OK(esp_model_forward_only(m, &ESP_BATCH(.tokens = tokens, .cu_seqlens = ends, .n_tokens = TOKENS, .n_seqs = 1), &hidden));
    *n = hidden.dims[0] * hidden.dims[1];
    double *values = malloc((size_t)*n * sizeof *values);
    cr_assert_not_null(values);
    for (int64_t i = 0; i < *n; i++) values[i] = value(hidden.data, i, m);
    esp_model_destroy(m);
    return values;
}

/* norm(got - want) / norm(want), as the golden data's own limits are stated; NaN when a value is NaN. */
static double norm_error(const double *got, const double *want, int64_t n) {
    double error = 0, norm = 0;
    for (int64_t i = 0; i < n; i++) {
        error += (got[i] - want[i]) * (got[i] - want[i]);
        norm += want[i] * want[i];
    }
    return sqrt(error / norm);
}

static void expect_merged(const char *model_dir, const char *adapter_dir, esp_qformat format, esp_qformat experts, double limit,
                          int64_t matrices) {
    char out[ESPI_PATH_MAX];
    scratch_make(out);
    esp_ctx *ctx = context("ref");
    esp_merge_stats stats = ESP_MERGE_STATS_INIT;
    OK(esp_adapter_merge(ctx, &stats, out, model_dir, adapter_dir, &ESP_MERGE_CONFIG(.format = format)));
    cr_expect_eq(stats.attempted, matrices, "%s: %lld", model_dir, (long long)stats.attempted);
    cr_expect_eq(stats.applied, matrices, "%s: %lld", model_dir, (long long)stats.applied);
    int64_t n;
    double *want = hidden_of(ctx, model_dir, adapter_dir, experts, &n), *without = hidden_of(ctx, model_dir, NULL, experts, &n);
    double *got = hidden_of(ctx, out, NULL, format == ESP_Q_DEFAULT ? experts : format, &n);
    const double error = norm_error(got, want, n), moved = norm_error(without, want, n);
    cr_expect(error <= limit, "%s: error %g, limit %g", model_dir, error, limit);
    cr_expect(moved > 4 * limit, "%s: the adapter moves the output by %g only", model_dir, moved);
    free(want), free(got), free(without);
    esp_ctx_destroy(ctx);
    scratch_remove(out);
}

/* Stored in f32: equal to rounding.  Attention 4 and experts 3 * 8 matrices in each of 2 layers. */
Test(adapter_merge, f32_to_rounding) {
    expect_merged(DATA "q3a/model", DATA "q3a/adapter", ESP_Q_DEFAULT, ESP_Q_NONE, 2e-5, 2 * (4 + 24));
    expect_merged(DATA "q3a/model", DATA "q3a/adapter_2d", ESP_Q_DEFAULT, ESP_Q_NONE, 2e-5, 2 * (2 + 24));
}

/* Stored in BF16, whose rounding of the merged weights stays: shards, per expert, other names, fused in both orders. */
Test(adapter_merge, bf16_to_its_rounding) {
    /* four layers instead of two, and a delta of scale 4 that needs coarser steps: each weight is still the nearest BF16 value */
    expect_merged(DATA "q3b/model", DATA "q3b/adapter", ESP_Q_DEFAULT, ESP_Q_NONE, 3e-2, 4 * 4 + 24);
    expect_merged(DATA "q3c/model_fused", DATA "q3c/adapter", ESP_Q_DEFAULT, ESP_Q_NONE, 2e-2, 2 * (4 + 18));
    expect_merged(DATA "ol/model", DATA "ol/adapter", ESP_Q_DEFAULT, ESP_Q_NONE, 2e-2, 2 * (4 + 24));
    expect_merged(DATA "mx/model", DATA "mx/adapter", ESP_Q_DEFAULT, ESP_Q_NONE, 2e-2, 2 * (4 + 12));
    expect_merged(DATA "vl/model", DATA "vl/adapter", ESP_Q_DEFAULT, ESP_Q_NONE, 2e-2, 2 * (4 + 18));
    expect_merged(DATA "vla/model", DATA "vla/adapter", ESP_Q_DEFAULT, ESP_Q_NONE, 2e-2, 4 + 15);
    expect_merged(DATA "vla/model_transposed", DATA "vla/adapter", ESP_Q_DEFAULT, ESP_Q_NONE, 2e-2, 4 + 15);
}

/* A merged BF16 weight is the nearest to the old one plus PEFT's own delta of the last expert: half a step is 2^-8 of it at most. */
static void expect_nearest(const char *folder, const char *tensor, const char *delta_name, int64_t skip, int64_t rows, int64_t cols,
                           bool turned) {
    char out[ESPI_PATH_MAX], model[256], adapter[256], name[256], path[ESPI_PATH_MAX];
    scratch_make(out);
    snprintf(model, sizeof model, DATA "%s/model", folder);
    snprintf(adapter, sizeof adapter, DATA "%s/adapter", folder);
    esp_ctx *ctx = context("cpu");
    OK(esp_adapter_merge(ctx, NULL, out, model, adapter, NULL));
    esp_ctx_destroy(ctx);
    espi_st_file *file[2];
    snprintf(name, sizeof name, "%s/model/model.safetensors", folder);
    file[0] = golden_open(name);
    OK(espi_path_join(path, out, "model.safetensors"));
    OK(espi_st_open(&file[1], path));
    snprintf(name, sizeof name, "%s/delta.safetensors", folder);
    espi_st_file *delta = golden_open(name);
    double *d = golden_read(delta, delta_name, NULL);
    uint16_t *x[2];
    const size_t bytes = (size_t)(rows * cols) * sizeof **x;
    for (int i = 0; i < 2; i++) {
        x[i] = malloc(bytes);
        cr_assert_not_null(x[i]);
        OK(espi_st_read(espi_st_find(file[i], tensor), x[i], (uint64_t)skip * bytes, bytes));
    }
    for (int64_t o = 0; o < rows; o++)
        for (int64_t i = 0; i < cols; i++) {
            const int64_t at = turned ? i * rows + o : o * cols + i;
            const double want = (double)espi_bf16_value(x[0][at]) + d[o * cols + i];
            cr_assert_leq(fabs((double)espi_bf16_value(x[1][at]) - want), fabs(want) * 0x1.001p-8 + 1e-7, "%s (%lld,%lld)", tensor,
                          (long long)o, (long long)i);
        }
    free(x[0]), free(x[1]), free(d);
    espi_st_close(file[0]), espi_st_close(file[1]), espi_st_close(delta);
    scratch_remove(out);
}

Test(adapter_merge, to_the_nearest) {
    expect_nearest("ol", "model.layers.0.mlp.experts.7.down_proj.weight", "model.layers.0.mlp.experts.down_proj.expert7", 0, 64, 32, false);
    expect_nearest("vl", "model.language_model.layers.0.mlp.experts.gate_up_proj",
                   "model.language_model.layers.0.mlp.experts.gate_up_proj.expert5", 5, 96, 64, true);
}

/* With a format, the folder holds the bytes that quantising the merged f32 folder gives. */
Test(adapter_merge, rounded_once_to_four_bits) {
    char plain[ESPI_PATH_MAX], twice[ESPI_PATH_MAX], once[ESPI_PATH_MAX], path[2][ESPI_PATH_MAX];
    scratch_make(plain), scratch_make(twice), scratch_make(once);
    esp_ctx *ctx = context("ref");
    OK(esp_adapter_merge(ctx, NULL, plain, DATA "q3a/model", DATA "q3a/adapter", NULL));
    OK(espi_quantised_write(ctx, twice, plain, &(espi_quantised_spec){.format = ESP_NF4}));
    OK(esp_adapter_merge(ctx, NULL, once, DATA "q3a/model", DATA "q3a/adapter", &ESP_MERGE_CONFIG(.format = ESP_NF4)));
    char *text[2];
    size_t bytes[2];
    const char *const dirs[] = {twice, once};
    for (int i = 0; i < 2; i++) {
        OK(espi_path_join(path[i], dirs[i], "model.safetensors"));
        OK(espi_file_read_all(&text[i], &bytes[i], path[i], 1 << 24));
    }
    cr_assert_eq(bytes[0], bytes[1]);
    cr_expect_eq(memcmp(text[0], text[1], bytes[0]), 0);
    free(text[0]), free(text[1]);
    snprintf(path[0], ESPI_PATH_MAX, "%.4000s.f32", once);
    cr_expect_not(espi_dir_exists(path[0]), "the folder between is gone");
    esp_ctx_destroy(ctx);
    scratch_remove(plain), scratch_remove(twice), scratch_remove(once);
}

/* MXFP4 to MXFP4: each value is the nearest that its new block has to the decoded value plus the delta. */
Test(adapter_merge, mxfp4_rounded_again) {
    char out[ESPI_PATH_MAX], path[ESPI_PATH_MAX];
    scratch_make(out);
    esp_ctx *ctx = context("ref");
    esp_merge_stats stats = ESP_MERGE_STATS_INIT;
    OK(esp_adapter_merge(ctx, &stats, out, DATA "go1/model", DATA "go1/adapter", &ESP_MERGE_CONFIG(.format = ESP_MXFP4)));
    cr_expect_eq(stats.applied, 2 * (4 + 2 * 4));
    espi_st_file *file[2], *delta = golden_open("go1/delta.safetensors");
    file[0] = golden_open("go1/model/model.safetensors");
    OK(espi_path_join(path, out, "model.safetensors"));
    OK(espi_st_open(&file[1], path));
    enum { ROWS = 192, COLS = 64, N = ROWS * COLS, LAST = 3 };
    float x[2][N];
    for (int i = 0; i < 2; i++) {
        uint8_t codes[N / 2], scales[N / 32];
        OK(espi_st_read(espi_st_find(file[i], "model.layers.0.mlp.experts.gate_up_proj_blocks"), codes, LAST * sizeof codes, sizeof codes));
        OK(espi_st_read(espi_st_find(file[i], "model.layers.0.mlp.experts.gate_up_proj_scales"), scales, LAST * sizeof scales,
                        sizeof scales));
        OK(esp_mxfp4_dequantize(x[i], codes, scales, N));
    }
    double *d = golden_read(delta, "model.layers.0.mlp.experts.gate_up_proj.expert3", NULL);
    for (int b = 0; b < N; b += 32) {
        double most = 0;
        for (int i = b; i < b + 32; i++) most = fmax(most, fabs(x[0][i] + d[i]));
        /* steps of the largest magnitudes are 2 * 2^(e-2), and 6 stands for up to 8 */
        for (int i = b; i < b + 32; i++) cr_assert_leq(fabs(x[1][i] - (x[0][i] + d[i])), most * 0.251, "element %d", i);
    }
    free(d);
    espi_st_close(file[0]), espi_st_close(file[1]), espi_st_close(delta);
    esp_ctx_destroy(ctx);
    scratch_remove(out);
}

/* ---- what is refused ---- */

static void expect_refused(const char *model_dir, const char *adapter_dir, esp_qformat format, esp_status status, const char *part) {
    char out[ESPI_PATH_MAX];
    scratch_make(out);
    esp_ctx *ctx = context("ref");
    const esp_status got = esp_adapter_merge(ctx, NULL, out, model_dir, adapter_dir, &ESP_MERGE_CONFIG(.format = format));
    cr_expect_eq(got, status, "%s: got %s: %s", part, esp_status_name(got), esp_last_error());
    cr_expect(strstr(esp_last_error(), part), "no '%s' in: %s", part, esp_last_error());
    cr_expect_eq(scratch_count(out), 0, "%s: nothing is written", part);
    esp_ctx_destroy(ctx);
    scratch_remove(out);
}

Test(adapter_merge, four_bit_models_are_refused) {
    expect_refused(DATA "q3a/model_nf4", DATA "q3a/adapter", ESP_Q_DEFAULT, ESP_ERR_UNSUPPORTED, "merge into the 16-bit checkpoint");
    expect_refused(DATA "go1/model", DATA "go1/adapter", ESP_Q_DEFAULT, ESP_ERR_UNSUPPORTED, "format mxfp4");
    expect_refused(DATA "q3a/model", DATA "q3a/adapter", (esp_qformat)99, ESP_ERR_ARG, "format");
}

Test(adapter_merge, a_missing_weight_is_fatal) {
    static const char *const names[] = {"model.layers.1.self_attn.v_proj.weight", "model.layers.1.mlp.experts.7.up_proj.weight"};
    for (int i = 0; i < 2; i++) {
        char dir[ESPI_PATH_MAX];
        scratch_make(dir);
        checkpoint *c = checkpoint_open("q3a/model");
        checkpoint_drop(c, names[i]);
        checkpoint_write(c, dir);
        expect_refused(dir, DATA "q3a/adapter", ESP_Q_DEFAULT, ESP_ERR_FORMAT, names[i]);
        checkpoint_close(c);
        scratch_remove(dir);
    }
}

/* A value that BF16 still holds, and no more with the delta. */
Test(adapter_merge, too_large_a_sum_is_named) {
    char dir[ESPI_PATH_MAX];
    scratch_make(dir);
    checkpoint *c = adapter_open("q3c/adapter");
    const char *name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight";
    for (int i = 0; i < 64 * 4; i++) ((float *)checkpoint_item(c, name)->data)[i] = 3e38f;
    checkpoint_write(c, dir);
    expect_refused(DATA "q3c/model", dir, ESP_Q_DEFAULT, ESP_ERR_NONFINITE, "layers.0.self_attn.q_proj.weight");
    checkpoint_close(c);
    scratch_remove(dir);
}
