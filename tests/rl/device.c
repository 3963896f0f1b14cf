/* Whole training runs on a device: the trainer, its samplers, losses, snapshot, checkpoints and resumed runs touch no memory of the device
 * from the host (the fake device faults when they do) and have the reference's bits. */
#include "demo.h"
#include "fake.h"
#include "scratch.h"

/* Steps of a run, its adapter afterwards, and that of one resumed from its checkpoint after the same number again. */
typedef struct outcome {
    float *first, *second;
    size_t n;
    double reward[4], loss[4];
} outcome;

static float *adapter_of(esp_model *model, size_t *n) {
    *n = 0;
    for (int64_t i = 0; i < esp_model_param_count(model); i++) {
        esp_param p = ESP_PARAM_INIT;
        OK(esp_model_param_get(model, i, &p));
        const esp_tensor view = esp_tensor_view(p.data, p.dtype, p.rank, p.dims);
        *n += (size_t)esp_tensor_count(&view);
    }
    float *all = calloc(*n, sizeof *all), *at = all;
    for (int64_t i = 0; i < esp_model_param_count(model); i++) {
        esp_param p = ESP_PARAM_INIT;
        OK(esp_model_param_get(model, i, &p));
        const esp_tensor view = esp_tensor_view(p.data, p.dtype, p.rank, p.dims);
        OK(espi_ctx_get(model->ctx, at, p.data, (size_t)esp_tensor_count(&view) * sizeof *at));
        at += esp_tensor_count(&view);
    }
    return all;
}

static demo open_demo(bool device, const esp_trainer_config *config) {
    demo d = {NULL, NULL, NULL, NULL};
    if (device)
        OK(fake_ctx(&d.ctx, NULL));
    else
        OK(esp_ctx_create(&d.ctx, &ESP_CTX_CONFIG(.backend = "ref")));
    const esp_model_config options = ESP_MODEL_CONFIG(.seed = config->seed, .host_layers = config->adamw.host_moments);
    esp_plan plan = ESP_PLAN_INIT;
    size_t foretold, host, planned, peak;
    OK(esp_tokenizer_load(&d.tokenizer, DEMO_MODEL));
    const esp_adamw_config *adamw = config->adamw.struct_size > 0 ? &config->adamw : NULL;
    OK(esp_plan_folder(&plan, d.ctx, DEMO_MODEL, &options, adamw, 16, 1));
    OK(esp_trainer_plan(&foretold, &host, d.ctx, DEMO_MODEL, &options, d.tokenizer, config));
    OK(esp_model_load(&d.model, d.ctx, DEMO_MODEL, &options));
    OK(esp_trainer_create(&d.trainer, d.model, d.tokenizer, config));
    OK(esp_trainer_memory(d.trainer, &planned, &peak));
    cr_assert_eq(foretold, planned, "%zu bytes planned before loading, %zu after it", foretold, planned);
    cr_assert_eq(host, plan.host_weights + plan.host_moments, "%zu bytes in the host's memory, expected %zu and %zu", host,
                 plan.host_weights, plan.host_moments);
    cr_assert_eq(host > 0, device, "%zu bytes in the host's memory", host);
    return d;
}

static outcome train(bool device, const esp_trainer_config *base) {
    outcome o = {0};
    char dir[ESPI_PATH_MAX];
    scratch_make(dir);
    esp_trainer_config config = *base;
    config.out_dir = dir;
    for (int part = 0; part < 2; part++) {
        demo d = open_demo(device, &config);
        for (int i = 0; i < 2; i++) {
            esp_step_stats stats = ESP_STEP_STATS_INIT;
            OK(esp_trainer_step(d.trainer, &stats));
            o.reward[2 * part + i] = stats.reward;
            o.loss[2 * part + i] = stats.loss;
        }
        OK(esp_trainer_save(d.trainer));
        *(part ? &o.second : &o.first) = adapter_of(d.model, &o.n);
        demo_free(&d);
        config.resume_dir = dir;
    }
    scratch_remove(dir);
    return o;
}

static void same(const char *what, const esp_trainer_config *config) {
    outcome want = train(false, config), got = train(true, config);
    cr_expect_eq(got.n, want.n);
    cr_expect(memcmp(got.first, want.first, want.n * sizeof(float)) == 0, "%s: adapter after two steps", what);
    cr_expect(memcmp(got.second, want.second, want.n * sizeof(float)) == 0, "%s: adapter after a resumed run", what);
    for (int i = 0; i < 4; i++) {
        cr_expect(memcmp(&got.reward[i], &want.reward[i], sizeof(double)) == 0, "%s: reward of step %d is %g, expected %g", what, i,
                  got.reward[i], want.reward[i]);
        cr_expect_eq(got.loss[i], want.loss[i], "%s: loss of step %d is %g, expected %g", what, i, got.loss[i], want.loss[i]);
    }
    free(want.first);
    free(want.second);
    free(got.first);
    free(got.second);
}

Test(device, supervised) {
    same("sft", &ESP_TRAINER_CONFIG(.kind = ESP_TRAIN_SFT, .train_file = DEMO_LINES, .steps = 4, .prompts_per_step = 4, .seed = 1,
                                    .eval_every = 100));
}

/* Moments and a layer in the host's memory. */
Test(device, grpo) {
    same("grpo", &ESP_TRAINER_CONFIG(.kind = ESP_TRAIN_GRPO, .train_file = DEMO_PROMPTS, .steps = 4, .prompts_per_step = 2, .group_size = 3,
                                     .max_new_tokens = 6, .seed = 2, .objective = {.beta = 0.05f}, .eval_every = 100,
                                     .adamw = {.struct_size = sizeof(esp_adamw_config), .host_moments = true}));
}

Test(device, grpo_with_everything) {
    same("grpo with snapshot, replay and filters",
         &ESP_TRAINER_CONFIG(.kind = ESP_TRAIN_GRPO, .train_file = DEMO_PROMPTS, .steps = 4, .prompts_per_step = 2, .group_size = 3,
                             .max_new_tokens = 6, .seed = 3, .objective = {.beta = 0.05f}, .reference = ESP_REFERENCE_SNAPSHOT,
                             .replay = ESP_REPLAY_R3, .top_k = 20, .updates_per_batch = 2, .eval_every = 100));
}
