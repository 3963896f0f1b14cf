/* What `inspect` and `plan` say of published models from config.json alone, against formulas written out here. */
#include "program.h"

#include <jansson.h>

#define CONFIGS ESP_SOURCE_DIR "/tests/cli/configs/"

/* Dimensions as published; total: the parameters that the published files hold (of Qwen3-VL, the text tower's). */
typedef struct published {
    const char *name, *family;
    long long layers, hidden, heads, kv_heads, head_dim, experts, top_k, width, vocab;
    long long q_norm, k_norm; /* weights of the norms of q and k in a layer */
    bool gpt_oss;             /* biases everywhere, sinks, MXFP4 */
    long long total;
} published;

static const published models[] = {
    {"qwen3-30b-a3b", "qwen3_moe", 48, 2048, 32, 4, 128, 128, 8, 768, 151936, 128, 128, false, 30532122624},
    {"qwen3-235b-a22b", "qwen3_moe", 94, 4096, 64, 4, 128, 128, 8, 1536, 151936, 128, 128, false, 235093634560},
    {"gpt-oss-20b", "gpt_oss", 24, 2880, 64, 8, 64, 32, 4, 2880, 201088, 0, 0, true, 20914757184},
    {"gpt-oss-120b", "gpt_oss", 36, 2880, 64, 8, 64, 128, 4, 2880, 201088, 0, 0, true, 116829156672},
    {"qwen3-vl-30b-a3b", "qwen3_vl_moe", 48, 2048, 32, 4, 128, 128, 8, 768, 151936, 128, 128, false, 30532122624},
    {"olmoe-1b-7b", "olmoe", 16, 2048, 16, 16, 128, 64, 8, 1024, 50304, 2048, 2048, false, 6919161856},
    {"mixtral-8x7b", "mixtral", 32, 4096, 32, 8, 128, 8, 2, 14336, 32000, 0, 0, false, 46702792704},
};
enum { N_MODELS = sizeof models / sizeof models[0], RANK = 16, TOKENS = 4096 };

static char *run(const char *format, const char *a, const char *b) {
    char command[4096], arguments[2048];
    snprintf(arguments, sizeof arguments, format, a, b);
    snprintf(command, sizeof command, "%s %s", ESP_PROGRAM, arguments);
    program_run r = program(command);
    cr_assert_eq(r.code, 0, "espalier %s: exit code %d\n%s", arguments, r.code, r.out);
    return r.out;
}

/* The number behind `label` at the beginning of a line. */
static long long figure(const char *out, const char *label) {
    for (const char *line = out; line; line = strchr(line, '\n') ? strchr(line, '\n') + 1 : NULL) {
        long long value;
        const size_t n = strlen(label);
        if (strncmp(line, label, n) == 0 && sscanf(line + n, " %lld", &value) == 1) return value;
    }
    cr_assert(false, "no '%s' in\n%s", label, out);
    return -1;
}

static void expect_count(const published *m, const char *what, long long got, long long want) {
    cr_expect_eq(got, want, "%s: %s: got %lld, expected %lld", m->name, what, got, want);
}

static long long attention_parameters(const published *m) {
    const long long nq = m->heads * m->head_dim, nk = m->kv_heads * m->head_dim;
    return m->layers * (2 * m->hidden * (nq + nk) + (m->gpt_oss ? nq + 2 * nk + m->hidden + m->heads : 0));
}
static long long norm_parameters(const published *m) {
    return m->hidden + m->layers * (2 * m->hidden + m->q_norm + m->k_norm);
}
static long long router_parameters(const published *m) {
    return m->layers * m->experts * (m->hidden + (m->gpt_oss ? 1 : 0));
}
static long long expert_matrices(const published *m) {
    return m->layers * m->experts * 3 * m->hidden * m->width;
}
static long long expert_biases(const published *m) {
    return m->gpt_oss ? m->layers * m->experts * (2 * m->width + m->hidden) : 0;
}

