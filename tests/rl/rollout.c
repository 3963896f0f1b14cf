/* Batches of rollouts: joined, picked, through a checkpoint and back; what is malformed is named. */
#include "rl/rollout.h"
#include "core/status.h"
#include "outcome.h"

#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { VOCAB = 50, EXPERTS = 8 };

/* Groups of 2; row i has 2 tokens of prompt and 1 + (i + mark) % 3 of completion; every value says where it is from. */
static espi_rollouts make(int64_t rows, int mark) {
    espi_rollouts r;
    espi_rollouts_shape s = {.rows = rows, .group_size = 2, .rewards = 2, .layers = 2, .top_k = 2, .route_bytes = 1, .filtered = 1};
    for (int64_t i = 0; i < rows; i++) s.tokens += 3 + (i + mark) % 3;
    s.kept = rows * 2;
    OK(espi_rollouts_create(&r, &s));
    for (int64_t i = 0, t = 0, k = 0; i < rows; i++) {
        const int64_t first = t, n = 3 + (i + mark) % 3;
        r.n_prompt[i] = 2;
        r.group[i] = mark * 100 + i / 2;
        r.version[i] = mark;
        r.advantage[i] = mark + 0.5 * (double)i;
        r.rewards[2 * i + 1] = (double)(10 * mark + i);
        for (; t < first + n; t++) {
            r.tokens[t] = (int32_t)(t + mark) % VOCAB;
            r.loss_mask[t] = t >= first + 2;
            r.sampler_logprob[t] = -(float)(t + mark);
            if (t < first + n - 1) memset(r.routes + 4 * t, (int)(t + mark) % EXPERTS, 4);
            if (t == first + 2) { /* the first token of the completion was drawn from itself and the next id */
                r.kept_ids[k++] = r.tokens[t];
                r.kept_ids[k++] = r.tokens[t] + 1;
            }
            r.kept_offsets[t + 1] = k;
        }
        r.offsets[i + 1] = t;
    }
    OK(espi_rollouts_check(&r, VOCAB, EXPERTS));
    return r;
}

/* Rows a of x and b of y hold the same. */
static void same_row(const espi_rollouts *x, int64_t a, const espi_rollouts *y, int64_t b) {
    const int64_t n = x->offsets[a + 1] - x->offsets[a], s = x->offsets[a], t = y->offsets[b];
    cr_assert_eq(y->offsets[b + 1] - t, n);
    cr_assert_eq(x->group[a], y->group[b]);
    cr_assert_eq(x->advantage[a], y->advantage[b]);
    cr_assert_arr_eq(x->rewards + 2 * a, y->rewards + 2 * b, 2 * sizeof(double));
    cr_assert_arr_eq(x->tokens + s, y->tokens + t, (size_t)n * sizeof(int32_t));
    cr_assert_arr_eq(x->sampler_logprob + s, y->sampler_logprob + t, (size_t)n * sizeof(float));
    cr_assert_arr_eq(x->routes + 4 * s, y->routes + 4 * t, (size_t)n * 4);
    const int64_t kept = x->kept_offsets[s + n] - x->kept_offsets[s];
    cr_assert_eq(y->kept_offsets[t + n] - y->kept_offsets[t], kept);
    cr_assert_arr_eq(x->kept_ids + x->kept_offsets[s], y->kept_ids + y->kept_offsets[t], (size_t)kept * sizeof(int32_t));
}

Test(rollout, join_and_pick_keep_every_row) {
    espi_rollouts all = {0}, a = make(6, 1), b = make(4, 2);
    OK(espi_rollouts_append(&all, &a));
    OK(espi_rollouts_append(&all, &b));
    OK(espi_rollouts_check(&all, VOCAB, EXPERTS));
    cr_assert_eq(all.shape.rows, 10);
    for (int64_t i = 0; i < 6; i++) same_row(&a, i, &all, i);
    for (int64_t i = 0; i < 4; i++) same_row(&b, i, &all, 6 + i);
    OK(espi_rollouts_select(&all, (const int64_t[]){4, 0, 2}, 3));
    OK(espi_rollouts_check(&all, VOCAB, EXPERTS));
    cr_assert_eq(all.shape.rows, 6);
    for (int64_t i = 0; i < 2; i++) {
        same_row(&b, 2 + i, &all, i);
        same_row(&a, i, &all, 2 + i);
        same_row(&a, 4 + i, &all, 4 + i);
    }
    espi_rollouts_free(&b);
    b = make(2, 0);
    b.shape.rewards = 1;
    FAILS(ESP_ERR_MISMATCH, "with 1 rewards", espi_rollouts_append(&all, &b));
    espi_rollouts_free(&all);
    espi_rollouts_free(&a);
    espi_rollouts_free(&b);
}

Test(rollout, a_checkpoint_gives_back_what_went_in) {
    char path[64];
    snprintf(path, sizeof path, "/tmp/espalier-rollout-%d.h5", (int)getpid());
    espi_saved_array arrays[ESPI_ROLLOUT_ARRAYS];
    espi_checkpoint *c;
    espi_rollouts a = make(8, 3), b;
    size_t n;
    a.has_old = 1;
    espi_rollouts_arrays(arrays, &n, &a);
    OK(espi_checkpoint_write(path, arrays, n, NULL));
    OK(espi_checkpoint_open(&c, path));
    OK(espi_rollouts_read(&b, c));
    espi_checkpoint_close(c);
    remove(path);
    OK(espi_rollouts_check(&b, VOCAB, EXPERTS));
    cr_assert_eq(memcmp(&a.shape, &b.shape, sizeof a.shape), 0);
    cr_assert(b.has_old == 1 && b.has_ref == 0);
    for (int64_t i = 0; i < 8; i++) same_row(&a, i, &b, i);
    espi_rollouts_free(&a);
    espi_rollouts_free(&b);
}

Test(rollout, what_is_malformed_is_named) {
    espi_rollouts r = make(4, 0);
    r.tokens[5] = VOCAB;
    FAILS(ESP_ERR_FORMAT, "row 1 has the id 50", espi_rollouts_check(&r, VOCAB, EXPERTS));
    r.tokens[5] = 5;
    r.loss_mask[3] = 1;
    FAILS(ESP_ERR_FORMAT, "row 1 has loss mask 1 at its token 0", espi_rollouts_check(&r, VOCAB, EXPERTS));
    r.loss_mask[3] = 0;
    r.n_prompt[2] = 5;
    FAILS(ESP_ERR_FORMAT, "row 2 has a prompt of 5 of its 5 tokens", espi_rollouts_check(&r, VOCAB, EXPERTS));
    r.n_prompt[2] = 2;
    r.routes[9] = EXPERTS;
    FAILS(ESP_ERR_FORMAT, "token 2 was routed to expert 8", espi_rollouts_check(&r, VOCAB, EXPERTS));
    r.routes[9] = ESPI_ROUTE_NATIVE_U8;
    r.kept_ids[0] = r.tokens[2] - 1;
    r.kept_ids[1] = r.tokens[2] + 1;
    FAILS(ESP_ERR_FORMAT, "its kept ids lack it", espi_rollouts_check(&r, VOCAB, EXPERTS));
    r.kept_ids[0] = r.tokens[2];
    r.offsets[1] = 0;
    FAILS(ESP_ERR_FORMAT, "offsets[1] is 0 after 0", espi_rollouts_check(&r, VOCAB, EXPERTS));
    espi_rollouts_free(&r);
    FAILS(ESP_ERR_FORMAT, "5 rows in groups of 2", espi_rollouts_create(&r, &(espi_rollouts_shape){.rows = 5, .group_size = 2}));
}
