/* espalier plot: a trainer's metrics.jsonl as an SVG. */
#include "cli/cli.h"

int espi_cli_plot(int argc, char **argv) {
    const char *metrics, *svg = "metrics.svg";
    const espi_option options[] = {{"-o", ESPI_OPTION_TEXT, &svg, "FILE.svg", "where to write (metrics.svg)"}};
    const espi_usage usage = {
        "plot", "Draws reward, accuracy, KL, entropy and length over the steps of a run.", "METRICS.jsonl", &metrics, options, 1};
    int code;
    if (!espi_cli_parse(&code, &usage, argc, argv)) return code;
    esp_status status = esp_plot_metrics(metrics, svg);
    if (status != ESP_OK) return espi_cli_failed("plot", status);
    printf("%s\n", svg);
    return ESPI_EXIT_OK;
}
