/* Recorded rollouts train as they did when they were made, to the bit; and what a run on files refuses. */
#include "demo.h"

#include "io/file.h"
#include "rl/rollout_file.h"
#include <math.h>

enum { STEPS = 4 };

static esp_trainer_config recording(const char *folder) {
    return ESP_TRAINER_CONFIG(.kind = ESP_TRAIN_GRPO, .train_file = DEMO_PROMPTS, .save_rollouts = folder, .steps = STEPS, .seed = 11,
                              .prompts_per_step = 4, .group_size = 4, .checkpoint_every = 1000, .scale = ESP_SCALE_GROUP);
}

static void run(demo *d, int64_t until) {
    while (esp_trainer_steps_done(d->trainer) < until) OK(esp_trainer_step(d->trainer, NULL));
}

static void remove_folder(const char *dir) {
    for (int i = 0; i <= STEPS; i++) {
        char path[512];
        snprintf(path, sizeof path, "%s/rollouts-%08d.h5", dir, i);
        remove(path);
    }
    cr_expect_eq(remove(dir), 0, "%s is not empty", dir);
}

/* The run of `c`, recorded, and its replay end with the same adapter and the same moments; and the replay records the same rollouts. */
static void replays(esp_trainer_config c, const char *model, const char *name) {
    char first[256], second[256];
    demo_folder(first, name);
    demo_folder(second, "again");
    c.save_rollouts = first;
    demo a = demo_trainer_of(model, &c);
    run(&a, STEPS);
    c.train_file = NULL;
    c.resample_tries = 0; /* what was picked then is what there is now */
    c.rollouts = first;
    c.save_rollouts = second;
    demo b = demo_trainer_of(model, &c);
    run(&b, STEPS);
    demo_same_state(&a, &b);
    demo_free(&a);
    demo_free(&b);
    c.rollouts = second;
    c.save_rollouts = NULL;
    b = demo_trainer_of(model, &c);
    run(&b, STEPS);
    c.rollouts = first;
    a = demo_trainer_of(model, &c);
    run(&a, STEPS);
    demo_same_state(&a, &b);
    demo_free(&a);
    demo_free(&b);
    remove_folder(first);
    remove_folder(second);
}

Test(recorded, updates_are_the_same_bits) {
    replays(recording(NULL), DEMO_MODEL, "plain");
}

Test(recorded, with_several_steps_and_updates_of_one_generation) {
    esp_trainer_config c = recording(NULL);
    c.updates_per_batch = 2;
    c.steps_per_generation = 2;
    c.objective.beta = 0.01f;
    c.correction = ESP_CORRECTION_TIS;
    replays(c, DEMO_MODEL, "several");
}

Test(recorded, with_resampling_masks_and_penalties) {
    esp_trainer_config c = recording(NULL);
    c.resample_tries = 3;
    c.overlong_share = 0.5f;
    c.order = ESP_NORMALIZE_THEN_SUM;
    replays(c, DEMO_MODEL, "resampled");
    c.overlong_share = 0;
    c.mask_truncated = true;
    replays(c, DEMO_MODEL, "masked");
}

/* Of a run whose sampler left ids out, and of one whose routes are taken from the old policy's pass, on another family. */
Test(recorded, with_filters_and_with_routes) {
    esp_trainer_config c = recording(NULL);
    c.top_p = 0.9f;
    c.top_k = 12;
    replays(c, DEMO_MODEL, "filtered");
    c = recording(NULL);
    c.updates_per_batch = 2;
    c.replay = ESP_REPLAY_R3;
    replays(c, DEMO_GPT_OSS, "routes");
    c.replay = ESP_REPLAY_R2;
    replays(c, DEMO_MODEL, "old-routes");
    c.replay = ESP_REPLAY_NONE;
    replays(c, DEMO_MODEL, "native");
}

