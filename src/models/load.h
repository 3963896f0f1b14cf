/* What the loader's parts share: load.c walks the model, load_bnb.c takes matrices that bitsandbytes has quantised. */
#ifndef ESPI_MODELS_LOAD_H
#define ESPI_MODELS_LOAD_H

#include "io/safetensors.h"
#include "models/model.h"

#define ESPI_TENSOR_NAME 256

typedef struct espi_loader {
    esp_model *model;
    espi_st_set *set;
    bool *used;    /* which tensors of the set have been asked for */
    void *staging; /* one block of the context, freed after loading; holds the two below */
    size_t staging_bytes;
    float *absmax;      /* room for the block scales of one matrix, under double quantisation */
    unsigned char *raw; /* stored values on their way */
    size_t raw_bytes;   /* a multiple of 64 elements of any dtype, at least 4096 */
    float *map;         /* the stacks' map of double quantisation, or NULL */
    bool map_used;      /* some matrix has codes for it, so it must not change any more */
} espi_loader;

/* Opens the folder and takes the staging buffer, for a model of which there is a skeleton; to be closed, also after a failure. */
esp_status espi_loader_open(espi_loader *loader, esp_model *model, const char *dir);
void espi_loader_close(espi_loader *loader);

/* NULL: not there.  Notes that it was asked for. */
const espi_st_tensor *espi_loader_find(espi_loader *loader, const char *name);
/* The same, but absence and another dtype (ESP_DTYPE_NONE: any) or shape are errors. */
esp_status espi_loader_need(espi_loader *loader, const espi_st_tensor **tensor, const char *name, esp_dtype dtype, int rank,
                            const int64_t *dims);
/* Elements first .. first+n-1 as they are stored; a NaN or infinity is ESP_ERR_NONFINITE naming file, tensor, element. */
esp_status espi_loader_read(const espi_st_tensor *tensor, void *out, int64_t first, int64_t n);
/* Scales of matrix `part` of the stack, which lie in loader->absmax, to 8 bits. */
esp_status espi_loader_shrink_absmax(espi_loader *loader, const espi_stack *stack, int64_t part);

/* What the tensor that holds matrix `part` of a layer's down or gate_up stack is called. */
void espi_expert_matrix_name(char out[ESPI_TENSOR_NAME], const espi_family *family, espi_expert_layout layout, int64_t layer, bool down,
                             int64_t part);
void espi_expert_bias_name(char out[ESPI_TENSOR_NAME], const espi_family *family, espi_expert_layout layout, int64_t layer, bool down,
                           int64_t part);
/* Where the plain values of one expert matrix, or of its bias, lie. */
typedef struct espi_source {
    const espi_st_tensor *t;
    int64_t first;   /* its first element */
    int64_t columns; /* 0: row after row.  Else from one column to the next: column after column, this many elements apart */
} espi_source;
/* Those of matrix `part` of a layer's down or gate_up stack, whatever the layout.  ESP_ERR_UNSUPPORTED: quantised already. */
esp_status espi_loader_source(espi_source *from, espi_loader *loader, const espi_stack *stack, int64_t layer, bool down, int64_t part);
esp_status espi_loader_bias(espi_source *from, espi_loader *loader, const espi_stack *stack, int64_t layer, bool down, int64_t part);
/* The values become matrix `part` of the stack, in its form. */
esp_status espi_loader_take(espi_loader *loader, const espi_stack *stack, int64_t part, const espi_source *from);

/* True where `name` (with ".weight" where it has that) was quantised by bitsandbytes: its quant_state or its scales are there. */
bool espi_bnb_present(espi_loader *loader, const char *name);
/* Takes the codes of matrix `part` as they are.  The file's format, block size, shape and tables must be those of the stack. */
esp_status espi_bnb_load_part(espi_loader *loader, const espi_stack *stack, int64_t part, const char *name);
/* The same for a whole stack that is stored as one array [experts,rows,cols]; every matrix of it must fill whole blocks. */
esp_status espi_bnb_load_fused(espi_loader *loader, const espi_stack *stack, const char *name);
/* A dense matrix, NF4 or FP4, restored to f32. */
esp_status espi_bnb_load_dense(espi_loader *loader, float *out, const char *name, int64_t rows, int64_t cols);

#endif
