/* What each of several ranks loads is its slice of the whole model, byte for byte, from every form of a checkpoint; it takes what was planned,
 * and leaves no file in the page cache.  Loading makes no calls between the ranks, so one thread loads for all. */
#define _DEFAULT_SOURCE /* mincore */
#include "dist/comm.h"
#include "espalier/plan.h"
#include "gpt_oss_forms.h"
#include "models/passes.h"
#include "quantise_item.h"

#include <fcntl.h>
#include <sys/mman.h>

enum { MOST = 9 };

/* One rank's model, or the whole one. */
typedef struct part {
    esp_ctx *ctx;
    esp_model *model;
    char log[2048];
} part;

static void note(void *user, esp_log_level level, const char *line) {
    part *p = user;
    const size_t n = strlen(p->log);
    if (level == ESP_LOG_WARN) snprintf(p->log + n, sizeof p->log - n, "%s\n", line);
}

static esp_status part_load(part *p, esp_comm *comm, const char *backend, const char *dir, const esp_model_config *options) {
    *p = (part){0};
    OK(esp_ctx_create(&p->ctx, &ESP_CTX_CONFIG(.comm = comm, .backend = backend, .log = note, .log_user = p)));
    p->model = calloc(1, sizeof *p->model);
    cr_assert_not_null(p->model);
    p->model->ctx = p->ctx;
    OK(espi_config_read(&p->model->config, dir));
    OK(espi_model_options(&p->model->options, p->model->lora, options, &p->model->config));
    return espi_model_load_weights(p->model, dir);
}

static void part_free(part *p) {
    espi_room_free(&p->model->weights, p->ctx);
    espi_model_skeleton_free(p->model);
    espi_config_free(&p->model->config);
    free(p->model);
    esp_ctx_destroy(p->ctx);
}

static void expect_bytes(const void *mine, const void *whole, size_t each, int64_t first, int64_t count, const char *what) {
    cr_expect_eq(mine != NULL && count > 0, whole != NULL && count > 0, "%s", what);
    if (whole && count > 0)
        cr_expect_eq(memcmp(mine, (const unsigned char *)whole + (size_t)first * each, (size_t)count * each), 0, "%s", what);
}

static void expect_slice(const espi_stack *mine, const espi_stack *whole, int64_t first, size_t packed, const char *what) {
    const int64_t n = mine->experts;
    const size_t parts = (size_t)whole->parts, blocks = parts * (size_t)whole->part_blocks;
    expect_bytes(mine->packed, whole->packed, packed, first, n, what);
    expect_bytes(mine->data, whole->data, parts * whole->part_bytes, first, n, what);
    expect_bytes(mine->absmax, whole->absmax, blocks * sizeof(float), first, n, what);
    expect_bytes(mine->absmax8, whole->absmax8, blocks, first, n, what);
    expect_bytes(mine->scales, whole->scales, blocks, first, n, what);
    expect_bytes(mine->nested, whole->nested, parts * (size_t)whole->part_nested * sizeof(float), first, n, what);
    expect_bytes(mine->offset, whole->offset, parts * sizeof(float), first, n, what);
    expect_bytes(mine->map, whole->map, 256 * sizeof(float), 0, n > 0 ? 1 : 0, what); /* nobody reads that of no experts */
}

static void expect_dense(const espi_mat *mine, const espi_mat *whole, const char *what) {
    expect_bytes(mine->data, whole->data, (size_t)(whole->rows * whole->cols) * esp_dtype_size(whole->dtype), 0, 1, what);
}

static size_t packed_each(const part *p, const espi_stack *s) {
    const espi_backend *b = p->ctx->backends[0];
    return s->packed ? b->packed_bytes(s) : 0;
}

