/* esp_bench_shared: forward, loss and backward of groups of completions, the prompt computed once a group against the prompt repeated before
 * each completion; and with some of the groups left out, as a step does with those of zero advantage.  Rounds are interleaved, figures are
 * medians.  Repeated sequences go in batches of about as many tokens as a shared group has, so that both take about the same memory. */
#include "espalier/espalier.h"
#include "measure.h"

#include <getopt.h>
#include <jansson.h>

typedef struct bench {
    const char *dir;
    int prompt, completion, members, groups;
    esp_model *model;
    int32_t *tokens, *cu, *prefix_of;
    uint8_t *mask;
} bench;

static void append(bench *b, esp_batch *batch, int n, bool counted) {
    const int32_t begin = (int32_t)batch->n_tokens;
    for (int32_t t = begin; t < begin + n; t++) {
        b->tokens[t] = (int32_t)((t * 2654435761u >> 8) % 50);
        b->mask[t] = counted;
    }
    batch->n_tokens += n;
}

/* prefix -1 and repeated: the prompt stands in the sequence itself. */
static void append_completion(bench *b, esp_batch *batch, int32_t prefix) {
    if (prefix < 0) append(b, batch, b->prompt, false);
    append(b, batch, b->completion, true);
    b->prefix_of[batch->n_seqs++] = prefix;
    b->cu[batch->n_seqs] = (int32_t)batch->n_tokens;
}

/* Seconds of a batch; it is empty afterwards. */
static double run(bench *b, esp_batch *batch) {
    esp_tensor hidden, d_hidden;
    double loss;
    const double start = now();
    if (esp_model_forward(b->model, batch, &hidden) != ESP_OK) die("forward");
    if (esp_model_cross_entropy(b->model, batch, &hidden, &loss, &d_hidden) != ESP_OK) die("loss");
    if (esp_model_backward(b->model, batch, &d_hidden) != ESP_OK) die("backward");
    batch->n_tokens = batch->n_seqs = 0;
    return now() - start;
}

static esp_batch empty(const bench *b, double groups) {
    b->cu[0] = 0;
    return ESP_BATCH(.tokens = b->tokens, .cu_seqlens = b->cu, .loss_mask = b->mask,
                     .step_tokens = groups * (double)b->members * (double)b->completion);
}

/* Seconds for the first `groups` of them. */
static double shared(bench *b, int groups) {
    esp_batch batch = empty(b, b->groups);
    batch.prefix_of = b->prefix_of;
    double seconds = 0;
    for (int g = 0; g < groups; g++) {
        append(b, &batch, b->prompt, false);
        b->prefix_of[batch.n_seqs++] = -1;
        b->cu[batch.n_seqs] = (int32_t)batch.n_tokens;
        for (int i = 0; i < b->members; i++) append_completion(b, &batch, 0);
        seconds += run(b, &batch);
    }
    return seconds;
}

static double repeated(bench *b) {
    const int64_t most = b->prompt + (int64_t)b->members * b->completion;
    esp_batch batch = empty(b, b->groups);
    double seconds = 0;
    for (int i = 0; i < b->groups * b->members; i++) {
        if (batch.n_tokens + b->prompt + b->completion > most) seconds += run(b, &batch);
        append_completion(b, &batch, -1);
    }
    return seconds + run(b, &batch);
}

static const char usage[] = "usage: esp_bench_shared --model DIR [--prompt N] [--completion N] [--members N] [--groups N]\n"
                            "                        [--backend NAME] [--threads N] [--rounds N] [--json FILE] [--commit ID]\n";

