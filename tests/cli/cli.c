/* The program `espalier`: options, help, exit codes, and what its commands say. */
#include "espalier/espalier.h"
#include "program.h"

#include <jansson.h>

#define Q3B ESP_SOURCE_DIR "/tests/golden/data/q3b/model"
#define MIX ESP_SOURCE_DIR "/examples/models/mix-moe"

static program_run espalier(const char *arguments) {
    char command[4096];
    snprintf(command, sizeof command, "%s %s", ESP_PROGRAM, arguments);
    return program(command);
}

/* Exit code and a part of what is printed. */
static void expect(const char *arguments, int code, const char *part) {
    program_run run = espalier(arguments);
    cr_expect_eq(run.code, code, "espalier %s: exit code %d, expected %d\n%s", arguments, run.code, code, run.out);
    cr_expect(strstr(run.out, part), "espalier %s: no '%s' in\n%s", arguments, part, run.out);
    free(run.out);
}

Test(cli, version) {
    char line[64];
    snprintf(line, sizeof line, "espalier %d.%d.%d\n", ESP_VERSION_MAJOR, ESP_VERSION_MINOR, ESP_VERSION_PATCH);
    expect("--version", 0, line);
}

Test(cli, help_everywhere) {
    static const char *const commands[] = {"inspect",  "plan",    "verify", "generate", "plot",
                                           "quantize", "convert", "merge",  "tokenize", "rollouts"};
    for (size_t i = 0; i < sizeof commands / sizeof commands[0]; i++) {
        char arguments[64], usage[64];
        snprintf(arguments, sizeof arguments, "%s --help", commands[i]);
        snprintf(usage, sizeof usage, "usage: espalier %s ", commands[i]);
        expect(arguments, 0, usage);
        expect("--help", 0, commands[i]);
    }
    expect("", 2, "usage: espalier COMMAND");
}

Test(cli, wrong_use_is_told) {
    expect("verfy x", 2, "unknown command 'verfy'; did you mean 'verify'?");
    expect("--verison", 2, "unknown option '--verison'");
    expect("plan x --token 3", 2, "unknown option '--token'; did you mean '--tokens'?");
    expect("generate x --promt=hi", 2, "did you mean '--prompt'?");
    expect("inspect", 2, "DIR is missing");
    expect("inspect a b", 2, "'b' is too many");
    expect("inspect a --json=yes", 2, "--json takes no value");
    expect("plan x --tokens", 2, "--tokens needs a value");
    expect("plan x --tokens 3x", 2, "--tokens cannot be '3x'");
    expect("plan x --tokens -3", 2, "--tokens cannot be '-3'");
    expect("plan x --tokens 3 --experts nf5", 2, "expected auto|nf4|fp4|mxfp4|none");
    expect("plan x --tokens 3 --activation-budget 3Q", 2, "--activation-budget cannot be '3Q'");
    expect("plan x --tokens 3 --sequences 4", 2, "every sequence has a token");
    expect("plan x", 2, "every sequence has a token");
    expect("plan x --tokens 3 --ranks 4 --expert-ranks 3", 2, "a divisor of them");
    expect("generate x", 2, "--prompt is missing");
    expect("generate x --prompt a --temperature nan", 2, "--temperature cannot be 'nan'");
    expect("generate x --prompt a --temperature -1", 2, "expected 0 or more");
    expect("generate x --prompt a --temperature 1e-50", 2, "expected 0, which is greedy, or 1e-06 to 1e+06");
    expect("generate x --prompt a --max-new-tokens 2147483647", 2, "must be from 1 to 1073741823");
}

Test(cli, quantize) {
    char *dir = program_folder(), arguments[512];
    expect("quantize a", 2, "OUT is missing");
    expect("quantize a b", 2, "--format is missing");
    expect("quantize a b --format int4", 2, "expected nf4|fp4|mxfp4");
    expect("quantize a b --format nf4 --round-up", 2, "--round-up is for mxfp4");
    snprintf(arguments, sizeof arguments, "quantize " MIX " %s --format nf4 --double-quant", dir);
    expect(arguments, 0, "");
    expect(arguments, 1, "expected a new or empty folder");
    snprintf(arguments, sizeof arguments, "inspect %s", dir);
    expect(arguments, 0, "U8");
    program_remove(dir);
}