static void expect_share(const part *mine, const part *whole, int ranks, const char *what) {
    const espi_share *share = &mine->model->share;
    const espi_config *c = &mine->model->config;
    cr_assert_eq(share->ranks, ranks);
    expect_dense(&mine->model->embed, &whole->model->embed, what);
    expect_dense(&mine->model->head, &whole->model->head, what);
    for (int64_t l = 0; l < c->layers; l++) {
        const espi_layer *a = &mine->model->layers[l], *b = &whole->model->layers[l];
        char where[200];
        snprintf(where, sizeof where, "%s, rank %d of %d, spread %d, layer %lld", what, share->rank, ranks, share->spread, (long long)l);
        expect_dense(&a->q.w, &b->q.w, where);
        expect_dense(&a->o.w, &b->o.w, where);
        if (a->mlp != ESPI_MLP_MOE) continue;
        expect_dense(&a->router, &b->router, where);
        cr_assert_eq(a->gate_up.experts, share->count);
        expect_slice(&a->gate_up, &b->gate_up, share->first, packed_each(whole, &b->gate_up), where);
        expect_slice(&a->down, &b->down, share->first, packed_each(whole, &b->down), where);
        expect_bytes(a->gate_up_bias, b->gate_up_bias, (size_t)b->gate_up.rows * sizeof(float), share->first, share->count, where);
        expect_bytes(a->down_bias, b->down_bias, (size_t)b->down.rows * sizeof(float), share->first, share->count, where);
    }
}

/* The plan of this rank's context is what loading took, and the most it had at any time. */
static void expect_planned(part *p, const char *dir, const esp_model_config *options, const char *what) {
    esp_plan plan = ESP_PLAN_INIT;
    esp_memory got = ESP_MEMORY_INIT;
    OK(esp_plan_folder(&plan, p->ctx, dir, options, NULL, 16, 1));
    OK(esp_ctx_memory(p->ctx, &got));
    cr_expect_eq(got.weights, plan.dense_weights + plan.expert_weights, "%s", what);
    cr_expect_eq(got.peak, plan.dense_weights + plan.expert_weights + plan.staging, "%s: %zu of %zu", what, got.peak, plan.staging);
    cr_expect_leq(plan.staging, (size_t)64 << 20, "%s", what);
}

static void expect_slices(const char *dir, const char *backend, const esp_model_config *options, const char *what) {
    static const int spreads[][2] = {{1, 1}, {2, 2}, {3, 3}, {4, 4}, {4, 2}, {2, 1}, {MOST, MOST}};
    part whole;
    OK(part_load(&whole, NULL, backend, dir, options));
    for (int i = 0; i < ESPI_COUNT(spreads); i++) {
        const int ranks = spreads[i][0];
        esp_comm *comms[MOST];
        esp_model_config asked = options ? *options : ESP_MODEL_CONFIG(.experts = ESP_Q_DEFAULT);
        asked.expert_ranks = spreads[i][1];
        OK(espi_comm_simulate(comms, ranks));
        int64_t experts = 0;
        for (int r = 0; r < ranks; r++) {
            part p;
            OK(part_load(&p, comms[r], backend, dir, &asked));
            experts += p.model->share.count;
            expect_share(&p, &whole, ranks, what);
            expect_planned(&p, dir, &asked, what);
            cr_expect_str_empty(p.log, "%s: %s", what, p.log);
            part_free(&p);
        }
        cr_expect_eq(experts, whole.model->config.experts * ranks / spreads[i][1], "%s", what);
        for (int r = 0; r < ranks; r++) esp_comm_destroy(comms[r]);
    }
    part_free(&whole);
}

static const esp_model_config plain = {.struct_size = sizeof(esp_model_config), .experts = ESP_Q_NONE};
static const esp_model_config doubled = {.struct_size = sizeof(esp_model_config), .double_quant = true};
static const esp_model_config mxfp4 = {.struct_size = sizeof(esp_model_config), .experts = ESP_MXFP4};

