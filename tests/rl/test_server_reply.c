/* The reader of completions: forms of routed experts, what is cut, and answers damaged at every byte. */
#include "rl/server_reply.h"

#include "core/status.h"
#include "outcome.h"

#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>

/* Two layers, of which the first is dense; three of 300 experts. */
static espi_mlp_kind kinds[] = {ESPI_MLP_DENSE, ESPI_MLP_MOE};
static const espi_config model = {
    .layers = 2, .vocab = 40, .experts = 300, .top_k = 2, .mlp_kind = kinds, .moe_layers = 1, .refused = {30}, .n_refused = 1};
static const int32_t prompt[] = {5, 6};
static const espi_reply_want plain = {.prompt = prompt, .n_prompt = 2, .samples = 1, .max_new_tokens = 3, .stop_id = 2, .model = &model};

/* An answer with one choice. */
static void write_answer(char *out, size_t room, const char *ids, const char *logprobs, const char *finish, const char *more) {
    snprintf(out, room,
             "{\"id\":\"cmpl-1\",\"model\":\"run-v1\",\"choices\":[{\"index\":0,\"text\":\"\",\"token_ids\":[%s],"
             "\"logprobs\":{\"token_logprobs\":[%s]},\"finish_reason\":\"%s\"%s}]}",
             ids, logprobs, finish, more);
}

static esp_status read_answer(espi_reply *r, const espi_reply_want *want, const char *ids, const char *logprobs, const char *finish,
                              const char *more) {
    char text[4096];
    write_answer(text, sizeof text, ids, logprobs, finish, more);
    return espi_reply_read(r, text, strlen(text), want);
}

Test(server_reply, ends) {
    espi_reply r;
    OK(read_answer(&r, &plain, "7,2", "-0.5,-1e-3", "stop", ""));
    cr_assert(r.lengths[0] == 2 && r.stopped[0] == 1 && r.tokens[1] == 2 && r.logprobs[0] == -0.5f);
    cr_assert_str_eq(r.model, "run-v1");
    cr_assert_null(r.routes);
    espi_reply_free(&r);
    OK(read_answer(&r, &plain, "7,8,9", "-1,0,-1", "length", ""));
    cr_assert(r.lengths[0] == 3 && r.stopped[0] == 0);
    espi_reply_free(&r);
    /* The end token in the last place that there is: an end, whatever it is called. */
    OK(read_answer(&r, &plain, "7,8,2", "-1,-1,-1", "length", ""));
    cr_assert_eq(r.stopped[0], 1);
    espi_reply_free(&r);
    FAILS(ESP_ERR_FORMAT, "goes on behind the end token 2 at its place 1 of 3", read_answer(&r, &plain, "7,2,9", "-1,-1,-1", "length", ""));
    FAILS(ESP_ERR_FORMAT, "finish_reason is stop and its last token is 9", read_answer(&r, &plain, "7,9", "-1,-1", "stop", ""));
    FAILS(ESP_ERR_FORMAT, "finish_reason is length and it has 2 tokens, expected 3", read_answer(&r, &plain, "7,9", "-1,-1", "length", ""));
    FAILS(ESP_ERR_FORMAT, "token_logprobs[1] is -1e+300", read_answer(&r, &plain, "7,2", "-1,-1e300", "stop", ""));
    FAILS(ESP_ERR_FORMAT, "token_ids[0] is -3, expected 0 to 39", read_answer(&r, &plain, "-3,2", "-1,-1", "stop", ""));
    FAILS(ESP_ERR_FORMAT, "token_ids[0] is -1, expected 0 to 39", read_answer(&r, &plain, "7.5,2", "-1,-1", "stop", ""));
}

/* As our own sampler: a row ends before a token that stands for a picture. */
Test(server_reply, tokens_that_the_model_does_not_take) {
    espi_reply r;
    OK(read_answer(&r, &plain, "7,30,2", "-1,-1,-1", "stop", ""));
    cr_assert(r.lengths[0] == 1 && r.stopped[0] == 0);
    espi_reply_free(&r);
    FAILS(ESP_ERR_FORMAT, "begins with token 30, which stands for a picture", read_answer(&r, &plain, "30,2", "-1,-1", "stop", ""));
}

