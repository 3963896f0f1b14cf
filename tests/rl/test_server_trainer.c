/* The trainer with its completions from a server: what it trains on, resuming, a server that goes away, the program's options. */
#include "mock.h"
#include "program.h"
#include "scratch.h"

#include <pthread.h>

typedef struct place {
    mock mock;
    char dir[ESPI_PATH_MAX], adapters[ESPI_PATH_MAX], out[ESPI_PATH_MAX];
} place;

static place place_make(const char *option) {
    place p = {.mock = mock_start(DEMO_MODEL, option, NULL)};
    scratch_make(p.dir);
    OK(espi_path_join(p.adapters, p.dir, "adapters"));
    OK(espi_path_join(p.out, p.dir, "out"));
    return p;
}

static void place_free(place *p) {
    mock_stop(&p->mock);
    scratch_remove(p->dir);
}

static esp_trainer_config config_of(const place *p, int64_t steps) {
    return ESP_TRAINER_CONFIG(.kind = ESP_TRAIN_GRPO, .train_file = DEMO_PROMPTS, .steps = steps, .seed = 4, .prompts_per_step = 3,
                              .group_size = 4, .max_new_tokens = 6, .server = p->mock.url, .server_adapter_dir = p->adapters,
                              .server_timeout = 10, .rollout_timeout = 30, .checkpoint_every = 100);
}

/* Every value of the adapter; free it. */
static float *values_of(esp_model *model, int64_t *n) {
    float *out = NULL;
    *n = 0;
    for (int64_t i = 0; i < esp_model_param_count(model); i++) {
        esp_param p = ESP_PARAM_INIT;
        OK(esp_model_param_get(model, i, &p));
        const esp_tensor view = esp_tensor_view(p.data, p.dtype, p.rank, p.dims);
        const int64_t count = esp_tensor_count(&view);
        out = realloc(out, (size_t)(*n + count) * sizeof *out);
        cr_assert_not_null(out);
        memcpy(out + *n, p.data, (size_t)count * sizeof *out);
        *n += count;
    }
    return out;
}

/* The last line of the metrics has this number. */
static double metric(const place *p, const char *name) {
    char path[ESPI_PATH_MAX], key[96], *text;
    OK(espi_path_join(path, p->out, "metrics.jsonl"));
    OK(espi_file_read_all(&text, NULL, path, 1 << 20));
    snprintf(key, sizeof key, "\"%s\":", name);
    const char *found = NULL;
    for (const char *at = text; (at = strstr(at, key)); at++) found = at;
    cr_assert_not_null(found, "no %s in %s", key, text);
    const double value = atof(found + strlen(key));
    free(text);
    return value;
}

static void check_plan(const demo *d) {
    size_t planned, peak;
    OK(esp_trainer_memory(d->trainer, &planned, &peak));
    cr_assert_eq(planned, peak, "planned %zu, measured %zu", planned, peak);
}

Test(server_trainer, the_plan_has_room_for_the_probe, .timeout = 60) {
    place p = place_make(NULL);
    esp_trainer_config c = config_of(&p, 1);
    c.prompts_per_step = 1;
    c.group_size = c.max_new_tokens = 2;
    demo d = demo_trainer(&c);
    OK(esp_trainer_step(d.trainer, NULL));
    check_plan(&d);
    demo_free(&d);
    place_free(&p);
}

Test(server_trainer, it_trains_on_what_the_server_writes, .timeout = 60) {
    place p = place_make(NULL);
    esp_trainer_config c = config_of(&p, 3);
    c.out_dir = p.out;
    demo d = demo_trainer(&c);
    for (int64_t step = 1; step <= 3; step++) {
        OK(esp_trainer_step(d.trainer, NULL));
        cr_assert_eq(d.trainer->rollouts.shape.rows, 12);
        for (int64_t i = 0; i < 12; i++) cr_assert_eq(d.trainer->rollouts.version[i], step - 1);
        /* The old policy is the trainer's own pass; the server has the same adapter, to the bit. */
        cr_assert(d.trainer->rollouts.has_old);
        cr_assert(metric(&p, "sampling/sampling_logp_difference/max") <= 1e-6);
    }
    cr_assert_eq(metric(&p, "server/adapters_published"), 3);
    cr_assert_eq(metric(&p, "server/groups_lost"), 0);
    cr_assert_eq(mock_count(&p.mock, "answered"), 3 * 3 + 4, "three steps of three groups, and the probe");
    check_plan(&d);
    demo_free(&d);
    cr_assert_eq(scratch_count(p.adapters), 0);
    place_free(&p);
}

