/* Adapters of several ranks: the files have the bytes of one rank's, in every form; each rank reads what is its own; a failure of one is
 * everybody's and leaves the old files. */
#define _DEFAULT_SOURCE /* syscall */
#include "adapter_files.h"
#include "faulty_files.h"
#include "ranks.h"

/* What is written, and where. */
typedef struct setting {
    const char *model, *dir;
    esp_adapter_config form;
    int diagonal; /* how many experts have a B in two blocks; -1: all */
} setting;

static esp_status take(esp_model **model, esp_ctx **ctx, rank_job *job, const char *folder, uint64_t seed, const char *adapter_dir) {
    char dir[ESPI_PATH_MAX];
    snprintf(dir, sizeof dir, DATA "%s", folder);
    *model = NULL;
    ESPI_TRY(esp_ctx_create(ctx, &ESP_CTX_CONFIG(.comm = job->comm, .backend = "ref", .threads = 1)));
    return esp_model_load(model, *ctx, dir,
                          &ESP_MODEL_CONFIG(.seed = seed, .lora_rank = 4, .expert_ranks = job->spread, .adapter_dir = adapter_dir));
}

static void leave(esp_model *model, esp_ctx *ctx) {
    esp_model_destroy(model);
    esp_ctx_destroy(ctx);
}

/* Value j of parameter p of the whole model.  In two blocks: B of gate's rows is 0 for the second half of the ranks, up's for the first. */
static float whole_value(const esp_model *m, const esp_param *p, int64_t i, int64_t j, int diagonal) {
    const float x = (float)(espi_uniform(5, ESPI_STREAM_CONTROL, (uint32_t)i, (uint32_t)j, 0, 0) - 0.5);
    if (!strstr(p->name, "gate_up.lora_B")) return x;
    const int64_t each = p->dims[1] * p->dims[2], expert = j / each, row = j % each / p->dims[2], k = j % p->dims[2];
    const bool up = m->config.glu.interleaved ? row % 2 : row >= p->dims[1] / 2;
    return (diagonal < 0 || expert < diagonal) && up != (k >= p->dims[2] / 2) ? 0 : x;
}

/* The rank's own values: sets them, or counts those that are others. */
static int64_t visit(esp_model *m, int diagonal, bool set) {
    int64_t wrong = 0;
    for (int64_t i = 0; i < m->n_params; i++) {
        const esp_param *p = &m->params[i];
        const int64_t n = count(p), first = p->rank == 3 ? m->share.first * p->dims[1] * p->dims[2] : 0;
        for (int64_t j = 0; j < n; j++) {
            const float x = whole_value(m, p, i, first + j, diagonal);
            if (set)
                ((float *)p->data)[j] = x;
            else
                wrong += ((const float *)p->data)[j] != x;
        }
    }
    return wrong;
}

static esp_status save(rank_job *job) {
    const setting *s = job->user;
    esp_ctx *ctx = NULL;
    esp_model *model;
    esp_status status = take(&model, &ctx, job, s->model, 1, NULL);
    if (status == ESP_OK) {
        (void)visit(model, s->diagonal, true);
        status = esp_model_save_adapter_as(model, s->dir, &s->form);
    }
    leave(model, ctx);
    return status;
}

static esp_status load_it(rank_job *job) {
    const setting *s = job->user;
    esp_ctx *ctx = NULL;
    esp_model *model;
    esp_status status = take(&model, &ctx, job, s->model, 2, NULL);
    if (status == ESP_OK) status = esp_model_load_adapter(model, s->dir);
    if (status == ESP_OK) job->wrong = visit(model, s->diagonal, false);
    leave(model, ctx);
    return status;
}

static esp_status load_with_it(rank_job *job) {
    const setting *s = job->user;
    esp_ctx *ctx = NULL;
    esp_model *model;
    const esp_status status = take(&model, &ctx, job, s->model, 2, s->dir);
    if (status == ESP_OK) job->wrong = visit(model, s->diagonal, false);
    leave(model, ctx);
    return status;
}

static const char *const files[] = {"adapter_config.json", "adapter_model.safetensors"};

static void expect_same_files(const char *a, const char *b, const char *what) {
    for (int i = 0; i < 2; i++) {
        char path[ESPI_PATH_MAX], *text[2];
        size_t bytes[2];
        OK(espi_path_join(path, a, files[i]));
        OK(espi_file_read_all(&text[0], &bytes[0], path, (size_t)1 << 26));
        OK(espi_path_join(path, b, files[i]));
        OK(espi_file_read_all(&text[1], &bytes[1], path, (size_t)1 << 26));
        cr_assert(bytes[0] == bytes[1] && memcmp(text[0], text[1], bytes[0]) == 0, "%s: %s differs", what, files[i]);
        free(text[0]);
        free(text[1]);
    }
    cr_assert_eq(scratch_count(b), 2, "%s: something else is in the folder", what);
}

/* More ranks than experts; several models beside one another. */
static const int cuts[][2] = {{2, 2}, {3, 3}, {4, 4}, {8, 8}, {11, 11}, {4, 2}, {3, 1}};

static void expect_bytes(setting s, const char *what) {
    char one[ESPI_PATH_MAX], several[ESPI_PATH_MAX];
    scratch_make(one);
    s.dir = one;
    ranks_well(1, 1, save, &s, what);
    ranks_well(1, 1, load_it, &s, what);
    for (int i = 0; i < (int)(sizeof cuts / sizeof *cuts); i++) {
        const int ranks = cuts[i][0], spread = cuts[i][1];
        scratch_make(several);
        s.dir = several;
        ranks_well(ranks, spread, save, &s, what);
        expect_same_files(one, several, what);
        ranks_well(ranks, spread, load_it, &s, what);
        ranks_well(ranks, spread, load_with_it, &s, what);
        scratch_remove(several);
    }
    scratch_remove(one);
}

