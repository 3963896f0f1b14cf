/* tokenizer.json -> tables.  Reads what byte-level BPE files use and refuses, by name, what it does not know. */
#include "io/tokenizer.h"

#include "core/status.h"
#include "io/file.h"

#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_FILE = 256 << 20, MAX_ID = 1 << 24 };

/* GPT-2's pattern: what ByteLevel splits by when it is told to use a regex of its own. */
#define GPT2_PATTERN "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"

/* ---- the byte alphabet ---- */

/* The code point that GPT-2's alphabet shows for each byte: printable bytes are themselves, the other 68 follow from U+0100 on. */
static void byte_alphabet(int32_t byte_of[512]) {
    for (int i = 0; i < 512; i++) byte_of[i] = -1;
    int next = 256;
    for (int b = 0; b < 256; b++) {
        const bool printable = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
        byte_of[printable ? b : next++] = b;
    }
}

/* One code point of valid UTF-8. */
static uint32_t code_point(const unsigned char **p) {
    const unsigned char *s = *p;
    const int n = s[0] < 0x80 ? 1 : s[0] < 0xE0 ? 2 : s[0] < 0xF0 ? 3 : 4;
    uint32_t c = n == 1 ? s[0] : s[0] & (0xFFu >> (n + 1));
    for (int i = 1; i < n; i++) c = c << 6 | (s[i] & 0x3Fu);
    *p += n;
    return c;
}

/* A vocabulary key as the bytes it stands for, or, when it has a character outside the alphabet (special tokens do), as it is written. */
static uint32_t key_bytes(unsigned char *out, const char *key, const int32_t byte_of[512]) {
    const unsigned char *p = (const unsigned char *)key;
    uint32_t n = 0;
    while (*p) {
        const uint32_t c = code_point(&p);
        if (c >= 512 || byte_of[c] < 0) {
            n = (uint32_t)strlen(key);
            memcpy(out, key, n);
            return n;
        }
        out[n++] = (unsigned char)byte_of[c];
    }
    return n;
}

/* ---- vocabulary and merges ---- */

typedef struct loader {
    esp_tokenizer *t;
    const char *path;
    int32_t byte_of[512];
} loader;

#define NO_MEMORY(l) ESPI_FAIL(ESP_ERR_MEMORY, "%s: no memory for the tokenizer's tables", (l)->path)

static esp_status read_id(int32_t *id, const loader *l, const json_t *value, const char *what) {
    if (!json_is_integer(value) || json_integer_value(value) < 0 || json_integer_value(value) >= MAX_ID)
        return ESPI_FAIL(ESP_ERR_FORMAT, "%s: id of %s: got %s%lld, expected 0 to %d", l->path, what,
                         json_is_integer(value) ? "" : "no integer, ", (long long)json_integer_value(value), MAX_ID - 1);
    *id = (int32_t)json_integer_value(value);
    return ESP_OK;
}

static esp_status count_ids(loader *l, json_t *vocab, const json_t *added) {
    int32_t largest = -1, id;
    const char *key;
    json_t *value;
    json_object_foreach(vocab, key, value) {
        ESPI_TRY(read_id(&id, l, value, key));
        largest = id > largest ? id : largest;
    }
    for (size_t i = 0; i < json_array_size(added); i++) {
        ESPI_TRY(read_id(&id, l, json_object_get(json_array_get(added, i), "id"), "an added token"));
        largest = id > largest ? id : largest;
    }
    return espi_tokens_create(l->t, largest + 1, json_object_size(vocab), json_array_size(added), l->path);
}

static esp_status load_vocab(loader *l, json_t *vocab) {
    const char *key;
    json_t *value;
    json_object_foreach(vocab, key, value) {
        unsigned char *bytes = malloc(strlen(key) + 1);
        if (!bytes) return NO_MEMORY(l);
        const uint32_t n = key_bytes(bytes, key, l->byte_of);
        const esp_status status = espi_token_add(l->t, (int32_t)json_integer_value(value), bytes, n, l->path);
        free(bytes);
        ESPI_TRY(status);
    }
    return ESP_OK;
}