typedef enum breaking { STRAIGHT, KILLED, STOPPED } breaking;

/* As of a signal's handler, whose signal comes 0.3 s after it is armed. */
typedef struct stopper {
    double armed; /* 0 = not */
} stopper;

static int stop_soon(void *user) {
    const stopper *s = user;
    return s->armed > 0 && espi_seconds() - s->armed > 0.3;
}

/* The values after six steps: in one run; or with one whose fourth generation is broken off while the server is at it, because the server dies or
 * because the run is to stop, and another trainer and server that go on. */
static float *six_steps(place *p, breaking broken, int64_t *n) {
    esp_trainer_config c = config_of(p, 6);
    c.out_dir = p->out;
    c.server_retries = 1;
    stopper stop = {0};
    c.stop = stop_soon;
    c.stop_user = &stop;
    demo d = demo_trainer(&c);
    for (int64_t step = 1; step <= (broken ? 3 : 6); step++) OK(esp_trainer_step(d.trainer, NULL));
    if (broken) {
        const double start = espi_seconds();
        mock_plan(&p->mock, "none", 2, 0); /* a version is loaded, another unloaded */
        mock_plan(&p->mock, "slow", 1, 20);
        if (broken == KILLED) {
            pthread_t killer;
            cr_assert_eq(pthread_create(&killer, NULL, mock_kill_soon, &p->mock), 0);
            FAILS(ESP_ERR_COMM, "given up after 2 tries: http://127.0.0.1:", esp_trainer_step(d.trainer, NULL));
            pthread_join(killer, NULL);
        } else {
            esp_step_stats stats = ESP_STEP_STATS_INIT;
            stop.armed = espi_seconds();
            OK(esp_trainer_step(d.trainer, &stats));
            cr_assert(stats.interrupted);
        }
        cr_assert(espi_seconds() - start < 5, "%.1f s", espi_seconds() - start);
        OK(esp_trainer_save(d.trainer));
        demo_free(&d);
        stop.armed = 0;
        mock_stop(&p->mock);
        p->mock = mock_start(DEMO_MODEL, NULL);
        c.server = p->mock.url;
        c.resume_dir = p->out;
        d = demo_trainer(&c);
        for (int64_t step = 4; step <= 6; step++) OK(esp_trainer_step(d.trainer, NULL));
    }
    cr_assert_eq(esp_trainer_steps_done(d.trainer), 6);
    cr_assert_eq(metric(p, "server/adapters_published"), broken ? 3 : 6);
    float *values = values_of(d.model, n);
    demo_free(&d);
    return values;
}

Test(server_trainer, a_generation_broken_off_costs_nothing_but_time, .timeout = 60) {
    float *values[3];
    int64_t n[3];
    for (int i = STRAIGHT; i <= STOPPED; i++) {
        place p = place_make(NULL);
        values[i] = six_steps(&p, (breaking)i, &n[i]);
        cr_assert_eq(n[i], n[0]);
        cr_assert_eq(memcmp(values[i], values[0], (size_t)n[0] * sizeof *values[0]), 0, "broken off in way %d", i);
        place_free(&p);
    }
    for (int i = STRAIGHT; i <= STOPPED; i++) free(values[i]);
}

Test(server_trainer, routes_are_replayed_where_the_server_gives_them, .timeout = 60) {
    for (int gives = 0; gives < 2; gives++) {
        place p = place_make(gives ? "--routes" : NULL);
        esp_trainer_config c = config_of(&p, 2);
        c.out_dir = p.out;
        demo d = demo_trainer(&c);
        OK(esp_trainer_step(d.trainer, NULL));
        cr_assert_eq(d.trainer->rollouts.routes != NULL, gives);
        if (gives) cr_assert_eq(metric(&p, "moe/route_flip_rate"), 0);
        demo_free(&d);
        place_free(&p);
    }
}

