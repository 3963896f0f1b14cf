/* espalier plot: the metrics.jsonl of one run or several as an SVG. */
#include "cli/cli.h"

#include <stdlib.h>

int espi_cli_plot(int argc, char **argv) {
    const char *svg = "metrics.svg", **runs = espi_cli_memory((size_t)argc * sizeof *runs);
    double smooth = 0;
    bool raw = false;
    const espi_option options[] = {
        {"-o", ESPI_OPTION_TEXT, &svg, "FILE.svg", "where to write (metrics.svg)"},
        {"--smooth", ESPI_OPTION_REAL, &smooth, "STEPS", "of the running mean over the curves (a 25th of the run)"},
        {"--raw", ESPI_OPTION_FLAG, &raw, NULL, "no running mean"}};
    const espi_usage usage = {
        "plot",  "Draws the curves of a run over its steps, or compares several runs. A RUN is its folder, or the metrics.jsonl in it.",
        "RUN..", runs,
        options, sizeof options / sizeof options[0]};
    int code, n = 0;
    if (espi_cli_parse(&code, &usage, argc, argv)) {
        while (runs[n]) n++;
        const esp_status status = esp_plot_runs(svg, runs, n, raw ? -1 : smooth);
        if (status == ESP_OK)
            printf("%s\n", svg);
        else
            code = espi_cli_failed("plot", status);
    }
    free(runs);
    return code;
}
