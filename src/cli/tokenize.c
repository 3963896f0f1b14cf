/* espalier tokenize: text to token ids, and back. */
#include "cli/cli.h"

#include "core/status.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

typedef struct tokenize_options {
    const char *path, *text;
    bool decode, specials_as_text, add_special, count;
} tokenize_options;

/* All of standard input, with a NUL behind. */
static esp_status read_input(char **text, size_t *bytes) {
    size_t room = 1 << 16, n = 0;
    char *buffer = malloc(room);
    while (buffer) {
        n += fread(buffer + n, 1, room - n - 1, stdin);
        if (n + 1 < room) break;
        char *grown = realloc(buffer, room *= 2);
        if (!grown) free(buffer);
        buffer = grown;
    }
    if (!buffer) return ESPI_FAIL(ESP_ERR_MEMORY, "standard input: no memory for %zu bytes", room);
    *text = buffer;
    *bytes = n;
    buffer[n] = 0;
    return ferror(stdin) ? ESPI_FAIL(ESP_ERR_IO, "standard input: %s", strerror(errno)) : ESP_OK;
}

static esp_status encode(const esp_tokenizer *tokenizer, const tokenize_options *o, const char *text, size_t bytes) {
    const size_t capacity = bytes + 16;
    int32_t *ids = espi_cli_memory(capacity * sizeof *ids);
    size_t n = 0;
    esp_status status = esp_tokenizer_encode(tokenizer, text, bytes, o->add_special, o->specials_as_text, ids, capacity, &n);
    if (status == ESP_ERR_SHAPE) {
        free(ids);
        ids = espi_cli_memory(n * sizeof *ids);
        status = esp_tokenizer_encode(tokenizer, text, bytes, o->add_special, o->specials_as_text, ids, n, &n);
    }
    if (status == ESP_OK && o->count) printf("%zu\n", n);
    for (size_t i = 0; status == ESP_OK && !o->count && i < n; i++) printf("%s%d", i ? " " : "", ids[i]);
    if (status == ESP_OK && !o->count) printf("\n");
    free(ids);
    return status;
}

/* Ids apart by white space or commas; text as each id completes it. */
static esp_status decode(const esp_tokenizer *tokenizer, const char *list) {
    esp_decode_state state = {0};
    const size_t room = 1 << 12;
    char *text = espi_cli_memory(room);
    esp_status status = ESP_OK;
    while (*(list += strspn(list, " \t\r\n,")) && status == ESP_OK) {
        char *end;
        const long id = strtol(list, &end, 10);
        size_t n = 0;
        if (end == list || id < 0 || id >= esp_tokenizer_size(tokenizer))
            status = ESPI_FAIL(ESP_ERR_ARG, "ids: got %.20s, expected numbers below %d", list, esp_tokenizer_size(tokenizer));
        else
            status = esp_tokenizer_decode_next(tokenizer, &state, (int32_t)id, false, text, room, &n);
        if (status == ESP_OK) fwrite(text, 1, n, stdout);
        list = end;
    }
    if (status == ESP_OK) printf("%s\n", state.n_pending ? "\xEF\xBF\xBD" : "");
    free(text);
    return status;
}

static esp_status tokenize(const tokenize_options *o) {
    esp_tokenizer *tokenizer = NULL;
    char *input = NULL;
    size_t bytes = o->text ? strlen(o->text) : 0;
    esp_status status = esp_tokenizer_load(&tokenizer, o->path);
    if (status == ESP_OK && !o->text) status = read_input(&input, &bytes);
    const char *text = o->text ? o->text : input;
    if (status == ESP_OK) status = o->decode ? decode(tokenizer, text) : encode(tokenizer, o, text, bytes);
    free(input);
    esp_tokenizer_destroy(tokenizer);
    return status;
}

int espi_cli_tokenize(int argc, char **argv) {
    tokenize_options o = {0};
    const espi_option options[] = {
        {"--text", ESPI_OPTION_TEXT, &o.text, "TEXT", "what to encode, or ids with --decode; else standard input"},
        {"--decode", ESPI_OPTION_FLAG, &o.decode, NULL, "ids to text"},
        {"--specials-as-text", ESPI_OPTION_FLAG, &o.specials_as_text, NULL, "special tokens in the text are plain text"},
        {"--add-special", ESPI_OPTION_FLAG, &o.add_special, NULL, "with the tokens that the tokenizer puts around a text"},
        {"--count", ESPI_OPTION_FLAG, &o.count, NULL, "only how many ids"},
    };
    const espi_usage usage = {"tokenize", "Text to token ids, by a tokenizer.json, a folder that has one, or o200k_base.tiktoken.",
                              "DIR|FILE", &o.path,
                              options,    sizeof options / sizeof options[0]};
    int code;
    if (!espi_cli_parse(&code, &usage, argc, argv)) return code;
    if (o.decode && (o.count || o.specials_as_text || o.add_special))
        return espi_cli_misuse(&usage, "--decode goes with none of --count, --specials-as-text and --add-special");
    const esp_status status = tokenize(&o);
    return status == ESP_OK ? code : espi_cli_failed("tokenize", status);
}