/* A merge is "a b" in older files, ["a", "b"] in newer ones. */
static esp_status merge_sides(char **copy, const char **left, const char **right, const loader *l, const json_t *merge, size_t rank) {
    *copy = NULL;
    *left = *right = NULL;
    if (json_array_size(merge) == 2) {
        *left = json_string_value(json_array_get(merge, 0));
        *right = json_string_value(json_array_get(merge, 1));
    } else if (json_is_string(merge)) {
        const size_t bytes = json_string_length(merge) + 1;
        *copy = malloc(bytes);
        if (!*copy) return NO_MEMORY(l);
        memcpy(*copy, json_string_value(merge), bytes);
        char *space = strchr(*copy, ' ');
        *left = space ? *copy : NULL;
        *right = space ? space + 1 : NULL;
        if (space) *space = 0;
    }
    if (*left && *right) return ESP_OK;
    free(*copy);
    *copy = NULL;
    return ESPI_FAIL(ESP_ERR_FORMAT, "%s: merge %zu: got neither \"a b\" nor [\"a\", \"b\"], expected one of them", l->path, rank);
}

static esp_status add_merge(const loader *l, const char *left, const char *right, int32_t rank) {
    esp_tokenizer *t = l->t;
    const size_t nl = strlen(left), nr = strlen(right);
    unsigned char *bytes = malloc(nl + nr + 1);
    if (!bytes) return NO_MEMORY(l);
    const uint32_t a = key_bytes(bytes, left, l->byte_of), b = key_bytes(bytes + a, right, l->byte_of);
    const int32_t ids[3] = {espi_vocab_find(t, &t->vocab, bytes, a), espi_vocab_find(t, &t->vocab, bytes + a, b),
                            espi_vocab_find(t, &t->vocab, bytes, (size_t)a + b)};
    free(bytes);
    if (ids[0] < 0 || ids[1] < 0 || ids[2] < 0)
        return ESPI_FAIL(ESP_ERR_FORMAT, "%s: merge %d: %s + %s: got a part or a result that is no token of the vocabulary", l->path, rank,
                         left, right);
    return espi_merge_add(t, ids[0], ids[1], rank, ids[2], l->path);
}

static esp_status load_merges(loader *l, const json_t *merges) {
    for (size_t i = 0; i < json_array_size(merges); i++) {
        char *copy;
        const char *left = NULL, *right = NULL;
        ESPI_TRY(merge_sides(&copy, &left, &right, l, json_array_get(merges, i), i));
        const esp_status status = add_merge(l, left, right, (int32_t)i);
        free(copy);
        ESPI_TRY(status);
    }
    return ESP_OK;
}

static esp_status check_added(const loader *l, const json_t *a, const char *content) {
    const char *const flags[] = {"single_word", "lstrip", "rstrip", "normalized"};
    if (!content || !*content) return ESPI_FAIL(ESP_ERR_FORMAT, "%s: added_tokens: got an entry without content", l->path);
    for (int i = 0; i < ESPI_COUNT(flags); i++)
        if (json_is_true(json_object_get(a, flags[i])))
            return ESPI_FAIL(ESP_ERR_UNSUPPORTED,
                             "%s: added token %s: %s: got true, expected false: this version matches added tokens as they are", l->path,
                             content, flags[i]);
    return ESP_OK;
}

static esp_status load_added(loader *l, const json_t *added) {
    for (size_t i = 0; i < json_array_size(added); i++) {
        const json_t *a = json_array_get(added, i);
        const char *content = json_string_value(json_object_get(a, "content"));
        const int32_t id = (int32_t)json_integer_value(json_object_get(a, "id"));
        ESPI_TRY(check_added(l, a, content));
        ESPI_TRY(espi_added_add(l->t, id, content, json_is_true(json_object_get(a, "special")), l->path));
    }
    espi_added_finish(l->t);
    return ESP_OK;
}

/* ---- the pipeline ---- */

static const char *type_of(const json_t *component) {
    const char *type = json_string_value(json_object_get(component, "type"));
    return type ? type : "(no type)";
}

static esp_status unknown(const loader *l, const char *where, const json_t *component, const char *known) {
    return ESPI_FAIL(ESP_ERR_UNSUPPORTED, "%s: %s: got %s, expected %s", l->path, where, type_of(component), known);
}

static esp_status load_normalizer(loader *l, const json_t *n) {
    if (!n || json_is_null(n)) return ESP_OK;
    if (strcmp(type_of(n), "NFC") != 0) return unknown(l, "normalizer", n, "none or NFC");
    l->t->nfc = true;
    return ESP_OK;
}

