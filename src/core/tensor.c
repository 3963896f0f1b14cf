/* dtypes and tensor views. */
#include "espalier/tensor.h"
#include "core/status.h"

typedef struct dtype_row {
    const char *name; /* as safetensors spells it */
    size_t size;
} dtype_row;

static const dtype_row dtypes[] = {
    [ESP_DTYPE_NONE] = {"?", 0}, [ESP_F32] = {"F32", 4}, [ESP_F64] = {"F64", 8}, [ESP_BF16] = {"BF16", 2}, [ESP_F16] = {"F16", 2},
    [ESP_I32] = {"I32", 4},      [ESP_I64] = {"I64", 8}, [ESP_U8] = {"U8", 1},   [ESP_I8] = {"I8", 1},     [ESP_BOOL] = {"BOOL", 1},
    [ESP_I16] = {"I16", 2},      [ESP_U16] = {"U16", 2}, [ESP_U32] = {"U32", 4}, [ESP_U64] = {"U64", 8},   [ESP_F8_E4M3] = {"F8_E4M3", 1},
};

static const dtype_row *find(esp_dtype dtype) {
    unsigned value = (unsigned)dtype;
    return &dtypes[value < (unsigned)ESPI_COUNT(dtypes) ? value : ESP_DTYPE_NONE];
}

size_t esp_dtype_size(esp_dtype dtype) {
    return find(dtype)->size;
}

const char *esp_dtype_name(esp_dtype dtype) {
    return find(dtype)->name;
}

esp_tensor esp_tensor_view(void *data, esp_dtype dtype, int rank, const int64_t *dims) {
    if (rank < 0 || rank > ESP_MAX_RANK) return (esp_tensor){.rank = -1, .dtype = dtype};
    esp_tensor view = {.data = data, .rank = rank, .dtype = dtype};
    int64_t stride = 1;
    for (int i = rank - 1; i >= 0; i--) {
        view.dims[i] = dims[i];
        view.strides[i] = stride;
        stride *= dims[i];
    }
    return view;
}

int64_t esp_tensor_count(const esp_tensor *t) {
    int64_t count = 1;
    for (int i = 0; i < t->rank; i++) count *= t->dims[i];
    return count;
}
