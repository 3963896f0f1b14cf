/* espalier inspect: what a model folder holds, from config.json and the headers of its safetensors files, where there are any. */
#include "cli/cli.h"

#include "core/status.h"
#include "io/file.h"
#include "io/safetensors.h"
#include "kernels/backend.h"
#include "models/family.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

typedef enum part {
    PART_EMBEDDING,
    PART_ATTENTION,
    PART_NORMS,
    PART_ROUTER,
    PART_EXPERTS,
    PART_DENSE,
    PART_HEAD,
    PART_OTHER,
    N_PARTS
} part;
static const char *const part_names[] = {"embedding", "attention", "norms", "router", "experts", "dense_mlp", "head", "other"};

typedef struct inventory {
    espi_config config;
    int64_t parameters[N_PARTS]; /* by the config */
    bool weights;                /* is there a file of weights? */
    int64_t tensors[N_PARTS];
    uint64_t bytes[N_PARTS];
    char dtypes[64]; /* those that occur, comma-separated */
    bool tokenizer;
    esp_plan plan; /* what it becomes when it is loaded */
} inventory;

/* Does `name` begin with the family's name for something, numbers standing for each %d, the first of them below `layers`, and end there or
 * at one of `ends`? */
static bool is_called(const char *name, const char *pattern, int64_t layers, const char *ends) {
    if (!pattern) return false;
    for (bool first = true; *pattern;) {
        if (strncmp(pattern, "%d", 2) == 0) {
            const size_t digits = strspn(name, "0123456789");
            if (digits == 0 || (first && strtoll(name, NULL, 10) >= layers)) return false;
            first = false;
            name += digits;
            pattern += 2;
        } else if (*name++ != *pattern++)
            return false;
    }
    return *name == '\0' || strchr(ends, *name);
}

/* The name that the family's file gives to what some versions call otherwise. */
static void usual_name(char out[512], const espi_family *f, const char *name) {
    const char *at = f->renamed_to ? strstr(name, f->renamed_to) : NULL;
    if (at)
        snprintf(out, 512, "%.*s%s%s", (int)(at - name), name, f->renamed_from, at + strlen(f->renamed_to));
    else
        snprintf(out, 512, "%s", name);
}

static part part_of(const espi_config *c, const char *stored) {
    const espi_family *f = c->family;
    const struct {
        part part;
        const char *pattern;
    } rows[] = {
        {PART_EMBEDDING, f->embed},     {PART_NORMS, f->final_norm},
        {PART_HEAD, f->head},           {PART_NORMS, f->norm1},
        {PART_NORMS, f->norm2},         {PART_ATTENTION, f->q},
        {PART_ATTENTION, f->k},         {PART_ATTENTION, f->v},
        {PART_ATTENTION, f->o},         {PART_ATTENTION, f->sinks},
        {PART_NORMS, f->q_norm},        {PART_NORMS, f->k_norm},
        {PART_ROUTER, f->router},       {PART_ROUTER, f->router_correction},
        {PART_DENSE, f->dense_gate},    {PART_DENSE, f->dense_up},
        {PART_DENSE, f->dense_down},    {PART_DENSE, f->shared_gate},
        {PART_DENSE, f->shared_up},     {PART_DENSE, f->shared_down},
        {PART_EXPERTS, f->expert_gate}, {PART_EXPERTS, f->expert_up},
        {PART_EXPERTS, f->expert_down}, {PART_EXPERTS, f->expert_gate_up},
        {PART_EXPERTS, f->joined_down},
    };
    char name[512];
    usual_name(name, f, stored);
    for (int i = 0; i < ESPI_COUNT(rows); i++)
        if (is_called(name, rows[i].pattern, c->layers, ".")) return rows[i].part;
    /* Fused tensors have "_blocks", "_scales", "_bias" behind. */
    const bool fused = is_called(name, f->fused_gate_up, c->layers, "._") || is_called(name, f->fused_down, c->layers, "._");
    return fused ? PART_EXPERTS : PART_OTHER;
}