static esp_status load_byte_level(loader *l, const json_t *p) {
    if (json_is_true(json_object_get(p, "add_prefix_space")))
        return ESPI_FAIL(ESP_ERR_UNSUPPORTED, "%s: pre_tokenizer ByteLevel: add_prefix_space: got true, expected false", l->path);
    const json_t *regex = json_object_get(p, "use_regex");
    return !regex || json_is_true(regex) ? espi_split_compile(l->t, GPT2_PATTERN, l->path) : ESP_OK;
}

static esp_status load_split(loader *l, const json_t *p) {
    const char *behaviour = json_string_value(json_object_get(p, "behavior"));
    const char *regex = json_string_value(json_object_get(json_object_get(p, "pattern"), "Regex"));
    if (!regex) return ESPI_FAIL(ESP_ERR_UNSUPPORTED, "%s: pre_tokenizer Split: got no Regex pattern, expected one", l->path);
    const bool invert = json_is_true(json_object_get(p, "invert"));
    l->t->drop_gaps = invert && behaviour && strcmp(behaviour, "Removed") == 0; /* what does not match is what is removed */
    if (!l->t->drop_gaps && (invert || !behaviour || strcmp(behaviour, "Isolated") != 0))
        return ESPI_FAIL(ESP_ERR_UNSUPPORTED,
                         "%s: pre_tokenizer Split: got behavior %s%s, expected Isolated, not inverted, or Removed, inverted", l->path,
                         behaviour ? behaviour : "(none)", invert ? ", inverted" : "");
    return espi_split_compile(l->t, regex, l->path);
}

static esp_status load_pre_tokenizer(loader *l, const json_t *p) {
    const char *const known = "ByteLevel, Split, or a Sequence of them";
    if (strcmp(type_of(p), "ByteLevel") == 0) return load_byte_level(l, p);
    if (strcmp(type_of(p), "Sequence") != 0) return unknown(l, "pre_tokenizer", p, known);
    const json_t *list = json_object_get(p, "pretokenizers");
    bool byte_level = false;
    for (size_t i = 0; i < json_array_size(list); i++) {
        const json_t *step = json_array_get(list, i);
        if (strcmp(type_of(step), "Split") == 0)
            ESPI_TRY(load_split(l, step));
        else if (strcmp(type_of(step), "ByteLevel") == 0)
            ESPI_TRY(load_byte_level(l, step));
        else
            return unknown(l, "pre_tokenizer", step, known);
        byte_level = byte_level || strcmp(type_of(step), "ByteLevel") == 0;
    }
    return byte_level ? ESP_OK : ESPI_FAIL(ESP_ERR_UNSUPPORTED, "%s: pre_tokenizer: got no ByteLevel step, expected one", l->path);
}

/* The ids that a special token of a template stands for go before or behind the text. */
static esp_status load_template(loader *l, const json_t *p) {
    esp_tokenizer *t = l->t;
    const json_t *single = json_object_get(p, "single");
    bool passed = false;
    for (size_t i = 0; i < json_array_size(single); i++) {
        const json_t *piece = json_array_get(single, i), *special = json_object_get(piece, "SpecialToken");
        if (!special) {
            passed = true;
            continue;
        }
        const char *name = json_string_value(json_object_get(special, "id"));
        const json_t *ids = json_object_get(json_object_get(json_object_get(p, "special_tokens"), name ? name : ""), "ids");
        for (size_t j = 0; j < json_array_size(ids); j++) {
            int32_t id;
            int *n = passed ? &t->n_behind : &t->n_before;
            ESPI_TRY(read_id(&id, l, json_array_get(ids, j), "a template's token"));
            if (id >= t->size || !t->tokens[id].bytes || *n == ESPI_MAX_TEMPLATE)
                return ESPI_FAIL(ESP_ERR_FORMAT, "%s: post_processor: got id %d, expected a token's, at most %d a side", l->path, id,
                                 ESPI_MAX_TEMPLATE);
            (passed ? t->behind : t->before)[(*n)++] = id;
        }
    }
    return ESP_OK;
}

static esp_status load_post_processor(loader *l, const json_t *p) {
    if (!p || json_is_null(p) || strcmp(type_of(p), "ByteLevel") == 0) return ESP_OK;
    if (strcmp(type_of(p), "TemplateProcessing") == 0) return load_template(l, p);
    if (strcmp(type_of(p), "Sequence") != 0) return unknown(l, "post_processor", p, "ByteLevel, TemplateProcessing, or a Sequence of them");
    const json_t *list = json_object_get(p, "processors");
    for (size_t i = 0; i < json_array_size(list); i++) ESPI_TRY(load_post_processor(l, json_array_get(list, i)));
    return ESP_OK;
}

