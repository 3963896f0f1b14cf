/* What the loader's parts share: load.c walks the model, load_bnb.c takes matrices that bitsandbytes has quantised. */
#ifndef ESPI_MODELS_LOAD_H
#define ESPI_MODELS_LOAD_H

#include "io/safetensors.h"
#include "models/model.h"

#define ESPI_TENSOR_NAME 256

typedef struct espi_loader {
    esp_model *model;
    espi_st_set *set;
    bool *used;         /* which tensors of the set have been asked for */
    espi_room staging;  /* freed after loading; holds what follows */
    float *absmax;      /* room for the block scales of one matrix, under double quantisation */
    unsigned char *raw; /* stored values on their way */
    size_t raw_bytes;   /* a multiple of 64 elements of any dtype, at least 4096 */
    unsigned char *one; /* one expert as it is, in host memory: on its way to a device, or to be packed */
    /* On a device: the same there; the values of `raw`; and the scales of `absmax`.  Else NULL. */
    unsigned char *d_one, *d_raw;
    float *d_absmax;
    float *map, *lut; /* where the stacks' map of double quantisation lies, or NULL; on a device, their table of values */
    float map_values[256];
    bool map_used; /* some matrix has codes for it, so it must not change any more */
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
/* The map of double quantisation becomes this one.  *same: it was, or there was none. */
esp_status espi_loader_set_map(espi_loader *loader, bool *same, const float *values);
/* Scales of matrix `part` of the stack, which lie in loader->absmax, to 8 bits. */
esp_status espi_loader_shrink_absmax(espi_loader *loader, const espi_stack *stack, int64_t part);

/* What the tensor that holds matrix `part` of a layer's down or gate_up stack is called. */
void espi_expert_matrix_name(char out[ESPI_TENSOR_NAME], const espi_family *family, espi_expert_layout layout, int64_t layer, bool down,
                             int64_t part);
void espi_expert_bias_name(char out[ESPI_TENSOR_NAME], const espi_family *family, espi_expert_layout layout, int64_t layer, bool down,
                           int64_t part);
/* Expert e of the stack as a stack of one in host memory, to be filled and then put into its place: on a CPU it is that place. */
espi_stack espi_loader_expert(const espi_loader *loader, const espi_stack *stack, int64_t e);
esp_status espi_loader_expert_done(espi_loader *loader, const espi_stack *stack, int64_t e, const espi_stack *one);
/* n values of `dtype`, in host memory, to `out`, which holds `held`.  room: for n values of `held`, used on a device. */
esp_status espi_loader_store(espi_loader *loader, void *out, esp_dtype held, const void *values, esp_dtype dtype, int64_t n, void *room);
/* Where the plain values of one expert matrix, or of its bias, lie. */
typedef struct espi_source {
    const espi_st_tensor *t;
    int64_t first;   /* its first element */
    int64_t columns; /* 0: row after row.  Else from one column to the next: column after column, this many elements apart */
} espi_source;
/* Those of matrix `part` of a layer's down or gate_up stack, whatever the layout.  ESP_ERR_UNSUPPORTED: quantised already. */
esp_status espi_loader_source(espi_source *from, espi_loader *loader, const espi_stack *stack, int64_t layer, bool down, int64_t part);
esp_status espi_loader_bias(espi_source *from, espi_loader *loader, const espi_stack *stack, int64_t layer, bool down, int64_t part);
/* The values become matrix `part` of the stack, which is in host memory, in its form. */
esp_status espi_loader_take(espi_loader *loader, const espi_stack *stack, int64_t part, const espi_source *from);

/* True where `name` (with ".weight" where it has that) was quantised by bitsandbytes: its quant_state or its scales are there. */
bool espi_bnb_present(espi_loader *loader, const char *name);
/* Takes the codes of matrix `part` as they are.  The file's format, block size, shape and tables must be those of the stack. */
esp_status espi_bnb_load_part(espi_loader *loader, const espi_stack *stack, int64_t part, const char *name);
/* Takes nothing: looks at what that would take, for an expert that another rank holds. */
esp_status espi_bnb_expect_part(espi_loader *loader, const espi_stack *stack, const char *name);
/* As espi_bnb_load_part, for a whole stack that is stored as one array [experts,rows,cols]; every matrix of it must fill whole blocks. */
esp_status espi_bnb_load_fused(espi_loader *loader, const espi_stack *stack, const char *name);
/* A dense matrix, NF4 or FP4, restored to f32, which becomes what `to` holds. */
esp_status espi_bnb_load_dense(espi_loader *loader, const espi_mat *to, const char *name);

#endif
