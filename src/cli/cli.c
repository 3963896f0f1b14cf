/* Options of the subcommands: parsing, help, suggestions for what was mistyped. */
#include "cli/cli.h"

#include <errno.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

const char espi_cli_experts[] = "auto|nf4|fp4|mxfp4|none";

esp_qformat espi_cli_format(int choice) {
    static const esp_qformat formats[] = {ESP_Q_DEFAULT, ESP_NF4, ESP_FP4, ESP_MXFP4, ESP_Q_NONE};
    return formats[choice];
}

const char *espi_cli_device(const char *name) {
    if (!name) return "cpu";
    return strcmp(name, "auto") == 0 ? "any" : name;
}

void *espi_cli_memory(size_t bytes) {
    void *p = calloc(1, bytes ? bytes : 1);
    if (!p) {
        fprintf(stderr, "espalier: out of memory (%zu bytes)\n", bytes);
        exit(ESPI_EXIT_FAILED);
    }
    return p;
}

char *espi_cli_path(const char *dir, const char *name) {
    size_t bytes = strlen(dir) + strlen(name) + 2;
    char *path = espi_cli_memory(bytes);
    snprintf(path, bytes, "%s/%s", dir, name);
    return path;
}

static int smallest(int a, int b, int c) {
    int m = a < b ? a : b;
    return m < c ? m : c;
}

/* Levenshtein distance; words longer than the table are simply far away. */
static int edit_distance(const char *a, const char *b) {
    enum { LONGEST = 63 };
    size_t n = strlen(a), m = strlen(b);
    if (n > LONGEST || m > LONGEST) return LONGEST;
    int row[LONGEST + 1];
    for (size_t j = 0; j <= m; j++) row[j] = (int)j;
    for (size_t i = 1; i <= n; i++) {
        int diagonal = row[0];
        row[0] = (int)i;
        for (size_t j = 1; j <= m; j++) {
            int above = row[j];
            row[j] = smallest(above + 1, row[j - 1] + 1, diagonal + (a[i - 1] != b[j - 1]));
            diagonal = above;
        }
    }
    return row[m];
}

int espi_cli_unknown(const char *what, const char *got, const char *const *known, int n_known) {
    int best = 0;
    for (int i = 1; i < n_known; i++)
        if (edit_distance(got, known[i]) < edit_distance(got, known[best])) best = i;
    fprintf(stderr, "espalier: unknown %s '%s'", what, got);
    if (n_known > 0) fprintf(stderr, "; did you mean '%s'?", known[best]);
    fprintf(stderr, "\n");
    return ESPI_EXIT_USAGE;
}

int espi_cli_misuse(const espi_usage *usage, const char *format, ...) {
    va_list args;
    va_start(args, format);
    fprintf(stderr, "espalier %s: ", usage->command);
    vfprintf(stderr, format, args);
    fprintf(stderr, "; see `espalier %s --help`\n", usage->command);
    va_end(args);
    return ESPI_EXIT_USAGE;
}

int espi_cli_failed(const char *command, esp_status status) {
    fprintf(stderr, "espalier %s: %s: %s\n", command, esp_status_name(status), esp_last_error());
    return ESPI_EXIT_FAILED;
}

static void print_help(const espi_usage *usage) {
    printf("usage: espalier %s %s%s\n\n%s\n", usage->command, usage->operand, usage->n_options ? " [options]" : "", usage->summary);
    if (usage->n_options) printf("\noptions:\n");
    for (int i = 0; i < usage->n_options; i++) {
        const espi_option *o = &usage->options[i];
        char left[80];
        snprintf(left, sizeof left, "%s %s", o->name, o->value ? o->value : "");
        printf("  %-32s %s\n", left, o->help);
    }
    printf("  %-32s %s\n", "--help", "this text");
}

static bool read_count(const char *text, int64_t *out) {
    char *end;
    errno = 0;
    long long value = strtoll(text, &end, 10);
    *out = value;
    return end != text && *end == '\0' && errno == 0 && value >= 0;
}

static bool read_bytes(const char *text, size_t *out) {
    char *end;
    errno = 0;
    unsigned long long value = strtoull(text, &end, 10);
    if (end == text || errno != 0 || *text == '-') return false;
    static const char units[] = "KMG";
    int shift = 0;
    const char *unit = *end ? strchr(units, *end) : NULL;
    if (unit) {
        shift = 10 * (int)(unit - units + 1);
        end++;
    }
    *out = (size_t)value << shift;
    return *end == '\0' && (*out >> shift) == value;
}

