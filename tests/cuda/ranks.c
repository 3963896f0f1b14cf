/* One rank of several on GPUs (ranks.sh starts them): a training step, of which rank 0 prints the digests that must not depend on the ranks;
 * and the exchange of rows by itself.  Exit status 77: no GPU.
 *   ranks step FOLDER [spread=N] [rows=N] [batches=N] [tokens=N] [steps=N] [router=1]
 *   ranks exchange [bytes=N]      the largest message to each rank
 *   ranks make FOLDER             writes the model of middle size that the test trains */
#include "dist/link.h"
#include "rank_step.h"

#include "core/clock.h"
#include "core/ctx.h"
#include "core/status.h"
#include "kernels/backend.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

enum { SKIPPED = 77, TIMES = 20 };

static int64_t option(int argc, char **argv, const char *name, int64_t value) {
    const size_t n = strlen(name);
    for (int i = 2; i < argc; i++)
        if (strncmp(argv[i], name, n) == 0 && argv[i][n] == '=') value = strtoll(argv[i] + n + 1, NULL, 10);
    return value;
}

/* ---- a step ---- */

static esp_status step(esp_comm *comm, esp_ctx *ctx, int argc, char **argv) {
    const rank_setting set = {.dir = argv[2],
                              .spread = (int)option(argc, argv, "spread", 0),
                              .rows = option(argc, argv, "rows", 0),
                              .batches = (int)option(argc, argv, "batches", 7),
                              .tokens = (int)option(argc, argv, "tokens", 40),
                              .steps = (int)option(argc, argv, "steps", 1),
                              .router = option(argc, argv, "router", 0) != 0};
    rank_digest digest;
    char text[RANK_TEXT];
    esp_memory memory = ESP_MEMORY_INIT;
    ESPI_TRY(rank_step(&digest, ctx, &set));
    ESPI_TRY(esp_ctx_memory(ctx, &memory));
    rank_text(text, &digest);
    if (esp_comm_rank(comm) == 0)
        printf("{\"model\": \"%s\", \"ranks\": %d, \"spread\": %d, \"rows\": %" PRId64 ", \"step_seconds\": %.4f, \"norm\": %.17g, "
               "\"peak_mb\": %.1f, \"digest\": \"%s\"}\n",
               strrchr(set.dir, '/') ? strrchr(set.dir, '/') + 1 : set.dir, esp_comm_size(comm), set.spread, set.rows, digest.seconds,
               digest.value_of_norm, (double)memory.peak / 1e6, text);
    return ESP_OK;
}

/* ---- rows ---- */

typedef struct rows {
    espi_message *send, *recv;
    unsigned char *out, *in, *host;
    size_t bytes; /* of all messages */
} rows;

static unsigned char content(int from, int to, size_t i) {
    return (unsigned char)(from * 37 + to * 101 + (int)(i * 7 + i / 251));
}

/* To the rank d places on: all of it, half, nothing, and so on. */
static size_t share_of(int from, int to, int size, size_t most, bool even) {
    const int d = (to - from + size) % size;
    return even || d % 3 == 0 ? most : d % 3 == 1 ? most / 2 + 3 : 0;
}

static esp_status exchange_once(espi_link *link, rows *x) {
    int ticket;
    ESPI_TRY(espi_link_begin(link, (espi_place){"rows of the test", 0}, x->send, x->recv, 1, &ticket));
    return espi_link_end(link, ticket);
}

static void fill_messages(rows *x, int rank, int size, size_t most, bool even) {
    for (int r = 0; r < size; r++) {
        x->send[r] = (espi_message){x->out + (size_t)r * most, share_of(rank, r, size, most, even)};
        x->recv[r] = (espi_message){x->in + (size_t)r * most, share_of(r, rank, size, most, even)};
        for (size_t i = 0; i < x->send[r].bytes; i++) x->host[(size_t)r * most + i] = content(rank, r, i);
    }
}

static esp_status check(esp_ctx *ctx, rows *x, int rank, int size, size_t most) {
    ESPI_TRY(espi_ctx_get(ctx, x->host, x->in, x->bytes));
    int64_t wrong = 0;
    for (int r = 0; r < size; r++)
        for (size_t i = 0; i < x->recv[r].bytes; i++) wrong += x->host[(size_t)r * most + i] != content(r, rank, i);
    return wrong == 0 ? ESP_OK : ESPI_FAIL(ESP_ERR_MISMATCH, "%" PRId64 " bytes are wrong of messages of up to %zu", wrong, most);
}

