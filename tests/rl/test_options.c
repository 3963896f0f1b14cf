/* The trainer's options one by one: what each does to a step, and the pairs that are refused by name. */
#include "demo.h"

#include "io/file.h"
#include <math.h>

static esp_trainer_config small(int64_t steps) {
    return ESP_TRAINER_CONFIG(.kind = ESP_TRAIN_GRPO, .train_file = DEMO_PROMPTS, .steps = steps, .seed = 5, .prompts_per_step = 4,
                              .group_size = 4, .eval_every = 1000);
}

static void run(demo *d, int64_t until) {
    while (!esp_trainer_finished(d->trainer) && esp_trainer_steps_done(d->trainer) < until) OK(esp_trainer_step(d->trainer, NULL));
}

/* ---- refusals ---- */

typedef struct refusal {
    const char *a, *b; /* both are named */
    esp_trainer_config c;
} refusal;

#define GRPO(...) ESP_TRAINER_CONFIG(.kind = ESP_TRAIN_GRPO, .train_file = DEMO_PROMPTS, __VA_ARGS__)

Test(options, pairs_that_make_no_sense_are_refused_by_name) {
    const refusal refusals[] = {
        {"level sequence", "loss dapo", GRPO(.objective = {.level = ESP_IS_SEQUENCE})},
        {"level sequence", "loss bnpo", GRPO(.objective = {.level = ESP_IS_SEQUENCE, .loss = ESP_LOSS_BNPO})},
        {"level sequence", "loss dr_grpo", GRPO(.objective = {.level = ESP_IS_SEQUENCE, .loss = ESP_LOSS_DR_GRPO})},
        {"level token", "loss luspo", GRPO(.objective = {.loss = ESP_LOSS_LUSPO})},
        {"entropy_target", "top_entropy_quantile", GRPO(.entropy_target = 0.1f, .objective = {.top_entropy_quantile = 0.5f})},
        {"entropy_target", "entropy_coef below 0", GRPO(.entropy_target = 0.1f, .objective = {.entropy_coef = -0.1f})},
        {"entropy_step", "entropy_target 0", GRPO(.entropy_step = 0.1f)},
        {"entropy_max", "entropy_target 0", GRPO(.entropy_max = 0.1f)},
        {"order normalize_then_sum", "scale other than group", GRPO(.order = ESP_NORMALIZE_THEN_SUM)},
        {"ref_sync_every", "reference base", GRPO(.ref_sync_every = 3, .objective = {.beta = 0.1f})},
        {"no_kl_on_zero_adv", "beta 0", GRPO(.no_kl_on_zero_adv = true)},
        {"no_kl_on_zero_adv", "no_skip", GRPO(.no_kl_on_zero_adv = true, .no_skip = true, .objective = {.beta = 0.1f})},
        {"ref_sync_every", "beta 0", GRPO(.ref_sync_every = 3, .reference = ESP_REFERENCE_SNAPSHOT)},
        {"correction_level sequence", "correction none", GRPO(.correction_level = ESP_IS_SEQUENCE)},
        {"correction_high", "correction none", GRPO(.correction_high = 2)},
        {"correction_low", "correction none", GRPO(.correction_low = 0.5f)},
        {"correction_low", "correction tis", GRPO(.correction = ESP_CORRECTION_TIS, .correction_low = 0.5f)},
        {"correction_low", "correction mis", GRPO(.correction = ESP_CORRECTION_MIS, .correction_low = 0.5f)},
        {"correction_low 3", "correction_high 2", GRPO(.correction = ESP_CORRECTION_ICEPOP, .correction_low = 3, .correction_high = 2)},
        {"reject_low 1.01", "reject_high 0", GRPO(.reject_low = 1.01f)},
        {"correction_level sequence", "loss vespo",
         GRPO(.correction = ESP_CORRECTION_TIS, .correction_level = ESP_IS_SEQUENCE, .objective = {.loss = ESP_LOSS_VESPO})},
        {"mask_truncated", "overlong_share", GRPO(.mask_truncated = true, .overlong_share = 0.2f)},
        {"overlong_penalty", "overlong_share 0", GRPO(.overlong_penalty = 2)},
        {"resample_tries", "shuffle_rewards", GRPO(.resample_tries = 1, .shuffle_rewards = true)},
        {"replay r2", "one update per generation", GRPO(.replay = ESP_REPLAY_R2)},
        {"early_stop", "no eval", GRPO(.early_stop = 2)},
        {"keep_best", "no eval", GRPO(.keep_best = true)},
        {"keep_best", "no out", GRPO(.keep_best = true, .eval_file = DEMO_EVAL)},
        {"keep_checkpoints", "no out", GRPO(.keep_checkpoints = 2)},
    };
    demo d = demo_model(5, false);
    for (size_t i = 0; i < sizeof refusals / sizeof *refusals; i++) {
        const refusal *r = &refusals[i];
        const esp_status status = esp_trainer_create(&d.trainer, d.model, d.tokenizer, &r->c);
        cr_expect(status == ESP_ERR_ARG && strstr(esp_last_error(), r->a) && strstr(esp_last_error(), r->b), "%s with %s: %s: %s", r->a,
                  r->b, esp_status_name(status), esp_last_error());
        esp_trainer_destroy(d.trainer);
        d.trainer = NULL;
    }
    demo_free(&d);
}

