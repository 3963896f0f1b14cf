/* The trainer: resume to the bit, exact skipping, micro-batches, the plan, rewards that fail. */
#include "demo.h"

#include "io/checkpoint.h"
#include "io/file.h"
#include <math.h>

static esp_trainer_config small(const char *out, const char *resume, int64_t steps) {
    return ESP_TRAINER_CONFIG(.kind = ESP_TRAIN_GRPO, .train_file = DEMO_PROMPTS, .out_dir = out, .resume_dir = resume, .steps = steps,
                              .seed = 5, .prompts_per_step = 4, .group_size = 4, .checkpoint_every = 1000);
}

/* metrics.jsonl without what a clock says; free() it. */
static char *timeless(const char *dir) {
    char path[512], *text;
    snprintf(path, sizeof path, "%s/metrics.jsonl", dir);
    OK(espi_file_read_all(&text, NULL, path, (size_t)1 << 24));
    for (char *p = text; (p = strstr(p, ",\"step_time\"")) != NULL;) {
        char *end = strchr(p, '\n');
        memmove(p, end, strlen(end) + 1);
    }
    return text;
}

/* Both runs ended alike and told the same; frees them and removes their folders. */
static void same_runs(demo *a, demo *b, const char *dir_a, const char *dir_b) {
    demo_same_state(a, b);
    char *x = timeless(dir_a), *y = timeless(dir_b);
    cr_assert_str_eq(x, y);
    free(x);
    free(y);
    demo_free(a);
    demo_free(b);
    demo_remove(dir_a);
    demo_remove(dir_b);
}

static void run(demo *d, int64_t until) {
    while (esp_trainer_steps_done(d->trainer) < until) OK(esp_trainer_step(d->trainer, NULL));
}

Test(trainer, twenty_steps_are_ten_and_ten) {
    char one[256], two[256];
    demo_folder(one, "whole");
    demo_folder(two, "halves");
    esp_trainer_config c = small(one, NULL, 20);
    c.eval_every = 5;
    demo a = demo_trainer(&c);
    run(&a, 20);
    c = small(two, NULL, 10);
    c.eval_every = 5;
    demo first = demo_trainer(&c);
    run(&first, 10);
    demo_free(&first);
    c = small(two, two, 20);
    c.eval_every = 5;
    demo b = demo_trainer(&c);
    cr_assert_eq(esp_trainer_steps_done(b.trainer), 10);
    run(&b, 20);
    same_runs(&a, &b, one, two);
}

/* Where a run is stopped. */
typedef struct place {
    const demo *d;
    int64_t step; /* done */
    espi_phase phase;
} place;

static int stop_there(void *user) {
    const place *p = user;
    return p->d->trainer->step == p->step && p->d->trainer->phase == p->phase;
}

/* All steps, and the same with a stop and a resume from what was saved then. */
static void resume_after(esp_trainer_config c, int64_t step, espi_phase phase, const char *name) {
    char one[256], two[256];
    demo_folder(one, "straight");
    demo_folder(two, name);
    c.out_dir = one;
    demo a = demo_trainer(&c), first;
    run(&a, c.steps);
    place p = {&first, step, phase};
    c.out_dir = two;
    c.stop = stop_there;
    c.stop_user = &p;
    first = demo_trainer(&c);
    esp_step_stats s = ESP_STEP_STATS_INIT;
    while (!s.interrupted) OK(esp_trainer_step(first.trainer, &s));
    OK(esp_trainer_save(first.trainer));
    demo_free(&first);
    c.stop = NULL;
    c.resume_dir = two;
    demo b = demo_trainer(&c);
    cr_assert(b.trainer->phase == phase && b.trainer->step == step);
    run(&b, c.steps);
    same_runs(&a, &b, one, two);
}

Test(trainer, resume_between_sampling_and_update) {
    resume_after(small(NULL, NULL, 3), 1, ESPI_PHASE_READY, "sampled");
}

Test(trainer, resume_before_a_generation_call) {
    resume_after(small(NULL, NULL, 3), 1, ESPI_PHASE_EMPTY, "unsampled");
}

/* The evaluation before the first step is told once. */
Test(trainer, resume_before_the_first_step) {
    esp_trainer_config c = small(NULL, NULL, 2);
    c.eval_file = DEMO_EVAL;
    c.eval_samples = 1;
    c.eval_every = 2;
    resume_after(c, 0, ESPI_PHASE_EMPTY, "unbegun");
}

