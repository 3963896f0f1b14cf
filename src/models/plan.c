/* The plan: how many bytes a run will take, part by part, found by walking it dry.  What is planned is what is taken, to the byte. */
#include "espalier/plan.h"
#include "models/passes.h"

esp_status espi_model_outline(esp_model *model, esp_ctx *ctx, const char *dir, const esp_model_config *config) {
    *model = (esp_model){.ctx = ctx, .adapter_on = true};
    ESPI_TRY(espi_config_read(&model->config, dir));
    ESPI_TRY(espi_model_options(&model->options, model->lora, config, &model->config));
    return espi_model_skeleton(model);
}

void espi_model_outline_free(esp_model *model) {
    espi_room_free(&model->room, model->ctx);
    espi_model_skeleton_free(model);
    espi_config_free(&model->config);
}

static esp_status no_coef(void *user, const espi_head_rows *rows, int64_t first, int64_t count) {
    (void)user, (void)rows, (void)first, (void)count; /* never called: the arena is dry */
    return ESP_OK;
}

/* Forward, then the dearest of the losses, then the backward. */
static esp_status training_walk(esp_model *model, espi_arena *dry, const esp_batch *batch) {
    espi_decoder_saved *saved;
    ESPI_TRY(espi_decoder_saved_create(&saved, &model->config));
    esp_status status = espi_decoder_forward(model, dry, batch, saved);
    void *d_hidden;
    if (status == ESP_OK)
        status = espi_arena_take(dry, (size_t)(espi_head_d_rows(batch) * model->config.hidden) * model->ctx->act_size, &d_hidden);
    for (int row_local = 0; row_local < 2 && status == ESP_OK; row_local++) {
        const espi_mark mark = espi_arena_mark(dry);
        espi_head_rows rows;
        status = espi_head_rows_make(&rows, model, dry, batch);
        if (status == ESP_OK) status = espi_head_loss(model, dry, &rows, NULL, NULL, batch->n_tokens, 1.0, row_local != 0, no_coef, NULL);
        espi_arena_release(dry, mark);
    }
    if (status == ESP_OK) status = espi_decoder_backward(model, dry, NULL, 1.0, saved);
    espi_decoder_saved_free(saved);
    return status;
}

static esp_status inference_walk(esp_model *model, espi_arena *dry, const esp_batch *batch) {
    void *hidden;
    int64_t *flips;
    espi_head_rows rows;
    ESPI_TRY(espi_decoder_forward_only(&hidden, &flips, model, dry, batch));
    ESPI_TRY(espi_head_rows_make(&rows, model, dry, batch));
    return espi_head_logprob(model, dry, &rows, NULL, 1.0);
}

esp_status espi_batch_bytes(espi_extent *room, esp_model *model, const esp_batch *shape, bool training) {
    espi_arena dry = espi_ctx_dry(model->ctx);
    ESPI_TRY(training ? training_walk(model, &dry, shape) : inference_walk(model, &dry, shape));
    *room = espi_arena_high(&dry);
    return ESP_OK;
}

esp_status espi_activation_bytes(espi_extent *room, esp_model *model, int64_t n_tokens, int32_t n_seqs, bool training) {
    return espi_batch_bytes(room, model, &ESP_BATCH(.n_tokens = n_tokens, .n_seqs = n_seqs), training);
}

static esp_status head_bytes(size_t *bytes, esp_model *model, const esp_batch *shape) {
    espi_arena dry = espi_ctx_dry(model->ctx);
    espi_head_rows rows;
    ESPI_TRY(espi_head_rows_make(&rows, model, &dry, shape));
    ESPI_TRY(espi_head_loss(model, &dry, &rows, NULL, NULL, shape->n_tokens, 1.0, true, no_coef, NULL));
    *bytes = dry.main.high;
    return ESP_OK;
}

static esp_status fill_plan(esp_plan *plan, esp_model *model, const esp_adamw_config *adamw, int64_t n_tokens, int32_t n_seqs) {
    const esp_batch shape = ESP_BATCH(.n_tokens = n_tokens, .n_seqs = n_seqs);
    espi_weight_plan w;
    ESPI_TRY(espi_weight_plan_make(&w, model->ctx, &model->config, &model->options, model->lora));
    plan->dense_weights = w.dense;
    plan->expert_weights = w.experts;
    plan->host_weights = w.host;
    plan->adapter = w.adapter;
    plan->gradients = w.gradients;
    espi_extent room;
    ESPI_TRY(espi_adamw_plan(&room, model, adamw));
    plan->optimizer = room.main;
    plan->host_moments = room.host;
    ESPI_TRY(espi_activation_bytes(&room, model, n_tokens, n_seqs, true));
    plan->activations = room.main;
    ESPI_TRY(head_bytes(&plan->head, model, &shape));
    ESPI_TRY(espi_decoder_first_kept(&plan->layers_recomputed, model, n_tokens));
    plan->staging = w.staging;
    const size_t weights = plan->dense_weights + plan->expert_weights;
    plan->total = weights + plan->adapter + plan->gradients + plan->optimizer + plan->activations;
    plan->peak = espi_weight_plan_peak(&w, plan->optimizer + plan->activations);
    return ESP_OK;
}

esp_status esp_plan_folder(esp_plan *out, esp_ctx *ctx, const char *dir, const esp_model_config *config, const esp_adamw_config *adamw,
                           int64_t n_tokens, int32_t n_seqs) {
    if (!out || !ctx || !dir) return ESPI_FAIL(ESP_ERR_ARG, "esp_plan_folder: out, ctx or dir is NULL, expected all three");
    if (n_seqs < 1 || n_tokens < n_seqs)
        return ESPI_FAIL(ESP_ERR_ARG,
                         "esp_plan_folder: got %lld tokens in %d sequences, expected at least one token in each of at least one",
                         (long long)n_tokens, n_seqs);
    esp_plan plan = {0};
    esp_model model;
    esp_status status = espi_model_outline(&model, ctx, dir, config);
    if (status == ESP_OK) status = fill_plan(&plan, &model, adamw, n_tokens, n_seqs);
    espi_model_outline_free(&model);
    return status == ESP_OK ? espi_struct_write(out, &plan, sizeof plan, "esp_plan") : status;
}