Test(options, numbers_out_of_range_are_refused) {
    const refusal refusals[] = {
        {"overlong_share", "[0, 1]", GRPO(.overlong_share = 1.5f)},
        {"temperature", "[1e-06, 1e+06]", GRPO(.temperature = 1e-40f)},
        {"has 21474836", "context of", GRPO(.max_new_tokens = INT32_MAX)},
        {DEMO_EVAL, "context of",
         ESP_TRAINER_CONFIG(.kind = ESP_TRAIN_SFT, .train_file = DEMO_LINES, .eval_file = DEMO_EVAL, .max_new_tokens = INT32_MAX)},
        {"top_p", "[1e-06, 1]", GRPO(.top_p = 1.5f)},
        {"min_p", "[0, 1]", GRPO(.min_p = -0.5f)},
        {"resample_tries", "negative", GRPO(.resample_tries = -1)},
        {"steps_per_generation", "positive", GRPO(.steps_per_generation = -1)},
        {"keep_checkpoints", "0 to 64", GRPO(.keep_checkpoints = 65)},
        {"correction", "0 to 4", GRPO(.correction = (esp_correction)7)},
        {"group_size", "2 or more", GRPO(.group_size = 1)},
        {"resample_tries",
         "SFT",
         {.struct_size = sizeof(esp_trainer_config), .kind = ESP_TRAIN_SFT, .train_file = DEMO_LINES, .resample_tries = 1}}};
    demo d = demo_model(5, false);
    for (size_t i = 0; i < sizeof refusals / sizeof *refusals; i++) {
        const refusal *r = &refusals[i];
        const esp_status status = esp_trainer_create(&d.trainer, d.model, d.tokenizer, &r->c);
        cr_expect(status == ESP_ERR_ARG && strstr(esp_last_error(), r->a) && strstr(esp_last_error(), r->b), "%s: %s", r->a,
                  esp_last_error());
    }
    demo_free(&d);
}

Test(options, presets_are_under_what_is_set_afterwards) {
    esp_trainer_config c = small(1);
    OK(esp_trainer_preset(&c, "dapo"));
    cr_assert(c.objective.epsilon_high == 0.28f && c.resample_tries == 3 && c.scale == ESP_SCALE_GROUP && c.prompts_per_step == 4);
    OK(esp_trainer_preset(&c, "gspo-moe"));
    cr_assert(c.objective.level == ESP_IS_SEQUENCE && c.objective.loss == ESP_LOSS_GRPO && c.objective.epsilon_low == 3e-4f);
    FAILS(ESP_ERR_ARG, "expected trl-default, dapo, dr-grpo, gspo-moe or cispo", esp_trainer_preset(&c, "ppo"));
    c.struct_size = 8;
    FAILS(ESP_ERR_ARG, "struct_size", esp_trainer_preset(&c, "dapo"));
}

/* ---- sources that are not our sampler ---- */

/* Our sampler behind a mask: log-probabilities moved by `shift` (NaN: taken away), the last `lose` groups of a call lost.  tools: some
 * tokens were not sampled, and what stands for their log-probability means nothing. */
typedef struct stranger {
    espi_rollout_source inside;
    float shift;
    bool tools;
    int64_t lose, calls, published;
} stranger;

static esp_status strange(void *self, espi_rollouts *r, const espi_rollout_request *request) {
    stranger *s = self;
    espi_rollout_request q = *request;
    s->calls++;
    q.n_prompts -= (int32_t)(s->lose < q.n_prompts ? s->lose : q.n_prompts);
    if (q.n_prompts == 0) return ESP_OK;
    OK(s->inside.generate(s->inside.self, r, &q));
    for (int64_t i = 0; i < r->shape.tokens; i++) {
        if (r->loss_mask[i]) r->sampler_logprob[i] += s->shift * (float)(1 + i % 3);
        if (!s->tools || i % 5 != 0) continue;
        r->loss_mask[i] = 0;
        r->sampler_logprob[i] = -9;
    }
    return ESP_OK;
}

