/* espalier quantize: a model folder with 4-bit experts, of one with 16-bit or f32 experts. */
#include "cli/cli.h"
#include "io/quantised.h"

static esp_status quantise(const char *out, const char *in, const espi_quantised_spec *spec) {
    esp_ctx *ctx;
    esp_status status = esp_ctx_create(&ctx, NULL);
    if (status != ESP_OK) return status;
    status = espi_quantised_write(ctx, out, in, spec);
    esp_ctx_destroy(ctx);
    return status;
}

int espi_cli_quantize(int argc, char **argv) {
    static const esp_qformat formats[] = {ESP_NF4, ESP_FP4, ESP_MXFP4};
    const char *folders[2];
    int format = -1, code;
    espi_quantised_spec spec = {0};
    bool round_up = false;
    const espi_option options[] = {
        {"--format", ESPI_OPTION_CHOICE, &format, "nf4|fp4|mxfp4", "required"},
        {"--double-quant", ESPI_OPTION_FLAG, &spec.double_quant, NULL, "block scales of nf4 and fp4 through 8 bits"},
        {"--fused", ESPI_OPTION_FLAG, &spec.fused, NULL, "nf4 and fp4: one array for all experts of a layer, not one a matrix"},
        {"--round-up", ESPI_OPTION_FLAG, &round_up, NULL, "mxfp4: scales that nothing exceeds, as triton_kernels has them (OCP's rule)"},
    };
    const espi_usage usage = {
        "quantize",
        "Writes the model of folder IN to folder OUT with its experts in 4 bits, bit for bit those that loading IN makes.\n"
        "All other tensors and files are copied.  nf4, fp4: keys of bitsandbytes; of gpt_oss, lists of matrices.  mxfp4: keys of gpt_oss.\n"
        "OUT must be new or empty.",
        "IN OUT",
        folders,
        options,
        sizeof options / sizeof options[0]};
    if (!espi_cli_parse(&code, &usage, argc, argv)) return code;
    if (format < 0) return espi_cli_misuse(&usage, "--format is missing");
    spec.format = formats[format];
    if (round_up && spec.format != ESP_MXFP4) return espi_cli_misuse(&usage, "--round-up is for mxfp4");
    if (round_up) spec.rule = ESP_MXFP4_ROUND_UP;
    const esp_status status = quantise(folders[1], folders[0], &spec);
    return status == ESP_OK ? ESPI_EXIT_OK : espi_cli_failed("quantize", status);
}
