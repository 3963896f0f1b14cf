/* espalier convert: a PEFT adapter in another form, without its model's weights. */
#include "cli/cli.h"

const char espi_cli_widths[] = "stated|true|swapped";
const char espi_cli_columns[] = "stated|expert-fastest|expert-slowest";
static const char written_columns[] = "expert-fastest|expert-slowest";

static esp_status convert(const char *out, const char *adapter, const char *model, const esp_adapter_config *reading,
                          const esp_adapter_config *writing) {
    esp_ctx *ctx;
    esp_status status = esp_ctx_create(&ctx, NULL);
    if (status != ESP_OK) return status;
    status = esp_adapter_convert(ctx, out, adapter, model, reading, writing);
    esp_ctx_destroy(ctx);
    return status;
}

int espi_cli_convert(int argc, char **argv) {
    const char *folders[2], *model = NULL;
    int to = -1, widths = 0, columns = 0, columns_out = 0, code;
    const espi_option options[] = {
        {"--model", ESPI_OPTION_TEXT, &model, "DIR", "the model's folder, of which config.json is read; required"},
        {"--to", ESPI_OPTION_CHOICE, &to, "2d|3d", "one pair of matrices per expert, or one per stack; required"},
        {"--b-layout", ESPI_OPTION_CHOICE, &columns_out, written_columns, "columns of a fused lora_B that is written (expert-fastest)"},
        {"--read-b-layout", ESPI_OPTION_CHOICE, &columns, espi_cli_columns, "columns of a fused lora_B that is read (stated)"},
        {"--read-widths", ESPI_OPTION_CHOICE, &widths, espi_cli_widths, "swapped: old PEFT took input and output for one another (stated)"},
    };
    const espi_usage usage = {
        "convert",
        "Writes the adapter of one folder to another in the form asked for, bit for bit, or says why that cannot be.\n"
        "2d: qwen3_moe, olmoe, mixtral, glm4_moe under vLLM.  3d: gpt_oss, qwen3_vl_moe.",
        "ADAPTER OUT",
        folders,
        options,
        sizeof options / sizeof options[0]};
    if (!espi_cli_parse(&code, &usage, argc, argv)) return code;
    if (!model) return espi_cli_misuse(&usage, "--model is missing");
    if (to < 0) return espi_cli_misuse(&usage, "--to is missing");
    const esp_status status = convert(folders[1], folders[0], model,
                                      &ESP_ADAPTER_CONFIG(.columns = (esp_adapter_columns)columns, .widths = (esp_adapter_widths)widths),
                                      &ESP_ADAPTER_CONFIG(.form = to ? ESP_ADAPTER_3D : ESP_ADAPTER_2D,
                                                          .columns = (esp_adapter_columns)(columns_out + ESP_ADAPTER_EXPERT_FASTEST)));
    return status == ESP_OK ? ESPI_EXIT_OK : espi_cli_failed("convert", status);
}
