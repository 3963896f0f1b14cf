/* Loads a model, trains its adapter step by step, tells how it goes. */
#include "train.h"
#include "options.h"

#include <math.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>

static volatile sig_atomic_t stop_signal;

static void note_signal(int number) {
    stop_signal = number;
}

static void watch_signals(void) {
    struct sigaction action = {.sa_handler = note_signal};
    sigemptyset(&action.sa_mask);
    sigaction(SIGTERM, &action, NULL);
    sigaction(SIGINT, &action, NULL);
}

/* What is remembered of the steps of this process. */
typedef struct history {
    double *seconds, *score; /* score: reward of GRPO, loss of SFT */
    int64_t n;
} history;

typedef struct accuracy {
    double sampled, greedy;
} accuracy;

static void print_step(const settings *s, const esp_step_stats *x, int64_t steps) {
    if (s->trainer.kind == ESP_TRAIN_GRPO) {
        printf("step %3lld/%lld  reward %.3f  exact %.3f", (long long)x->step, (long long)steps, x->reward, x->exact);
        if (isfinite(x->kl)) printf("  kl %.4f", x->kl);
        printf("  entropy %.3f  length %.1f  zero-std %.2f  |grad| %.4f  %.3f s", x->entropy, x->mean_length, x->frac_reward_zero_std,
               x->grad_norm, x->seconds);
    } else {
        printf("step %3lld/%lld  loss %.4f  |grad| %.4f  %.3f s", (long long)x->step, (long long)steps, x->loss, x->grad_norm, x->seconds);
    }
    if (isfinite(x->eval_sampled)) printf("  | eval: sampled %.4f  greedy %.4f", x->eval_sampled, x->eval_greedy);
    printf("\n");
    fflush(stdout);
}

/* One character a step, at most 72 of them. */
static void sparkline(const char *name, const double *x, int64_t n) {
    static const char marks[] = "_.-=+*#";
    const int64_t width = n < 72 ? n : 72;
    double low = INFINITY, high = -INFINITY;
    for (int64_t i = 0; i < n; i++) {
        low = fmin(low, x[i]);
        high = fmax(high, x[i]);
    }
    if (n < 2) return;
    printf("%s %.3f to %.3f  ", name, x[0], x[n - 1]);
    for (int64_t i = 0; i < width; i++) {
        const double share = high > low ? (x[i * n / width] - low) / (high - low) : 0;
        putchar(marks[(int)(share * (sizeof marks - 2))]);
    }
    printf("  (lowest %.3f, highest %.3f)\n", low, high);
}

static int ascending(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *x, int64_t n) {
    if (n == 0) return NAN;
    qsort(x, (size_t)n, sizeof *x, ascending);
    return n % 2 ? x[n / 2] : (x[n / 2 - 1] + x[n / 2]) / 2;
}

static int plot(const char *out_dir) {
    char metrics[4096], svg[4096];
    if (snprintf(metrics, sizeof metrics, "%s/metrics.jsonl", out_dir) >= (int)sizeof metrics ||
        snprintf(svg, sizeof svg, "%s/metrics.svg", out_dir) >= (int)sizeof svg) {
        fprintf(stderr, "error: --out: got a path of %zu bytes, expected fewer than 4080\n", strlen(out_dir));
        return 1;
    }
    ESP_CHECK(esp_plot_metrics(metrics, svg));
    printf("plot: %s\n", svg);
    return 0;
}

static int report(esp_trainer *trainer, const settings *s, history *h, accuracy before, accuracy after) {
    size_t planned, peak;
    sparkline(s->trainer.kind == ESP_TRAIN_GRPO ? "reward" : "loss", h->score, h->n);
    if (s->trainer.out_dir && plot(s->trainer.out_dir) != 0) return 1;
    ESP_CHECK(esp_trainer_memory(trainer, &planned, &peak));
    printf("result: before_sampled=%.4f before_greedy=%.4f after_sampled=%.4f after_greedy=%.4f steps=%lld step_seconds_median=%.6f "
           "peak_bytes=%zu planned_bytes=%zu\n",
           before.sampled, before.greedy, after.sampled, after.greedy, (long long)esp_trainer_steps_done(trainer), median(h->seconds, h->n),
           peak, planned);
    return 0;
}

