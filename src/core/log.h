/* One finished line to the context's log function, if its level is on. */
#ifndef ESPI_CORE_LOG_H
#define ESPI_CORE_LOG_H

#include "espalier/ctx.h"

void espi_log(const esp_ctx *ctx, esp_log_level level, const char *format, ...) __attribute__((format(printf, 3, 4)));
bool espi_log_enabled(const esp_ctx *ctx, esp_log_level level);

#endif