static esp_status note_publish(void *self, int64_t version) {
    ((stranger *)self)->published = version;
    return ESP_OK;
}

static void estrange(demo *d, stranger *s) {
    s->inside = d->trainer->source;
    s->published = -1;
    d->trainer->source = (espi_rollout_source){.name = "stranger", .self = s, .generate = strange, .publish = note_publish};
}

Test(options, lost_groups_are_counted_and_normalised_away) {
    esp_trainer_config c = small(3);
    c.steps_per_generation = 2;
    stranger s = {.lose = 3};
    demo d = demo_trainer(&c);
    estrange(&d, &s);
    run(&d, 1);
    cr_assert_eq(d.trainer->lost, 3);
    cr_assert_eq(d.trainer->rollouts.shape.rows, 5 * 4);
    cr_assert_eq(d.trainer->n_sequences, 2 * 4); /* five groups over two steps */
    run(&d, 2);
    cr_assert_eq(d.trainer->n_sequences, 3 * 4);
    cr_assert(s.calls == 1 && s.published == 0);
    run(&d, 3);
    cr_assert(s.calls == 2 && s.published == 2);
    demo_free(&d);
    d = demo_trainer(&c);
    s = (stranger){.lose = 7};
    estrange(&d, &s);
    FAILS(ESP_ERR_COMM, "the stranger brought 1 groups of the 8", esp_trainer_step(d.trainer, NULL));
    demo_free(&d);
}

/* Log-probabilities of another program: ours are made by a pass of our own, and are what our sampler would have told. */
Test(options, old_logprobs_of_a_foreign_sampler_are_our_own) {
    esp_trainer_config c = small(4);
    c.updates_per_batch = 2;
    stranger s = {.shift = 0.05f}, absent = {.shift = NAN};
    demo a = demo_trainer(&c), b = demo_trainer(&c), n = demo_trainer(&c);
    estrange(&b, &s);
    estrange(&n, &absent);
    run(&a, 2);
    run(&b, 1);
    cr_assert_float_eq(b.trainer->sums.diff_max, 0.15, 1e-5);
    run(&b, 2);
    run(&n, 2);
    const espi_rollouts *x = &a.trainer->rollouts, *y = &b.trainer->rollouts;
    cr_assert_arr_eq(x->old_logprob, y->old_logprob, (size_t)x->shape.tokens * sizeof(float));
    cr_assert_arr_eq(x->old_logprob, n.trainer->rollouts.old_logprob, (size_t)x->shape.tokens * sizeof(float));
    cr_assert_eq(n.trainer->sums.diff_tokens, 0);
    cr_assert(n.trainer->correction.absent_share == 1 && a.trainer->correction.absent_share == 0);
    cr_assert(a.trainer->correction.ratio_low == 1 && a.trainer->correction.ratio_high == 1 && a.trainer->correction.k3 == 0);
    cr_assert_float_eq(b.trainer->correction.ratio_high, exp(-0.05), 1e-5);
    cr_assert_float_eq(b.trainer->correction.ratio_low, exp(-0.15), 1e-5);
    demo_free(&a);
    demo_free(&b);
    demo_free(&n);
}

Test(options, correction_weights) {
    const struct {
        esp_correction rule;
        float low, high;
        double rho, weight;
    } cases[] = {{ESP_CORRECTION_NONE, 0, 0, 7, 1},          {ESP_CORRECTION_TIS, 0, 2, 1.5, 1.5},
                 {ESP_CORRECTION_TIS, 0, 2, 7, 2},           {ESP_CORRECTION_TIS, 0, 2, 0.01, 0.01},
                 {ESP_CORRECTION_MIS, 0, 3, 2.9, 2.9},       {ESP_CORRECTION_MIS, 0, 3, 3.1, 0},
                 {ESP_CORRECTION_ICEPOP, 0.5f, 5, 0.4, 0},   {ESP_CORRECTION_ICEPOP, 0.5f, 5, 0.6, 0.6},
                 {ESP_CORRECTION_ICEPOP, 0.5f, 5, 4.9, 4.9}, {ESP_CORRECTION_ICEPOP, 0.5f, 5, 5.1, 0}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const esp_trainer_config c = {.correction = cases[i].rule, .correction_low = cases[i].low, .correction_high = cases[i].high};
        const double got = espi_correction_weight(&c, log(cases[i].rho));
        cr_expect(fabs(got - cases[i].weight) < 1e-12, "case %zu: got %g, expected %g", i, got, cases[i].weight);
    }
}

