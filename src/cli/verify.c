/* espalier verify: compares this build with reference tensors.  Walks the folders, tells their kinds, counts. */
#include "cli/verify.h"

#include "io/folder.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

/* A kind of folder is known by the files it holds. */
typedef struct kind {
    const char *marks[4];
    void (*verify)(espi_verify *v, const char *dir);
    bool on_device; /* or it is about what the host computes, whatever the device */
} kind;

static const kind kinds[] = {
    {{"ref.safetensors", "model"}, espi_verify_model, .on_device = true},
    {{"losses.safetensors", "advantages.safetensors", "head.safetensors"}, espi_verify_grpo},
    {{"adamw.safetensors", "adamw8bit.safetensors", "schedules.safetensors"}, espi_verify_optim},
    {{"bnb4.safetensors", "linear4bit_nf4_plain.safetensors", "linear4bit_fp4_plain.safetensors", "mxfp4.safetensors"}, espi_verify_quant},
    {{"qwen3.jsonl", "o200k.jsonl"}, espi_verify_tokenizer},
};

static const kind *kind_of(const char *dir) {
    for (size_t k = 0; k < sizeof kinds / sizeof kinds[0]; k++)
        for (size_t m = 0; m < sizeof kinds[k].marks / sizeof kinds[k].marks[0]; m++) {
            const char *mark = kinds[k].marks[m];
            if (mark && (espi_is_file(dir, mark) || espi_is_folder(dir, mark))) return &kinds[k];
        }
    return NULL;
}

/* Last part of a path, trailing slashes left out. */
static char *base_name(const char *path) {
    size_t end = strlen(path);
    while (end > 1 && path[end - 1] == '/') end--;
    size_t start = end;
    while (start > 0 && path[start - 1] != '/') start--;
    char *name = espi_cli_memory(end - start + 1);
    memcpy(name, path + start, end - start);
    return name;
}

static bool verify_folder(espi_verify *v, const char *dir) {
    const kind *k = kind_of(dir);
    if (!k) return false;
    char *name = base_name(dir);
    v->folder = name;
    if (v->ctx->device && !k->on_device)
        espi_verify_skip(v, "", "no part of a GPU's passes: verify it with --device cpu");
    else
        k->verify(v, dir);
    v->folder = NULL;
    free(name);
    return true;
}

/* Every golden folder directly below `dir`. */
static esp_status verify_children(espi_verify *v, const char *dir) {
    char **names;
    size_t n;
    ESPI_TRY(espi_folder_list(&names, &n, dir));
    for (size_t i = 0; i < n; i++) {
        char *child = espi_cli_path(dir, names[i]);
        if (espi_is_folder(dir, names[i]) && !verify_folder(v, child)) {
            v->folder = names[i];
            espi_verify_skip(v, "", "not a golden folder");
            v->folder = NULL;
        }
        free(child);
    }
    espi_folder_list_free(names, n);
    return ESP_OK;
}

int espi_cli_verify(int argc, char **argv) {
    espi_verify v = {0};
    const char *dir, *backend = NULL, *device = NULL;
    const espi_option options[] = {
        {"--backend", ESPI_OPTION_TEXT, &backend, "NAME", "cpu, ref or ref64 (cpu)"},
        {"--device", ESPI_OPTION_TEXT, &device, "NAME", "cuda, cpu, or auto: a GPU where one is usable (cpu)"},
        {"--tokenizer", ESPI_OPTION_TEXT, &v.tokenizer, "FILE", "tokenizer.json for tokenizer/"},
    };
    const espi_usage usage = {
        "verify",
        "Compares this build with the reference tensors of a golden folder, or of every golden folder below DIR.\n"
        "One line a tensor: name, error, limit, ok or FAIL.  Forward values: max|a-b| <= 2e-5 max|b|; gradients:\n"
        "norm(a-b) <= 1e-4 norm(b); indices, codes and bytes: equal.  With --backend ref64 against an f64 reference:\n"
        "1e-12 and 1e-11.  With --device cuda, which computes in bf16 and replays the reference's experts: 0.12, and 0.1\n"
        "or, where activations are clamped, 0.35.\n"
        "Exit code 1 on any failure, or when nothing was checked.",
        "DIR",
        &dir,
        options,
        sizeof options / sizeof options[0]};
    int code;
    if (!espi_cli_parse(&code, &usage, argc, argv)) return code;
    if (backend && device) return espi_cli_misuse(&usage, "--backend %s and --device %s say the same: give one", backend, device);
    esp_status status = esp_ctx_create(&v.ctx, &ESP_CTX_CONFIG(.backend = backend ? backend : espi_cli_device(device)));
    if (status != ESP_OK) return espi_cli_failed("verify", status);
    if (!verify_folder(&v, dir)) status = verify_children(&v, dir);
    esp_ctx_destroy(v.ctx);
    if (status != ESP_OK)
        espi_cli_failed("verify", status);
    else if (v.passed + v.failed == 0)
        fprintf(stderr, "espalier verify: nothing was checked in %s\n", dir);
    printf("%" PRId64 " passed, %" PRId64 " failed, %" PRId64 " skipped\n", v.passed, v.failed, v.skipped);
    return v.failed > 0 || v.passed == 0 ? ESPI_EXIT_FAILED : ESPI_EXIT_OK;
}