int main(int argc, char **argv) {
    static double times[3][MAX_ROUNDS];
    static const struct option options[] = {{"model", required_argument, NULL, 'm'},
                                            {"prompt", required_argument, NULL, 'p'},
                                            {"completion", required_argument, NULL, 'c'},
                                            {"members", required_argument, NULL, 'g'},
                                            {"groups", required_argument, NULL, 'n'},
                                            {"backend", required_argument, NULL, 'b'},
                                            {"threads", required_argument, NULL, 't'},
                                            {"rounds", required_argument, NULL, 'r'},
                                            {"json", required_argument, NULL, 'j'},
                                            {"commit", required_argument, NULL, 'i'},
                                            {NULL, 0, NULL, 0}};
    bench b = {.prompt = 1024, .completion = 1024, .members = 8, .groups = 1};
    const char *backend = "cpu", *json = NULL, *commit = "unknown";
    int threads = 1, rounds = 3, option;
    program = "esp_bench_shared";
    while ((option = getopt_long(argc, argv, "", options, NULL)) != -1) {
        switch (option) {
        case 'm':
            b.dir = optarg;
            break;
        case 'p':
            b.prompt = atoi(optarg);
            break;
        case 'c':
            b.completion = atoi(optarg);
            break;
        case 'g':
            b.members = atoi(optarg);
            break;
        case 'n':
            b.groups = atoi(optarg);
            break;
        case 'b':
            backend = optarg;
            break;
        case 't':
            threads = atoi(optarg);
            break;
        case 'r':
            rounds = atoi(optarg);
            break;
        case 'j':
            json = optarg;
            break;
        case 'i':
            commit = optarg;
            break;
        default:
            fputs(usage, stderr);
            return 2;
        }
    }
    if (!b.dir || b.prompt < 1 || b.completion < 1 || b.members < 1 || b.groups < 1 || threads < 1 || rounds < 1 || rounds >= MAX_ROUNDS) {
        fputs(usage, stderr);
        return 2;
    }
    if (threads > 1) stopwatch = CLOCK_MONOTONIC;
    const size_t most = (size_t)(b.prompt + b.members * (b.prompt + b.completion));
    b.tokens = allocate(most * sizeof *b.tokens);
    b.mask = allocate(most);
    b.cu = allocate(((size_t)b.members + 2) * sizeof *b.cu);
    b.prefix_of = allocate(((size_t)b.members + 1) * sizeof *b.prefix_of);
    esp_ctx *ctx;
    esp_memory memory = ESP_MEMORY_INIT;
    if (esp_ctx_create(&ctx, &ESP_CTX_CONFIG(.backend = backend, .threads = threads)) != ESP_OK) die("context");
    if (esp_model_load(&b.model, ctx, b.dir, NULL) != ESP_OK) die(b.dir);
    const int left = b.groups / 2;
    for (int round = 0; round < rounds; round++) {
        times[0][round] = repeated(&b);
        times[1][round] = shared(&b, b.groups);
        times[2][round] = left ? shared(&b, left) : 0;
        fprintf(stderr, "round %d: repeated %.2f s, shared %.2f s, %d of %d groups %.2f s\n", round, times[0][round], times[1][round], left,
                b.groups, times[2][round]);
    }
    if (esp_ctx_memory(ctx, &memory) != ESP_OK) die("memory");
    const double one = median(times[0], rounds), two = median(times[1], rounds), half = median(times[2], rounds);
    const int before = b.members * (b.prompt + b.completion), after = b.prompt + b.members * b.completion;
    printf("prompt %d, completions %d x %d, %d groups: %d tokens a group repeated, %d shared (%.2f)\n", b.prompt, b.members, b.completion,
           b.groups, before, after, (double)before / after);
    printf("forward, loss and backward: repeated %.2f s, shared %.2f s: %.2f times less\n", one, two, one / two);
    if (left) printf("%d of %d groups left out: %.2f s, %.3f of the time\n", b.groups - left, b.groups, half, half / two);
    if (json) {
        char date[LINE];
        date_now(date);
        json_t *root = json_pack("{s:s, s:s, s:s, s:s, s:s, s:i, s:i, s:i, s:i, s:i, s:i, s:f, s:f, s:f, s:i, s:f, s:I}", "commit", commit,
                                 "cpu", cpu_name(), "date", date, "backend", backend, "folder", b.dir, "threads", threads, "rounds", rounds,
                                 "prompt", b.prompt, "completion", b.completion, "members", b.members, "groups", b.groups,
                                 "repeated_seconds", one, "shared_seconds", two, "ratio", one / two, "groups_kept", left, "kept_seconds",
                                 half, "peak_bytes", (json_int_t)memory.peak);
        if (!root || json_dump_file(root, json, JSON_INDENT(1)) != 0) die(json);
        json_decref(root);
    }
    esp_model_destroy(b.model);
    esp_ctx_destroy(ctx);
    free(b.tokens);
    free(b.mask);
    free(b.cu);
    free(b.prefix_of);
    return 0;
}