Test(cli, tokenize) {
    expect("tokenize " MIX " --text sdbca=", 0, "42 27 25 26 24 5\n");
    expect("tokenize " MIX " --text sdbca= --add-special", 0, "1 42 27 25 26 24 5\n");
    expect("tokenize " MIX " --text '<eos>a'", 0, "2 24\n");
    expect("tokenize " MIX " --text '<eos>a' --specials-as-text", 0, "3 28 38 42 7 24\n");
    expect("tokenize " MIX " --text abc --count", 0, "3\n");
    expect("tokenize " MIX " --text '1 42 27 25' --decode", 0, "<bos>sdb");
    expect("tokenize " MIX " --text x --decode", 1, "got x, expected numbers below 50");
    expect("tokenize " MIX " --text 99 --decode", 1, "got 99, expected numbers below 50");
    expect("tokenize /nowhere --text a", 1, "/nowhere");
    expect("tokenize", 2, "is missing");
}

Test(cli, convert_asks_for_what_it_needs) {
    expect("convert a", 2, "OUT is missing");
    expect("convert a b --to 2d", 2, "--model is missing");
    expect("convert a b --model m", 2, "--to is missing");
    expect("convert a b --model m --to 4d", 2, "expected 2d|3d");
    expect("convert /nonexistent b --model " Q3B " --to 2d", 1, "/nonexistent/adapter_model.safetensors");
    expect("convert " Q3B "/../adapter /tmp/never --model " Q3B " --to 2d --b-layout expert-slowest", 1,
           "expert-slowest with the 2-D form");
}

Test(cli, merge_counts_what_it_changed) {
    char *dir = program_folder(), command[4096];
    snprintf(command, sizeof command, "merge " Q3B " " Q3B "/../adapter %s/merged", dir);
    expect(command, 0, "matrices attempted 40, applied 40");
    expect(command, 1, "is there already");
    program_remove(dir);
    expect("merge a b", 2, "OUT is missing");
    expect("merge a b c --format q4", 2, "expected nf4|fp4|mxfp4");
    expect("merge /nonexistent b c", 1, "b/adapter_model.safetensors");
}

Test(cli, failures_are_told) {
    expect("inspect /nonexistent", 1, "/nonexistent");
    expect("plan /nonexistent --tokens 5", 1, "/nonexistent");
    expect("plan " ESP_SOURCE_DIR "/examples/models/mix-moe --tokens 128 --ranks 4", 0, "choose: --expert-ranks ");
    expect("plan " ESP_SOURCE_DIR "/examples/models/mix-moe --tokens 128 --ranks 4 --memory 1K", 0, "nothing fits in 1024 bytes a rank");
    expect("generate /nonexistent --prompt a", 1, "/nonexistent");
    expect("plot /nonexistent", 1, "/nonexistent");
    expect("verify " Q3B "/../ --device cpux", 1, "cpux");
    expect("verify " Q3B "/../ --device cpu --backend ref", 2, "give one");
}

/* On a machine without a GPU: told, and nothing else is taken in its place. */
Test(cli, verify_takes_a_gpu_when_told) {
    program_run run = espalier("verify " Q3B "/../ --device cuda");
    const bool none = strstr(run.out, "no GPU that it can use") || strstr(run.out, "this build does not have");
    cr_expect(run.code == (none ? 1 : 0), "%d: %s", run.code, run.out);
    cr_expect(none == !strstr(run.out, " 0 failed"), "%s", run.out);
    free(run.out);
}