#define FORM(...) ESP_ADAPTER_CONFIG(__VA_ARGS__)

Test(adapter_ranks, fused_of_five_experts) {
    expect_bytes((setting){.model = "go2/model", .form = FORM(.form = ESP_ADAPTER_FORM_DEFAULT)}, "go2");
    expect_bytes((setting){.model = "go2/model", .form = FORM(.columns = ESP_ADAPTER_EXPERT_SLOWEST)}, "go2, expert slowest");
}
Test(adapter_ranks, fused_because_asked) {
    expect_bytes((setting){.model = "q3a/model", .form = FORM(.form = ESP_ADAPTER_3D)}, "q3a, 3-D");
    expect_bytes((setting){.model = "vl/model", .form = FORM(.form = ESP_ADAPTER_FORM_DEFAULT)}, "vl");
}
Test(adapter_ranks, per_expert) {
    expect_bytes((setting){.model = "q3a/model", .form = FORM(.form = ESP_ADAPTER_2D)}, "q3a, 2-D");
    expect_bytes((setting){.model = "gla/model", .form = FORM(.form = ESP_ADAPTER_2D)}, "gla, 2-D");
}
/* Gate and up get an A each where all experts allow it: one expert of one rank decides for all. */
Test(adapter_ranks, the_form_is_that_of_all_experts) {
    static const char key[] = "base_model.model.model.layers.0.mlp.experts.0.gate_proj.lora_A.weight";
    for (int i = 0; i < 3; i++) {
        const int diagonal = (const int[]){-1, 7, 1}[i];
        setting s = {.model = "q3a/model", .form = FORM(.form = ESP_ADAPTER_2D), .diagonal = diagonal};
        char dir[ESPI_PATH_MAX], path[ESPI_PATH_MAX];
        espi_st_file *file;
        if (diagonal >= 0) {
            expect_bytes(s, "mostly in two blocks");
            continue;
        }
        scratch_make(dir);
        s.dir = dir;
        ranks_well(3, 3, save, &s, "in two blocks");
        OK(espi_path_join(path, dir, files[1]));
        OK(espi_st_open(&file, path));
        cr_expect_eq(espi_st_find(file, key)->dims[0], 2, "an A of half the rank each");
        espi_st_close(file);
        scratch_remove(dir);
    }
}

/* Whichever call fails on whichever rank: all ranks say so, and the folder is as it was. */
Test(adapter_ranks, a_full_disk_is_everybodys) {
    char dir[ESPI_PATH_MAX], before[ESPI_PATH_MAX];
    setting s = {.model = "go2/model", .dir = before, .form = FORM(.form = ESP_ADAPTER_FORM_DEFAULT)};
    scratch_make(before);
    scratch_make(dir);
    ranks_well(3, 3, save, &s, "before");
    s.dir = dir;
    ranks_well(3, 3, save, &s, "before");
    s.diagonal = -1; /* other values now */
    for (int at = 1; at <= 17; at += 4) {
        fault_set(at, false);
        ranks_fail(3, 3, save, &s, ESP_ERR_IO, "No space left");
        fault_set(0, false);
        expect_same_files(before, dir, "after a full disk");
    }
    scratch_remove(dir);
    scratch_remove(before);
}

/* A file that cannot be read leaves every rank's model as it was. */
static esp_status load_damaged(rank_job *job) {
    const setting *s = job->user;
    esp_ctx *ctx = NULL;
    esp_model *model;
    esp_status status = take(&model, &ctx, job, s->model, 2, NULL);
    if (status == ESP_OK) {
        (void)visit(model, 0, true);
        status = esp_model_load_adapter(model, s->dir);
        job->wrong = visit(model, 0, false);
    }
    leave(model, ctx);
    return status;
}

Test(adapter_ranks, a_bad_value_of_one_rank) {
    char dir[ESPI_PATH_MAX];
    const setting s = {.model = "q3a/model", .dir = dir, .form = FORM(.form = ESP_ADAPTER_2D)};
    scratch_make(dir);
    ranks_well(2, 2, save, (void *)&s, "to be damaged");
    espi_st_file *file;
    char path[ESPI_PATH_MAX];
    OK(espi_path_join(path, dir, files[1]));
    OK(espi_st_open(&file, path));
    const espi_st_tensor *t = espi_st_find(file, "base_model.model.model.layers.1.mlp.experts.7.down_proj.lora_B.weight");
    cr_assert_not_null(t);
    char *bytes;
    size_t n;
    OK(espi_file_read_all(&bytes, &n, path, (size_t)1 << 26));
    memset(bytes + t->offset, 0xff, 4);
    OK(espi_file_write_atomic(path, bytes, n));
    free(bytes);
    espi_st_close(file);
    ranks_fail(2, 2, load_damaged, (void *)&s, ESP_ERR_NONFINITE, "experts.7.down_proj.lora_B");
    scratch_remove(dir);
}

static esp_status convert(rank_job *job) {
    esp_ctx *ctx = NULL;
    ESPI_TRY(esp_ctx_create(&ctx, &ESP_CTX_CONFIG(.comm = job->comm, .backend = "ref", .threads = 1)));
    const esp_status status = esp_adapter_convert(ctx, job->user, DATA "q3a/adapter", DATA "q3a/model", NULL, NULL);
    esp_ctx_destroy(ctx);
    return status;
}

Test(adapter_ranks, files_are_made_of_files_alone) {
    ranks_fail(2, 2, convert, "/tmp/espalier-never-made", ESP_ERR_UNSUPPORTED, "expected one that is alone");
}
