/* A pass of a model that fails on one rank alone, for a reason of its own: where that rank says so, the others end at once with its status;
 * where it is silent, at their deadline. */
#include "ranks.h"

#include "core/clock.h"
#include "core/status.h"
#include "espalier/model.h"

enum { RANKS = 3, WRONG = 1, TOKENS = 6 };

/* Of each rank; shared with the test. */
typedef struct outcome {
    bool says;
    double patience, seconds; /* seconds: that the pass took */
} outcome;

static esp_status forward(esp_model *model, int rank) {
    int32_t ids[TOKENS] = {1, 2, 3, 4, 5, 6};
    const int32_t cu[2] = {0, TOKENS};
    esp_tensor hidden;
    if (rank == WRONG) ids[4] = -7;
    return esp_model_forward(model, &ESP_BATCH(.tokens = ids, .cu_seqlens = cu, .n_tokens = TOKENS, .n_seqs = 1), &hidden);
}

static esp_status pass(rank_job *job) {
    outcome *out = (outcome *)job->user + job->rank;
    esp_ctx *ctx;
    esp_model *model = NULL;
    ESPI_TRY(esp_ctx_create(&ctx, &ESP_CTX_CONFIG(.comm = job->comm, .threads = 1)));
    esp_status status = esp_model_load(&model, ctx, ESP_SOURCE_DIR "/examples/models/mix-moe", NULL);
    if (status == ESP_OK) {
        espi_comm_patience(job->comm, out->patience);
        const double began = espi_seconds();
        status = forward(model, job->rank);
        if (out->says) status = esp_comm_agree(job->comm, "a step of mine", status);
        out->seconds = espi_seconds() - began;
    }
    esp_model_destroy(model);
    esp_ctx_destroy(ctx);
    return status;
}

static void expect_end(bool says, double patience, esp_status status, const char *words) {
    rank_job jobs[RANKS];
    outcome out[RANKS];
    for (int r = 0; r < RANKS; r++) out[r] = (outcome){.says = says, .patience = patience};
    ranks_run(jobs, RANKS, RANKS, pass, out);
    for (int r = 0; r < RANKS; r++) {
        const bool wrong = r == WRONG;
        cr_expect_eq(jobs[r].status, wrong ? ESP_ERR_ARG : status, "rank %d: %s", r, jobs[r].sentence);
        cr_expect(strstr(jobs[r].sentence, wrong ? "batch.tokens[4]: got id -7" : words) != NULL, "rank %d: %s", r, jobs[r].sentence);
        if (says) cr_expect(out[r].seconds < patience / 2, "rank %d: %g s", r, out[r].seconds);
        if (!says && !wrong) cr_expect(out[r].seconds < patience + 2, "rank %d: %g s", r, out[r].seconds);
    }
}

Test(failures, of_a_rank_that_says_so) {
    expect_end(true, 15, ESP_ERR_ARG, "rank 1 failed before \"a step of mine\"");
}

Test(failures, of_a_rank_that_is_silent) {
    expect_end(false, 1, ESP_ERR_COMM, "at \"tokens of a pass\" (call");
}
