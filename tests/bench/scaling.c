/* esp_bench_scaling: seconds of a micro-batch of one rank among others, and of calls between ranks by themselves; scaling.py starts it.
 *   esp_bench_scaling CONFIG_DIR EXPERT_RANKS ROUNDS TOKENS...
 * EXPERT_RANKS 0: every process is a job of one rank, and all of them compute at the same time.  Random weights; where tokens go is replayed:
 * evenly over the experts, then three quarters of the rows to the lower half of them.  Process 0 says one JSON object a line: the best of
 * ROUNDS, of the slowest process each, as whatever else ran can only have made it longer. */
#include "dist/comm.h"
#include "espalier/espalier.h"
#include "measure.h"
#include "random_model.h"

#define OK(call)                                                                                                                           \
    do {                                                                                                                                   \
        if ((call) != ESP_OK) die(#call);                                                                                                  \
    } while (0)

enum { EXPERTS_MAX = 254 };

/* Waits for the others, so that all begin at once. */
static double begin(esp_comm *comm) {
    OK(esp_comm_agree(comm, "a point is measured", ESP_OK));
    return now();
}

/* Of all ranks the longest. */
static double slowest(esp_comm *comm, double mine) {
    double all[EXPERTS_MAX], most = 0;
    if (esp_comm_size(comm) == 1) return mine;
    OK(espi_comm_gather(comm, (espi_place){"seconds", -1}, all, &mine, sizeof mine));
    for (int r = 0; r < esp_comm_size(comm); r++) most = all[r] > most ? all[r] : most;
    return most;
}

/* `of_lower` of the k experts that each token goes to are in the lower half, all as often. */
static void route(unsigned char *to, const espi_config *c, int64_t tokens, int64_t of_lower) {
    const int64_t half = c->experts / 2, of_upper = c->top_k - of_lower;
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t l = 0; l < c->layers; l++)
            for (int64_t k = 0; k < c->top_k; k++, to++) {
                *to = (unsigned char)(k < of_lower ? (t * of_lower + k) % half : half + (t * of_upper + k - of_lower) % half);
                if (t == tokens - 1) *to = UINT8_MAX; /* as of a sampler, which never feeds it back */
            }
}

static double micro_batch(esp_model *model, esp_comm *comm, const esp_batch *batch) {
    esp_tensor hidden, d_hidden;
    double loss;
    const double start = begin(comm);
    OK(esp_model_forward(model, batch, &hidden));
    OK(esp_model_cross_entropy(model, batch, &hidden, &loss, &d_hidden));
    OK(esp_model_backward(model, batch, &d_hidden));
    return slowest(comm, now() - start);
}

static void point(esp_model *model, esp_comm *comm, int64_t tokens, int64_t of_lower, int rounds) {
    const espi_config *c = &model->config;
    const int64_t n_routed = tokens * c->layers * c->top_k;
    int32_t *ids = allocate((size_t)tokens * sizeof *ids), cu[2] = {0, (int32_t)tokens};
    unsigned char *to = allocate((size_t)n_routed);
    double best = 0;
    for (int64_t t = 0; t < tokens; t++) ids[t] = (int32_t)(t * 37 % c->vocab);
    route(to, c, tokens, of_lower);
    const esp_batch batch = ESP_BATCH(.tokens = ids, .cu_seqlens = cu, .n_tokens = tokens, .n_seqs = 1, .routed_experts = to,
                                      .n_routed = n_routed, .routed_bytes = 1, .last_follows = true);
    micro_batch(model, comm, &batch); /* takes memory */
    for (int i = 0; i < rounds; i++) {
        const double seconds = micro_batch(model, comm, &batch);
        if (best == 0 || seconds < best) best = seconds;
    }
    if (esp_comm_rank(comm) == 0)
        printf("{\"processes\": %d, \"ranks\": %d, \"expert_ranks\": %d, \"tokens\": %lld, \"skew\": %.2f, \"seconds\": %.5f}\n",
               esp_comm_size(comm), model->share.ranks, model->share.spread, (long long)tokens, 2.0 * (double)of_lower / (double)c->top_k,
               best);
    free(ids);
    free(to);
}

/* Rows of `bytes` to every rank and from every rank, one after the other in so much memory that none of it is in a cache, as in a pass. */
static void call(esp_comm *comm, size_t bytes, int rounds) {
    enum { POOL = 1 << 27 };
    const size_t ranks = (size_t)esp_comm_size(comm), each = bytes * ranks, places = POOL / 2 / each;
    char *pool = allocate(POOL);
    int64_t at[EXPERTS_MAX], rows[EXPERTS_MAX];
    double best = 0;
    memset(pool, 1, POOL);
    for (size_t r = 0; r < ranks; r++) {
        at[r] = (int64_t)r;
        rows[r] = 1;
    }
    for (int i = 0; i < rounds; i++) {
        char *to = pool + 2 * each * ((size_t)i % places);
        const espi_row_array array = {to, to + each, bytes};
        const espi_row_ranges ranges = {at, rows};
        const double start = begin(comm);
        OK(espi_comm_exchange(comm, (espi_place){"a call", -1}, &array, 1, ranges, ranges));
        const double seconds = slowest(comm, now() - start);
        if (best == 0 || seconds < best) best = seconds;
    }
    if (esp_comm_rank(comm) == 0)
        printf("{\"processes\": %d, \"call_bytes\": %zu, \"seconds\": %.8f}\n", esp_comm_size(comm), bytes * (ranks - 1), best);
    free(pool);
}

int main(int argc, char **argv) {
    esp_comm *comm;
    esp_ctx *ctx;
    esp_model *model;
    program = "esp_bench_scaling";
    stopwatch = CLOCK_MONOTONIC;
    OK(esp_comm_init(&comm, &argc, &argv));
    if (argc < 5) {
        fprintf(stderr, "usage: esp_bench_scaling CONFIG_DIR EXPERT_RANKS ROUNDS TOKENS...\n");
        return 2;
    }
    static const size_t bytes[] = {8, 1 << 18, 1 << 20, 1 << 22, 1 << 23};
    const int rounds = atoi(argv[3]), expert_ranks = atoi(argv[2]);
    OK(esp_ctx_create(&ctx, &ESP_CTX_CONFIG(.backend = "cpu", .comm = expert_ranks > 0 ? comm : NULL)));
    OK(random_model(&model, ctx, argv[1], &ESP_MODEL_CONFIG(.experts = ESP_NF4, .expert_ranks = expert_ranks)));
    if (model->config.experts > EXPERTS_MAX || esp_comm_size(comm) > EXPERTS_MAX) die("at most 254 experts and ranks");
    if (model->share.ranks > 1)
        for (int i = 0; i < (int)(sizeof bytes / sizeof bytes[0]); i++) call(comm, bytes[i], 50);
    for (int i = 4; i < argc; i++)
        for (int skewed = 0; skewed < 2; skewed++)
            point(model, comm, atoi(argv[i]), model->config.top_k / 2 + (skewed ? model->config.top_k / 4 : 0), rounds);
    esp_model_destroy(model);
    esp_ctx_destroy(ctx);
    esp_comm_destroy(comm);
    return 0;
}