static void expect_golden(const char *folder, const esp_model_config *options) {
    char dir[ESPI_PATH_MAX];
    snprintf(dir, sizeof dir, "%s/tests/golden/data/%s", ESP_SOURCE_DIR, folder);
    expect_slices(dir, "ref", options, folder);
}

static void expect_written(checkpoint *c, const esp_model_config *options, const char *what) {
    char dir[ESPI_PATH_MAX];
    scratch_make(dir);
    checkpoint_write(c, dir);
    checkpoint_close(c);
    expect_slices(dir, "ref", options, what);
    scratch_remove(dir);
}

Test(load, per_expert) {
    expect_golden("q3a/model", NULL);
    expect_golden("q3a/model", &plain);
    expect_golden("q3b/model", &doubled);
    expect_golden("mx/model", &mxfp4);
    expect_golden("ol/model", NULL);
    expect_golden("gla/model", NULL); /* a shared expert, a correction of the router */
}

Test(load, fused) {
    expect_golden("q3c/model_fused", NULL);
    expect_golden("q3c/model_fused", &plain);
    expect_golden("q3c/model_fused", &doubled);
    expect_golden("vl/model", NULL); /* [E,in,out] */
}

Test(load, blocks_and_their_biases) {
    expect_golden("go1/model", NULL);
    expect_golden("go2/model", NULL);
}

/* Of gpt-oss: [E,in,out] in one layer, a tensor for each expert in the other. */
Test(load, joined) {
    for (int i = 0; i < 3; i++) {
        checkpoint *c = plain_gpt_oss();
        list_experts(c);
        expect_written(c, (const esp_model_config *[]){NULL, &plain, &doubled}[i], "joined");
    }
}

Test(load, bitsandbytes_per_expert) {
    expect_golden("q3a/model_nf4", NULL);
    expect_golden("q3a/model_nf4_dq", &doubled);
    expect_golden("q3a/model_nf4_dq", NULL);
    expect_golden("q3a/model_nf4", &doubled);
}

#define STACK(layer, name) "model.layers." layer ".mlp.experts." name "_proj"

Test(load, bitsandbytes_fused) {
    static const char *const names[] = {STACK("0", "gate_up"), STACK("0", "down"), STACK("1", "gate_up"), STACK("1", "down")};
    for (int nested = 0; nested < 2; nested++) {
        checkpoint *c = checkpoint_open("q3c/model_fused");
        for (int i = 0; i < ESPI_COUNT(names); i++) quantise_item(c, names[i], ESP_NF4, nested);
        expect_written(c, NULL, nested ? "bitsandbytes, fused, nested" : "bitsandbytes, fused");
    }
}

/* The form in which the CPU's kernels want the experts, where it has one. */
Test(load, as_the_backend_wants_it) {
    expect_slices(ESP_SOURCE_DIR "/tests/golden/data/q3a/model", "cpu", NULL, "packed");
    expect_slices(ESP_SOURCE_DIR "/tests/golden/data/go2/model", "cpu", NULL, "packed");
}

static void expect_refused_everywhere(checkpoint *c, const char *missing) {
    char dir[ESPI_PATH_MAX];
    esp_comm *comms[3];
    scratch_make(dir);
    checkpoint_write(c, dir);
    checkpoint_close(c);
    OK(espi_comm_simulate(comms, 3));
    for (int r = 0; r < 3; r++) {
        part p;
        const esp_status got = part_load(&p, comms[r], "ref", dir, NULL);
        cr_expect_eq(got, ESP_ERR_FORMAT, "rank %d: %s", r, esp_status_name(got));
        cr_expect(strstr(esp_last_error(), missing) != NULL, "rank %d: %s", r, esp_last_error());
        part_free(&p);
        esp_comm_destroy(comms[r]);
    }
    scratch_remove(dir);
}

