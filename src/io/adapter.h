/* PEFT adapters from the inside: what a folder states, which tensors it has, and where each of their values lies in a model. */
#ifndef ESPI_IO_ADAPTER_H
#define ESPI_IO_ADAPTER_H

#include "espalier/adapter.h"
#include "models/model.h"

#define ESPI_ADAPTER_WEIGHTS "adapter_model.safetensors"
#define ESPI_ADAPTER_CONFIG "adapter_config.json"
#define ESPI_ADAPTER_KEY 256
#define ESPI_ADAPTER_PIECE INT64_C(1048576) /* values that are on their way at once, unless one row has more */
#define ESPI_ADAPTER_GATE_UP "gate_up_proj" /* the parameters of an experts module, as every family's current class calls them */
#define ESPI_ADAPTER_DOWN "down_proj"

/* How the expert branches of one folder lie. */
enum { ESPI_STACK_GATE_UP, ESPI_STACK_DOWN, ESPI_STACKS };
typedef struct espi_adapter_layout {
    bool fused[ESPI_STACKS]; /* one pair of tensors for all experts; else a pair per expert and projection */
    bool separate;           /* not fused: gate and up have an A each, which the model holds as one of twice the rank, B block-diagonal */
    bool down_inside;        /* both fused: experts.base_layer.lora_* is down, not gate_up */
    bool swapped;            /* fused: A and B have changed places */
    bool slowest;            /* fused: column e*r + k of B, not k*E + e */
} espi_adapter_layout;

/* One index of a tensor in a parameter: index x lies at x / inner * major + x % inner * minor. */
typedef struct espi_adapter_axis {
    int64_t n, inner, major, minor;
} espi_adapter_axis;

/* Whose experts a tensor is of. */
typedef enum espi_adapter_of {
    ESPI_OF_ALL,         /* none's: every rank has all of it */
    ESPI_OF_ONE,         /* one expert's */
    ESPI_OF_EXPERT_ROWS, /* all experts', rows of one after those of the other */
    ESPI_OF_EXPERT_COLS  /* all experts', by columns */
} espi_adapter_of;

/* One tensor of the file, [rows.n, cols.n]. */
typedef struct espi_adapter_entry {
    char key[ESPI_ADAPTER_KEY];
    const void *parameter; /* of the model, in its context's real dtype */
    int64_t first;         /* where element (0,0) lies in it, as if it held all experts */
    espi_adapter_axis rows, cols;
    espi_adapter_of of;
    int64_t expert, r; /* of ESPI_OF_ONE; the others': how many rows or columns each expert has */
    bool slowest;      /* ESPI_OF_EXPERT_COLS: column e*r + k, not k*E + e */
    bool repeated;     /* an entry before has the same values: up's A where gate and up share one */
} espi_adapter_entry;

/* Every tensor that the adapter of `model` (a skeleton with its adapter suffices) has in this layout, those of other ranks' experts too;
 * free() *entries. */
esp_status espi_adapter_list(espi_adapter_entry **entries, size_t *n, const esp_model *model, const espi_adapter_layout *layout);

static inline int64_t espi_adapter_at(const espi_adapter_entry *e, int64_t i, int64_t j) {
    const espi_adapter_axis *r = &e->rows, *c = &e->cols;
    return e->first + i / r->inner * r->major + i % r->inner * r->minor + j / c->inner * c->major + j % c->inner * c->minor;
}

/* The model's parameters in host memory: those themselves where that is where they are and they are only read, else a copy. */
typedef struct espi_adapter_image {
    const esp_model *model;
    unsigned char *bytes;
    size_t size;
    bool copied;
} espi_adapter_image;
esp_status espi_adapter_image_take(espi_adapter_image *image, const esp_model *model, bool to_change);
/* What was changed becomes the model's. */
esp_status espi_adapter_image_put(const espi_adapter_image *image);
void espi_adapter_image_free(espi_adapter_image *image);
/* Where a parameter of the model lies in the image; its value i. */
void *espi_adapter_image_at(const espi_adapter_image *image, const void *parameter);
float espi_adapter_image_get(const espi_adapter_image *image, const void *parameter, int64_t i);

/* "base_model.model.NAME.lora_A.weight"; module has %d for the layer and, where there is one, for the expert. */
void espi_adapter_key(char key[ESPI_ADAPTER_KEY], const char *module, int64_t layer, int64_t expert, char matrix);
/* The same of a fused stack.  inner: as the wrapper inside the other one. */
void espi_adapter_fused_key(char key[ESPI_ADAPTER_KEY], const espi_family *family, int64_t layer, bool inner, char matrix);

typedef enum espi_projection { ESPI_P_GATE, ESPI_P_UP, ESPI_P_DOWN } espi_projection;
const char *espi_adapter_attention(const espi_family *family, int target);
const char *espi_adapter_expert(const espi_family *family, espi_projection projection);
/* Of a module's name: "model.layers.%d.self_attn.q_proj" -> "q_proj". */
const char *espi_adapter_last_part(const char *module);

/* rank_pattern or alpha_pattern: a module takes the value of the first key k for which the expression (.*\.)?(k)$ matches its name. */
typedef struct espi_patterns espi_patterns;
esp_status espi_patterns_read(espi_patterns **patterns, const json_t *root, const char *path, const char *key);
void espi_patterns_free(espi_patterns *patterns);
bool espi_patterns_empty(const espi_patterns *patterns);
/* value [in,out]: left as it is when no key matches. */
esp_status espi_patterns_apply(double *value, const espi_patterns *patterns, const char *module);

/* Rows *begin .. *end-1 are those that have values of this rank's.  Of ESPI_OF_EXPERT_COLS: in some columns. */
static inline void espi_adapter_own_rows(int64_t *begin, int64_t *end, const espi_adapter_entry *e, const espi_share *s) {
    const bool foreign = e->of == ESPI_OF_ONE && (e->expert < s->first || e->expert >= s->first + s->count);
    *begin = e->of == ESPI_OF_EXPERT_ROWS ? s->first * e->r : 0;
    *end = e->of == ESPI_OF_EXPERT_ROWS ? *begin + s->count * e->r : foreign ? 0 : e->rows.n;
}
/* In one of those rows, is this column this rank's? */
static inline bool espi_adapter_own_column(const espi_adapter_entry *e, const espi_share *s, int64_t column) {
    if (e->of != ESPI_OF_EXPERT_COLS) return true;
    const int64_t expert = e->slowest ? column / e->r : column % s->experts;
    return expert >= s->first && expert < s->first + s->count;
}

/* adapter_write.c.  Collective.  dtype: of the file's tensors, F32 unless values are known to fit a narrower one. */
esp_status espi_adapter_write(esp_model *model, const char *dir, const esp_adapter_config *config, esp_dtype dtype);

/* A model without weights: config.json of model_dir and the adapter of adapter_dir, read in `reading`'s way.  dtype: that of all the file's
 * tensors, or ESP_F32.  esp_model_destroy() it. */
esp_status espi_adapter_open(esp_model **model, esp_dtype *dtype, esp_ctx *ctx, const char *adapter_dir, const char *model_dir,
                             const esp_adapter_config *reading);

#endif
