/* espalier inspect: what a model folder holds, from config.json and the headers of its safetensors files. */
#include "cli/cli.h"

#include "core/status.h"
#include "io/file.h"
#include "io/safetensors.h"
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
    int64_t tensors[N_PARTS];
    uint64_t bytes[N_PARTS];
    char dtypes[64]; /* those that occur, comma-separated */
    bool tokenizer;
    esp_plan plan; /* what it becomes as NF4 */
} inventory;

/* Does `name` begin with the family's name for something, numbers standing for each %d, and end there or at a dot? */
static bool is_called(const char *name, const char *pattern) {
    if (!pattern) return false;
    while (*pattern) {
        if (strncmp(pattern, "%d", 2) == 0) {
            size_t digits = strspn(name, "0123456789");
            if (digits == 0) return false;
            name += digits;
            pattern += 2;
        } else if (*name++ != *pattern++)
            return false;
    }
    return *name == '\0' || *name == '.';
}

static part part_of(const espi_family *f, const char *name) {
    const struct {
        part part;
        const char *pattern;
    } rows[] = {
        {PART_EMBEDDING, f->embed},       {PART_NORMS, f->final_norm},   {PART_HEAD, f->head},
        {PART_NORMS, f->norm1},           {PART_NORMS, f->norm2},        {PART_ATTENTION, f->q},
        {PART_ATTENTION, f->k},           {PART_ATTENTION, f->v},        {PART_ATTENTION, f->o},
        {PART_NORMS, f->q_norm},          {PART_NORMS, f->k_norm},       {PART_ROUTER, f->router},
        {PART_DENSE, f->dense_gate},      {PART_DENSE, f->dense_up},     {PART_DENSE, f->dense_down},
        {PART_EXPERTS, f->expert_gate},   {PART_EXPERTS, f->expert_up},  {PART_EXPERTS, f->expert_down},
        {PART_EXPERTS, f->fused_gate_up}, {PART_EXPERTS, f->fused_down},
    };
    for (int i = 0; i < ESPI_COUNT(rows); i++)
        if (is_called(name, rows[i].pattern)) return rows[i].part;
    return PART_OTHER;
}

static void note_dtype(inventory *v, const char *dtype) {
    if (strstr(v->dtypes, dtype)) return;
    size_t used = strlen(v->dtypes);
    snprintf(v->dtypes + used, sizeof v->dtypes - used, "%s%s", used ? "," : "", dtype);
}

static esp_status read_tensors(inventory *v, const char *dir) {
    espi_st_set *set;
    ESPI_TRY(espi_st_set_open(&set, dir));
    for (size_t i = 0; i < espi_st_set_count(set); i++) {
        const espi_st_tensor *t = espi_st_set_at(set, i);
        const part p = part_of(v->config.family, t->name);
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
    esp_status status = esp_plan_folder(&v->plan, ctx, dir, &ESP_MODEL_CONFIG(.experts = ESP_NF4), NULL, 1, 1);
    esp_ctx_destroy(ctx);
    return status;
}

static esp_status take_inventory(inventory *v, const char *dir) {
    ESPI_TRY(espi_config_read(&v->config, dir));
    ESPI_TRY(read_tensors(v, dir));
    ESPI_TRY(read_plan(v, dir));
    char *tokenizer = espi_cli_path(dir, "tokenizer.json");
    v->tokenizer = espi_file_exists(tokenizer);
    free(tokenizer);
    return ESP_OK;
}

static void print_json(const inventory *v) {
    const espi_config *c = &v->config;
    json_t *parts = json_object();
    for (int p = 0; p < N_PARTS; p++)
        json_object_set_new(parts, part_names[p],
                            json_pack("{s:I, s:I}", "tensors", (json_int_t)v->tensors[p], "bytes", (json_int_t)v->bytes[p]));
    json_t *root = json_pack(
        "{s:s, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:b, s:s, s:b, s:I, s:I, s:o}", "family", c->family->name, "layers",
        (json_int_t)c->layers, "moe_layers", (json_int_t)c->moe_layers, "hidden", (json_int_t)c->hidden, "heads", (json_int_t)c->heads,
        "kv_heads", (json_int_t)c->kv_heads, "head_dim", (json_int_t)c->head_dim, "experts", (json_int_t)c->experts, "top_k",
        (json_int_t)c->top_k, "expert_width", (json_int_t)c->expert_width, "vocab", (json_int_t)c->vocab, "max_position",
        (json_int_t)c->max_position, "tied_head", c->tied_head, "dtypes", v->dtypes, "tokenizer", v->tokenizer, "loaded_dense_bytes",
        (json_int_t)v->plan.dense_weights, "loaded_nf4_expert_bytes", (json_int_t)v->plan.expert_weights, "parts", parts);
    json_dumpf(root, stdout, JSON_INDENT(1));
    printf("\n");
    json_decref(root);
}

static void print_text(const inventory *v) {
    const espi_config *c = &v->config;
    printf("family            %s\n", c->family->name);
    printf("layers            %" PRId64 " (%" PRId64 " MoE, %" PRId64 " dense)\n", c->layers, c->moe_layers, c->layers - c->moe_layers);
    printf("hidden            %" PRId64 "\n", c->hidden);
    printf("attention         %" PRId64 " heads, %" PRId64 " key/value heads of %" PRId64 "%s%s\n", c->heads, c->kv_heads, c->head_dim,
           c->qk_norm ? ", q/k norm" : "", c->attention_bias ? ", biases" : "");
    printf("experts           %" PRId64 ", %" PRId64 " a token, width %" PRId64 "\n", c->experts, c->top_k, c->expert_width);
    printf("vocabulary        %" PRId64 "%s\n", c->vocab, c->tied_head ? ", head tied to the embedding" : "");
    printf("context           %" PRId64 "\n", c->max_position);
    printf("stored as         %s\n", v->dtypes);
    printf("tokenizer.json    %s\n\n", v->tokenizer ? "present" : "absent");
    printf("%-16s %8s %16s\n", "part", "tensors", "bytes");
    int64_t tensors = 0;
    uint64_t bytes = 0;
    for (int p = 0; p < N_PARTS; p++) {
        tensors += v->tensors[p];
        bytes += v->bytes[p];
        if (v->tensors[p]) printf("%-16s %8" PRId64 " %16" PRIu64 "\n", part_names[p], v->tensors[p], v->bytes[p]);
    }
    printf("%-16s %8" PRId64 " %16" PRIu64 "\n\n", "total", tensors, bytes);
    printf("loaded, NF4       %zu bytes: dense %zu, experts %zu\n", v->plan.dense_weights + v->plan.expert_weights, v->plan.dense_weights,
           v->plan.expert_weights);
}

int espi_cli_inspect(int argc, char **argv) {
    const char *dir;
    bool json = false;
    const espi_option options[] = {{"--json", ESPI_OPTION_FLAG, &json, NULL, "as one JSON object"}};
    const espi_usage usage = {
        "inspect", "Family, dimensions, and tensors and bytes by part of a Hugging Face model folder.", "DIR", &dir, options, 1};
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