static esp_status one_size(esp_comm *comm, esp_ctx *ctx, espi_link *link, rows *x, size_t most, bool even) {
    const int rank = esp_comm_rank(comm), size = esp_comm_size(comm);
    x->bytes = most * (size_t)size;
    fill_messages(x, rank, size, most, even);
    ESPI_TRY(espi_ctx_put(ctx, x->out, x->host, x->bytes));
    ESPI_TRY(espi_ctx_zero(ctx, x->in, x->bytes));
    ESPI_TRY(exchange_once(link, x));
    ESPI_TRY(check(ctx, x, rank, size, most));
    ESPI_TRY(espi_comm_meet(comm, (espi_place){"before the clock", -1}));
    const double start = espi_seconds();
    for (int i = 0; i < TIMES; i++) ESPI_TRY(exchange_once(link, x));
    ESPI_TRY(espi_ctx_wait(ctx));
    double mine = (espi_seconds() - start) / TIMES, all[64], slowest = 0;
    ESPI_TRY(espi_comm_gather(comm, (espi_place){"times", -1}, all, &mine, sizeof mine));
    for (int r = 0; r < size; r++) slowest = all[r] > slowest ? all[r] : slowest;
    if (rank == 0 && even)
        printf("{\"exchange\": \"%s\", \"ranks\": %d, \"bytes_to_each\": %zu, \"us\": %.1f, \"gb_per_s_sent_to_others\": %.2f}\n",
               espi_link_name(link), size, most, slowest * 1e6, (double)most * (size - 1) / slowest / 1e9);
    return ESP_OK;
}

static esp_status exchange(esp_comm *comm, esp_ctx *ctx, int argc, char **argv) {
    const size_t largest = (size_t)option(argc, argv, "bytes", 64 << 20), size = (size_t)esp_comm_size(comm);
    espi_link *link;
    rows x = {.send = calloc(size, sizeof *x.send), .recv = calloc(size, sizeof *x.recv), .host = malloc(size * largest)};
    if (!x.send || !x.recv || !x.host || size > 64) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for %zu ranks", size);
    ESPI_TRY(espi_link_of(&link, ctx));
    ESPI_TRY(espi_ctx_alloc(ctx, ESPI_MEM_ACTIVATIONS, size * largest, &x.out));
    ESPI_TRY(espi_ctx_alloc(ctx, ESPI_MEM_ACTIVATIONS, size * largest, &x.in));
    esp_status status = ESP_OK;
    for (size_t most = 4096; most <= largest && status == ESP_OK; most *= 4) {
        status = one_size(comm, ctx, link, &x, most, false);
        if (status == ESP_OK) status = one_size(comm, ctx, link, &x, most, true);
    }
    espi_ctx_free(ctx, ESPI_MEM_ACTIVATIONS, x.out, size * largest);
    espi_ctx_free(ctx, ESPI_MEM_ACTIVATIONS, x.in, size * largest);
    free(x.send);
    free(x.recv);
    free(x.host);
    return status;
}

/* ---- a model of middle size: a Qwen3-MoE of 4 layers and 32 experts ---- */

enum { LAYERS = 4, HIDDEN = 1024, EXPERTS = 32, WIDTH = 512, HEADS = 16, KV_HEADS = 4, HEAD_DIM = 64, VOCAB = 2048, NAMES = 1024 };

static const char config[] =
    "{\"architectures\": [\"Qwen3MoeForCausalLM\"], \"model_type\": \"qwen3_moe\", \"attention_bias\": false, \"decoder_sparse_step\": 1, "
    "\"head_dim\": 64, \"hidden_act\": \"silu\", \"hidden_size\": 1024, \"intermediate_size\": 2048, \"max_position_embeddings\": 4096, "
    "\"mlp_only_layers\": [], \"moe_intermediate_size\": 512, \"norm_topk_prob\": true, \"num_attention_heads\": 16, "
    "\"num_experts\": 32, \"num_experts_per_tok\": 4, \"num_hidden_layers\": 4, \"num_key_value_heads\": 4, \"rms_norm_eps\": 1e-06, "
    "\"rope_theta\": 10000.0, \"tie_word_embeddings\": false, \"torch_dtype\": \"bfloat16\", \"use_sliding_window\": false, "
    "\"vocab_size\": 2048}\n";

/* One more tensor for the header; *at: the bytes so far. */
static void entry(char *header, size_t room, size_t *at, const char *name, int64_t rows, int64_t cols) {
    const size_t n = strlen(header), bytes = (size_t)(rows * (cols ? cols : 1)) * 2;
    char shape[64];
    snprintf(shape, sizeof shape, cols ? "[%" PRId64 ",%" PRId64 "]" : "[%" PRId64 "]", rows, cols);
    snprintf(header + n, room - n, "%c\"%s\":{\"dtype\":\"BF16\",\"shape\":%s,\"data_offsets\":[%zu,%zu]}", n ? ',' : '{', name, shape, *at,
             *at + bytes);
    *at += bytes;
}

