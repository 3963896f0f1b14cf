/* The built-in rewards of the task files. */
#include "espalier/trainer.h"

#include <string.h>

int esp_reward_exact(void *user, const esp_reward_batch *batch, float *reward) {
    (void)user;
    for (int64_t i = 0; i < batch->n; i++) reward[i] = batch->stopped[i] && strcmp(batch->completion[i], batch->answer[i]) == 0;
    return 0;
}

/* The next character of UTF-8 text: its bytes, 0 at the end. */
static size_t character(const char *text) {
    if (!*text) return 0;
    size_t n = 1;
    while (((unsigned char)text[n] & 0xC0) == 0x80) n++;
    return n;
}

int esp_reward_match(void *user, const esp_reward_batch *batch, float *reward) {
    (void)user;
    for (int64_t i = 0; i < batch->n; i++) {
        const char *want = batch->answer[i], *got = batch->completion[i];
        int64_t length = 0, right = 0;
        for (size_t w; (w = character(want)) > 0; want += w, length++) {
            const size_t g = character(got);
            right += g == w && memcmp(want, got, w) == 0;
            got += g;
        }
        reward[i] = length ? (float)right / (float)length : (float)(*got == '\0');
    }
    return 0;
}
