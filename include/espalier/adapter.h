/// Adapters as PEFT folders (adapter_config.json, adapter_model.safetensors): the forms that other software writes and loads.
///
/// Expert branches come in two forms, told apart by their keys:
///   2-D  one A [R,in] and B [out,R] per expert and projection
///   3-D  one pair per stack: A [R*E,in], row e*R + k; B [out,R*E], column k*E + e.  Old versions of PEFT took the stack's two widths for
///   one
///        another ("swapped": A [R*E,out], B [in,R*E], the delta is the transpose); old versions of Unsloth ordered B's columns e*R + k.
/// Which of the two widths comes first is seen where a stack is not square, and else taken from the file's other stack or its peft_version;
/// what none of these says is refused.  The order of B's columns cannot be seen: it is `lora_B_layout` of adapter_config.json
/// ("rank_major" or "grouped_by_expert"), and PEFT's without it.
#ifndef ESPALIER_ADAPTER_H
#define ESPALIER_ADAPTER_H

#include "espalier/model.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum esp_adapter_form {
    ESP_ADAPTER_FORM_DEFAULT = 0, ///< what vLLM loads for the family: 3-D for gpt_oss and qwen3_vl_moe, else 2-D
    ESP_ADAPTER_2D,
    ESP_ADAPTER_3D
} esp_adapter_form;

typedef enum esp_adapter_columns {
    ESP_ADAPTER_COLUMNS_DEFAULT = 0, ///< reading: as lora_B_layout says, else expert-fastest; writing: expert-fastest
    ESP_ADAPTER_EXPERT_FASTEST,      ///< column k*E + e: PEFT, vLLM
    ESP_ADAPTER_EXPERT_SLOWEST       ///< column e*R + k: Unsloth before 2026-09; written with lora_B_layout "grouped_by_expert"
} esp_adapter_columns;

typedef enum esp_adapter_widths {
    ESP_ADAPTER_WIDTHS_DEFAULT = 0, ///< as the file says
    ESP_ADAPTER_WIDTHS_TRUE,        ///< A has the stack's input width, B its output width
    ESP_ADAPTER_WIDTHS_SWAPPED      ///< the other way round; for reading only
} esp_adapter_widths;

/// How a folder is read or written, where it does not say so itself.
struct esp_adapter_config {
    size_t struct_size;
    esp_adapter_form form; ///< writing only: the keys of a file that is read say what it is
    esp_adapter_columns columns;
    esp_adapter_widths widths;
};
#define ESP_ADAPTER_CONFIG(...) ((esp_adapter_config){.struct_size = sizeof(esp_adapter_config), __VA_ARGS__})

/// esp_model_save_adapter() in a form of choice.  A gate_up branch that was read from separate A of gate and up, and has not been trained
/// since, is written to 2-D as it was; to 3-D with twice the rank and alpha.  Collective, as that is.
/// In 2-D, rsLoRA's scale is stated as alpha / R (use_rslora false): PEFT takes alpha / sqrt(R) of such a file sqrt(2) too large.
/// ESP_ERR_UNSUPPORTED: 2-D for a family that has no module per expert, or swapped widths
ESP_API esp_status esp_model_save_adapter_as(esp_model *model, const char *dir, const esp_adapter_config *config);
/// esp_model_load_adapter() with what the folder does not say.
ESP_API esp_status esp_model_load_adapter_as(esp_model *model, const char *dir, const esp_adapter_config *config);

/// Writes the adapter of adapter_dir to out_dir in another form; of model_dir only config.json is read.  Values keep their bits, and their
/// dtype where the file has one for all.
/// ESP_ERR_UNSUPPORTED: what cannot be written exactly in that form
ESP_API esp_status esp_adapter_convert(esp_ctx *ctx, const char *out_dir, const char *adapter_dir, const char *model_dir,
                                       const esp_adapter_config *reading, const esp_adapter_config *writing);

typedef struct esp_merge_config {
    size_t struct_size;
    const esp_adapter_config *reading; ///< how the adapter is read; NULL = as it says
    esp_qformat format;                ///< of the new folder's experts: ESP_NF4, ESP_FP4, ESP_MXFP4; 0 = plain, in the dtype they had
} esp_merge_config;
#define ESP_MERGE_CONFIG(...) ((esp_merge_config){.struct_size = sizeof(esp_merge_config), __VA_ARGS__})

typedef struct esp_merge_stats {
    size_t struct_size;
    int64_t attempted; ///< weight matrices that the adapter changes
    int64_t applied;   ///< those that were found and changed: the same number, or the call has failed
} esp_merge_stats;
#define ESP_MERGE_STATS_INIT                                                                                                               \
    { .struct_size = sizeof(esp_merge_stats) }

/// Writes the model of model_dir to out_dir, same files and tensors, with scale * B A added to every weight that the adapter has a branch
/// for: in f32, rounded once (to nearest, ties to even).  Tensor by tensor.  A format other than 0 needs, for the time of the call, a
/// folder "OUT_DIR.f32" with the experts in f32.
/// stats [out] or NULL
/// ESP_ERR_FORMAT: a weight of the adapter is not in the folder (nothing is written); ESP_ERR_UNSUPPORTED: the folder is 4-bit already
/// (MXFP4 is taken with format ESP_MXFP4: decoded, changed, rounded again); ESP_ERR_NONFINITE: a sum too large for its dtype
ESP_API esp_status esp_adapter_merge(esp_ctx *ctx, esp_merge_stats *stats, const char *out_dir, const char *model_dir,
                                     const char *adapter_dir, const esp_merge_config *config);

#ifdef __cplusplus
}
#endif
#endif
