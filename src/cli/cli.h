/* What the subcommands of `espalier` share: option parsing, help, and how a failed call is told. */
#ifndef ESPI_CLI_H
#define ESPI_CLI_H

#include "espalier/espalier.h"

/* Exit codes. */
enum { ESPI_EXIT_OK = 0, ESPI_EXIT_FAILED = 1, ESPI_EXIT_USAGE = 2 };

/* How an option's value is read and what `out` points to. */
typedef enum espi_option_kind {
    ESPI_OPTION_FLAG,  /* bool */
    ESPI_OPTION_COUNT, /* int64_t >= 0 */
    ESPI_OPTION_BYTES, /* size_t, with an optional K, M or G */
    ESPI_OPTION_REAL,  /* double */
    ESPI_OPTION_TEXT,  /* const char * */
    ESPI_OPTION_LIST,  /* espi_words: the option may be given several times */
    ESPI_OPTION_CHOICE /* int: which of the words of `value`, "nf4|fp4|none" */
} espi_option_kind;

enum { ESPI_MAX_WORDS = 16 };
typedef struct espi_words {
    const char *text[ESPI_MAX_WORDS];
    int32_t n;
} espi_words;

typedef struct espi_option {
    const char *name; /* with its dashes: "--tokens", "-o" */
    espi_option_kind kind;
    void *out;
    const char *value; /* what help calls the value; NULL for a flag */
    const char *help;
} espi_option;

/* A subcommand as its help describes it. */
typedef struct espi_usage {
    const char *command, *summary;
    const char *operand;      /* "DIR", or several names with spaces between: each is required; a last one "RUN.." may come again */
    const char **operand_out; /* as many as there are names, or zeroed room for argc of them */
    const espi_option *options;
    int n_options;
} espi_usage;

/* Reads argv[2..].  True: go on.  False: leave main with *exit_code (help was printed, or the mistake was told). */
bool espi_cli_parse(int *exit_code, const espi_usage *usage, int argc, char **argv);

/* "espalier: unknown WHAT 'got'; did you mean 'nearest'?" on standard error; returns ESPI_EXIT_USAGE. */
int espi_cli_unknown(const char *what, const char *got, const char *const *known, int n_known);

/* Tells a wrong use on standard error; returns ESPI_EXIT_USAGE. */
int espi_cli_misuse(const espi_usage *usage, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* Tells the last failed call on standard error; returns ESPI_EXIT_FAILED. */
int espi_cli_failed(const char *command, esp_status status);

/* Zeroed memory of at least one byte; leaves the program when there is none. */
void *espi_cli_memory(size_t bytes);

/* DIR/NAME in memory of the caller's. */
char *espi_cli_path(const char *dir, const char *name);

/* The words of --experts, and the format that one of them names; "auto": what the library does by default. */
extern const char espi_cli_experts[];
esp_qformat espi_cli_format(int choice);

/* The backend of --device NAME, or of none. */
const char *espi_cli_device(const char *name);

/* The choices of esp_adapter_widths and esp_adapter_columns. */
extern const char espi_cli_widths[], espi_cli_columns[];

int espi_cli_inspect(int argc, char **argv);
int espi_cli_plan(int argc, char **argv);
int espi_cli_verify(int argc, char **argv);
int espi_cli_generate(int argc, char **argv);
int espi_cli_tokenize(int argc, char **argv);
int espi_cli_plot(int argc, char **argv);
int espi_cli_rollouts(int argc, char **argv);
int espi_cli_quantize(int argc, char **argv);
int espi_cli_convert(int argc, char **argv);
int espi_cli_merge(int argc, char **argv);

#endif