Test(server_trainer, lost_groups_shrink_the_step, .timeout = 60) {
    place p = place_make(NULL);
    esp_trainer_config c = config_of(&p, 2);
    c.out_dir = p.out;
    c.server_drop_lost = true;
    demo d = demo_trainer(&c);
    mock_plan(&p.mock, "error400", 2, 0);
    OK(esp_trainer_step(d.trainer, NULL));
    cr_assert_eq(d.trainer->rollouts.shape.rows, 4);
    cr_assert_eq(metric(&p, "rollout/groups_lost"), 2);
    cr_assert_eq(metric(&p, "server/groups_lost"), 2);
    OK(esp_trainer_step(d.trainer, NULL));
    cr_assert_eq(d.trainer->rollouts.shape.rows, 12);
    demo_free(&d);
    place_free(&p);
}

Test(server_trainer, pairs_of_options_that_make_no_sense) {
    const esp_trainer_config plain = ESP_TRAINER_CONFIG(.kind = ESP_TRAIN_GRPO, .train_file = DEMO_PROMPTS);
    demo d = demo_model(0, false);
    static const struct {
        const char *words;
        esp_trainer_config set;
    } wrong[] = {{"server_model together with no server", {.server_model = "base"}},
                 {"server_adapter_dir together with no server", {.server_adapter_dir = "x"}},
                 {"server_adapter_path together with no server", {.server_adapter_path = "x"}},
                 {"server_retries together with no server", {.server_retries = 1}},
                 {"server_concurrency together with no server", {.server_concurrency = 1}},
                 {"server_timeout together with no server", {.server_timeout = 1}},
                 {"server_drop_lost together with no server", {.server_drop_lost = true}},
                 {"max_staleness together with no server", {.max_staleness = 1}},
                 {"server together with no server_adapter_dir", {.server = "http://127.0.0.1:1"}},
                 {"server together with top_k", {.server = "http://127.0.0.1:1", .server_adapter_dir = "x", .top_k = 5}},
                 {"server together with top_p", {.server = "http://127.0.0.1:1", .server_adapter_dir = "x", .top_p = 0.9f}},
                 {"server together with min_p", {.server = "http://127.0.0.1:1", .server_adapter_dir = "x", .min_p = 0.1f}},
                 {"max_staleness: got -1", {.server = "http://127.0.0.1:1", .server_adapter_dir = "x", .max_staleness = -1}},
                 {"server_retries: got -1", {.server = "http://127.0.0.1:1", .server_adapter_dir = "x", .server_retries = -1}}};
    for (int i = 0; i < ESPI_COUNT(wrong); i++) {
        esp_trainer_config c = wrong[i].set;
        c.struct_size = plain.struct_size;
        c.kind = plain.kind;
        c.train_file = plain.train_file;
        FAILS(ESP_ERR_ARG, wrong[i].words, esp_trainer_create(&d.trainer, d.model, d.tokenizer, &c));
    }
    demo_free(&d);
}

#ifdef ESP_GRPO
Test(server_trainer, the_program_trains_with_a_server, .timeout = 60) {
    place p = place_make(NULL);
    char command[4 * ESPI_PATH_MAX];
    snprintf(command, sizeof command,
             "%s --model %s --train %s --steps 2 --prompts-per-step 2 --group-size 4 --server %s --server-adapter-dir %s --out %s",
             ESP_GRPO, DEMO_MODEL, DEMO_PROMPTS, p.mock.url, p.adapters, p.out);
    const program_run run = program(command);
    cr_assert_eq(run.code, 0, "%s", run.out);
    cr_assert_eq(metric(&p, "server/adapters_published"), 2);
    cr_assert_eq(mock_count(&p.mock, "answered"), 2 * 2 + 4);
    free(run.out);
    place_free(&p);
}
#endif
