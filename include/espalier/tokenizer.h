/// Byte-level BPE from a tokenizer.json.  Safe to use from several threads at once.
#ifndef ESPALIER_TOKENIZER_H
#define ESPALIER_TOKENIZER_H

#include "espalier/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct esp_tokenizer esp_tokenizer;

/// path: a tokenizer.json, or a folder that has one.  ESP_ERR_UNSUPPORTED names a component that is not offered.
ESP_API esp_status esp_tokenizer_load(esp_tokenizer **tokenizer, const char *path);
ESP_API void esp_tokenizer_destroy(esp_tokenizer *tokenizer);

/// add_special: run the post-processor (e.g. put <bos> in front).  specials_as_text: added tokens in the text are plain text (untrusted
/// input). ids [out] up to `capacity` ids; n [out] how many there are.  ESP_ERR_SHAPE when n > capacity (n is set; nothing else is lost).
ESP_API esp_status esp_tokenizer_encode(const esp_tokenizer *tokenizer, const char *text, size_t text_bytes, bool add_special,
                                        bool specials_as_text, int32_t *ids, size_t capacity, size_t *n);

/// text [out] NUL-terminated, up to capacity bytes with the NUL; n [out] bytes without the NUL.  Incomplete UTF-8 becomes U+FFFD.
/// ESP_ERR_ARG: an id that the tokenizer does not have; ESP_ERR_SHAPE when it does not fit
ESP_API esp_status esp_tokenizer_decode(const esp_tokenizer *tokenizer, const int32_t *ids, size_t n_ids, bool skip_special, char *text,
                                        size_t capacity, size_t *n);

/// Streaming: the bytes that one more id completes.  state starts zeroed, holds up to 3 pending bytes.
typedef struct esp_decode_state {
    unsigned char pending[4];
    int n_pending;
} esp_decode_state;
ESP_API esp_status esp_tokenizer_decode_next(const esp_tokenizer *tokenizer, esp_decode_state *state, int32_t id, bool skip_special,
                                             char *text, size_t capacity, size_t *n);

ESP_API int32_t esp_tokenizer_size(const esp_tokenizer *tokenizer);                  ///< largest id + 1
ESP_API int32_t esp_tokenizer_id(const esp_tokenizer *tokenizer, const char *token); ///< -1 = unknown

#ifdef __cplusplus
}
#endif
#endif