static esp_trainer_config everything(void) {
    esp_trainer_config c = small(NULL, NULL, 6);
    demo_everything(&c);
    c.eval_every = 2;
    return c;
}

Test(trainer, resume_among_the_slices_of_a_generation) {
    resume_after(everything(), 3, ESPI_PHASE_READY, "slice");
}

/* Groups that are there are neither lost nor asked for again. */
Test(trainer, resume_between_two_calls_of_one_generation) {
    resume_after(everything(), 4, ESPI_PHASE_GATHERING, "gathering");
}

/* One update on the same rollout; the first moments, 0.1 times the gradient, come back in one array; free() it. */
static float *moments(const esp_trainer_config *c, int64_t *count) {
    demo d = demo_trainer(c);
    OK(espi_trainer_sample(d.trainer));
    espi_rollouts *r = &d.trainer->rollouts;
    for (int64_t i = 0; i < r->shape.rows; i++) r->advantage[i] = i / c->group_size % 2 ? 0 : 1 - 2.0 * (double)(i % 3 == 0);
    espi_rollout_sequences(d.trainer);
    OK(espi_update(d.trainer));
    cr_assert_eq(d.trainer->sums.tokens_skipped > 0, !c->no_skip);
    float *all = NULL;
    *count = 0;
    for (int64_t i = 0; i < esp_optim_array_count(d.trainer->optim); i++) {
        esp_optim_array a = ESP_OPTIM_ARRAY_INIT;
        OK(esp_optim_array_get(d.trainer->optim, i, &a));
        if (strcmp(a.name + strlen(a.name) - 2, "/m") != 0) continue;
        all = realloc(all, (size_t)(*count + a.count) * sizeof *all);
        memcpy(all + *count, a.data, (size_t)a.count * sizeof *all);
        *count += a.count;
    }
    demo_free(&d);
    return all;
}

static void same_gradients(const esp_trainer_config *x, const esp_trainer_config *y) {
    int64_t n, m;
    float *a = moments(x, &n), *b = moments(y, &m);
    double largest = 0, difference = 0;
    cr_assert_eq(n, m);
    for (int64_t i = 0; i < n; i++) {
        largest = fmax(largest, fabs((double)a[i]));
        difference = fmax(difference, fabs((double)a[i] - (double)b[i]));
    }
    cr_assert_gt(largest, 0);
    /* The same products in another grouping of the sums over tokens: a few f32 roundings of the largest. */
    cr_assert(difference <= 2e-6 * largest, "largest %g, difference %g", largest, difference);
    free(a);
    free(b);
}

Test(trainer, skipping_groups_without_advantage_changes_nothing) {
    esp_trainer_config skip = small(NULL, NULL, 5), whole = skip;
    whole.no_skip = true;
    same_gradients(&skip, &whole);
}

Test(trainer, micro_batches_change_nothing) {
    esp_trainer_config whole = small(NULL, NULL, 5), cut = whole;
    cut.micro_batch_tokens = 40;
    same_gradients(&whole, &cut);
    whole.no_shared_prompts = cut.no_shared_prompts = true;
    same_gradients(&whole, &cut);
}

Test(trainer, shared_prompts_change_nothing_but_the_tokens_of_a_forward) {
    esp_trainer_config shared = small(NULL, NULL, 5), repeated = shared;
    repeated.no_shared_prompts = true;
    same_gradients(&shared, &repeated);
    demo a = demo_trainer(&shared), b = demo_trainer(&repeated);
    OK(espi_trainer_sample(a.trainer));
    OK(espi_trainer_sample(b.trainer));
    int64_t next = 0, prompts = 0;
    esp_batch x, y;
    OK(espi_pack(&x, a.trainer, a.trainer->sequences, a.trainer->n_sequences, &next, true));
    cr_assert_eq(next, 16);
    OK(espi_pack(&y, b.trainer, b.trainer->sequences, b.trainer->n_sequences, (next = 0, &next), true));
    for (int64_t g = 0; g < 4; g++) prompts += 3 * a.trainer->sequences[4 * g].n_prompt;
    cr_assert(x.n_seqs == 20 && y.n_seqs == 16 && x.n_tokens == y.n_tokens - prompts);
    demo_free(&a);
    demo_free(&b);
}