static bool read_real(const char *text, double *out) {
    char *end;
    *out = strtod(text, &end);
    return end != text && *end == '\0' && *out - *out == 0; /* infinities and NaN fail the difference */
}

static bool read_choice(const char *text, const char *words, int *out) {
    size_t n = strlen(text);
    for (int i = 0; words; i++) {
        const char *bar = strchr(words, '|');
        size_t length = bar ? (size_t)(bar - words) : strlen(words);
        if (length == n && strncmp(text, words, n) == 0) {
            *out = i;
            return true;
        }
        words = bar ? bar + 1 : NULL;
    }
    return false;
}

static bool read_word(const char *text, espi_words *out) {
    if (out->n == ESPI_MAX_WORDS) return false;
    out->text[out->n++] = text;
    return true;
}

static bool read_value(const espi_option *option, const char *text) {
    switch (option->kind) {
    case ESPI_OPTION_COUNT:
        return read_count(text, option->out);
    case ESPI_OPTION_BYTES:
        return read_bytes(text, option->out);
    case ESPI_OPTION_REAL:
        return read_real(text, option->out);
    case ESPI_OPTION_CHOICE:
        return read_choice(text, option->value, option->out);
    case ESPI_OPTION_TEXT:
        *(const char **)option->out = text;
        return true;
    case ESPI_OPTION_LIST:
        return read_word(text, option->out);
    case ESPI_OPTION_FLAG:
        break;
    }
    return false;
}

static const espi_option *find_option(const espi_usage *usage, const char *word) {
    size_t length = strcspn(word, "=");
    for (int i = 0; i < usage->n_options; i++)
        if (strlen(usage->options[i].name) == length && strncmp(usage->options[i].name, word, length) == 0) return &usage->options[i];
    return NULL;
}

static int unknown_option(const espi_usage *usage, const char *word) {
    const char **names = espi_cli_memory(((size_t)usage->n_options + 1) * sizeof *names);
    for (int i = 0; i < usage->n_options; i++) names[i] = usage->options[i].name;
    names[usage->n_options] = "--help";
    int code = espi_cli_unknown("option", word, names, usage->n_options + 1);
    free(names);
    return code;
}

/* One option at argv[*i], as "--name value" or "--name=value"; moves *i past it. */
static int parse_option(const espi_usage *usage, int argc, char **argv, int *i) {
    const char *word = argv[*i];
    const espi_option *option = find_option(usage, word);
    if (!option) return unknown_option(usage, word);
    const char *equals = strchr(word, '=');
    if (option->kind == ESPI_OPTION_FLAG) {
        if (equals) return espi_cli_misuse(usage, "%s takes no value", option->name);
        *(bool *)option->out = true;
        return ESPI_EXIT_OK;
    }
    if (!equals && *i + 1 >= argc) return espi_cli_misuse(usage, "%s needs a value %s", option->name, option->value);
    const char *text = equals ? equals + 1 : argv[++*i];
    if (!read_value(option, text)) return espi_cli_misuse(usage, "%s cannot be '%s'; expected %s", option->name, text, option->value);
    return ESPI_EXIT_OK;
}

/* The i-th of the names that `usage` has for its operands; false behind the last, unless that ends in "..". */
static bool operand_name(char out[32], bool *more, const espi_usage *usage, int i) {
    const char *word = usage->operand, *next;
    *more = false; /* behind the last */
    for (; i > 0 && word; i--) {
        next = strchr(word, ' ');
        *more = !next && strstr(word, "..");
        if (*more) break;
        word = next ? next + 1 : NULL;
    }
    if (word) snprintf(out, 32, "%.*s", (int)strcspn(word, " "), word);
    return word;
}

bool espi_cli_parse(int *exit_code, const espi_usage *usage, int argc, char **argv) {
    *exit_code = ESPI_EXIT_OK;
    for (int i = 2; i < argc; i++)
        if (strcmp(argv[i], "--help") == 0 || strcmp(argv[i], "-h") == 0) {
            print_help(usage);
            return false;
        }
    char name[32];
    bool more;
    int n = 0;
    for (int i = 2; i < argc; i++) {
        if (argv[i][0] == '-' && argv[i][1] != '\0')
            *exit_code = parse_option(usage, argc, argv, &i);
        else if (!operand_name(name, &more, usage, n))
            *exit_code = espi_cli_misuse(usage, "only %s is taken, '%s' is too many", usage->operand, argv[i]);
        else
            usage->operand_out[n++] = argv[i];
        if (*exit_code != ESPI_EXIT_OK) return false;
    }
    if (!operand_name(name, &more, usage, n) || more) return true;
    *exit_code = espi_cli_misuse(usage, "%s is missing", name);
    return false;
}