/* One generation of a sampler whose log-probabilities are off by known amounts, and the weights it gets. */
static void weights_of(esp_trainer_config c, stranger s, void (*check)(const esp_trainer *t, const int64_t row)) {
    demo d = demo_trainer(&c);
    estrange(&d, &s);
    OK(espi_trainer_sample(d.trainer));
    cr_assert(d.trainer->rollouts.has_ratio);
    for (int64_t i = 0; i < d.trainer->rollouts.shape.rows; i++) check(d.trainer, i);
    OK(espi_update(d.trainer));
    demo_free(&d);
}

static void by_token(const esp_trainer *t, int64_t row) {
    const espi_rollouts *r = &t->rollouts;
    for (int64_t i = r->offsets[row] + r->n_prompt[row]; i < r->offsets[row + 1]; i++)
        cr_assert_float_eq(r->is_ratio[i], fmin(exp(0.4 * (double)(1 + i % 3)), 2), 1e-4);
}

/* Over the tokens that count. */
static double log_sum(const espi_rollouts *r, int64_t row, int64_t *n) {
    double sum = 0;
    *n = 0;
    for (int64_t i = r->offsets[row]; i < r->offsets[row + 1]; i++) {
        if (!r->loss_mask[i]) continue;
        sum += 0.05 * (double)(1 + i % 3);
        ++*n;
    }
    return sum;
}

/* exp of the sum, not the sum of the exps. */
static void by_sequence(const esp_trainer *t, int64_t row) {
    const espi_rollouts *r = &t->rollouts;
    int64_t n;
    const double rho = exp(log_sum(r, row, &n));
    for (int64_t i = r->offsets[row]; i < r->offsets[row + 1]; i++)
        if (r->loss_mask[i]) cr_assert_float_eq(r->is_ratio[i], rho <= 1.8 ? rho : 0, 1e-4);
    cr_assert_lt(t->correction.k3, 0.02, "of the counted tokens alone");
}

static void by_geometric_mean(const esp_trainer *t, int64_t row) {
    const espi_rollouts *r = &t->rollouts;
    int64_t n;
    const double mean = exp(log_sum(r, row, &n) / (double)n);
    for (int64_t i = r->offsets[row]; i < r->offsets[row + 1]; i++)
        if (r->loss_mask[i]) cr_assert_eq(r->is_ratio[i], mean <= 1.103 ? 1 : 0, "mean %g", mean);
    cr_assert(t->correction.rejected_share > 0 && t->correction.rejected_share < 1);
}

Test(options, tokens_sequences_and_rejection_get_their_weights) {
    esp_trainer_config c = small(2);
    c.correction = ESP_CORRECTION_TIS;
    weights_of(c, (stranger){.shift = -0.4f}, by_token);
    c.correction = ESP_CORRECTION_MIS;
    c.correction_level = ESP_IS_SEQUENCE;
    c.correction_high = 1.8f;
    weights_of(c, (stranger){.shift = -0.05f}, by_sequence);
    weights_of(c, (stranger){.shift = -0.05f, .tools = true}, by_sequence);
    c = small(2);
    c.reject_low = 0.9f;
    c.reject_high = 1.103f;
    weights_of(c, (stranger){.shift = -0.05f}, by_geometric_mean);
    weights_of(c, (stranger){.shift = -0.05f, .tools = true}, by_geometric_mean);
}

/* ---- generations ---- */

/* Each round goes over every group once; two rounds in another order. */
Test(options, slices_partition_a_generation) {
    esp_trainer_config c = small(8);
    c.steps_per_generation = 4;
    c.updates_per_batch = 2;
    demo d = demo_trainer(&c);
    int64_t order[8][16];
    for (int64_t step = 0; step < 8; step++) {
        OK(espi_trainer_sample(d.trainer));
        cr_assert_eq(d.trainer->n_sequences, 16);
        for (int64_t i = 0; i < 16; i++) order[step][i] = d.trainer->sequences[i].row;
        esp_step_stats s = ESP_STEP_STATS_INIT;
        OK(espi_trainer_update(d.trainer, &s));
    }
    cr_assert_eq(d.trainer->generation, 1);
    for (int round = 0; round < 2; round++) {
        int seen[64] = {0}, moved = 0;
        for (int64_t step = 0; step < 4; step++)
            for (int64_t i = 0; i < 16; i++) {
                seen[order[4 * round + step][i]]++;
                moved += order[4 * round + step][i] != 16 * step + i;
                cr_assert_eq(order[4 * round + step][i] / 4, order[4 * round + step][i / 4 * 4] / 4, "a group was split");
            }
        for (int i = 0; i < 64; i++) cr_assert_eq(seen[i], 1);
        cr_assert_gt(moved, 16);
    }
    cr_assert_neq(memcmp(order[0], order[4], sizeof order[0]), 0);
    demo_free(&d);
}