/* One step of one update, and the first of two. */
Test(trainer, first_update_has_ratio_one_and_the_samplers_logprobs) {
    for (int loss = ESP_LOSS_GRPO; loss <= ESP_LOSS_VESPO; loss++)
        for (int mu = 1; mu <= 2; mu++) {
            esp_trainer_config c = small(NULL, NULL, 5);
            c.updates_per_batch = mu;
            c.adamw = ESP_ADAMW_CONFIG(.lr = 0.01f);
            c.objective.loss = (esp_loss_type)loss;
            c.objective.level = loss == ESP_LOSS_LUSPO ? ESP_IS_SEQUENCE : ESP_IS_TOKEN;
            c.no_skip = true;
            demo d = demo_trainer(&c);
            run(&d, mu);
            OK(espi_trainer_sample(d.trainer));
            OK(espi_update(d.trainer));
            const espi_step_sums *s = &d.trainer->sums;
            cr_assert_eq(s->ratio, s->tokens, "%s", esp_loss_type_name(c.objective.loss));
            cr_assert_eq(s->diff_max, 0);
            cr_assert_eq(s->clip_low + s->clip_high, 0);
            /* The second update on the same rollouts sees how far the first has gone. */
            if (mu == 2) {
                esp_step_stats stats = ESP_STEP_STATS_INIT;
                OK(espi_trainer_update(d.trainer, &stats));
                OK(espi_trainer_sample(d.trainer));
                OK(espi_update(d.trainer));
                cr_assert_neq(s->ratio, s->tokens, "%s", esp_loss_type_name(c.objective.loss));
                cr_assert_gt(s->diff_max, 0);
            }
            demo_free(&d);
        }
}

Test(trainer, kl_to_the_base_starts_at_zero) {
    esp_trainer_config c = small(NULL, NULL, 3);
    c.objective.beta = 0.05f;
    demo d = demo_trainer(&c);
    esp_step_stats s = ESP_STEP_STATS_INIT;
    OK(esp_trainer_step(d.trainer, &s));
    cr_assert_eq(s.kl, 0, "kl %g", s.kl);
    OK(esp_trainer_step(d.trainer, &s));
    cr_assert_gt(s.kl, 0);
    demo_free(&d);
}

static void planned_is_peak(const esp_trainer_config *c) {
    demo d = demo_trainer(c);
    size_t planned, peak;
    run(&d, c->steps);
    OK(esp_trainer_memory(d.trainer, &planned, &peak));
    cr_assert_eq(planned, peak);
    demo_free(&d);
}

Test(trainer, planned_bytes_are_the_peak) {
    esp_trainer_config c = small(NULL, NULL, 2);
    planned_is_peak(&c);
    c.micro_batch_tokens = 50;
    c.objective.beta = 0.1f;
    c.adamw.eight_bit = true;
    planned_is_peak(&c);
    c = ESP_TRAINER_CONFIG(.kind = ESP_TRAIN_SFT, .train_file = DEMO_LINES, .steps = 2);
    planned_is_peak(&c);
}

/* Micro-batches of one step differ in shape: one long line, then many short ones, whose number is what counts. */
Test(trainer, planned_bytes_hold_for_many_short_lines) {
    enum { SHORT = 160 };
    char path[256], text[SHORT * 64 + 1024], *w = text;
    demo_folder(path, "shapes.jsonl");
    for (int i = 0; i < SHORT; i++) w += sprintf(w, "{\"prompt_ids\":[1],\"answer_ids\":[2]}\n");
    OK(espi_file_write_atomic(path, text, strlen(text)));
    esp_trainer_config c = ESP_TRAINER_CONFIG(.kind = ESP_TRAIN_SFT, .train_file = path, .steps = 2, .prompts_per_step = SHORT);
    planned_is_peak(&c);
    c.micro_batch_tokens = 100; /* 50 lines a micro-batch, and 10 in the last */
    planned_is_peak(&c);
    remove(path);
}

static int failing(void *user, const esp_reward_batch *batch, float *reward) {
    (void)batch, (void)reward;
    return *(int *)user;
}

static int odd(void *user, const esp_reward_batch *batch, float *reward) {
    for (int64_t i = 0; i < batch->n; i++) reward[i] = i % 2 ? *(float *)user : (float)batch->completion_length[i];
    return 0;
}

