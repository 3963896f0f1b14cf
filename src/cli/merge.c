/* espalier merge: a model folder with an adapter's delta added to its weights. */
#include "cli/cli.h"

#include <inttypes.h>

static esp_status merge(esp_merge_stats *stats, const char *const folders[3], const esp_merge_config *config) {
    esp_ctx *ctx;
    esp_status status = esp_ctx_create(&ctx, NULL);
    if (status != ESP_OK) return status;
    status = esp_adapter_merge(ctx, stats, folders[2], folders[0], folders[1], config);
    esp_ctx_destroy(ctx);
    return status;
}

int espi_cli_merge(int argc, char **argv) {
    static const esp_qformat formats[] = {ESP_NF4, ESP_FP4, ESP_MXFP4};
    const char *folders[3];
    int format = -1, widths = 0, columns = 0, code;
    const espi_option options[] = {
        {"--format", ESPI_OPTION_CHOICE, &format, "nf4|fp4|mxfp4", "experts in 4 bits (plain, as they were)"},
        {"--read-b-layout", ESPI_OPTION_CHOICE, &columns, espi_cli_columns, "columns of a fused lora_B (stated)"},
        {"--read-widths", ESPI_OPTION_CHOICE, &widths, espi_cli_widths, "swapped: old PEFT took input and output for one another (stated)"},
    };
    const espi_usage usage = {
        "merge",
        "Writes the model of folder MODEL to folder OUT with ADAPTER added to its weights: in f32, rounded once.\n"
        "MODEL is the 16-bit or f32 checkpoint, or one with MXFP4 experts and --format mxfp4.  OUT must be new or empty.",
        "MODEL ADAPTER OUT",
        folders,
        options,
        sizeof options / sizeof options[0]};
    if (!espi_cli_parse(&code, &usage, argc, argv)) return code;
    esp_merge_stats stats = ESP_MERGE_STATS_INIT;
    const esp_adapter_config reading = ESP_ADAPTER_CONFIG(.columns = (esp_adapter_columns)columns, .widths = (esp_adapter_widths)widths);
    const esp_status status =
        merge(&stats, folders, &ESP_MERGE_CONFIG(.reading = &reading, .format = format < 0 ? ESP_Q_DEFAULT : formats[format]));
    if (status != ESP_OK) return espi_cli_failed("merge", status);
    printf("matrices attempted %" PRId64 ", applied %" PRId64 "\n", stats.attempted, stats.applied);
    return ESPI_EXIT_OK;
}