/* Rewards by the prompt alone in all but one of four groups. */
static int often_equal(void *user, const esp_reward_batch *batch, float *reward) {
    int *calls = user;
    for (int64_t i = 0; i < batch->n; i++) reward[i] = i / 4 % 4 == *calls % 4 ? (float)(i % 4) : 1;
    ++*calls;
    return 0;
}

Test(options, groups_without_spread_give_way_a_bounded_number_of_times) {
    int calls = 0;
    const esp_reward reward = {.name = "often", .fn = often_equal, .user = &calls, .weight = 1};
    esp_trainer_config c = small(1);
    c.rewards = &reward;
    c.n_rewards = 1;
    c.resample_tries = 2;
    demo d = demo_trainer(&c);
    OK(espi_trainer_sample(d.trainer));
    /* 4 prompts: one of them differs; 3 more: one of those; 2 more: none or one. */
    const espi_rollouts *r = &d.trainer->rollouts;
    cr_assert_eq(calls, 3);
    cr_assert_eq(r->shape.rows, 16);
    cr_assert_eq(d.trainer->resampled, 4 + 3 + 2 - 4);
    cr_assert_neq(r->reward[0], r->reward[1], "the group with a spread does not come first");
    cr_assert_neq(r->reward[4], r->reward[5]);
    int64_t zero = 0;
    for (int64_t g = 0; g < 4; g++) zero += r->reward[4 * g] == r->reward[4 * g + 1];
    cr_assert_eq(zero, 2);
    cr_assert_eq(d.trainer->cursor, 9);
    demo_free(&d);
}

Test(options, overlong_completions_are_punished_on_a_line) {
    esp_trainer_config c = small(1);
    c.max_new_tokens = 10;
    c.overlong_share = 0.4f;
    c.overlong_penalty = 0.5f;
    demo d = demo_trainer(&c);
    OK(espi_trainer_sample(d.trainer));
    const espi_rollouts *r = &d.trainer->rollouts;
    bool some = false;
    cr_assert_eq(r->shape.rewards, 3);
    cr_assert_str_eq(d.trainer->rewards[2].name, "overlong");
    for (int64_t i = 0; i < r->shape.rows; i++) {
        const int64_t n = r->offsets[i + 1] - r->offsets[i] - r->n_prompt[i];
        const double expected = n <= 6 ? 0 : -(double)(n - 6) / 4;
        cr_assert_float_eq(r->rewards[3 * i + 2], expected, 1e-6);
        cr_assert_float_eq(r->reward[i], r->rewards[3 * i] + 0.2 * r->rewards[3 * i + 1] + 0.5 * expected, 1e-6);
        some = some || n > 6;
    }
    cr_assert(some);
    demo_free(&d);
}

/* Cut completions have no loss, count in no mean of tokens, and still pull on their group's mean. */
Test(options, truncated_completions_can_be_masked) {
    esp_trainer_config c = small(1);
    c.max_new_tokens = 5; /* few answers fit */
    c.mask_truncated = true;
    c.no_skip = true;
    demo d = demo_trainer(&c);
    OK(espi_trainer_sample(d.trainer));
    const espi_rollouts *r = &d.trainer->rollouts;
    int64_t cut = 0, counted = 0;
    for (int64_t i = 0; i < d.trainer->n_sequences; i++) {
        const espi_sequence *s = &d.trainer->sequences[i];
        const bool stopped = r->finish[s->row] == ESPI_FINISH_STOP;
        cr_assert_eq(s->n_counted, stopped ? s->n_completion : 0);
        cut += !stopped;
        counted += s->n_counted;
    }
    cr_assert(cut > 0 && cut < d.trainer->n_sequences);
    OK(espi_update(d.trainer));
    cr_assert_eq(d.trainer->sums.tokens, (double)counted);
    for (int64_t g = 0; g < 4; g++) {
        double sum = 0, mean = 0;
        for (int64_t i = 4 * g; i < 4 * g + 4; i++) mean += r->reward[i] / 4;
        for (int64_t i = 4 * g; i < 4 * g + 4; i++) sum += fabs(r->advantage[i] - (r->reward[i] - mean));
        cr_assert_lt(sum, 1e-9);
    }
    demo_free(&d);
}

/* Nothing left to train on: no gradient, no failure. */
Test(options, a_step_of_cut_completions_only_is_no_failure) {
    esp_trainer_config c = small(2);
    c.max_new_tokens = 1;
    c.mask_truncated = true;
    c.objective.beta = 0.1f; /* nothing may be skipped */
    demo d = demo_trainer(&c);
    esp_step_stats s = ESP_STEP_STATS_INIT;
    OK(esp_trainer_step(d.trainer, &s));
    cr_assert_eq(s.grad_norm, 0);
    demo_free(&d);
}