static void count_parameters(int64_t n[N_PARTS], const espi_config *c) {
    const int64_t h = c->hidden, l = c->layers, moe = c->moe_layers, i = c->expert_width;
    const int64_t nq = c->heads * c->head_dim, nk = c->kv_heads * c->head_dim;
    n[PART_EMBEDDING] = c->vocab * h;
    n[PART_HEAD] = c->tied_head ? 0 : c->vocab * h;
    n[PART_NORMS] = (2 * l + 1) * h + (c->qk_norm ? l * (espi_qk_norm_size(c, c->heads) + espi_qk_norm_size(c, c->kv_heads)) : 0);
    n[PART_ATTENTION] =
        l * (2 * h * nq + 2 * h * nk + (c->attention_bias ? nq + 2 * nk : 0) + (c->output_bias ? h : 0) + (c->sinks ? c->heads : 0));
    n[PART_ROUTER] = moe * c->experts * (h + c->router_bias + c->router_correction);
    n[PART_EXPERTS] = moe * c->experts * (3 * h * i + (c->expert_bias ? 2 * i + h : 0));
    n[PART_DENSE] = 3 * h * ((l - moe) * c->dense_width + moe * c->shared_width);
}

static void note_dtype(inventory *v, const char *dtype) {
    if (strstr(v->dtypes, dtype)) return;
    size_t used = strlen(v->dtypes);
    snprintf(v->dtypes + used, sizeof v->dtypes - used, "%s%s", used ? "," : "", dtype);
}

static bool has_file(const char *dir, const char *name) {
    char *path = espi_cli_path(dir, name);
    const bool has = espi_file_exists(path);
    free(path);
    return has;
}

static esp_status read_tensors(inventory *v, const char *dir) {
    v->weights = has_file(dir, "model.safetensors") || has_file(dir, "model.safetensors.index.json");
    if (!v->weights) return ESP_OK;
    espi_st_set *set;
    ESPI_TRY(espi_st_set_open(&set, dir));
    for (size_t i = 0; i < espi_st_set_count(set); i++) {
        const espi_st_tensor *t = espi_st_set_at(set, i);
        const part p = part_of(&v->config, t->name);
        v->tensors[p]++;
        v->bytes[p] += t->bytes;
        note_dtype(v, t->dtype_name);
    }
    espi_st_set_close(set);
    return ESP_OK;
}

static esp_status read_plan(inventory *v, const char *dir) {
    esp_ctx *ctx;
    ESPI_TRY(esp_ctx_create(&ctx, NULL));
    v->plan = (esp_plan)ESP_PLAN_INIT;
    esp_status status = esp_plan_folder(&v->plan, ctx, dir, NULL, NULL, 1, 1);
    esp_ctx_destroy(ctx);
    return status;
}

static esp_status take_inventory(inventory *v, const char *dir) {
    ESPI_TRY(espi_config_read(&v->config, dir));
    count_parameters(v->parameters, &v->config);
    ESPI_TRY(read_tensors(v, dir));
    ESPI_TRY(read_plan(v, dir));
    v->tokenizer = has_file(dir, "tokenizer.json");
    return ESP_OK;
}

static const char *loaded_form(const inventory *v) {
    return v->config.mxfp4 ? "mxfp4" : "nf4";
}

/* How many layers see a window of keys only. */
static int64_t sliding_layers(const espi_config *c) {
    int64_t n = 0;
    for (int64_t l = 0; l < c->layers; l++) n += c->window[l] > 0;
    return n;
}

static void print_json(const inventory *v) {
    const espi_config *c = &v->config;
    json_t *parts = json_object();
    int64_t parameters = 0;
    for (int p = 0; p < N_PARTS; p++) {
        parameters += v->parameters[p];
        json_object_set_new(parts, part_names[p],
                            json_pack("{s:I, s:I, s:I}", "parameters", (json_int_t)v->parameters[p], "tensors", (json_int_t)v->tensors[p],
                                      "bytes", (json_int_t)v->bytes[p]));
    }
    json_t *root = json_pack("{s:s, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I}", "family", c->family->name, "layers",
                             (json_int_t)c->layers, "moe_layers", (json_int_t)c->moe_layers, "hidden", (json_int_t)c->hidden, "heads",
                             (json_int_t)c->heads, "kv_heads", (json_int_t)c->kv_heads, "head_dim", (json_int_t)c->head_dim, "experts",
                             (json_int_t)c->experts, "top_k", (json_int_t)c->top_k, "expert_width", (json_int_t)c->expert_width, "vocab",
                             (json_int_t)c->vocab, "max_position", (json_int_t)c->max_position);
    json_t *more = json_pack("{s:I, s:b, s:b, s:s, s:b, s:I, s:s, s:I, s:I, s:o}", "sliding_layers", (json_int_t)sliding_layers(c),
                             "tied_head", c->tied_head, "weights", v->weights, "dtypes", v->dtypes, "tokenizer", v->tokenizer, "parameters",
                             (json_int_t)parameters, "loaded_experts", loaded_form(v), "loaded_dense_bytes",
                             (json_int_t)v->plan.dense_weights, "loaded_expert_bytes", (json_int_t)v->plan.expert_weights, "parts", parts);
    json_object_update(root, more);
    json_decref(more);
    json_dumpf(root, stdout, JSON_INDENT(1));
    printf("\n");
    json_decref(root);
}

