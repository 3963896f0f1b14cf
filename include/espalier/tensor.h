/// dtypes, 4-bit formats, and a visible view of memory that owns nothing.
#ifndef ESPALIER_TENSOR_H
#define ESPALIER_TENSOR_H

#include "espalier/status.h"

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/// Element types.  Values are pinned.
typedef enum esp_dtype {
    ESP_DTYPE_NONE = 0,
    ESP_F32 = 1,
    ESP_F64 = 2,
    ESP_BF16 = 3,
    ESP_F16 = 4,
    ESP_I32 = 5,
    ESP_I64 = 6,
    ESP_U8 = 7,
    ESP_I8 = 8,
    ESP_BOOL = 9,
    ESP_I16 = 10,
    ESP_U16 = 11,
    ESP_U32 = 12,
    ESP_U64 = 13,
    ESP_F8_E4M3 = 14
} esp_dtype;

/// How frozen expert weights are held.  Values are pinned.
typedef enum esp_qformat {
    ESP_Q_DEFAULT = 0, ///< what the call documents as its default
    ESP_Q_NONE = 1,    ///< as stored in the checkpoint (bf16, f16, f32)
    ESP_NF4 = 2,       ///< bitsandbytes NF4, flat blocks of 64
    ESP_FP4 = 3,       ///< bitsandbytes FP4, flat blocks of 64
    ESP_MXFP4 = 4      ///< OCP MXFP4, blocks of 32 within rows
} esp_qformat;

/// How quantising to MXFP4 chooses a block's power of two, and where a value between two codes goes.  Values are pinned.
typedef enum esp_mxfp4_rule {
    ESP_MXFP4_OCP = 0,     ///< floor(log2(max)) - 2, to the nearest, ties to even, larger ones to 6
    ESP_MXFP4_ROUND_UP = 1 ///< the smallest that reaches max, ties away from zero: as triton_kernels does by default
} esp_mxfp4_rule;

#define ESP_MAX_RANK 8

/// A view: element [i0,i1,..] lies at data + (i0*strides[0] + i1*strides[1] + ..) elements.  Owns nothing.
typedef struct esp_tensor {
    void *data;
    int64_t dims[ESP_MAX_RANK];
    int64_t strides[ESP_MAX_RANK]; ///< in elements
    int32_t rank;
    esp_dtype dtype;
} esp_tensor;

/// Bytes of one element; 0 for ESP_DTYPE_NONE or an unknown value.
ESP_API size_t esp_dtype_size(esp_dtype dtype);

/// "F32", "BF16", ... as safetensors spells it; "?" when unknown.
ESP_API const char *esp_dtype_name(esp_dtype dtype);

/// A contiguous row-major view.  dims [in] `rank` entries; rank 0 is a scalar.  rank > ESP_MAX_RANK gives a view of rank -1 with NULL data.
ESP_API esp_tensor esp_tensor_view(void *data, esp_dtype dtype, int rank, const int64_t *dims);

/// Product of the dimensions (1 for a scalar).
ESP_API int64_t esp_tensor_count(const esp_tensor *t);

#ifdef __cplusplus
}
#endif
#endif