/* ---- reference ---- */

/* A trained adapter as the start: against its own snapshot the distance is 0, against the base it is not; a sync makes it 0 again. */
Test(options, references_are_base_snapshot_and_last_sync) {
    esp_trainer_config c = small(4);
    c.objective.beta = 0.05f;
    c.ref_sync_every = 2;
    c.reference = ESP_REFERENCE_SNAPSHOT;
    demo d = demo_model(5, true);
    OK(esp_trainer_create(&d.trainer, d.model, d.tokenizer, &c));
    esp_step_stats s = ESP_STEP_STATS_INIT;
    double kl[4];
    for (int i = 0; i < 4; i++) {
        OK(esp_trainer_step(d.trainer, &s));
        kl[i] = s.kl;
    }
    cr_assert(kl[0] == 0 && kl[1] > 0 && kl[2] == 0 && kl[3] > 0, "%g %g %g %g", kl[0], kl[1], kl[2], kl[3]);
    demo_free(&d);
    c.reference = ESP_REFERENCE_BASE;
    c.ref_sync_every = 0;
    d = demo_model(5, true);
    OK(esp_trainer_create(&d.trainer, d.model, d.tokenizer, &c));
    OK(esp_trainer_step(d.trainer, &s));
    cr_assert_gt(s.kl, 0);
    demo_free(&d);
}

static int same_for_all(void *user, const esp_reward_batch *batch, float *reward) {
    (void)user;
    for (int64_t i = 0; i < batch->n; i++) reward[i] = 1;
    return 0;
}

/* Without any advantage only the KL term pulls, unless it is told not to. */
Test(options, kl_pulls_on_groups_without_advantage_unless_told_not_to) {
    const esp_reward reward = {.name = "same", .fn = same_for_all, .weight = 1};
    for (int off = 0; off < 2; off++) {
        esp_trainer_config c = small(1);
        c.rewards = &reward;
        c.n_rewards = 1;
        c.objective.beta = 0.1f;
        c.no_kl_on_zero_adv = off;
        demo d = demo_model(5, true);
        OK(esp_trainer_create(&d.trainer, d.model, d.tokenizer, &c));
        esp_step_stats s = ESP_STEP_STATS_INIT;
        OK(esp_trainer_step(d.trainer, &s));
        cr_expect_eq(s.grad_norm == 0, off == 1, "no_kl_on_zero_adv %d: |grad| %g", off, s.grad_norm);
        cr_expect_eq(d.trainer->sums.tokens == 0, off == 1);
        demo_free(&d);
    }
}

/* Balanced or not, the load adds up: every token of a step's forward goes to K experts in every layer. */
Test(options, the_routers_load_is_that_of_the_steps_tokens) {
    esp_trainer_config c = small(1);
    c.no_skip = true;
    c.micro_batch_tokens = 60;
    c.no_shared_prompts = true;
    demo d = demo_trainer(&c);
    run(&d, 1);
    int64_t tokens = 0, load = 0;
    for (int64_t i = 0; i < d.trainer->n_sequences; i++) tokens += d.trainer->sequences[i].n_prompt + d.trainer->sequences[i].n_completion;
    for (int64_t e = 0; e < d.trainer->info.experts; e++) load += d.trainer->load[e];
    cr_assert_eq(load, tokens * d.trainer->info.top_k * d.trainer->info.layers);
    demo_free(&d);
}

/* The pass of the snapshot leaves the adapter as it was, to the bit. */
Test(options, a_snapshot_pass_changes_no_parameter) {
    esp_trainer_config c = small(2);
    c.reference = ESP_REFERENCE_SNAPSHOT;
    c.eval_every = 1;
    demo d = demo_trainer(&c), e;
    c.reference = ESP_REFERENCE_BASE;
    e = demo_trainer(&c);
    run(&d, 2);
    run(&e, 2);
    for (int64_t i = 0; i < esp_model_param_count(d.model); i++) {
        esp_param x = ESP_PARAM_INIT, y = ESP_PARAM_INIT;
        OK(esp_model_param_get(d.model, i, &x));
        OK(esp_model_param_get(e.model, i, &y));
        const esp_tensor view = esp_tensor_view(x.data, x.dtype, x.rank, x.dims);
        cr_assert_eq(memcmp(x.data, y.data, (size_t)esp_tensor_count(&view) * esp_dtype_size(x.dtype)), 0, "%s", x.name);
    }
    demo_free(&d);
    demo_free(&e);
}

/* ---- routing replay ---- */