Test(trainer, rewards_that_fail_abstain_or_are_infinite) {
    int code = 42;
    float value = INFINITY;
    esp_reward reward = {.name = "mine", .fn = failing, .user = &code, .weight = 1};
    esp_trainer_config c = small(NULL, NULL, 2);
    c.rewards = &reward;
    c.n_rewards = 1;
    demo d = demo_trainer(&c);
    FAILS(ESP_ERR_CALLBACK, "\"mine\" returned 42", esp_trainer_step(d.trainer, NULL));
    demo_free(&d);
    reward.fn = odd;
    reward.user = &value;
    d = demo_trainer(&c);
    FAILS(ESP_ERR_NONFINITE, "\"mine\" gave inf for completion 1", esp_trainer_step(d.trainer, NULL));
    demo_free(&d);
    value = NAN;
    d = demo_trainer(&c);
    OK(esp_trainer_step(d.trainer, NULL));
    for (int64_t i = 1; i < d.trainer->rows; i += 2) cr_assert_eq(d.trainer->rollouts.advantage[i], 0);
    demo_free(&d);
}

Test(trainer, resume_refuses_another_config) {
    char out[256];
    demo_folder(out, "config");
    esp_trainer_config c = small(out, NULL, 2);
    demo d = demo_trainer(&c);
    run(&d, 1);
    OK(esp_trainer_save(d.trainer));
    demo_free(&d);
    d = demo_model(5, false);
    c = small(NULL, out, 2);
    c.group_size = 8;
    FAILS(ESP_ERR_MISMATCH, "group_size: got 8, expected 4", esp_trainer_create(&d.trainer, d.model, d.tokenizer, &c));
    c = small(NULL, out, 2);
    c.seed = 6;
    FAILS(ESP_ERR_MISMATCH, "seed: got \"6\", expected \"5\"", esp_trainer_create(&d.trainer, d.model, d.tokenizer, &c));
    c = small(NULL, out, 2);
    c.train_file = DEMO_LINES;
    FAILS(ESP_ERR_MISMATCH, "train_file_hash", esp_trainer_create(&d.trainer, d.model, d.tokenizer, &c));
    c = small(NULL, out, 2);
    c.objective.beta = 0.5f;
    FAILS(ESP_ERR_MISMATCH, "beta: got 0.5, expected 0.0", esp_trainer_create(&d.trainer, d.model, d.tokenizer, &c));
    /* Another scale of the branches, another form of the experts, another base. */
    c = small(NULL, out, 2);
    d.model->lora[ESPI_T_DOWN].scale *= 1.5;
    FAILS(ESP_ERR_MISMATCH, "lora_scale_down", esp_trainer_create(&d.trainer, d.model, d.tokenizer, &c));
    d.model->lora[ESPI_T_DOWN].scale /= 1.5;
    d.model->options.double_quant = true;
    FAILS(ESP_ERR_MISMATCH, "double_quant", esp_trainer_create(&d.trainer, d.model, d.tokenizer, &c));
    d.model->options.double_quant = false;
    ((uint8_t *)d.model->layers[0].gate_up.data)[7] ^= 0x80; /* the sign of one weight */
    FAILS(ESP_ERR_MISMATCH, "weights_hash", esp_trainer_create(&d.trainer, d.model, d.tokenizer, &c));
    ((uint8_t *)d.model->layers[0].gate_up.data)[7] ^= 0x80;
    /* What the checkpoint's run took by default may be stated: a default that was stated is the default. */
    c = small(NULL, out, 2);
    c.temperature = 1;
    c.adamw = ESP_ADAMW_CONFIG(.lr = 1e-3f, .beta1 = 0.9f, .beta2 = 0.999f, .eps = 1e-8f, .max_grad_norm = 1);
    c.objective = ESP_OBJECTIVE(.loss = ESP_LOSS_DAPO, .epsilon_low = 0.2f, .epsilon_high = 0.2f, .top_entropy_quantile = 1,
                                .sapo_temperature_pos = 1, .vespo_k_pos = 2);
    OK(esp_trainer_create(&d.trainer, d.model, d.tokenizer, &c));
    demo_free(&d);
    d = demo_model(5, false);
    c.adamw.lr = 2e-3f;
    FAILS(ESP_ERR_MISMATCH, "adamw_lr: got 0.002, expected 0.001", esp_trainer_create(&d.trainer, d.model, d.tokenizer, &c));
    demo_free(&d);
    demo_remove(out);
}

