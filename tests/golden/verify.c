/* `espalier verify` on the golden data: everything passes, and nothing that was checked vanishes; on damaged copies it fails. */
#include "golden.h"
#include "program.h"

#define DATA ESP_SOURCE_DIR "/tests/golden/data"

typedef struct counts {
    long long passed, failed, skipped;
    int code;
} counts;

static void print_failures(const char *out) {
    for (const char *line = out, *end; (end = strchr(line, '\n')); line = end + 1)
        if (end - line > 4 && strncmp(end - 4, "FAIL", 4) == 0) fprintf(stderr, "%.*s\n", (int)(end - line), line);
}

/* The last line of verify on `path`.  whole: nothing should fail, so what does is printed. */
static counts verify(const char *path, bool whole) {
    char command[4096];
    snprintf(command, sizeof command, "%s verify %s", ESP_PROGRAM, path);
    program_run run = program(command);
    counts c = {.code = run.code};
    if (whole) print_failures(run.out);
    const char *last = run.out;
    for (const char *line = run.out, *end; (end = strchr(line, '\n')); line = end + 1) last = line;
    int fields = sscanf(last, "%lld passed, %lld failed, %lld skipped", &c.passed, &c.failed, &c.skipped);
    cr_assert_eq(fields, 3, "last line: %s", last);
    free(run.out);
    return c;
}

/* What each folder checks, and what it leaves out, at the time of writing: a check that vanishes is a failure. */
static void expect_all(const char *folder, long long passed, long long skipped) {
    char path[4096];
    snprintf(path, sizeof path, DATA "/%s", folder);
    counts c = verify(path, true);
    cr_expect_eq(c.code, 0, "%s: exit code %d", folder, c.code);
    cr_expect_eq(c.failed, 0, "%s: %lld failed", folder, c.failed);
    cr_expect(c.passed >= passed, "%s: %lld passed, at least %lld expected", folder, c.passed, passed);
    cr_expect(c.skipped <= skipped, "%s: %lld skipped, at most %lld expected", folder, c.skipped, skipped);
}

Test(verify, q3a) {
    expect_all("q3a", 506, 0);
}
Test(verify, q3b) {
    expect_all("q3b", 318, 0);
}
Test(verify, q3c) {
    expect_all("q3c", 390, 0);
}
Test(verify, go1) {
    expect_all("go1", 402, 0);
}
Test(verify, go2) {
    expect_all("go2", 282, 0);
}
Test(verify, vl) {
    expect_all("vl", 260, 0);
}
Test(verify, vla) {
    expect_all("vla", 195, 0);
}
Test(verify, ol) {
    expect_all("ol", 260, 0);
}
Test(verify, mx) {
    expect_all("mx", 262, 0);
}
Test(verify, gla) {
    expect_all("gla", 4, 0);
}
Test(verify, glb) {
    expect_all("glb", 4, 0);
}
Test(verify, grpo) {
    expect_all("grpo", 207, 2);
}
Test(verify, optim) {
    expect_all("optim", 74, 0);
}
Test(verify, quant) {
    expect_all("quant", 282, 0);
}
Test(verify, folder_of_folders) {
    expect_all(".", 3451, 2);
}

/* A copy of one golden folder, to be damaged. */
static char *copy(const char *folder) {
    char *place = program_folder(), command[4096];
    snprintf(command, sizeof command, "cp -r %s/%s/. %s && chmod -R u+w %s", DATA, folder, place, place);
    program_run run = program(command);
    cr_assert_eq(run.code, 0, "%s", run.out);
    free(run.out);
    return place;
}

/* Flips bit 6 of the last byte of a tensor's first element: the top of a float's exponent, or one code of two. */
static void damage(const char *place, const char *file, const char *tensor) {
    char path[4096];
    snprintf(path, sizeof path, "%s/%s", place, file);
    espi_st_file *st = NULL;
    cr_assert_eq(espi_st_open(&st, path), ESP_OK, "%s", esp_last_error());
    const espi_st_tensor *t = espi_st_find(st, tensor);
    cr_assert_not_null(t, "%s", tensor);
    long offset = (long)t->offset + (long)esp_dtype_size(t->dtype) - 1;
    espi_st_close(st);
    FILE *f = fopen(path, "r+b");
    cr_assert(f && fseek(f, offset, SEEK_SET) == 0);
    int byte = fgetc(f);
    cr_assert(fseek(f, offset, SEEK_SET) == 0 && fputc(byte ^ 0x40, f) != EOF && fclose(f) == 0);
}

static void expect_failure(char *place, const char *what) {
    counts c = verify(place, false);
    cr_expect_eq(c.code, 1, "%s: exit code %d", what, c.code);
    cr_expect(c.failed > 0, "%s: nothing failed", what);
    program_remove(place);
}

typedef struct harm {
    const char *folder, *file, *tensor;
} harm;

