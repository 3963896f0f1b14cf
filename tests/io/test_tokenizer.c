/* The tokenizer: a small synthetic file that has every offered component, the bundled one, refusals by name, streaming, random bytes. */
#include "core/rng.h"
#include "io/tokenizer.h"
#include "scratch.h"

#include <jansson.h>
#include <stdbool.h>

/* Ids 0..255 are the bytes, in order, in the byte alphabet of GPT-2. */
static const char *const merged[] = {"h e", "l l", "he ll", "hell o", "\xC4\xA0 w", "o r", "\xC3\x83 \xC2\xA9"}; /* Ġ w; the bytes of é */
enum { MERGED = 7, FIRST_MERGED = 256, BOS = FIRST_MERGED + MERGED, START, STARTLE, THINK, SIZE };

static int code_point_of(int byte) {
    if ((byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174) return byte;
    int below = 0;
    for (int b = 0; b < byte; b++) below += !((b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174);
    return 256 + below;
}

static json_t *added(const char *content, int id, bool special) {
    return json_pack("{s:i, s:s, s:b, s:b, s:b, s:b, s:b}", "id", id, "content", content, "special", special, "normalized", 0, "lstrip", 0,
                     "rstrip", 0, "single_word", 0);
}

static json_t *parsed(const char *text) {
    json_error_t error;
    json_t *v = json_loads(text, JSON_DECODE_ANY, &error);
    cr_assert_not_null(v, "%s: %s", text, error.text);
    return v;
}

#define BYTE_LEVEL "\"type\": \"ByteLevel\", \"add_prefix_space\": false, \"use_regex\": "
#define SPLIT                                                                                                                              \
    "{\"type\": \"Split\", \"behavior\": \"Isolated\", \"invert\": false, \"pattern\": {\"Regex\": "                                       \
    "\"[^\\\\r\\\\n\\\\p{L}\\\\p{N}]?\\\\p{L}+|\\\\p{N}| ?[^\\\\s\\\\p{L}\\\\p{N}]+|\\\\s+(?!\\\\S)|\\\\s+\"}}"

/* pairs: merges as arrays, as newer files have them. */
static json_t *whole(bool pairs) {
    json_t *vocab = json_object(), *merges = json_array();
    for (int b = 0; b < 256; b++) {
        const int c = code_point_of(b);
        const char key[3] = {c < 128 ? (char)c : (char)(0xC0 | c >> 6), c < 128 ? 0 : (char)(0x80 | (c & 63)), 0};
        json_object_set_new(vocab, key, json_integer(b));
    }
    for (int i = 0; i < MERGED; i++) {
        char left[32], right[32], both[64];
        sscanf(merged[i], "%31s %31s", left, right);
        snprintf(both, sizeof both, "%s%s", left, right);
        json_object_set_new(vocab, both, json_integer(FIRST_MERGED + i));
        json_array_append_new(merges, pairs ? json_pack("[s, s]", left, right) : json_string(merged[i]));
    }
    return json_pack("{s:[o,o,o,o], s:o, s:o, s:o, s:o, s:{s:s, s:o, s:o, s:b}}", "added_tokens", added("<bos>", BOS, true),
                     added("<|start|>", START, true), added("<|start|>le", STARTLE, false), added("<think>", THINK, false), "normalizer",
                     parsed("{\"type\": \"NFC\"}"), "pre_tokenizer",
                     parsed("{\"type\": \"Sequence\", \"pretokenizers\": [" SPLIT ", {" BYTE_LEVEL "false}]}"), "post_processor",
                     parsed("{\"type\": \"Sequence\", \"processors\": [{" BYTE_LEVEL "false}, {\"type\": \"TemplateProcessing\", "
                            "\"single\": [{\"SpecialToken\": {\"id\": \"<bos>\", \"type_id\": 0}}, {\"Sequence\": {\"id\": \"A\"}}], "
                            "\"special_tokens\": {\"<bos>\": {\"id\": \"<bos>\", \"ids\": [263], \"tokens\": [\"<bos>\"]}}}]}"),
                     "decoder", parsed("{" BYTE_LEVEL "false}"), "model", "type", "BPE", "vocab", vocab, "merges", merges, "ignore_merges",
                     0);
}

/* Takes `root`. */
static esp_status load(esp_tokenizer **t, json_t *root) {
    char dir[ESPI_PATH_MAX], path[ESPI_PATH_MAX], *text = json_dumps(root, 0);
    cr_assert_not_null(text);
    scratch_make(dir);
    scratch_write(path, dir, "tokenizer.json", text, strlen(text));
    const esp_status status = esp_tokenizer_load(t, dir);
    cr_expect(status == ESP_OK || strstr(esp_last_error(), path), "no file: %s", esp_last_error());
    scratch_remove(dir);
    json_decref(root);
    free(text);
    return status;
}

static esp_tokenizer *synthetic(void) {
    esp_tokenizer *t = NULL;
    OK(load(&t, whole(false)));
    return t;
}

/* Ends at -1. */
static void expect_ids(const esp_tokenizer *t, const char *text, bool add_special, bool as_text, const int32_t *want) {
    int32_t ids[256];
    size_t n = 0, expected = 0;
    while (want[expected] >= 0) expected++;
    OK(esp_tokenizer_encode(t, text, strlen(text), add_special, as_text, ids, 256, &n));
    cr_expect_eq(n, expected, "%s: got %zu ids, expected %zu", text, n, expected);
    for (size_t i = 0; i < n && i < expected; i++)
        cr_expect_eq(ids[i], want[i], "%s: id %zu: got %d, expected %d", text, i, ids[i], want[i]);
}
#define IDS(...) ((const int32_t[]){__VA_ARGS__, -1})

/* ---- encoding ---- */

Test(tokenizer, merges_by_rank) {
    esp_tokenizer *a = synthetic(), *b = NULL;
    OK(load(&b, whole(true)));
    const esp_tokenizer *both[] = {a, b};
    for (int i = 0; i < 2; i++) {
        expect_ids(both[i], "hello", false, false, IDS(259));
        expect_ids(both[i], "hello world", false, false, IDS(259, 260, 261, 'l', 'd'));
        expect_ids(both[i], "lll", false, false, IDS(257, 'l')); /* leftmost of two equal pairs */
        expect_ids(both[i], "hell", false, false, IDS(258));
        expect_ids(both[i], "", false, false, IDS(-1));
        expect_ids(both[i], "", true, false, IDS(BOS));
        expect_ids(both[i], "hello", true, false, IDS(BOS, 259));
    }
    cr_expect_eq(esp_tokenizer_size(a), SIZE);
    cr_expect_eq(esp_tokenizer_id(a, "<think>"), THINK);
    cr_expect_eq(esp_tokenizer_id(a, "no such token"), -1);
    esp_tokenizer_destroy(a), esp_tokenizer_destroy(b);
}

/* The longest of two that begin alike; both sides are texts of their own. */
Test(tokenizer, added_tokens) {
    esp_tokenizer *t = synthetic();
    expect_ids(t, "he<|start|>llo", false, false, IDS(256, START, 257, 'o'));
    expect_ids(t, "<|start|>le", false, false, IDS(STARTLE));
    expect_ids(t, "<|start|><think>", false, false, IDS(START, THINK));
    expect_ids(t, "<bos>", false, true, IDS('<', 'b', 'o', 's', '>'));
    esp_tokenizer_destroy(t);
}

/* e and a combining acute are one letter after NFC, whose two bytes a merge joins. */
Test(tokenizer, composes_and_mends) {
    esp_tokenizer *t = synthetic();
    expect_ids(t, "e\xCC\x81", false, false, IDS(262));
    expect_ids(t, "\xC3\xA9", false, false, IDS(262));
    expect_ids(t, "a\xFF", false, false, IDS('a', 0xEF, 0xBF, 0xBD));                                       /* not UTF-8: U+FFFD */
    expect_ids(t, "\xE2\x82", false, false, IDS(0xEF, 0xBF, 0xBD));                                         /* cut short: one */
    expect_ids(t, "\xED\xA0\x80", false, false, IDS(0xEF, 0xBF, 0xBD, 0xEF, 0xBF, 0xBD, 0xEF, 0xBF, 0xBD)); /* a surrogate: three */
    esp_tokenizer_destroy(t);
}

/* U+00A0 and U+0085 are space to the pattern, U+180E is not. */
Test(tokenizer, what_is_space) {
    json_t *root = whole(false);
    json_t *merges = json_object_get(json_object_get(root, "model"), "merges"),
           *vocab = json_object_get(json_object_get(root, "model"), "vocab");
    json_array_append_new(merges, json_string("! \xC3\x82"));
    json_object_set_new(vocab, "!\xC3\x82", json_integer(300)); /* '!' with the first byte of U+00A0: only within one piece */
    json_array_append_new(merges, json_string("! \xC3\xA1"));
    json_object_set_new(vocab, "!\xC3\xA1", json_integer(301)); /* '!' with the first byte of U+180E */
    esp_tokenizer *t = NULL;
    OK(load(&t, root));
    expect_ids(t, "!\xC2\xA0", false, false, IDS('!', 0xC2, 0xA0));
    expect_ids(t, "!\xC2\x85", false, false, IDS('!', 0xC2, 0x85));
    expect_ids(t, "!\xE1\xA0\x8E", false, false, IDS(301, 0xA0, 0x8E));
    esp_tokenizer_destroy(t);
}

Test(tokenizer, patterns_and_whole_pieces) {
    esp_tokenizer *t = NULL;
    json_t *root = whole(false);
    json_object_set_new(root, "pre_tokenizer", parsed("{" BYTE_LEVEL "true}")); /* GPT-2's own pattern */
    OK(load(&t, root));
    expect_ids(t, "hello world", false, false, IDS(259, 260, 261, 'l', 'd'));
    expect_ids(t, "  world", false, false, IDS(' ', 260, 261, 'l', 'd')); /* the last space goes with the word */
    esp_tokenizer_destroy(t);

    root = whole(false);
    json_array_clear(json_object_get(json_object_get(root, "model"), "merges"));
    OK(load(&t, root));
    expect_ids(t, "hello", false, false, IDS('h', 'e', 'l', 'l', 'o'));
    esp_tokenizer_destroy(t);

    root = whole(false);
    json_array_clear(json_object_get(json_object_get(root, "model"), "merges"));
    json_object_set_new(json_object_get(root, "model"), "ignore_merges", json_true());
    OK(load(&t, root));
    expect_ids(t, "hello", false, false, IDS(259));
    esp_tokenizer_destroy(t);
}

Test(tokenizer, room_for_ids_and_text) {
    esp_tokenizer *t = synthetic();
    int32_t ids[2] = {-7, -7};
    size_t n = 0;
    cr_expect_eq(esp_tokenizer_encode(t, "abc", 3, false, false, ids, 1, &n), ESP_ERR_SHAPE);
    cr_expect(n == 3 && ids[0] == 'a' && ids[1] == -7);
    char text[4] = {1, 1, 1, 1};
    OK(esp_tokenizer_decode(t, IDS('a', 'b', 'c'), 3, false, text, 4, &n));
    cr_expect(n == 3 && strcmp(text, "abc") == 0);
    cr_expect_eq(esp_tokenizer_decode(t, IDS('a', 'b', 'c', 'd'), 4, false, text, 4, &n), ESP_ERR_SHAPE);
    cr_expect_eq(n, 4);
    cr_expect_eq(esp_tokenizer_decode(t, IDS(SIZE), 1, false, text, 4, &n), ESP_ERR_ARG);
    const int32_t negative = -1;
    cr_expect_eq(esp_tokenizer_decode(t, &negative, 1, false, text, 4, &n), ESP_ERR_ARG);
    esp_tokenizer_destroy(t);
}

/* ---- decoding ---- */

Test(tokenizer, special_tokens_are_kept_or_skipped) {
    esp_tokenizer *t = synthetic();
    char text[64];
    size_t n;
    OK(esp_tokenizer_decode(t, IDS(BOS, 259, THINK), 3, false, text, sizeof text, &n));
    cr_expect_str_eq(text, "<bos>hello<think>");
    OK(esp_tokenizer_decode(t, IDS(BOS, 259, THINK), 3, true, text, sizeof text, &n));
    cr_expect_str_eq(text, "hello<think>"); /* added, but not special */
    OK(esp_tokenizer_decode(t, IDS(0xE2, 0x82), 2, false, text, sizeof text, &n));
    cr_expect_str_eq(text, "\xEF\xBF\xBD");
    esp_tokenizer_destroy(t);
}

/* The three bytes of the euro sign come out together; a beginning that nothing completes becomes U+FFFD. */
Test(tokenizer, streaming) {
    esp_tokenizer *t = synthetic();
    const struct {
        int32_t id;
        const char *text;
    } steps[] = {{'a', "a"},
                 {0xE2, ""},
                 {0x82, ""},
                 {0xAC, "\xE2\x82\xAC"},
                 {0xE2, ""},
                 {'b', "\xEF\xBF\xBD"
                       "b"},
                 {BOS, ""},
                 {0xF0, ""},
                 {0x9F, ""},
                 {0x99, ""},
                 {0x82, "\xF0\x9F\x99\x82"}};
    esp_decode_state state = {0};
    for (size_t i = 0; i < sizeof steps / sizeof *steps; i++) {
        char text[16];
        size_t n = 99;
        OK(esp_tokenizer_decode_next(t, &state, steps[i].id, true, text, sizeof text, &n));
        cr_expect(strcmp(text, steps[i].text) == 0 && n == strlen(text), "step %zu: %s", i, text);
    }
    esp_tokenizer_destroy(t);
}

/* Valid text without marks that NFC composes comes back whatever it is. */
Test(tokenizer, random_text_comes_back) {
    esp_tokenizer *t = synthetic();
    for (uint32_t round = 0; round < 400; round++) {
        char text[512], back[1024];
        size_t n = 0, decoded;
        for (uint32_t i = 0; i < 100; i++) {
            uint32_t r[4];
            espi_philox(r, 11, ESPI_STREAM_CONTROL, round, i, 0, 0);
            const uint32_t c = r[0] % 4 == 0 ? 0x4E00 + r[1] % 0x5000 : r[0] % 4 == 1 ? 0x1F300 + r[1] % 0x200 : r[1] % 0x7F + 1;
            if (c < 0x80) {
                text[n++] = (char)c;
            } else {
                const int more = c < 0x10000 ? 2 : 3;
                text[n++] = (char)((more == 2 ? 0xE0 : 0xF0) | c >> (6 * more));
                for (int k = more - 1; k >= 0; k--) text[n++] = (char)(0x80 | (c >> (6 * k) & 63));
            }
        }
        int32_t ids[512];
        size_t n_ids;
        OK(esp_tokenizer_encode(t, text, n, false, round % 2, ids, 512, &n_ids));
        OK(esp_tokenizer_decode(t, ids, n_ids, false, back, sizeof back, &decoded));
        cr_assert(decoded == n && memcmp(text, back, n) == 0, "round %u", round);
    }
    esp_tokenizer_destroy(t);
}

/* Whatever the bytes are, the text that comes back encodes to the same ids again. */
Test(tokenizer, random_bytes_settle) {
    esp_tokenizer *t = synthetic();
    for (uint32_t round = 0; round < 1000; round++) {
        char text[64], back[1024];
        for (uint32_t i = 0; i < 64; i++) {
            uint32_t r[4];
            espi_philox(r, 12, ESPI_STREAM_CONTROL, round, i, 0, 0);
            text[i] = (char)r[0];
        }
        int32_t first[256], second[256];
        size_t n, m, bytes;
        OK(esp_tokenizer_encode(t, text, round % 65, false, true, first, 256, &n));
        OK(esp_tokenizer_decode(t, first, n, false, back, sizeof back, &bytes));
        OK(esp_tokenizer_encode(t, back, bytes, false, true, second, 256, &m));
        cr_assert(n == m && memcmp(first, second, n * sizeof *first) == 0, "round %u", round);
    }
    esp_tokenizer_destroy(t);
}

/* Merging as it is defined: the pair with the lowest rank, the leftmost of equals, until there is none. */
static size_t merged_plainly(int32_t *ids, const char *text, size_t n) {
    static const int32_t pairs[MERGED][2] = {{'h', 'e'}, {'l', 'l'}, {256, 257}, {258, 'o'}, {' ', 'w'}, {'o', 'r'}, {0xC3, 0xA9}};
    for (size_t i = 0; i < n; i++) ids[i] = (unsigned char)text[i];
    for (;;) {
        int best = MERGED;
        size_t at = 0;
        for (size_t i = 0; i + 1 < n; i++)
            for (int m = 0; m < best; m++)
                if (ids[i] == pairs[m][0] && ids[i + 1] == pairs[m][1]) best = m, at = i;
        if (best == MERGED) return n;
        ids[at] = FIRST_MERGED + best;
        memmove(ids + at + 1, ids + at + 2, (n - at - 2) * sizeof *ids);
        n--;
    }
}

/* One piece of any length, short ones and those that take the heap; with the cache (many repeats in one text) and without. */
Test(tokenizer, pieces_of_any_length) {
    static char text[1 << 16];
    static int32_t ids[1 << 16], want[1 << 16];
    esp_tokenizer *t = synthetic();
    size_t bytes = 0, n_want = 0, n;
    for (uint32_t round = 0; round < 1200; round++) {
        char word[160];
        uint32_t r[4];
        espi_philox(r, 13, ESPI_STREAM_CONTROL, round, 0, 0, 0);
        const size_t length = 1 + (round % 3 ? r[0] % 7 : r[0] % 100);
        for (size_t i = 0; i < length; i++) {
            espi_philox(r, 13, ESPI_STREAM_CONTROL, round, 1 + (uint32_t)i, 0, 0);
            word[i] = "helowr"[r[0] % 6];
        }
        OK(esp_tokenizer_encode(t, word, length, false, false, ids, 160, &n));
        const size_t expected = merged_plainly(want + n_want, word, length);
        cr_assert(n == expected && memcmp(ids, want + n_want, n * sizeof *ids) == 0, "word %u of %zu letters", round, length);
        if (bytes + length + 1 >= sizeof text) break;
        memcpy(text + bytes, word, length);
        text[bytes + length] = '\n'; /* a piece of its own */
        bytes += length + 1;
        n_want += n;
        want[n_want++] = '\n';
    }
    OK(esp_tokenizer_encode(t, text, bytes, false, false, ids, sizeof ids / sizeof *ids, &n));
    cr_assert(n == n_want && memcmp(ids, want, n * sizeof *ids) == 0, "the whole text: %zu ids, expected %zu", n, n_want);
    esp_tokenizer_destroy(t);
}

static esp_tokenizer *with_pattern(const char *pattern, const char *behaviour, bool invert) {
    esp_tokenizer *t = NULL;
    json_t *root = whole(false);
    json_object_set_new(root, "pre_tokenizer",
                        json_pack("{s:s, s:[{s:s, s:s, s:b, s:{s:s}}, o]}", "type", "Sequence", "pretokenizers", "type", "Split",
                                  "behavior", behaviour, "invert", invert, "pattern", "Regex", pattern, parsed("{" BYTE_LEVEL "false}")));
    OK(load(&t, root));
    return t;
}

/* A pattern that runs away is stopped, one that goes deep is not. */
Test(tokenizer, limits_of_a_match, .timeout = 30) {
    enum { LONG = 1 << 20 };
    char *text = malloc(LONG);
    int32_t *ids = malloc(LONG * sizeof *ids);
    size_t n;
    memset(text, 'x', LONG);
    esp_tokenizer *t = with_pattern("(?:(?:x+)+)+(?=y)|z", "Isolated", false);
    cr_expect_eq(esp_tokenizer_encode(t, text, 60, false, false, ids, LONG, &n), ESP_ERR_ARG);
    cr_expect(strstr(esp_last_error(), "gave up at byte 0 of 60: match limit exceeded"), "%s", esp_last_error());
    esp_tokenizer_destroy(t);
    t = with_pattern("(?:x|y)+", "Isolated", false);
    OK(esp_tokenizer_encode(t, text, LONG / 8, false, false, ids, LONG, &n));
    cr_expect_eq(n, LONG / 8);
    esp_tokenizer_destroy(t);
    free(text);
    free(ids);
}

Test(tokenizer, gaps_are_kept_or_removed) {
    esp_tokenizer *t = with_pattern("[a-z]+", "Isolated", false);
    expect_ids(t, "he, llo", false, false, IDS(256, ',', ' ', 257, 'o'));
    esp_tokenizer_destroy(t);
    t = with_pattern("[a-z]+", "Removed", true);
    expect_ids(t, "he, llo", false, false, IDS(256, 257, 'o'));
    esp_tokenizer_destroy(t);
}

/* ---- files ---- */

Test(tokenizer, bundled) {
    esp_tokenizer *t = NULL;
    OK(esp_tokenizer_load(&t, ESP_SOURCE_DIR "/examples/models/mix-moe"));
    expect_ids(t, "sdbca=", true, false, IDS(1, 42, 27, 25, 26, 24, 5));
    expect_ids(t, "<eos>", false, false, IDS(2));
    expect_ids(t, "A", false, false, IDS(3)); /* not in its vocabulary: <unk> */
    cr_expect_eq(esp_tokenizer_size(t), 50);
    esp_tokenizer_destroy(t);
}

static const struct {
    const char *key, *json; /* of the file */
    esp_status status;
    const char *names;
} wrongs[] = {
    {"normalizer", "{\"type\": \"NFKC\"}", ESP_ERR_UNSUPPORTED, "NFKC"},
    {"pre_tokenizer", "{\"type\": \"Metaspace\"}", ESP_ERR_UNSUPPORTED, "Metaspace"},
    {"pre_tokenizer", "{\"type\": \"Sequence\", \"pretokenizers\": [{\"type\": \"Digits\"}]}", ESP_ERR_UNSUPPORTED, "Digits"},
    {"pre_tokenizer", "{\"type\": \"ByteLevel\", \"add_prefix_space\": true}", ESP_ERR_UNSUPPORTED, "add_prefix_space"},
    {"post_processor", "{\"type\": \"BertProcessing\"}", ESP_ERR_UNSUPPORTED, "BertProcessing"},
    {"decoder", "{\"type\": \"WordPiece\"}", ESP_ERR_UNSUPPORTED, "WordPiece"},
    {"model", "{\"type\": \"Unigram\"}", ESP_ERR_UNSUPPORTED, "Unigram"},
    {"model", "{\"type\": \"BPE\", \"merges\": []}", ESP_ERR_FORMAT, "vocab"},
    {"model", "{\"type\": \"BPE\", \"vocab\": {\"a\": -1}, \"merges\": []}", ESP_ERR_FORMAT, "-1"},
    {"model", "{\"type\": \"BPE\", \"vocab\": {\"a\": 1, \"b\": 1}, \"merges\": []}", ESP_ERR_FORMAT, "id 1"},
    {"model", "{\"type\": \"BPE\", \"vocab\": {\"a\": 1}, \"merges\": [\"a b\"]}", ESP_ERR_FORMAT, "merge 0"},
    {"model", "{\"type\": \"BPE\", \"vocab\": {\"a\": 1}, \"merges\": [7]}", ESP_ERR_FORMAT, "merge 0"},
    {"added_tokens", "[{\"id\": 1, \"content\": \"<x>\", \"normalized\": true}]", ESP_ERR_UNSUPPORTED, "normalized"},
    {"added_tokens", "[{\"id\": 1, \"content\": \"\"}]", ESP_ERR_FORMAT, "content"},
};

Test(tokenizer, wrong_files) {
    for (size_t i = 0; i < sizeof wrongs / sizeof *wrongs; i++) {
        esp_tokenizer *t = NULL;
        json_t *root = whole(false);
        json_object_set_new(root, wrongs[i].key, parsed(wrongs[i].json));
        const esp_status status = load(&t, root);
        cr_expect_eq(status, wrongs[i].status, "%zu: got %s: %s", i, esp_status_name(status), esp_last_error());
        cr_expect(strstr(esp_last_error(), wrongs[i].names), "%zu: %s", i, esp_last_error());
        cr_expect_null(t);
        esp_tokenizer_destroy(t);
    }
    esp_tokenizer *t = NULL;
    cr_expect_eq(esp_tokenizer_load(&t, "/nowhere/tokenizer.json"), ESP_ERR_IO);
}

/* ---- rank files ---- */

#define O200K ESP_SOURCE_DIR "/tests/golden/data/tokenizer/o200k_base.tiktoken"

Test(ranks, wrong_files) {
    static const struct {
        const char *name, *line; /* put behind the good ones */
        esp_status status;
        const char *names;
    } cases[] = {{"cl100k_base.tiktoken", "", ESP_ERR_UNSUPPORTED, "o200k_base.tiktoken"},
                 {"o200k_a.tiktoken", "IQ== \n", ESP_ERR_FORMAT, "expected a token in base64"},
                 {"o200k_a.tiktoken", "IQ==\n", ESP_ERR_FORMAT, "expected a token in base64"},
                 {"o200k_a.tiktoken", "I?== 5\n", ESP_ERR_FORMAT, "expected a token in base64"},
                 {"o200k_a.tiktoken", "IQ= 5\n", ESP_ERR_FORMAT, "expected a token in base64"},
                 {"o200k_a.tiktoken", "IWE= 199998\n", ESP_ERR_FORMAT, "below 199998"},
                 {"o200k_a.tiktoken", "IWE= 5x\n", ESP_ERR_FORMAT, "below 199998"},
                 {"o200k_a.tiktoken", "IQ== 150000\n", ESP_ERR_FORMAT, "a second time"},
                 {"o200k_a.tiktoken", "enp6enp6enp6 0\n", ESP_ERR_FORMAT, "two tokens have id 0"}};
    char *good;
    size_t bytes;
    OK(espi_file_read_all(&good, &bytes, O200K, 1 << 20));
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char dir[ESPI_PATH_MAX], path[ESPI_PATH_MAX], *text = malloc(bytes + 64);
        esp_tokenizer *t = NULL;
        snprintf(text, bytes + 64, "%s%s", good, cases[i].line);
        scratch_make(dir);
        scratch_write(path, dir, cases[i].name, text, strlen(text));
        cr_expect_eq(esp_tokenizer_load(&t, path), cases[i].status, "%zu: %s", i, esp_last_error());
        cr_expect(strstr(esp_last_error(), cases[i].names), "%zu: %s", i, esp_last_error());
        scratch_write(path, dir, "o200k_b.tiktoken", "IQ== 0\n", 7);
        cr_expect_eq(esp_tokenizer_load(&t, path), ESP_ERR_FORMAT);
        cr_expect(strstr(esp_last_error(), "byte 0x00: got no token"), "%s", esp_last_error());
        scratch_remove(dir);
        free(text);
    }
    free(good);
}

#define UPPER "[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]"
#define LOWER "[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]"
#define ENDINGS "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
#define O200K_PATTERN                                                                                                                      \
    "[^\\r\\n\\p{L}\\p{N}]?" UPPER "*" LOWER "+" ENDINGS "|[^\\r\\n\\p{L}\\p{N}]?" UPPER "+" LOWER "*" ENDINGS                             \
    "|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"

/* The bytes of a token in the alphabet of a tokenizer.json. */
static void shown(char *out, const unsigned char *bytes, size_t n) {
    for (size_t i = 0; i < n; i++) {
        const int c = code_point_of(bytes[i]);
        if (c >= 128) *out++ = (char)(0xC0 | c >> 6);
        *out++ = c < 128 ? (char)c : (char)(0x80 | (c & 63));
    }
    *out = 0;
}

/* The same vocabulary as a converted tokenizer.json has it (ignore_merges, every way to cut a token a merge) gives the golden ids too. */
Test(ranks, converted_file, .timeout = 60) {
    esp_tokenizer *ranks, *converted = NULL;
    OK(esp_tokenizer_load(&ranks, O200K));
    json_t *vocab = json_object(), *merges = json_array(), *specials = json_array(), *root = whole(false);
    for (int32_t id = 0; id < esp_tokenizer_size(ranks); id++) {
        const espi_token *token = &ranks->tokens[id];
        char text[300], left[300], right[300];
        if (!token->bytes || token->n > 140) continue;
        if (token->added) {
            json_array_append_new(specials, added((const char *)token->bytes, id, true));
            continue;
        }
        shown(text, token->bytes, token->n);
        json_object_set_new(vocab, text, json_integer(id));
        for (uint32_t cut = 1; cut < token->n; cut++) {
            if (espi_vocab_find(ranks, &ranks->vocab, token->bytes, cut) < 0 ||
                espi_vocab_find(ranks, &ranks->vocab, token->bytes + cut, token->n - cut) < 0)
                continue;
            shown(left, token->bytes, cut);
            shown(right, token->bytes + cut, token->n - cut);
            json_array_append_new(merges, json_pack("[s, s]", left, right));
        }
    }
    json_object_set_new(root, "pre_tokenizer",
                        json_pack("{s:s, s:[{s:s, s:s, s:b, s:{s:s}}, o]}", "type", "Sequence", "pretokenizers", "type", "Split",
                                  "behavior", "Isolated", "invert", 0, "pattern", "Regex", O200K_PATTERN, parsed("{" BYTE_LEVEL "false}")));
    json_object_set_new(root, "normalizer", json_null());
    json_object_set_new(root, "post_processor", parsed("{" BYTE_LEVEL "false}"));
    json_object_set_new(root, "added_tokens", specials);
    json_object_set_new(root, "model",
                        json_pack("{s:s, s:o, s:o, s:b}", "type", "BPE", "vocab", vocab, "merges", merges, "ignore_merges", 1));
    OK(load(&converted, root));
    char *lines;
    OK(espi_file_read_all(&lines, NULL, ESP_SOURCE_DIR "/tests/golden/data/tokenizer/o200k.jsonl", 1 << 20));
    int n_lines = 0;
    for (const char *at = lines; *at; n_lines++) {
        const size_t length = strcspn(at, "\n");
        json_t *line = json_loadb(at, length, JSON_ALLOW_NUL, NULL);
        const json_t *text = json_object_get(line, "text"), *want = json_object_get(line, "ids");
        int32_t ids[4096];
        size_t n;
        OK(esp_tokenizer_encode(converted, json_string_value(text), json_string_length(text), true, false, ids, 4096, &n));
        cr_assert_eq(n, json_array_size(want), "line %d", n_lines);
        for (size_t i = 0; i < n; i++) cr_assert_eq(ids[i], json_integer_value(json_array_get(want, i)), "line %d", n_lines);
        json_decref(line);
        at += length + (at[length] == '\n');
    }
    cr_assert_eq(n_lines, 404);
    free(lines);
    esp_tokenizer_destroy(ranks);
    esp_tokenizer_destroy(converted);
}