static void layer_entries(char *header, size_t room, size_t *at, int layer) {
    static const struct {
        const char *name;
        int rows, cols;
    } one[] = {{"input_layernorm", HIDDEN, 0},
               {"post_attention_layernorm", HIDDEN, 0},
               {"self_attn.q_norm", HEAD_DIM, 0},
               {"self_attn.k_norm", HEAD_DIM, 0},
               {"self_attn.q_proj", HEADS * HEAD_DIM, HIDDEN},
               {"self_attn.k_proj", KV_HEADS * HEAD_DIM, HIDDEN},
               {"self_attn.v_proj", KV_HEADS * HEAD_DIM, HIDDEN},
               {"self_attn.o_proj", HIDDEN, HEADS * HEAD_DIM},
               {"mlp.gate", EXPERTS, HIDDEN}};
    char name[128];
    for (size_t i = 0; i < sizeof one / sizeof one[0]; i++) {
        snprintf(name, sizeof name, "model.layers.%d.%s.weight", layer, one[i].name);
        entry(header, room, at, name, one[i].rows, one[i].cols);
    }
    for (int e = 0; e < 3 * EXPERTS; e++) {
        snprintf(name, sizeof name, "model.layers.%d.mlp.experts.%d.%s_proj.weight", layer, e / 3,
                 e % 3 == 0   ? "gate"
                 : e % 3 == 1 ? "up"
                              : "down");
        entry(header, room, at, name, e % 3 == 2 ? HIDDEN : WIDTH, e % 3 == 2 ? WIDTH : HIDDEN);
    }
}

static bool write_values(FILE *f, size_t n) {
    enum { CHUNK = 1 << 16 };
    static uint16_t values[CHUNK];
    uint64_t state = 88172645463325252u;
    for (size_t done = 0; done < n; done += CHUNK) {
        for (int i = 0; i < CHUNK; i++) { /* magnitudes of 2^-8 to 2^-5 */
            state = state * 6364136223846793005u + 1442695040888963407u;
            values[i] = (uint16_t)((state >> 63) << 15 | (uint64_t)(119 + ((state >> 60) & 3)) << 7 | ((state >> 40) & 0x7f));
        }
        const size_t count = n - done < CHUNK ? n - done : CHUNK;
        if (fwrite(values, 2, count, f) != count) return false;
    }
    return true;
}

static int make(const char *dir) {
    const size_t room = (size_t)NAMES * 200;
    char path[1024], *header = calloc(1, room);
    size_t bytes = 0;
    if (!header) return 1;
    entry(header, room, &bytes, "model.embed_tokens.weight", VOCAB, HIDDEN);
    entry(header, room, &bytes, "lm_head.weight", VOCAB, HIDDEN);
    entry(header, room, &bytes, "model.norm.weight", HIDDEN, 0);
    for (int l = 0; l < LAYERS; l++) layer_entries(header, room, &bytes, l);
    size_t n = strlen(header);
    header[n++] = '}';
    while (n % 8) header[n++] = ' ';
    (void)mkdir(dir, 0777);
    snprintf(path, sizeof path, "%s/config.json", dir);
    FILE *f = fopen(path, "w");
    bool right = f && fputs(config, f) >= 0;
    if (f) right = fclose(f) == 0 && right;
    snprintf(path, sizeof path, "%s/model.safetensors", dir);
    f = fopen(path, "wb");
    const uint64_t length = n;
    right = right && f && fwrite(&length, 8, 1, f) == 1 && fwrite(header, 1, n, f) == n && write_values(f, bytes / 2);
    if (f) right = fclose(f) == 0 && right;
    free(header);
    return right ? 0 : 1;
}

int main(int argc, char **argv) {
    if (argc == 3 && strcmp(argv[1], "make") == 0) return make(argv[2]);
    const bool steps = argc >= 3 && strcmp(argv[1], "step") == 0;
    if (!steps && !(argc >= 2 && strcmp(argv[1], "exchange") == 0)) {
        fputs("ranks step FOLDER [name=value ..], ranks exchange [bytes=N], or ranks make FOLDER\n", stderr);
        return 64;
    }
    const espi_backend *gpu = espi_backends_gpu[0];
    if (gpu == NULL || !gpu->available()) {
        puts("skipped: no GPU, or a build without one");
        return SKIPPED;
    }
    esp_comm *comm = NULL;
    esp_ctx *ctx = NULL;
    esp_status status = esp_comm_init(&comm, &argc, &argv);
    if (status == ESP_OK) status = esp_ctx_create(&ctx, &ESP_CTX_CONFIG(.comm = comm, .backend = "cuda", .threads = 2));
    if (status == ESP_OK) status = steps ? step(comm, ctx, argc, argv) : exchange(comm, ctx, argc, argv);
    if (status != ESP_OK) fprintf(stderr, "rank %d: %s\n", esp_comm_rank(comm), esp_last_error());
    const int code = esp_comm_exit_code(comm, status);
    esp_ctx_destroy(ctx);
    esp_comm_destroy(comm);
    return code;
}
