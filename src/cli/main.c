/* The program `espalier`: one subcommand a file, found in the table below. */
#include "cli/cli.h"

#include <string.h>

typedef struct command {
    const char *name;
    int (*run)(int argc, char **argv);
    const char *help;
} command;

static const command commands[] = {
    {"inspect", espi_cli_inspect, "what a model folder holds: family, dimensions, bytes by part"},
    {"plan", espi_cli_plan, "memory that training it would take, by part, before anything is read"},
    {"verify", espi_cli_verify, "compare this build with reference tensors, one line a tensor"},
    {"quantize", espi_cli_quantize, "write a model folder with 4-bit experts"},
    {"generate", espi_cli_generate, "continue a prompt"},
    {"convert", espi_cli_convert, "an adapter in another form: per expert or fused"},
    {"merge", espi_cli_merge, "a model with an adapter added to its weights"},
    {"tokenize", espi_cli_tokenize, "text to token ids, and back"},
    {"plot", espi_cli_plot, "draw the metrics.jsonl of one run or several"},
    {"rollouts", espi_cli_rollouts, "check a file of rollouts, and say what is in it"},
};
enum { N_COMMANDS = sizeof commands / sizeof commands[0] };

static void print_usage(FILE *out) {
    fprintf(out, "usage: espalier COMMAND ...\n\ncommands:\n");
    for (int i = 0; i < N_COMMANDS; i++) fprintf(out, "  %-10s %s\n", commands[i].name, commands[i].help);
    fprintf(out, "\n`espalier COMMAND --help` tells its options; `espalier --version` the version.\n"
                 "Exit codes: 0 done, 1 failed, 2 wrong use.\n");
}

int main(int argc, char **argv) {
    if (argc < 2) {
        print_usage(stderr);
        return ESPI_EXIT_USAGE;
    }
    if (strcmp(argv[1], "--version") == 0) {
        printf("espalier %s\n", esp_version());
        return ESPI_EXIT_OK;
    }
    if (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0) {
        print_usage(stdout);
        return ESPI_EXIT_OK;
    }
    const char *names[N_COMMANDS];
    for (int i = 0; i < N_COMMANDS; i++) {
        if (strcmp(argv[1], commands[i].name) == 0) return commands[i].run(argc, argv);
        names[i] = commands[i].name;
    }
    return espi_cli_unknown(argv[1][0] == '-' ? "option" : "command", argv[1], names, N_COMMANDS);
}