Test(published, inspect_needs_no_weights) {
    for (int i = 0; i < N_MODELS; i++) {
        const published *m = &models[i];
        char *out = run("inspect " CONFIGS "%s %s", m->name, "--json");
        json_t *root = json_loads(out, 0, NULL);
        cr_assert(root, "%s", out);
        cr_expect_str_eq(json_string_value(json_object_get(root, "family")), m->family);
        cr_expect(json_is_false(json_object_get(root, "weights")), "%s has no weights", m->name);
        const json_t *parts = json_object_get(root, "parts");
        const struct {
            const char *part;
            long long want;
        } rows[] = {{"embedding", m->vocab * m->hidden},
                    {"head", m->vocab * m->hidden},
                    {"attention", attention_parameters(m)},
                    {"norms", norm_parameters(m)},
                    {"router", router_parameters(m)},
                    {"experts", expert_matrices(m) + expert_biases(m)},
                    {"dense_mlp", 0},
                    {"other", 0}};
        for (size_t k = 0; k < sizeof rows / sizeof rows[0]; k++) {
            const json_t *part = json_object_get(parts, rows[k].part);
            expect_count(m, rows[k].part, json_integer_value(json_object_get(part, "parameters")), rows[k].want);
            expect_count(m, rows[k].part, json_integer_value(json_object_get(part, "bytes")), 0);
        }
        expect_count(m, "parameters", json_integer_value(json_object_get(root, "parameters")), m->total);
        json_decref(root);
        free(out);
        out = run("inspect " CONFIGS "%s%s", m->name, "");
        cr_expect(strstr(out, "no weights here"), "%s", out);
        free(out);
    }
}

/* Values of one rank of all branches. */
static long long adapter_values(const published *m) {
    const long long nq = m->heads * m->head_dim, nk = m->kv_heads * m->head_dim, h = m->hidden;
    const long long attention = 2 * (h + nq) + 2 * (h + nk), expert = h + 2 * m->width + m->width + h;
    return m->layers * (attention + m->experts * expert);
}

/* One in f64 of every tensor of an attention, two in each of four projections, and of every expert's four. */
static long long square_sums(const published *m) {
    return (m->layers * (8 + 4 * m->experts) * 8 + 63) / 64 * 64;
}

/* Frozen matrices outside the experts are f32, embedding and head bf16; NF4 has half a byte a weight and an f32 for 64, MXFP4 a byte for
 * 32.  The adapter, its gradients and AdamW's two moments are f32 each; every tensor, or of experts each one, has a sum of squares in f64. */
Test(published, plan_is_the_closed_formula) {
    for (int i = 0; i < N_MODELS; i++) {
        const published *m = &models[i];
        char *out = run("plan " CONFIGS "%s --tokens 4096 --rank 16%s", m->name, "");
        const long long matrices = expert_matrices(m);
        expect_count(m, "dense and expert weights", figure(out, "dense weights") + figure(out, "expert weights"),
                     2 * 2 * m->vocab * m->hidden +
                         4 * (attention_parameters(m) + norm_parameters(m) + router_parameters(m) + expert_biases(m)) + matrices / 2 +
                         (m->gpt_oss ? matrices / 32 : 4 * matrices / 64));
        expect_count(m, "adapter", figure(out, "adapter"), 4 * RANK * adapter_values(m));
        expect_count(m, "gradients", figure(out, "gradients"), 4 * RANK * adapter_values(m));
        expect_count(m, "optimizer", figure(out, "optimizer"), 8 * RANK * adapter_values(m) + square_sums(m));
        expect_count(m, "training", figure(out, "training"),
                     figure(out, "dense weights") + figure(out, "expert weights") + figure(out, "adapter") + figure(out, "gradients") +
                         figure(out, "optimizer") + figure(out, "activations"));
        free(out);
    }
}

/* A copy of the config with so many layers, in a folder of its own. */
static char *with_layers(const published *m, long long layers) {
    char path[4096], *place = program_folder();
    snprintf(path, sizeof path, CONFIGS "%s/config.json", m->name);
    json_t *root = json_load_file(path, 0, NULL);
    cr_assert(root, "%s", path);
    json_t *text = json_object_get(root, "text_config") ? json_object_get(root, "text_config") : root;
    json_object_set_new(text, "num_hidden_layers", json_integer(layers));
    json_t *types = json_object_get(text, "layer_types");
    while (types && (long long)json_array_size(types) > layers) json_array_remove(types, json_array_size(types) - 1);
    snprintf(path, sizeof path, "%s/config.json", place);
    cr_assert_eq(json_dump_file(root, path, 0), 0);
    json_decref(root);
    return place;
}

