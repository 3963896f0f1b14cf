/* Rewards in a run: what a command and a slow function come to in metrics.jsonl, and that the run goes on. */
#include "demo.h"

#include "io/file.h"
#include <jansson.h>
#include <math.h>
#include <time.h>

static int slow(void *user, const esp_reward_batch *batch, float *reward) {
    const struct timespec nap = {.tv_sec = 0, .tv_nsec = batch->step == 2 ? 900000000 : 0};
    (void)user;
    nanosleep(&nap, NULL);
    for (int64_t i = 0; i < batch->n; i++)
        reward[i] = (float)(batch->completion_length[i] + batch->prompt_length[i] + batch->max_completion);
    return 0;
}

/* metrics.jsonl, a number of one of its lines; NaN = null. */
static double number(json_t *lines, size_t line, const char *key) {
    const json_t *value = json_object_get(json_array_get(lines, line), key);
    cr_assert(value, "no %s in line %zu", key, line);
    return json_is_number(value) ? json_number_value(value) : NAN;
}

static json_t *read_lines(const char *dir) {
    char path[300], *text;
    json_t *lines = json_array();
    snprintf(path, sizeof path, "%s/metrics.jsonl", dir);
    OK(espi_file_read_all(&text, NULL, path, 1 << 20));
    for (char *line = strtok(text, "\n"); line; line = strtok(NULL, "\n")) json_array_append_new(lines, json_loads(line, 0, NULL));
    free(text);
    return lines;
}

Test(reward_trainer, commands_and_deadlines_are_counted) {
    char dir[256];
    esp_reward rewards[3] = {{.name = "slow", .fn = slow, .weight = 0.1}};
    demo_folder(dir, "rewards");
    OK(esp_reward_open(&rewards[1], "cmd(name=script,children=2):exec " ESP_SCORER " half=1 die=7"));
    OK(esp_reward_open(&rewards[2], "0.5*exact"));
    const esp_trainer_config c =
        ESP_TRAINER_CONFIG(.kind = ESP_TRAIN_GRPO, .train_file = DEMO_PROMPTS, .out_dir = dir, .steps = 3, .rewards = rewards,
                           .n_rewards = 3, .reward_timeout = 0.4f, .seed = 3, .prompts_per_step = 4, .group_size = 8);
    demo d = demo_trainer(&c);
    for (int i = 0; i < 3; i++) OK(esp_trainer_step(d.trainer, NULL));
    demo_free(&d);
    for (int i = 0; i < 3; i++) esp_reward_close(&rewards[i]);
    json_t *lines = read_lines(dir);
    cr_assert_eq(json_array_size(lines), 3);
    cr_expect_geq(number(lines, 0, "rewards/slow/mean"), 2 + 5 + 10);
    cr_expect(isnan(number(lines, 1, "rewards/slow/mean")), "given up");
    cr_expect_eq(number(lines, 1, "rewards/slow/timeouts"), 32);
    cr_expect(isfinite(number(lines, 1, "reward")) && isfinite(number(lines, 1, "rewards/exact/mean")), "the others count");
    cr_expect(fabs(number(lines, 0, "rewards/script/mean") - 2 * number(lines, 0, "rewards/script/half")) < 1e-6);
    double restarts = 0;
    for (size_t i = 0; i < 3; i++) restarts += number(lines, i, "rewards/script/restarts");
    cr_expect_gt(restarts, 0, "a completion of 7 characters kills the command, and some have that");
    json_decref(lines);
    demo_remove(dir);
}

/* Asked to stop from half a second after the first answer on. */
typedef struct patience {
    double until; /* 0: not begun */
} patience;

static int begin(void *user, const esp_reward_batch *batch, float *reward) {
    ((patience *)user)->until = espi_seconds() + 0.5;
    for (int64_t i = 0; i < batch->n; i++) reward[i] = 0;
    return 0;
}

static int out_of_patience(void *user) {
    const patience *p = user;
    return p->until > 0 && espi_seconds() > p->until;
}

/* A run that is asked to stop does not wait for a command, and is as it was before the generation. */
Test(reward_trainer, a_stop_does_not_wait_for_a_command, .timeout = 30) {
    patience p = {0};
    esp_reward rewards[2] = {{.name = "begin", .fn = begin, .user = &p, .weight = 1}};
    OK(esp_reward_open(&rewards[1], "cmd(name=hangs):exec sleep 25"));
    const esp_trainer_config c =
        ESP_TRAINER_CONFIG(.kind = ESP_TRAIN_GRPO, .train_file = DEMO_PROMPTS, .steps = 1, .rewards = rewards, .n_rewards = 2,
                           .prompts_per_step = 2, .group_size = 2, .stop = out_of_patience, .stop_user = &p);
    demo d = demo_trainer(&c);
    esp_step_stats s = ESP_STEP_STATS_INIT;
    const double start = espi_seconds();
    OK(esp_trainer_step(d.trainer, &s));
    cr_expect_lt(espi_seconds() - start, 10);
    cr_expect(s.interrupted && d.trainer->step == 0 && d.trainer->cursor == 0 && d.trainer->phase == ESPI_PHASE_EMPTY);
    demo_free(&d);
    esp_reward_close(&rewards[1]);
}