Test(verify, damaged_values_fail) {
    static const harm harms[] = {
        {"q3c", "model/model.safetensors", "model.layers.0.self_attn.q_proj.weight"},
        {"q3c", "ref.safetensors", "base.l1.moe_out"},
        {"q3c", "ref.safetensors", "grad.ce.base_model.model.model.layers.1.mlp.experts.lora_B.weight"},
        {"q3c", "ref.safetensors", "base.l0.topk_idx"},
        {"q3c", "adapter/adapter_model.safetensors", "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"},
        {"q3c", "delta.safetensors", "model.layers.0.mlp.experts.down_proj.expert5"},
        {"go2", "model/model.safetensors", "model.layers.1.mlp.experts.gate_up_proj_blocks"},
        {"go2", "model/model.safetensors", "model.layers.0.self_attn.sinks"},
        {"go2", "model/model.safetensors", "model.layers.0.mlp.experts.down_proj_bias"},
        {"go2", "ref.safetensors", "grad.ce.param.model.layers.1.self_attn.sinks"},
        {"go2", "ref.safetensors", "grad.ceaux.param.model.layers.0.mlp.router.bias"},
        {"go1", "ref.safetensors", "base.l0.act"},
        {"go1", "ref_f64.safetensors", "grad.ce.param.model.layers.0.self_attn.sinks"},
        {"vla", "model_transposed/model.safetensors", "model.language_model.layers.0.mlp.experts.gate_up_proj"},
        {"vla", "delta.safetensors", "model.language_model.layers.0.mlp.experts.gate_up_proj.expert4"},
        {"ol", "ref.safetensors", "grad.ce.param.model.layers.0.self_attn.q_norm.weight"},
        {"mx", "model/model.safetensors", "model.layers.1.block_sparse_moe.experts.3.w3.weight"},
        {"mx", "ref.safetensors", "grad.lp.base_model.model.model.layers.0.mlp.experts.base_layer.lora_B.weight"},
        {"grpo", "losses.safetensors", "gspo.dlp"},
        {"grpo", "advantages.safetensors", "adv.sum_then_normalize.group"},
        {"grpo", "advantages.safetensors", "binary.adv_std.sum_then_normalize.batch"},
        {"grpo", "head.safetensors", "t07.dh_lp"},
        {"optim", "adamw.safetensors", "adamw.m1"},
        {"optim", "schedules.safetensors", "cosine"},
        {"optim", "schedules.safetensors", "cosine_with_restarts_3"},
        {"optim", "adamw8bit.safetensors", "step3.absmax1"},
        {"quant", "bnb4.safetensors", "c.nf4.f32.sq.bs64.packed"},
        {"quant", "bnb4.safetensors", "nest257.absmax_restored"},
        {"quant", "linear4bit_nf4_nested_ref.safetensors", "dequant"},
        {"quant", "mxfp4.safetensors", "rand.scales"},
        {"quant", "mxfp4.safetensors", "bf16"},
    };
    for (size_t i = 0; i < sizeof harms / sizeof harms[0]; i++) {
        char *place = copy(harms[i].folder);
        damage(place, harms[i].file, harms[i].tensor);
        expect_failure(place, harms[i].tensor);
    }
}

Test(verify, missing_files_fail) {
    static const char *const files[] = {"ref.safetensors", "model/model.safetensors", "model/config.json",
                                        "adapter/adapter_model.safetensors", "adapter"};
    for (size_t i = 0; i < sizeof files / sizeof files[0]; i++) {
        char *place = copy("q3c"), command[4096];
        snprintf(command, sizeof command, "rm -r %s/%s", place, files[i]);
        free(program(command).out);
        expect_failure(place, files[i]);
    }
}

Test(verify, nothing_checked_fails) {
    char *place = program_folder();
    counts c = verify(place, false);
    cr_expect_eq(c.code, 1, "an empty folder: exit code %d", c.code);
    cr_expect_eq(c.passed + c.failed + c.skipped, 0);
    counts absent = verify("/nonexistent", false);
    cr_expect_eq(absent.code, 1, "no folder: exit code %d", absent.code);
    program_remove(place);
}

/* Alone it is nothing that was checked; beside others it does no harm. */
Test(verify, other_family_is_skipped_by_name) {
    char *place = copy("optim"), command[4096];
    snprintf(command, sizeof command,
             "mkdir -p %s/all/gpt/model && mv %s/*.* %s/all && mkdir %s/all/optim && mv %s/all/*.* %s/all/optim && "
             "printf '{\"model_type\":\"deepseek_v3\"}' > %s/all/gpt/model/config.json && %s verify %s/all/gpt; %s verify %s/all",
             place, place, place, place, place, place, place, ESP_PROGRAM, place, ESP_PROGRAM, place);
    program_run run = program(command);
    cr_expect_eq(run.code, 0, "%s", run.out);
    cr_expect(strstr(run.out, "0 passed, 0 failed, 1 skipped"), "%s", run.out);
    cr_expect(strstr(run.out, "deepseek_v3"), "%s", run.out);
    free(run.out);
    program_remove(place);
}