/* A threshold of each micro-batch would be another objective; one forward that holds the step is none of them. */
Test(trainer, entropy_quantile_needs_the_step_in_one_forward) {
    esp_trainer_config c = small(NULL, NULL, 1);
    c.objective.top_entropy_quantile = 0.5f;
    demo d = demo_trainer(&c);
    run(&d, 1);
    const int64_t all = d.trainer->packed.capacity;
    demo_free(&d);
    c.micro_batch_tokens = (int32_t)all;
    d = demo_trainer(&c);
    demo_free(&d);
    d = demo_model(5, false);
    c.micro_batch_tokens = (int32_t)all - 1;
    FAILS(ESP_ERR_ARG, "with top_entropy_quantile 0.5, expected at least", esp_trainer_create(&d.trainer, d.model, d.tokenizer, &c));
    c.objective.top_entropy_quantile = 1;
    OK(esp_trainer_create(&d.trainer, d.model, d.tokenizer, &c));
    demo_free(&d);
}

/* bnpo's mean is over the tokens of one forward. */
Test(trainer, bnpo_needs_the_step_in_one_forward) {
    esp_trainer_config c = small(NULL, NULL, 1);
    c.objective.loss = ESP_LOSS_BNPO;
    c.micro_batch_tokens = 60;
    demo d = demo_model(5, false);
    FAILS(ESP_ERR_ARG, "with loss bnpo", esp_trainer_create(&d.trainer, d.model, d.tokenizer, &c));
    c.micro_batch_tokens = 0;
    OK(esp_trainer_create(&d.trainer, d.model, d.tokenizer, &c));
    demo_free(&d);
}

/* A new run in a used folder leaves no checkpoint of the old one for a later resume to find. */
Test(trainer, a_new_run_takes_the_folder_over) {
    char out[256], path[300];
    demo_folder(out, "takes_over");
    snprintf(path, sizeof path, "%s/checkpoint.h5", out);
    esp_trainer_config c = small(out, NULL, 2);
    demo d = demo_trainer(&c);
    run(&d, 1);
    OK(esp_trainer_save(d.trainer));
    demo_free(&d);
    cr_assert(espi_file_exists(path));
    d = demo_trainer(&c);
    cr_expect_not(espi_file_exists(path), "the old run's checkpoint is still there");
    demo_free(&d);
    demo_remove(out);
}

/* What a killed run was writing goes when the next one holds the folder; names that only look alike stay. */
Test(trainer, leftovers_of_a_killed_run_go) {
    static const struct {
        const char *name;
        bool stays;
    } files[] = {{"checkpoint.h5.tmp.123", false}, {"adapter/adapter_model.safetensors.tmp.7", false}, {"notes.tmp.txt", true}};
    char out[256], path[300];
    demo_folder(out, "leftovers");
    snprintf(path, sizeof path, "%s/adapter", out);
    OK(espi_dir_make(path));
    for (int i = 0; i < ESPI_COUNT(files); i++) {
        snprintf(path, sizeof path, "%s/%s", out, files[i].name);
        OK(espi_file_write_atomic(path, "half", 4));
    }
    esp_trainer_config c = small(out, NULL, 2);
    demo d = demo_trainer(&c);
    for (int i = 0; i < ESPI_COUNT(files); i++) {
        snprintf(path, sizeof path, "%s/%s", out, files[i].name);
        cr_expect_eq(espi_file_exists(path), files[i].stays, "%s", files[i].name);
    }
    demo_free(&d);
    demo_remove(out);
}

Test(trainer, steps_end) {
    esp_trainer_config c = small(NULL, NULL, 1);
    demo d = demo_trainer(&c);
    run(&d, 1);
    FAILS(ESP_ERR_STATE, "all 1 steps", esp_trainer_step(d.trainer, NULL));
    FAILS(ESP_ERR_ARG, "out_dir", esp_trainer_save(d.trainer));
    demo_free(&d);
}

Test(trainer, lines_come_once_an_epoch_in_an_order_of_the_seed) {
    esp_trainer_config c = ESP_TRAINER_CONFIG(.kind = ESP_TRAIN_SFT, .train_file = DEMO_EVAL, .steps = 1);
    demo d = demo_trainer(&c);
    int seen[256] = {0}, moved = 0;
    for (int e = 0; e < 2; e++)
        for (int i = 0; i < 256; i++) {
            int64_t line;
            uint32_t key;
            OK(espi_next_line(d.trainer, &line, &key));
            cr_assert_eq(key, (uint32_t)(e * 256 + i));
            cr_assert_eq(seen[line]++, e);
            moved += line != i;
        }
    cr_assert_gt(moved, 450);
    demo_free(&d);
}