/* ---- routed experts ---- */

static char *base64(const uint8_t *data, size_t n) {
    static const char letters[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    char *out = calloc(1, (n + 2) / 3 * 4 + 1);
    cr_assert_not_null(out);
    for (size_t i = 0, bits = 0, word = 0, at = 0; i < n || bits > 0;) {
        if (bits < 6 && i < n) {
            word = (word << 8 | data[i++]) & 0xFFFF;
            bits += 8;
        } else if (bits < 6) {
            word = word << (6 - bits);
            bits = 6;
        }
        while (bits >= 6) out[at++] = letters[word >> (bits -= 6) & 63];
        if (i == n && bits == 0)
            while (at % 4) out[at++] = '=';
    }
    return out;
}

/* ,"routed_experts":".." of a .npy file of this version and header, with these ids of `width` bytes, little-endian. */
static char *routes_text(int version, const char *descr, const char *order, const char *shape, const int64_t *ids, size_t n, size_t width) {
    uint8_t file[1024] = {0};
    const size_t before = version == 1 ? 10 : 12;
    memcpy(file, "\x93NUMPY", 6);
    file[6] = (uint8_t)version;
    const int length =
        snprintf((char *)file + before, 256, "{'descr': '%s', 'fortran_order': %s, 'shape': %s, }          \n", descr, order, shape);
    file[8] = (uint8_t)length;
    for (size_t i = 0; i < n; i++)
        for (size_t b = 0; b < width; b++) file[before + (size_t)length + i * width + b] = (uint8_t)((uint64_t)ids[i] >> (8 * b));
    char *coded = base64(file, before + (size_t)length + n * width), *out = malloc(strlen(coded) + 64);
    cr_assert_not_null(out);
    sprintf(out, ",\"routed_experts\":\"%s\"", coded);
    free(coded);
    return out;
}

/* 7, 2 behind a prompt of two: three rows of two layers; what stands in the dense one is anything. */
static const int64_t chosen[] = {900, -7, 299, 0, 0, 0, 1, 256, 0, 0, 17, 18};

static espi_reply_want with_routes(void) {
    espi_reply_want w = plain;
    w.route_bytes = 2;
    return w;
}

Test(server_reply, routed_experts_in_every_form_that_numpy_writes) {
    static const struct {
        const char *descr;
        size_t width;
    } types[] = {{"<u2", 2}, {"<i2", 2}, {"<u4", 4}, {"<i4", 4}, {"<i8", 8}};
    const espi_reply_want want = with_routes();
    for (int version = 1; version <= 3; version++)
        for (int t = 0; t < ESPI_COUNT(types); t++) {
            espi_reply r;
            char *more = routes_text(version, types[t].descr, "False", "(3, 2, 2)", chosen, 12, types[t].width);
            OK(read_answer(&r, &want, "7,2", "-1,-1", "stop", more));
            const uint8_t *p = r.routes;
            for (int token = 0; token < 5; token++)
                for (int layer = 0; layer < 2; layer++)
                    for (int k = 0; k < 2; k++, p += 2) {
                        const int id = p[0] | p[1] << 8, at = (token * 2 + layer) * 2 + k;
                        cr_assert_eq(id, token < 3 && layer == 1 ? (int)chosen[at] : 0xFFFF, "token %d layer %d: %d", token, layer, id);
                    }
            espi_reply_free(&r);
            free(more);
        }
}

Test(server_reply, routed_experts_that_are_not) {
    const espi_reply_want want = with_routes();
    espi_reply r;
    static const int64_t beyond[] = {0, 1, 300, 0, 0, 1, 1, 2, 0, 1, 17, 18}, below[] = {0, 1, -1, 0, 0, 1, 1, 2, 0, 1, 17, 18},
                         twice[] = {0, 1, 4, 5, 0, 1, 9, 9, 0, 1, 17, 18};
    const struct {
        const char *words, *descr, *order, *shape;
        const int64_t *ids;
        size_t n, width;
    } wrong[] = {{"shape (2, 2, 2), expected (3, 2, 2)", "<i4", "False", "(2, 2, 2)", chosen, 8, 4},
                 {"shape (3, 1, 2), expected (3, 2, 2)", "<i4", "False", "(3, 1, 2)", chosen, 6, 4},
                 {"bytes of routed_experts, expected 48", "<i4", "False", "(3, 2, 2)", chosen, 11, 4},
                 {"expected integers of three dimensions in C order", "<f4", "False", "(3, 2, 2)", chosen, 12, 4},
                 {"expected integers of three dimensions in C order", ">i4", "False", "(3, 2, 2)", chosen, 12, 4},
                 {"expected integers of three dimensions in C order", "<i4", "True", "(3, 2, 2)", chosen, 12, 4},
                 {"expected integers of three dimensions in C order", "<i4", "False", "(6, 2)", chosen, 12, 4},
                 {"shape (4611686018427387904, 4, 2), expected", "<i8", "False", "(4611686018427387904, 4, 2)", chosen, 12, 8},
                 {"say expert 300 for token 0 in layer 1", "<i4", "False", "(3, 2, 2)", beyond, 12, 4},
                 {"say expert -1 for token 0 in layer 1", "<i4", "False", "(3, 2, 2)", below, 12, 4},
                 {"say expert 9 twice for token 1 in layer 1", "<i4", "False", "(3, 2, 2)", twice, 12, 4}};
    for (int i = 0; i < ESPI_COUNT(wrong); i++) {
        char *more = routes_text(1, wrong[i].descr, wrong[i].order, wrong[i].shape, wrong[i].ids, wrong[i].n, wrong[i].width);
        FAILS(ESP_ERR_FORMAT, wrong[i].words, read_answer(&r, &want, "7,2", "-1,-1", "stop", more));
        cr_assert_null(r.tokens);
        free(more);
    }
    FAILS(ESP_ERR_FORMAT, "5 characters of base64", read_answer(&r, &want, "7,2", "-1,-1", "stop", ",\"routed_experts\":\"AAAAA\""));
    FAILS(ESP_ERR_FORMAT, "character 1 is no base64", read_answer(&r, &want, "7,2", "-1,-1", "stop", ",\"routed_experts\":\"A-AA\""));
    FAILS(ESP_ERR_FORMAT, "that are no .npy file", read_answer(&r, &want, "7,2", "-1,-1", "stop", ",\"routed_experts\":\"\""));
    FAILS(ESP_ERR_UNSUPPORTED, "--enable-return-routed-experts", read_answer(&r, &want, "7,2", "-1,-1", "stop", ""));
    FAILS(ESP_ERR_UNSUPPORTED, "--enable-return-routed-experts",
          read_answer(&r, &want, "7,2", "-1,-1", "stop", ",\"routed_experts\":null"));
}

/* Cut at every byte it is refused; with any byte another one it is refused or read, and never anything else. */
Test(server_reply, damage_at_every_byte) {
    const espi_reply_want want = with_routes();
    char text[4096], *more = routes_text(1, "<i4", "False", "(3, 2, 2)", chosen, 12, 4);
    write_answer(text, sizeof text, "7,2", "-1,-1", "stop", more);
    free(more);
    const size_t n = strlen(text);
    espi_reply r;
    OK(espi_reply_read(&r, text, n, &want));
    espi_reply_free(&r);
    for (size_t i = 0; i < n; i++) {
        FAILS(ESP_ERR_FORMAT, "that is no JSON", espi_reply_read(&r, text, i, &want));
        const char kept = text[i];
        static const char others[] = {0, '"', '9', '-', 'A', ']', (char)0x80};
        for (int k = 0; k < ESPI_COUNT(others); k++) {
            text[i] = others[k];
            const esp_status status = espi_reply_read(&r, text, n, &want);
            cr_assert(status == ESP_OK || status == ESP_ERR_FORMAT || status == ESP_ERR_UNSUPPORTED);
            cr_assert((status == ESP_OK) == (r.tokens != NULL));
            espi_reply_free(&r);
        }
        text[i] = kept;
    }
}