static int interrupted(esp_trainer *trainer, const settings *s) {
    if (s->trainer.out_dir) {
        ESP_CHECK(esp_trainer_save(trainer));
        printf("signal %d: stopped after step %lld, saved; go on with --resume %s\n", (int)stop_signal,
               (long long)esp_trainer_steps_done(trainer), s->trainer.out_dir);
    } else {
        printf("signal %d: stopped after step %lld; nothing is saved without --out\n", (int)stop_signal,
               (long long)esp_trainer_steps_done(trainer));
    }
    return 128 + (int)stop_signal;
}

static int loop(esp_trainer *trainer, const settings *s, history *h) {
    const int64_t steps = s->trainer.steps;
    accuracy before = {NAN, NAN}, after;
    if (s->trainer.eval_file) {
        ESP_CHECK(esp_trainer_evaluate(trainer, &before.sampled, &before.greedy));
        printf("before: sampled exact %.4f  greedy exact %.4f\n", before.sampled, before.greedy);
    }
    while (esp_trainer_steps_done(trainer) < steps && !stop_signal) {
        esp_step_stats stats = ESP_STEP_STATS_INIT;
        ESP_CHECK(esp_trainer_step(trainer, &stats));
        h->seconds[h->n] = stats.seconds;
        h->score[h->n++] = s->trainer.kind == ESP_TRAIN_GRPO ? stats.reward : stats.loss;
        print_step(s, &stats, steps);
    }
    if (stop_signal) return interrupted(trainer, s);
    after = before;
    if (s->trainer.eval_file) ESP_CHECK(esp_trainer_evaluate(trainer, &after.sampled, &after.greedy));
    return report(trainer, s, h, before, after);
}

/* The objects of a run; released in the opposite order. */
typedef struct run {
    esp_ctx *ctx;
    esp_tokenizer *tokenizer;
    esp_model *model;
    esp_trainer *trainer;
    history history;
} run;

static int start(run *r, settings *s) {
    if (s->trainer.steps == 0) s->trainer.steps = 60;
    r->history.seconds = calloc((size_t)s->trainer.steps, sizeof(double));
    r->history.score = calloc((size_t)s->trainer.steps, sizeof(double));
    if (!r->history.seconds || !r->history.score) {
        fprintf(stderr, "error: no memory to remember %lld steps\n", (long long)s->trainer.steps);
        return 1;
    }
    ESP_CHECK(esp_ctx_create(&r->ctx, &s->ctx));
    ESP_CHECK(esp_model_load(&r->model, r->ctx, s->model_dir, &s->model));
    ESP_CHECK(esp_tokenizer_load(&r->tokenizer, s->model_dir));
    ESP_CHECK(esp_trainer_create(&r->trainer, r->model, r->tokenizer, &s->trainer));
    esp_model_info info = ESP_MODEL_INFO_INIT;
    ESP_CHECK(esp_model_info_get(r->model, &info));
    printf("%s: %s, %lld layers, %lld experts; %lld trained parameters; backend %s\n", s->model_dir, info.family, (long long)info.layers,
           (long long)info.experts, (long long)info.adapter_parameters, esp_ctx_backend(r->ctx));
    if (s->trainer.resume_dir)
        printf("resumed from %s after step %lld\n", s->trainer.resume_dir, (long long)esp_trainer_steps_done(r->trainer));
    return loop(r->trainer, s, &r->history);
}

int train_main(esp_trainer_kind kind, int argc, char **argv) {
    settings s;
    run r = {0};
    const outcome asked = settings_read(&s, kind, argc, argv);
    int code = asked == OUTCOME_HELP ? 0 : 2;
    if (asked == OUTCOME_RUN) {
        watch_signals();
        code = start(&r, &s);
    }
    esp_trainer_destroy(r.trainer);
    esp_tokenizer_destroy(r.tokenizer);
    esp_model_destroy(r.model);
    esp_ctx_destroy(r.ctx);
    free(r.history.seconds);
    free(r.history.score);
    settings_free(&s);
    return code;
}
