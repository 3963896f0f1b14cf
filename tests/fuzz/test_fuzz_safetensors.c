/* Damaged safetensors headers, 20000 of them, always the same ones: each is read in full or refused by a sentence that names the file. */
#include "core/rng.h"
#include "core/status.h"
#include "io/safetensors.h"
#include "scratch.h"

#include <fcntl.h>

#define ROUNDS 20000

static const char seed_header[] = "{\"__metadata__\":{\"format\":\"pt\"},\"a\":{\"dtype\":\"F32\",\"shape\":[2,3],\"data_offsets\":[0,24]},"
                                  "\"b\":{\"dtype\":\"BF16\",\"shape\":[4],\"data_offsets\":[24,32]},"
                                  "\"c\":{\"dtype\":\"U8\",\"shape\":[],\"data_offsets\":[32,33]}}   ";
static const char *const tokens[] = {"{",
                                     "}",
                                     "[",
                                     "]",
                                     ",",
                                     ":",
                                     "\"",
                                     "0",
                                     "-1",
                                     "1e9",
                                     "18446744073709551616",
                                     "\\",
                                     "32",
                                     "\\u0000",
                                     "null",
                                     "true",
                                     "\"shape\"",
                                     "U8\"",
                                     "\xf0\x9f",
                                     "33",
                                     "9223372036854775807"};

/* One draw below n. */
static uint32_t below(uint32_t round, uint32_t *draw, uint32_t n) {
    uint32_t words[4];
    espi_philox(words, 20261124, ESPI_STREAM_SHUFFLE, round, (*draw)++, 0, 0);
    return words[0] % n;
}

/* Up to four changes: a byte flipped, taken away, doubled, or a token put in its place. */
static size_t damage(char *text, size_t n, size_t capacity, uint32_t round) {
    uint32_t draw = 0;
    const uint32_t changes = 1 + below(round, &draw, 4);
    for (uint32_t i = 0; i < changes && n > 0; i++) {
        const size_t at = below(round, &draw, (uint32_t)n);
        const char *token = tokens[below(round, &draw, (uint32_t)ESPI_COUNT(tokens))];
        const size_t length = strlen(token);
        switch (below(round, &draw, 4)) {
        case 0:
            text[at] = (char)(text[at] ^ (1 << below(round, &draw, 8)));
            break;
        case 1:
            memmove(text + at, text + at + 1, --n - at);
            break;
        case 2:
            if (n + 1 < capacity) memmove(text + at + 1, text + at, n++ - at);
            break;
        default:
            if (n + length < capacity) {
                memmove(text + at + length, text + at + 1, n - at - 1);
                memcpy(text + at, token, length);
                n += length - 1;
            }
        }
    }
    return n;
}

Test(fuzz, safetensors_headers, .timeout = 60) {
    char dir[ESPI_PATH_MAX], path[ESPI_PATH_MAX], text[1024];
    unsigned char file[2048], tensor[64];
    int taken = 0;
    scratch_make(dir);
    OK(espi_path_join(path, dir, "x"));
    const int fd = open(path, O_RDWR | O_CREAT, 0600); /* one file for all rounds: making one for each is slow */
    cr_assert_geq(fd, 0);
    for (uint32_t round = 0; round < ROUNDS; round++) {
        uint32_t draw = 1000;
        memcpy(text, seed_header, sizeof seed_header - 1);
        const size_t n = damage(text, sizeof seed_header - 1, sizeof text, round);
        /* Now and then the prefix lies, or the file is cut. */
        const size_t claimed = below(round, &draw, 16) == 0 ? below(round, &draw, 600) : n;
        size_t bytes = 8 + n + 33;
        if (below(round, &draw, 16) == 0) bytes = below(round, &draw, (uint32_t)bytes);
        memset(file, 0, sizeof file);
        for (int i = 0; i < 8; i++) file[i] = (unsigned char)(claimed >> (8 * i));
        memcpy(file + 8, text, n);
        cr_assert_eq(pwrite(fd, file, bytes, 0), (ssize_t)bytes);
        cr_assert_eq(ftruncate(fd, (off_t)bytes), 0);
        espi_st_file *f = NULL;
        const esp_status status = espi_st_open(&f, path);
        if (status != ESP_OK) {
            cr_assert_eq(status, ESP_ERR_FORMAT, "round %u: %s", round, esp_last_error());
            cr_assert_not_null(strstr(esp_last_error(), path), "round %u: %s", round, esp_last_error());
            continue;
        }
        taken++;
        for (size_t i = 0; i < espi_st_count(f); i++) {
            const espi_st_tensor *t = espi_st_at(f, i);
            cr_assert_leq(t->bytes, 33, "round %u", round);
            OK(espi_st_read(t, tensor, 0, (size_t)t->bytes));
        }
        espi_st_close(f);
    }
    /* Damage to a name or to the metadata is no damage to the format; were none or all taken, this test would see nothing. */
    cr_expect(taken > ROUNDS / 100 && taken < ROUNDS / 2, "%d of %d taken", taken, ROUNDS);
    close(fd);
    scratch_remove(dir);
}