Test(recorded, a_run_on_files_resumes_to_the_bit) {
    char files[256], out[256];
    demo_folder(files, "files");
    demo_folder(out, "out");
    esp_trainer_config c = recording(files);
    c.updates_per_batch = 2;
    demo a = demo_trainer(&c);
    run(&a, STEPS);
    c.train_file = c.save_rollouts = NULL;
    c.rollouts = files;
    c.out_dir = out;
    demo b = demo_trainer(&c);
    run(&b, 3); /* in the middle of the second generation */
    OK(esp_trainer_save(b.trainer));
    demo_free(&b);
    c.resume_dir = out;
    b = demo_trainer(&c);
    cr_assert_eq(esp_trainer_steps_done(b.trainer), 3);
    run(&b, STEPS);
    demo_same_state(&a, &b);
    demo_free(&a);
    demo_free(&b);
    demo_remove(out);
    remove_folder(files);
}

static void refuses(const esp_trainer_config *c, esp_status code, const char *words) {
    demo d = demo_model(c->seed, false);
    FAILS(code, words, esp_trainer_create(&d.trainer, d.model, d.tokenizer, c));
    demo_free(&d);
}

/* One group of two rows, as another program would score them. */
static void write_advantages(const char *path) {
    const espi_rollouts_shape shape = {.rows = 2, .group_size = 2, .tokens = 6};
    const espi_rollout_facts facts = ESPI_ROLLOUT_FACTS_NONE;
    espi_rollouts r;
    OK(espi_rollouts_create(&r, &shape));
    for (int i = 0; i < 2; i++) {
        r.offsets[i + 1] = 3 * (i + 1);
        r.n_prompt[i] = 1;
        r.advantage[i] = i ? -0.5 : 0.5;
        for (int k = 0; k < 3; k++) {
            r.tokens[3 * i + k] = 20 + i + k;
            r.loss_mask[3 * i + k] = k > 0;
            r.sampler_logprob[3 * i + k] = k > 0 ? NAN : 0;
        }
    }
    r.has_advantages = 1;
    OK(espi_rollouts_save(path, &r, NULL, NULL, &facts));
    espi_rollouts_free(&r);
}

Test(recorded, refusals) {
    char files[256];
    demo_folder(files, "refused");
    esp_trainer_config c = recording(files);
    demo a = demo_trainer(&c);
    run(&a, 2);
    demo_free(&a);
    c.rollouts = files;
    c.save_rollouts = NULL;
    refuses(&c, ESP_ERR_ARG, "rollouts");
    cr_expect_not_null(strstr(esp_last_error(), "train"), "%s", esp_last_error());
    c.train_file = NULL;
    refuses(&c, ESP_ERR_ARG, "8 groups, 4 in a generation, are enough for 2 steps, expected at least the 4 of the run");
    c.steps = 2;
    c.resample_tries = 1;
    refuses(&c, ESP_ERR_ARG, "resample_tries");
    c.resample_tries = 0;
    const esp_reward one = {.name = "exact", .fn = esp_reward_exact, .weight = 1};
    c.rewards = &one;
    c.n_rewards = 1;
    refuses(&c, ESP_ERR_MISMATCH, "2 rewards a row, expected 1");
    c.rewards = NULL;
    c.n_rewards = 0;
    c.temperature = 0.5f;
    a = demo_trainer(&c);
    FAILS(ESP_ERR_MISMATCH, "sampled at temperature 1, expected 0.5", esp_trainer_step(a.trainer, NULL));
    demo_free(&a);
    c.temperature = 0;
    c.shuffle_rewards = true;
    c.prompts_per_step = c.steps = 1;
    c.group_size = 2;
    char advantages[300];
    snprintf(advantages, sizeof advantages, "%s.h5", files);
    write_advantages(advantages);
    c.rollouts = advantages;
    refuses(&c, ESP_ERR_ARG, "it has advantages and no rewards");
    c.shuffle_rewards = false;
    a = demo_trainer(&c);
    OK(esp_trainer_step(a.trainer, NULL));
    cr_expect_eq(a.trainer->rollouts.advantage[1], -0.5);
    demo_free(&a);
    remove(advantages);
    c.rollouts = "/nonexistent.h5";
    refuses(&c, ESP_ERR_IO, "/nonexistent.h5");
    c = ESP_TRAINER_CONFIG(.kind = ESP_TRAIN_SFT, .train_file = DEMO_LINES, .save_rollouts = files);
    refuses(&c, ESP_ERR_ARG, "save_rollouts");
    remove_folder(files);
}