/* A folder that lacks an expert is no model, whosever it is; nor is one with a tensor too many. */
Test(load, what_others_lack_is_missing) {
    checkpoint *c = checkpoint_open("q3a/model");
    checkpoint_drop(c, "model.layers.1.mlp.experts.7.down_proj.weight");
    expect_refused_everywhere(c, "experts.7.down_proj.weight is missing");
    c = checkpoint_open("q3a/model_nf4");
    checkpoint_drop(c, "model.layers.1.mlp.experts.7.up_proj.weight.absmax");
    expect_refused_everywhere(c, "experts.7.up_proj.weight");
    c = checkpoint_open("q3a/model_nf4");
    checkpoint_drop(c, "model.layers.0.mlp.experts.0.gate_proj.weight");
    expect_refused_everywhere(c, "experts.0.gate_proj.weight");
    c = plain_gpt_oss();
    list_experts(c);
    checkpoint_drop(c, GO("1") "down_projs.4.bias");
    expect_refused_everywhere(c, "down_projs.4.bias is missing");
    c = checkpoint_open("q3a/model");
    checkpoint_add(c, "model.layers.1.mlp.experts.8.down_proj.weight", ESP_U8, 1, (int64_t[]){1}, "x", 1);
    expect_refused_everywhere(c, "experts.8.down_proj.weight");
}

/* Pages of a file that are in the page cache, which it then leaves; *all: that it has. */
static int64_t cached_pages(const char *path, int64_t *all) {
    const int fd = open(path, O_RDONLY);
    const off_t bytes = lseek(fd, 0, SEEK_END);
    const size_t page = (size_t)sysconf(_SC_PAGESIZE), n = ((size_t)bytes + page - 1) / page;
    unsigned char *map = mmap(NULL, (size_t)bytes, PROT_READ, MAP_SHARED, fd, 0), *there = malloc(n);
    cr_assert(map != MAP_FAILED && there);
    cr_assert_eq(mincore(map, (size_t)bytes, there), 0);
    int64_t cached = 0;
    for (size_t i = 0; i < n; i++) cached += there[i] & 1;
    free(there);
    munmap(map, (size_t)bytes);
    posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
    close(fd);
    *all = (int64_t)n;
    return cached;
}

/* Several ranks leave of a large file what the kernel read ahead; one that is alone leaves all, as it may want it again. */
Test(load, reads_leave_the_page_cache) {
    enum { WORDS = 32768 };
    char dir[ESPI_PATH_MAX], path[ESPI_PATH_MAX];
    int64_t all, kept;
    esp_comm *comms[2];
    part p;
    checkpoint *c = checkpoint_open("q3a/model");
    float *table = calloc(WORDS * 64, sizeof *table);
    cr_assert_not_null(table);
    for (int i = 0; i < 2; i++) {
        const char *name = i ? "lm_head.weight" : "model.embed_tokens.weight";
        checkpoint_drop(c, name);
        checkpoint_add(c, name, ESP_F32, 2, (int64_t[]){WORDS, 64}, table, (size_t)WORDS * 64 * sizeof *table);
    }
    free(table);
    checkpoint_set(c, "vocab_size", "32768");
    scratch_make(dir);
    checkpoint_write(c, dir);
    checkpoint_close(c);
    OK(espi_path_join(path, dir, "model.safetensors"));
    OK(espi_comm_simulate(comms, 2));
    (void)cached_pages(path, &all);
    if (cached_pages(path, &all) == 0) { /* a file system that has pages to drop */
        OK(part_load(&p, NULL, "ref", dir, NULL));
        part_free(&p);
        kept = cached_pages(path, &all);
        cr_expect_gt(kept, all * 9 / 10, "alone: %lld of %lld pages", (long long)kept, (long long)all);
        OK(part_load(&p, comms[1], "ref", dir, NULL));
        part_free(&p);
        kept = cached_pages(path, &all);
        cr_expect_lt(kept, all / 16, "two ranks: %lld of %lld pages", (long long)kept, (long long)all);
    }
    for (int r = 0; r < 2; r++) esp_comm_destroy(comms[r]);
    scratch_remove(dir);
}
