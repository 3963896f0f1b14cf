/* Between the public calls of model.c, the losses of rl/ and the planner: the order in which a model's activation block is used.
 *
 *   [ what the last forward left | d_hidden of the last loss | scratch of the loss, then of the backward ]
 *                                ^ loss_mark
 * A loss or a backward starts at loss_mark again, so d_hidden lives until the next loss or forward. */
#ifndef ESPI_MODELS_PASSES_H
#define ESPI_MODELS_PASSES_H

#include "contract/decoder.h"
#include "contract/head.h"
#include "espalier/optim.h"

/* Defaults filled in, contradictions refused, the rank and scale of every target stated. */
esp_status espi_model_options(esp_model_config *options, espi_lora_spec lora[ESPI_T_COUNT], const esp_model_config *config,
                              const espi_config *c);
esp_status espi_rope_frequencies(double **inv_freq, const espi_config *config);

/* models/plan.c: room of the activation block for such batches, by walking forward, both kinds of loss, and backward dry. */
/* The same for a batch of which only the numbers are read, and whether it has routes; and making that room, as esp_model_reserve does. */
esp_status espi_batch_bytes(espi_extent *room, esp_model *model, const esp_batch *shape, bool training);
esp_status espi_model_reserve(esp_model *model, const esp_batch *shape, bool training);
esp_status espi_activation_bytes(espi_extent *room, esp_model *model, int64_t n_tokens, int32_t n_seqs, bool training);

esp_status espi_check_hidden(const esp_model *model, const esp_batch *batch, const esp_tensor *hidden, const char *name);

/* Checks batch and hidden, goes back to loss_mark, and takes d_hidden act [espi_head_d_rows,H] unless d_hidden is NULL (else: address of a pointer). */
esp_status espi_loss_begin(esp_model *model, const esp_batch *batch, const esp_tensor *hidden, void *d_hidden);
/* Accounts for the peak; *d_hidden becomes the view of what begin took. */
void espi_loss_end(esp_model *model, const esp_batch *batch, void *data, esp_tensor *d_hidden);

/* optim/adamw.c: esp_adamw_config with defaults filled in and checked. */
typedef struct espi_adamw_settings {
    double lr, beta1, beta2, eps, weight_decay, max_grad_norm, num_cycles;
    esp_schedule schedule;
    int64_t warmup_steps, total_steps;
    bool eight_bit, host_moments;
} espi_adamw_settings;
esp_status espi_adamw_settings_read(espi_adamw_settings *settings, const esp_adamw_config *config);

/* optim/adamw.c: bytes that esp_adamw_create takes for this model; config NULL = defaults. */
esp_status espi_adamw_plan(espi_extent *bytes, const esp_model *model, const esp_adamw_config *config);

/* This batch's share of the optimiser step: counted tokens / step_tokens, 1 when that is not stated. */
double espi_loss_share(const esp_batch *batch);

#endif
