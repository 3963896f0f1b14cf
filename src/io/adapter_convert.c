/* An adapter without its model's weights: read, and written in another form. */
#include "core/status.h"
#include "io/adapter.h"
#include "io/file.h"
#include "io/safetensors.h"

#include <stdlib.h>

/* The dtype of all tensors, if that is one. */
static esp_status common_dtype(esp_dtype *dtype, const char *adapter_dir) {
    char path[ESPI_PATH_MAX];
    espi_st_file *file;
    *dtype = ESP_F32;
    ESPI_TRY(espi_path_join(path, adapter_dir, ESPI_ADAPTER_WEIGHTS));
    ESPI_TRY(espi_st_open(&file, path));
    for (size_t i = 0; i < espi_st_count(file); i++) {
        const esp_dtype here = espi_st_at(file, i)->dtype;
        if (i == 0)
            *dtype = here;
        else if (here != *dtype)
            *dtype = ESP_F32;
    }
    espi_st_close(file);
    return ESP_OK;
}

static esp_status fill(esp_model *m, const char *adapter_dir, const char *model_dir, const esp_adapter_config *reading) {
    ESPI_TRY(espi_config_read(&m->config, model_dir));
    ESPI_TRY(espi_adapter_read_spec(m->lora, &m->options.lora_alpha, &m->options.rslora, adapter_dir, &m->config, reading));
    ESPI_TRY(espi_model_skeleton(m));
    ESPI_TRY(espi_model_init_adapter(m));
    return esp_model_load_adapter_as(m, adapter_dir, reading);
}

esp_status espi_adapter_open(esp_model **model, esp_dtype *dtype, esp_ctx *ctx, const char *adapter_dir, const char *model_dir,
                             const esp_adapter_config *reading) {
    espi_share share;
    ESPI_TRY(espi_share_make(&share, ctx->comm, 0, 0, 0));
    if (share.ranks > 1)
        return ESPI_FAIL(ESP_ERR_UNSUPPORTED,
                         "%s: got a context of one of %d ranks, expected one that is alone: files are made of files "
                         "without a launcher",
                         adapter_dir, share.ranks);
    esp_model *m = calloc(1, sizeof *m);
    if (!m) return ESPI_FAIL(ESP_ERR_MEMORY, "%s: no memory for an adapter's bookkeeping", adapter_dir);
    m->ctx = ctx;
    m->options = ESP_MODEL_CONFIG(.experts = ESP_Q_NONE);
    esp_status status = common_dtype(dtype, adapter_dir);
    if (status == ESP_OK) status = fill(m, adapter_dir, model_dir, reading);
    if (status == ESP_OK)
        *model = m;
    else
        esp_model_destroy(m);
    return status;
}

esp_status esp_adapter_convert(esp_ctx *ctx, const char *out_dir, const char *adapter_dir, const char *model_dir,
                               const esp_adapter_config *reading, const esp_adapter_config *writing) {
    if (!ctx || !out_dir || !adapter_dir || !model_dir)
        return ESPI_FAIL(ESP_ERR_ARG, "esp_adapter_convert: ctx or a folder is NULL, expected all four");
    esp_model *model;
    esp_dtype dtype;
    ESPI_TRY(espi_adapter_open(&model, &dtype, ctx, adapter_dir, model_dir, reading));
    const esp_status status = espi_adapter_write(model, out_dir, writing, dtype);
    esp_model_destroy(model);
    return status;
}