Test(cli, inspect_counts_every_byte) {
    program_run run = espalier("inspect " Q3B " --json");
    cr_assert_eq(run.code, 0, "%s", run.out);
    json_t *root = json_loads(run.out, 0, NULL);
    cr_assert(root, "%s", run.out);
    const struct {
        const char *key;
        json_int_t value;
    } wants[] = {{"layers", 4}, {"moe_layers", 1}, {"hidden", 64}, {"experts", 8}, {"top_k", 3}, {"expert_width", 40}, {"vocab", 160}};
    for (size_t i = 0; i < sizeof wants / sizeof wants[0]; i++)
        cr_expect_eq(json_integer_value(json_object_get(root, wants[i].key)), wants[i].value, "%s", wants[i].key);
    const json_t *parts = json_object_get(root, "parts");
    json_int_t experts = json_integer_value(json_object_get(json_object_get(parts, "experts"), "bytes"));
    cr_expect_eq(experts, 8 * 3 * 64 * 40 * 2, "bf16 experts: %lld bytes", (long long)experts);
    cr_expect_eq(json_integer_value(json_object_get(json_object_get(parts, "other"), "tensors")), 0, "every tensor belongs to a part");
    cr_expect(json_is_false(json_object_get(root, "tokenizer")));
    json_decref(root);
    free(run.out);
    expect("inspect " Q3B, 0, "4 (1 MoE, 3 dense)");
    expect("inspect " MIX, 0, "tokenizer.json    present");
}

/* Trains once on a batch of the planned size and reads the context's high-water mark. */
static size_t measured_peak(const char *dir, const esp_model_config *config, const esp_adamw_config *adamw, int32_t tokens,
                            int32_t sequences) {
    esp_ctx *ctx;
    esp_model *model;
    esp_optim *optim;
    cr_assert_eq(esp_ctx_create(&ctx, NULL), ESP_OK);
    cr_assert_eq(esp_model_load(&model, ctx, dir, config), ESP_OK, "%s", esp_last_error());
    cr_assert_eq(esp_adamw_create(&optim, model, adamw), ESP_OK, "%s", esp_last_error());
    int32_t *ids = calloc((size_t)tokens, sizeof *ids), *cu = calloc((size_t)sequences + 1, sizeof *cu);
    cr_assert(ids && cu);
    for (int32_t t = 0; t < tokens; t++) ids[t] = t % 7;
    for (int32_t s = 0; s <= sequences; s++) cu[s] = tokens / sequences * s;
    const esp_batch batch = ESP_BATCH(.tokens = ids, .cu_seqlens = cu, .n_tokens = tokens, .n_seqs = sequences);
    esp_tensor hidden, d_hidden;
    double loss;
    cr_assert_eq(esp_model_forward(model, &batch, &hidden), ESP_OK, "%s", esp_last_error());
    cr_assert_eq(esp_model_cross_entropy(model, &batch, &hidden, &loss, &d_hidden), ESP_OK, "%s", esp_last_error());
    cr_assert_eq(esp_model_backward(model, &batch, &d_hidden), ESP_OK, "%s", esp_last_error());
    cr_assert_eq(esp_optim_step(optim), ESP_OK, "%s", esp_last_error());
    esp_memory memory = ESP_MEMORY_INIT;
    cr_assert_eq(esp_ctx_memory(ctx, &memory), ESP_OK);
    free(ids);
    free(cu);
    esp_optim_destroy(optim);
    esp_model_destroy(model);
    esp_ctx_destroy(ctx);
    return memory.peak;
}

static void expect_peak(const char *arguments, size_t measured) {
    program_run run = espalier(arguments);
    const char *line = strstr(run.out, "predicted peak");
    size_t planned = 0;
    cr_assert(run.code == 0 && line && sscanf(line, "predicted peak %zu", &planned) == 1, "%s", run.out);
    cr_expect_eq(planned, measured, "espalier %s: planned %zu, measured %zu", arguments, planned, measured);
    free(run.out);
}