static esp_status load_model(loader *l, const json_t *root) {
    const json_t *model = json_object_get(root, "model");
    json_t *vocab = json_object_get(model, "vocab");
    if (strcmp(type_of(model), "BPE") != 0) return unknown(l, "model", model, "BPE");
    if (!json_is_object(vocab)) return ESPI_FAIL(ESP_ERR_FORMAT, "%s: model.vocab: got no object, expected one", l->path);
    if (json_is_true(json_object_get(model, "byte_fallback")))
        return ESPI_FAIL(ESP_ERR_UNSUPPORTED, "%s: model.byte_fallback: got true, expected false: this is a byte-level tokenizer", l->path);
    l->t->ignore_merges = json_is_true(json_object_get(model, "ignore_merges"));
    ESPI_TRY(count_ids(l, vocab, json_object_get(root, "added_tokens")));
    ESPI_TRY(load_vocab(l, vocab));
    ESPI_TRY(load_merges(l, json_object_get(model, "merges")));
    ESPI_TRY(load_added(l, json_object_get(root, "added_tokens")));
    const char *unk = json_string_value(json_object_get(model, "unk_token"));
    l->t->unknown = unk ? esp_tokenizer_id(l->t, unk) : -1;
    return ESP_OK;
}

static esp_status load_root(loader *l, const json_t *root) {
    const json_t *decoder = json_object_get(root, "decoder");
    ESPI_TRY(load_model(l, root));
    ESPI_TRY(load_normalizer(l, json_object_get(root, "normalizer")));
    ESPI_TRY(load_pre_tokenizer(l, json_object_get(root, "pre_tokenizer")));
    ESPI_TRY(load_post_processor(l, json_object_get(root, "post_processor")));
    return strcmp(type_of(decoder), "ByteLevel") == 0 ? ESP_OK : unknown(l, "decoder", decoder, "ByteLevel");
}

static esp_status read_json(esp_tokenizer *t, const char *text, size_t bytes, const char *path) {
    json_error_t error;
    json_t *root = json_loadb(text, bytes, JSON_REJECT_DUPLICATES, &error);
    if (!root) return ESPI_FAIL(ESP_ERR_FORMAT, "%s: line %d: %s", path, error.line, error.text);
    loader l = {.t = t, .path = path};
    byte_alphabet(l.byte_of);
    const esp_status status = load_root(&l, root);
    json_decref(root);
    return status;
}

static bool is_rank_file(const char *path) {
    const size_t n = strlen(path), suffix = strlen(".tiktoken");
    return n >= suffix && strcmp(path + n - suffix, ".tiktoken") == 0;
}

esp_status esp_tokenizer_load(esp_tokenizer **tokenizer, const char *path) {
    if (!tokenizer || !path) return ESPI_FAIL(ESP_ERR_ARG, "esp_tokenizer_load: tokenizer or path is NULL");
    *tokenizer = NULL;
    char file[ESPI_PATH_MAX], *text;
    size_t bytes;
    if (espi_dir_exists(path))
        ESPI_TRY(espi_path_join(file, path, "tokenizer.json"));
    else
        snprintf(file, sizeof file, "%s", path);
    ESPI_TRY(espi_file_read_all(&text, &bytes, file, MAX_FILE));
    esp_tokenizer *t = calloc(1, sizeof *t);
    esp_status status = t ? ESP_OK : ESPI_FAIL(ESP_ERR_MEMORY, "%s: no memory for a tokenizer", file);
    if (t) status = is_rank_file(file) ? espi_ranks_read(t, text, bytes, file) : read_json(t, text, bytes, file);
    free(text);
    if (status != ESP_OK) {
        esp_tokenizer_destroy(t);
        return status;
    }
    *tokenizer = t;
    return ESP_OK;
}

void esp_tokenizer_destroy(esp_tokenizer *tokenizer) {
    if (!tokenizer) return;
    for (int32_t i = 0; tokenizer->tokens && i < tokenizer->size; i++) free(tokenizer->tokens[i].bytes);
    free(tokenizer->tokens);
    free(tokenizer->vocab.slots);
    free(tokenizer->merges);
    free(tokenizer->added.slots);
    free(tokenizer->added_lengths);
    pcre2_code_free(tokenizer->split);
    free(tokenizer);
}