/* R2: the first update goes the way of the pass that recorded it; later ones are held to it while the router itself would turn off. */
Test(options, r2_replays_the_routes_of_the_old_policy) {
    esp_trainer_config c = small(6);
    c.replay = ESP_REPLAY_R2;
    c.updates_per_batch = 6;
    c.no_skip = true;
    c.adamw = ESP_ADAMW_CONFIG(.lr = 0.03f);
    demo d = demo_trainer(&c);
    run(&d, 1);
    const espi_step_sums *s = &d.trainer->sums;
    cr_assert(s->routes_replayed > 0 && s->route_flips == 0, "%g of %g", s->route_flips, s->routes_replayed);
    cr_assert_eq(s->ratio, s->tokens);
    run(&d, 6);
    cr_assert(s->route_flips > 0 && s->route_flips < s->routes_replayed, "%g of %g", s->route_flips, s->routes_replayed);
    demo_free(&d);
}

/* R3, the default: on a CPU the trainer's routers choose what the sampler's chose, and its log-probabilities are the same bits. */
Test(options, r3_of_our_own_sampler_has_no_flips) {
    for (int off = 0; off < 2; off++) {
        esp_trainer_config c = small(1);
        c.no_skip = true;
        c.replay = off ? ESP_REPLAY_NONE : ESP_REPLAY_DEFAULT;
        demo d = demo_trainer(&c);
        run(&d, 1);
        const espi_step_sums *s = &d.trainer->sums;
        cr_assert_eq(s->routes_replayed > 0, !off);
        cr_assert(s->route_flips == 0 && s->diff_max == 0 && s->tokens > 0);
        demo_free(&d);
    }
}

/* Filters: training sees the distribution that was sampled from. */
Test(options, filtered_tokens_have_the_samplers_logprobs) {
    const struct {
        int32_t top_k;
        float top_p, min_p;
    } filters[] = {{3, 0, 0}, {0, 0.9f, 0}, {0, 0, 0.1f}, {5, 0.95f, 0.02f}};
    for (size_t i = 0; i < sizeof filters / sizeof *filters; i++) {
        esp_trainer_config c = small(2);
        c.top_k = filters[i].top_k;
        c.top_p = filters[i].top_p;
        c.min_p = filters[i].min_p;
        c.updates_per_batch = 2;
        c.no_skip = true;
        c.objective.beta = 0.01f; /* the reference's passes see it too */
        demo d = demo_trainer(&c);
        OK(espi_trainer_sample(d.trainer));
        cr_assert(d.trainer->rollouts.shape.filtered == 1 && d.trainer->rollouts.shape.kept > 0);
        OK(espi_update(d.trainer));
        const espi_step_sums *s = &d.trainer->sums;
        cr_assert(s->diff_max == 0 && s->ratio == s->tokens && s->kl == 0, "filter %zu: %g", i, s->diff_max);
        demo_free(&d);
    }
}

/* ---- entropy ---- */

Test(options, the_entropy_controller_steps_towards_its_target) {
    esp_trainer_config c = small(8);
    c.entropy_target = 100; /* never reached: up at every step, to the bound */
    c.entropy_step = 0.01f;
    c.entropy_max = 0.035f;
    demo d = demo_trainer(&c);
    const double up[] = {0.01, 0.02, 0.03, 0.035, 0.035};
    for (int i = 0; i < 5; i++) {
        OK(esp_trainer_step(d.trainer, NULL));
        cr_assert_float_eq(d.trainer->entropy_coef, up[i], 1e-12);
        cr_assert(d.trainer->entropy_acts);
        cr_assert_eq(d.trainer->sums.tokens_skipped, 0, "a bonus acts on every token");
    }
    demo_free(&d);
    c.entropy_target = 1e-6f; /* always above: down to 0, and the bonus does not act */
    c.objective.entropy_coef = 0.02f;
    d = demo_trainer(&c);
    for (int i = 0; i < 3; i++) OK(esp_trainer_step(d.trainer, NULL));
    cr_assert(d.trainer->entropy_coef == 0 && !d.trainer->entropy_acts);
    demo_free(&d);
}

/* ---- memory ---- */

static size_t peak(int32_t prompts, int32_t group) {
    esp_trainer_config c = small(2);
    size_t planned, measured;
    c.steps = 1;
    c.prompts_per_step = prompts;
    c.group_size = group;
    c.micro_batch_tokens = 200;
    c.decode_rows = 8;
    demo d = demo_trainer(&c);
    run(&d, 1);
    OK(esp_trainer_memory(d.trainer, &planned, &measured));
    cr_assert_eq(planned, measured);
    demo_free(&d);
    return measured;
}

/* How many completions a step has costs no tensor memory, where the tokens of a forward and the rows decoded together are fixed. */
Test(options, peak_memory_does_not_grow_with_the_completions) {
    /* Below 200 rows a few of them are all that a forward of 200 tokens may hold. */
    const size_t enough = peak(25, 8);
    cr_assert_eq(peak(50, 8), enough);
    cr_assert_eq(peak(8, 32), enough);
}