Test(cli, plan_predicts_the_measured_peak) {
    expect_peak("plan " Q3B " --tokens 64 --sequences 4 --rank 4",
                measured_peak(Q3B, &ESP_MODEL_CONFIG(.experts = ESP_NF4, .lora_rank = 4), NULL, 64, 4));
    expect_peak("plan " Q3B " --tokens 600 --rank 16 --experts none --8bit-adam --activation-budget 400K",
                measured_peak(Q3B, &ESP_MODEL_CONFIG(.experts = ESP_Q_NONE, .lora_rank = 16, .activation_budget = 400 << 10),
                              &ESP_ADAMW_CONFIG(.eight_bit = true), 600, 1));
    expect_peak("plan " MIX " --tokens 2000 --sequences 100 --rank 8 --experts fp4 --double-quant",
                measured_peak(MIX, &ESP_MODEL_CONFIG(.experts = ESP_FP4, .lora_rank = 8, .double_quant = true), NULL, 2000, 100));
}

Test(cli, generate_is_repeatable) {
    const char *arguments = "generate " MIX " --prompt sdecbc= --max-new-tokens 8 --samples 3 --seed 5";
    program_run first = espalier(arguments), second = espalier(arguments);
    cr_assert_eq(first.code, 0, "%s", first.out);
    cr_expect_str_eq(first.out, second.out);
    int lines = 0;
    for (const char *c = first.out; *c; c++) lines += *c == '\n';
    cr_expect_eq(lines, 3, "%s", first.out);
    cr_expect_eq(strncmp(first.out, "sdecbc=", 7), 0, "%s", first.out);
    free(first.out);
    free(second.out);
    expect("generate " MIX " --prompt sdecbc= --max-new-tokens 4 --temperature 0", 0, "sdecbc=");
    program_run few = espalier("generate " MIX " --prompt sdecbc= --max-new-tokens 8 --samples 3 --seed 5 --batch 2");
    first = espalier(arguments);
    cr_expect_str_eq(first.out, few.out);
    free(few.out);
    free(first.out);
    /* The same draws, alone or with others, and printed alike. */
    program_run one = espalier("generate " MIX " --prompt sdecbc= --max-new-tokens 8 --samples 1 --seed 5");
    first = espalier(arguments);
    cr_expect_eq(strncmp(first.out, one.out, strlen(one.out)), 0, "streamed: %sfirst of three: %s", one.out, first.out);
    cr_expect(strlen(one.out) > 0 && one.out[strlen(one.out) - 1] == '\n', "%s", one.out);
    free(one.out);
    free(first.out);
}

/* What ends a row is not printed, and one token alone is left of the most likely. */
Test(cli, generate_filters_and_stops) {
#define GENERATE "generate " MIX " --prompt sdecbc= --max-new-tokens 8 "
    program_run greedy = espalier(GENERATE "--temperature 0"), one = espalier(GENERATE "--top-k 1 --seed 9");
    cr_assert_eq(one.code, 0, "%s", one.out);
    cr_expect_str_eq(greedy.out, one.out);
    cr_assert_gt(strlen(greedy.out), strlen("sdecbc=") + 3, "%s", greedy.out);
    char arguments[256], until[64];
    const char *answer = greedy.out + strlen("sdecbc=");
    snprintf(arguments, sizeof arguments, GENERATE "--temperature 0 --stop zz --stop %c%c", answer[2], answer[3]);
    snprintf(until, sizeof until, "sdecbc=%.2s\n", answer);
    program_run stopped = espalier(arguments);
    cr_expect_str_eq(stopped.out, until);
    snprintf(arguments, sizeof arguments, GENERATE "--temperature 0 --stop-token %c", answer[1]);
    snprintf(until, sizeof until, "sdecbc=%.*s\n", answer[0] == answer[1] ? 0 : 1, answer);
    program_run token = espalier(arguments);
    cr_expect_str_eq(token.out, until);
    free(greedy.out);
    free(one.out);
    free(stopped.out);
    free(token.out);
    expect(GENERATE "--top-p 0.5 --min-p 0.1 --samples 2", 0, "sdecbc=");
    expect(GENERATE "--top-p 1.5", 1, "got top_k 0, top_p 1.5");
    expect(GENERATE "--top-p 0.5 --temperature 0", 1, "got greedy with");
    expect(GENERATE "--stop-token nosuch", 1, "--stop-token: got 'nosuch'");
#undef GENERATE
}
