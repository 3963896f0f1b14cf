/// Status codes and the last-error sentence.
#ifndef ESPALIER_STATUS_H
#define ESPALIER_STATUS_H

#ifdef __cplusplus
extern "C" {
#endif

#if defined(_WIN32)
#define ESP_API
#else
#define ESP_API __attribute__((visibility("default")))
#endif

/// What every call returns.  Values are pinned: they never change meaning between versions.
typedef enum esp_status {
    ESP_OK = 0,
    ESP_ERR_ARG = 1,         ///< an argument is NULL, out of range or contradicts another: fix the call
    ESP_ERR_SHAPE = 2,       ///< a tensor has another shape than the call or the config says
    ESP_ERR_DTYPE = 3,       ///< a tensor has a dtype that the call does not take
    ESP_ERR_STATE = 4,       ///< the call came out of order (e.g. backward without forward)
    ESP_ERR_UNSUPPORTED = 5, ///< no kernel, family or format takes this case; the sentence lists all reasons
    ESP_ERR_MEMORY = 6,      ///< an allocation failed or passed the context's limit
    ESP_ERR_IO = 7,          ///< the operating system refused a file operation
    ESP_ERR_FORMAT = 8,      ///< a file is malformed, truncated or lies about its contents
    ESP_ERR_NONFINITE = 9,   ///< NaN or infinity where a finite number is required
    ESP_ERR_CALLBACK = 10,   ///< a callback of the caller reported failure
    ESP_ERR_MISMATCH = 11,   ///< two things that must agree do not (e.g. a checkpoint and a config)
    ESP_ERR_COMM = 12,       ///< communication between ranks, or with a server, failed or took too long
    ESP_ERR_INTERNAL = 13,   ///< a broken promise inside the library: please report it
    ESP_ERR_DEVICE = 14      ///< the GPU or its driver reports failure; the context is of no more use
} esp_status;

/// The sentence of the last failed call on this thread: what, got, expected, file:line.  Never NULL; "" after no failure.
ESP_API const char *esp_last_error(void);

/// The enumerator's name ("ESP_ERR_SHAPE"), or "ESP_STATUS_UNKNOWN".
ESP_API const char *esp_status_name(esp_status status);

#ifdef __cplusplus
}
#endif
#endif