/* What one more layer keeps for the backward at 4 bytes a value.  The MoE block's part is that of kernels-gpu section 4: a token's input
 * and the pre-activations of its experts, H + 2kI values, with the LoRA branches 2kr, beside the routing. */
static long long kept_values(const published *m) {
    const long long nq = m->heads * m->head_dim, nk = m->kv_heads * m->head_dim, k = m->top_k;
    const long long moe = m->hidden + 2 * k * m->width + 2 * k * RANK, routing = m->experts + 1 + 5 * k;
    const long long norms = !m->q_norm ? 0 : nq + nk + (m->q_norm == m->head_dim ? m->heads + m->kv_heads : 2);
    const long long attention = 2 * nq + 2 * nk + norms + m->heads + 4 * RANK;
    return moe + routing + attention + 3 * m->hidden + 2; /* layer input, norm 1, after attention; two rstd */
}

Test(published, activations_of_a_layer_are_the_closed_formula) {
    for (int i = 0; i < N_MODELS; i++) {
        const published *m = &models[i];
        char *small = with_layers(m, 2), *large = with_layers(m, 4);
        char *a = run("plan %s --tokens 4096 --rank 16%s", small, ""), *b = run("plan %s --tokens 4096 --rank 16%s", large, "");
        const long long offsets = ((m->experts + 1) * 4 + 63) / 64 * 64; /* where each expert's rows begin */
        expect_count(m, "activations of two layers", figure(b, "activations") - figure(a, "activations"),
                     2 * (4 * TOKENS * kept_values(m) + offsets));
        free(a);
        free(b);
        program_remove(small);
        program_remove(large);
    }
}

/* The frugal form, whose figures for Qwen3-30B-A3B at rank 16 kernels-gpu section 4 gives: experts 15.0 GB, adapter and gradients 2.57 GB,
 * moments 1.29 GB beside their scales; for gpt-oss-20b experts of 10.2 GB and 177 million values of expert branches. */
Test(published, frugal_plan_is_as_stated) {
    const published *m = &models[0];
    char *out = run("plan " CONFIGS "%s --tokens 4096 --rank 16 %s", m->name, "--double-quant --8bit-adam");
    const long long parts = 3 * m->layers * m->experts, blocks = m->hidden * m->width / 64, n = RANK * adapter_values(m);
    const long long experts = expert_matrices(m) / 2 + parts * (blocks + 4 * (blocks / 256) + 4);
    expect_count(m, "expert weights", figure(out, "expert weights"), experts);
    expect_count(m, "optimizer", figure(out, "optimizer"), 2 * n + 8 * n / 256 + square_sums(m));
    cr_expect(experts > 14.95e9 && experts < 15.05e9, "%lld", experts);
    cr_expect(figure(out, "adapter") > 2.565e9 && figure(out, "adapter") < 2.575e9);
    cr_expect(figure(out, "gradients") > 2.565e9 && figure(out, "gradients") < 2.575e9);
    cr_expect(2 * n > 1.285e9 && 2 * n < 1.295e9, "%lld", 2 * n);
    free(out);
    m = &models[2];
    out = run("plan " CONFIGS "%s --tokens 4096 --rank 16%s", m->name, "");
    const long long mxfp4 = figure(out, "expert weights"), nq = m->heads * m->head_dim, nk = m->kv_heads * m->head_dim;
    const long long branches = figure(out, "adapter") / 4 - m->layers * RANK * (4 * m->hidden + 2 * nq + 2 * nk);
    cr_expect(mxfp4 > 10.15e9 && mxfp4 < 10.25e9, "%lld", mxfp4);
    cr_expect(branches > 176.5e6 && branches < 177.5e6, "%lld", branches);
    free(out);
}
