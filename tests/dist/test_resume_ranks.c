/* A trainer's checkpoint, saved by any number of ranks and resumed by any other, ends with the bits of a run of one rank that nothing
 * interrupted. */
#include "demo.h"
#include "ranks.h"
#include "scratch.h"

/* Adapter and moments after the last step, whole. */
typedef struct whole {
    unsigned char *values[512];
    size_t bytes[512];
    int n;
} whole;

typedef struct run {
    const char *out, *from; /* from: NULL, or the folder of the checkpoint to go on with */
    int64_t steps;
    whole *truth;
    bool keep; /* the truth is what this run ends with */
} run;

/* An array of this rank, of which it has part share->first .. of the model's experts; or a whole one. */
static void visit(rank_job *job, const espi_share *share, int *index, const void *data, size_t bytes, bool of_experts) {
    const run *r = job->user;
    whole *w = r->truth;
    const int i = (*index)++;
    if (r->keep) {
        w->values[i] = malloc(bytes + 1);
        memcpy(w->values[i], data, bytes);
        w->bytes[i] = bytes;
        w->n = *index;
        return;
    }
    const size_t each = of_experts ? w->bytes[i] / (size_t)share->experts : w->bytes[i];
    const size_t first = of_experts ? (size_t)share->first * each : 0, n = of_experts ? (size_t)share->count * each : each;
    job->wrong += bytes != n || memcmp(w->values[i] + first, data, n) != 0;
}

static esp_status compare(rank_job *job, esp_trainer *t) {
    const esp_model *m = t->model;
    int index = 0;
    for (int64_t i = 0; i < m->n_params; i++) {
        const esp_param *p = &m->params[i];
        const esp_tensor view = esp_tensor_view(p->data, p->dtype, p->rank, p->dims);
        visit(job, &m->share, &index, p->data, (size_t)esp_tensor_count(&view) * esp_dtype_size(p->dtype), p->rank == 3);
    }
    for (int64_t i = 0; i < esp_optim_array_count(t->optim); i++) {
        esp_optim_array a = ESP_OPTIM_ARRAY_INIT;
        ESPI_TRY(esp_optim_array_get(t->optim, i, &a));
        visit(job, &m->share, &index, a.data, (size_t)a.count * esp_dtype_size(a.dtype), strstr(a.name, "experts") != NULL);
    }
    return ESP_OK;
}

static esp_status train(rank_job *job, const demo *d, esp_trainer **trainer) {
    const run *r = job->user;
    esp_trainer_config c = ESP_TRAINER_CONFIG(.kind = ESP_TRAIN_SFT, .train_file = DEMO_LINES, .out_dir = r->out, .resume_dir = r->from,
                                              .steps = r->steps, .prompts_per_step = 6, .micro_batch_tokens = 64);
    ESPI_TRY(esp_trainer_create(trainer, d->model, d->tokenizer, &c));
    while ((*trainer)->step < r->steps) ESPI_TRY(esp_trainer_step(*trainer, NULL));
    return r->truth ? compare(job, *trainer) : ESP_OK;
}

static esp_status body(rank_job *job) {
    demo d = {NULL, NULL, NULL, NULL};
    esp_status status = esp_ctx_create(&d.ctx, &ESP_CTX_CONFIG(.comm = job->comm, .threads = 1));
    if (status == ESP_OK)
        status = esp_model_load(&d.model, d.ctx, DEMO_MODEL, &ESP_MODEL_CONFIG(.lora_rank = 4, .expert_ranks = job->spread));
    if (status == ESP_OK) status = esp_tokenizer_load(&d.tokenizer, DEMO_MODEL);
    if (status == ESP_OK) status = train(job, &d, &d.trainer);
    demo_free(&d);
    return status;
}

static const int cuts[][2] = {{1, 1}, {2, 2}, {3, 3}, {4, 4}, {4, 2}};
enum { CUTS = sizeof cuts / sizeof *cuts };

Test(resume_ranks, any_number_goes_on_with_any_other) {
    char base[ESPI_PATH_MAX], out[ESPI_PATH_MAX], saved[ESPI_PATH_MAX], name[32];
    whole truth = {.n = 0};
    scratch_make(base);
    OK(espi_path_join(out, base, "truth"));
    ranks_well(1, 1, body, &(run){.out = out, .steps = 2, .truth = &truth, .keep = true}, "the truth");
    cr_assert_gt(truth.n, 0);
    for (int n = 0; n < CUTS; n++) {
        snprintf(name, sizeof name, "saved-%d", n);
        OK(espi_path_join(saved, base, name));
        ranks_well(cuts[n][0], cuts[n][1], body, &(run){.out = saved, .steps = 1}, "saving");
        for (int m = 0; m < CUTS; m++) {
            snprintf(name, sizeof name, "resumed-%d-%d", n, m);
            OK(espi_path_join(out, base, name));
            ranks_well(cuts[m][0], cuts[m][1], body, &(run){.out = out, .from = saved, .steps = 2, .truth = &truth}, name);
        }
    }
    for (int i = 0; i < truth.n; i++) free(truth.values[i]);
    scratch_remove(base);
}