/* The expert's rules that differ between families, in words. */
static void print_rules(const espi_config *c) {
    const int64_t sliding = sliding_layers(c);
    int64_t window = 0;
    for (int64_t l = 0; l < c->layers; l++)
        if (c->window[l] > window) window = c->window[l];
    printf("attention         %" PRId64 " heads, %" PRId64 " key/value heads of %" PRId64 "%s%s%s\n", c->heads, c->kv_heads, c->head_dim,
           !c->qk_norm        ? ""
           : c->whole_qk_norm ? ", q/k norm over all heads"
                              : ", q/k norm",
           c->attention_bias ? ", biases" : "", c->sinks ? ", sinks" : "");
    if (sliding > 0) printf("window            %" PRId64 " keys in %" PRId64 " layers\n", window, sliding);
    printf("experts           %" PRId64 ", %" PRId64 " a token, width %" PRId64 "%s\n", c->experts, c->top_k, c->expert_width,
           c->expert_bias ? ", biases" : "");
    if (c->shared_width > 0) printf("shared expert     width %" PRId64 "\n", c->shared_width);
}

/* Where a model could run beside this machine's processor. */
static void print_devices(void) {
    const espi_backend *const *gpu = espi_backends_gpu;
    if (!*gpu) printf("GPU               none in this build\n");
    for (; *gpu; gpu++)
        printf("GPU               %s: %s\n", (*gpu)->name, (*gpu)->available() ? (*gpu)->describe() : "none that is usable here");
}

static void print_text(const inventory *v) {
    const espi_config *c = &v->config;
    printf("family            %s\n", c->family->name);
    printf("layers            %" PRId64 " (%" PRId64 " MoE, %" PRId64 " dense)\n", c->layers, c->moe_layers, c->layers - c->moe_layers);
    printf("hidden            %" PRId64 "\n", c->hidden);
    print_rules(c);
    printf("vocabulary        %" PRId64 "%s\n", c->vocab, c->tied_head ? ", head tied to the embedding" : "");
    printf("context           %" PRId64 "\n", c->max_position);
    printf("stored as         %s\n", v->weights ? v->dtypes : "no weights here");
    printf("tokenizer.json    %s\n\n", v->tokenizer ? "present" : "absent");
    printf("%-16s %16s %8s %16s\n", "part", "parameters", "tensors", "bytes");
    int64_t parameters = 0, tensors = 0;
    uint64_t bytes = 0;
    for (int p = 0; p < N_PARTS; p++) {
        parameters += v->parameters[p];
        tensors += v->tensors[p];
        bytes += v->bytes[p];
        if (v->parameters[p] || v->tensors[p])
            printf("%-16s %16" PRId64 " %8" PRId64 " %16" PRIu64 "\n", part_names[p], v->parameters[p], v->tensors[p], v->bytes[p]);
    }
    printf("%-16s %16" PRId64 " %8" PRId64 " %16" PRIu64 "\n\n", "total", parameters, tensors, bytes);
    printf("loaded, %-9s %zu bytes: dense %zu, experts %zu\n", loaded_form(v), v->plan.dense_weights + v->plan.expert_weights,
           v->plan.dense_weights, v->plan.expert_weights);
    print_devices();
}

int espi_cli_inspect(int argc, char **argv) {
    const char *dir;
    bool json = false;
    const espi_option options[] = {{"--json", ESPI_OPTION_FLAG, &json, NULL, "as one JSON object"}};
    const espi_usage usage = {"inspect",
                              "Family, dimensions, and parameters, tensors and bytes by part of a Hugging Face model folder.\n"
                              "Weights need not be there: config.json alone tells the rest.",
                              "DIR",
                              &dir,
                              options,
                              1};
    int code;
    if (!espi_cli_parse(&code, &usage, argc, argv)) return code;
    inventory v = {0};
    esp_status status = take_inventory(&v, dir);
    if (status != ESP_OK)
        code = espi_cli_failed("inspect", status);
    else if (json)
        print_json(&v);
    else
        print_text(&v);
    espi_config_free(&v.config);
    return code;
}
