/* Log lines: formatted here, handed to the context's log function. */
#include "core/log.h"
#include "core/ctx.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *const level_names[] = {
    [ESP_LOG_ERROR] = "error", [ESP_LOG_WARN] = "warn", [ESP_LOG_INFO] = "info", [ESP_LOG_SELECT] = "select", [ESP_LOG_DEBUG] = "debug",
};

/* The one place of the library that writes to a stream, and only where the environment asks for it. */
static void standard_error(void *user, esp_log_level level, const char *line) {
    (void)user;
    fprintf(stderr, "espalier %s: %s\n", level_names[level], line);
}

esp_status espi_log_setup(esp_ctx *ctx, esp_log_fn log, void *user) {
    const char *asked = getenv("ESP_LOG");
    ctx->log = log;
    ctx->log_user = user;
    ctx->log_level = ESP_LOG_INFO;
    if (asked == NULL || asked[0] == '\0') return ESP_OK;
    for (int level = 0; level < ESPI_COUNT(level_names); level++)
        if (strcmp(asked, level_names[level]) == 0) {
            ctx->log_level = (esp_log_level)level;
            if (log == NULL) ctx->log = standard_error;
            return ESP_OK;
        }
    return ESPI_FAIL(ESP_ERR_ARG, "the environment has ESP_LOG=%s, expected error, warn, info, select or debug", asked);
}

bool espi_log_enabled(const esp_ctx *ctx, esp_log_level level) {
    return ctx->log != NULL && level <= ctx->log_level;
}

void espi_log(const esp_ctx *ctx, esp_log_level level, const char *format, ...) {
    if (!espi_log_enabled(ctx, level)) return;
    char line[2048];
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    if (length >= 0) ctx->log(ctx->log_user, level, line);
}
