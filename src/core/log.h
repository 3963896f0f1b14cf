/* One finished line to the context's log function, if its level is on. */
#ifndef ESPI_CORE_LOG_H
#define ESPI_CORE_LOG_H

#include "espalier/ctx.h"

void espi_log(const esp_ctx *ctx, esp_log_level level, const char *format, ...) __attribute__((format(printf, 3, 4)));
bool espi_log_enabled(const esp_ctx *ctx, esp_log_level level);

/* Where lines go and from which level: a caller's function gets INFO and graver unless ESP_LOG says otherwise; without a function, lines go
 * to standard error if ESP_LOG is set and nowhere if not.  ESP_ERR_ARG on an unknown level in ESP_LOG. */
esp_status espi_log_setup(esp_ctx *ctx, esp_log_fn log, void *user);

#endif