/* Rows that wait are drawn as if they had not. */
Test(options, rows_decoded_together_do_not_show) {
    esp_trainer_config c = small(2), all = c;
    c.decode_rows = 3;
    demo a = demo_trainer(&c), b = demo_trainer(&all);
    run(&a, 2);
    run(&b, 2);
    demo_same_state(&a, &b);
    demo_free(&a);
    demo_free(&b);
}

/* ---- the folder ---- */

static bool there(const char *dir, const char *name) {
    char path[512];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    return espi_file_exists(path);
}

static void remove_in(const char *dir, const char *name) {
    char path[512];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    remove(path);
}

Test(options, two_runs_cannot_share_a_folder) {
    char out[256];
    demo_folder(out, "shared");
    esp_trainer_config c = small(1);
    c.out_dir = out;
    demo a = demo_trainer(&c), b = demo_model(5, false);
    FAILS(ESP_ERR_STATE, "another run writes into this folder", esp_trainer_create(&b.trainer, b.model, b.tokenizer, &c));
    demo_free(&a);
    OK(esp_trainer_create(&b.trainer, b.model, b.tokenizer, &c));
    demo_free(&b);
    demo_remove(out);
}

Test(options, the_last_checkpoints_are_kept_and_each_resumes) {
    char out[256], old[300];
    demo_folder(out, "kept");
    esp_trainer_config c = small(4);
    c.out_dir = out;
    c.checkpoint_every = 1;
    c.keep_checkpoints = 2;
    demo d = demo_trainer(&c);
    run(&d, 4);
    demo_free(&d);
    cr_assert(!there(out, "checkpoint-2.h5") && there(out, "checkpoint-3.h5") && there(out, "checkpoint-4.h5"));
    snprintf(old, sizeof old, "%s/checkpoint-3.h5", out);
    c.resume_dir = old;
    d = demo_trainer(&c);
    cr_assert_eq(esp_trainer_steps_done(d.trainer), 3);
    run(&d, 4);
    demo_free(&d);
    cr_assert(!there(out, "checkpoint-2.h5") && there(out, "checkpoint-3.h5") && there(out, "checkpoint-4.h5"));
    remove_in(out, "checkpoint-3.h5");
    remove_in(out, "checkpoint-4.h5");
    demo_remove(out);
}

/* A learning rate that ruins: the first evaluation stays the best, and its adapter is the untrained one. */
Test(options, the_best_adapter_is_kept_and_a_run_that_worsens_ends) {
    char out[256];
    demo_folder(out, "best");
    esp_trainer_config c = small(40);
    c.out_dir = out;
    c.eval_file = DEMO_EVAL;
    c.eval_every = 1;
    c.eval_samples = 1;
    c.early_stop = 3;
    c.keep_best = true;
    c.adamw = ESP_ADAMW_CONFIG(.lr = 0.3f);
    demo d = demo_trainer(&c);
    esp_step_stats s = ESP_STEP_STATS_INIT;
    while (!esp_trainer_finished(d.trainer)) OK(esp_trainer_step(d.trainer, &s));
    cr_assert(s.early_stop && esp_trainer_steps_done(d.trainer) < 40);
    cr_assert_eq(esp_trainer_steps_done(d.trainer), d.trainer->best_step + 3);
    FAILS(ESP_ERR_STATE, "early_stop ended the run", esp_trainer_step(d.trainer, NULL));
    cr_assert(there(out, "checkpoint.h5"));
    char best[300];
    snprintf(best, sizeof best, "%s/adapter-best", out);
    if (d.trainer->best_step == 0) {
        OK(esp_model_load_adapter(d.model, best));
        demo fresh = demo_model(5, false);
        for (int64_t i = 0; i < esp_model_param_count(d.model); i++) {
            esp_param x = ESP_PARAM_INIT, y = ESP_PARAM_INIT;
            OK(esp_model_param_get(d.model, i, &x));
            OK(esp_model_param_get(fresh.model, i, &y));
            const esp_tensor view = esp_tensor_view(x.data, x.dtype, x.rank, x.dims);
            cr_assert_eq(memcmp(x.data, y.data, (size_t)esp_tensor_count(&view) * esp_dtype_size(x.dtype)), 0, "%s", x.name);
        }
        demo_free(&fresh);
    }
    demo_free(&d);
    remove_in(out, "adapter-best/adapter_config.json");
    remove_in(out, "adapter-best/adapter_model.safetensors");
    remove_in(out, "adapter-best");
    demo_remove(out);
}
