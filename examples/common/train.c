/* Loads a model, trains its adapter step by step, tells how it goes. */
#include "train.h"
#include "options.h"

#include <math.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/* What the programs return: 0 done, else what esp_comm_exit_code() lists; 64 is also a wrong option, 73 also a standard output that could not
 * be written; 128 + n ended by signal n, saved. */
enum { EXIT_USAGE = 64, EXIT_INTERNAL = 70, EXIT_FILES = 73 };
#define PLOT_SECONDS 2.0

static volatile sig_atomic_t stop_signal;

/* The ranks of this run; alone, there is one. */
static esp_comm *ranks;

static int failed(esp_status status) {
    char line[2048];
    esp_comm_line(ranks, status, line, sizeof line);
    fprintf(stderr, "%s\n", line);
    return esp_comm_exit_code(ranks, status);
}

#define CHECK(call)                                                                                                                        \
    do {                                                                                                                                   \
        const esp_status check_status_ = (call);                                                                                           \
        if (check_status_ != ESP_OK) return failed(check_status_);                                                                         \
    } while (0)

static void note_signal(int number) {
    stop_signal = number;
}

/* A second Ctrl-C ends the program at once, unsaved: a reward function in C cannot be interrupted otherwise. */
static void watch_signals(void) {
    struct sigaction action = {.sa_handler = note_signal};
    sigemptyset(&action.sa_mask);
    sigaction(SIGTERM, &action, NULL);
    action.sa_flags = SA_RESETHAND;
    sigaction(SIGINT, &action, NULL);
}

static int stop_asked(void *user) {
    (void)user;
    return stop_signal != 0;
}

/* What the library has to say while it works: requests tried again, groups left out, steps skipped.  All ranks would say the same. */
static void print_log(void *user, esp_log_level level, const char *line) {
    (void)user;
    if (esp_comm_rank(ranks) > 0) return;
    fprintf(stderr, "%s%s\n", level == ESP_LOG_ERROR ? "error: " : level == ESP_LOG_WARN ? "warning: " : "", line);
}

/* What a rank has to say of the others. */
static void print_ranks_log(void *user, esp_log_level level, const char *line) {
    (void)user;
    fprintf(stderr, "%s%s\n", level == ESP_LOG_WARN ? "warning: " : "", line);
}

/* The job is over, and this rank does not get to where it would find out. */
static void leave_at_once(void *user, int code, const char *line) {
    (void)user;
    fprintf(stderr, "%s\n", line);
    _exit(code);
}

/* What is remembered of the steps of this process. */
typedef struct history {
    double *seconds, *score; /* score: reward of GRPO, loss of SFT */
    int64_t n;
    int stopped; /* by which signal, here or on another rank; 0: not */
} history;

typedef struct accuracy {
    double sampled, greedy;
} accuracy;

static void print_time_left(double seconds) {
    if (seconds >= 3600)
        printf("  ETA %d:%02d h", (int)(seconds / 3600), (int)(seconds / 60) % 60);
    else
        printf("  ETA %d:%02d", (int)(seconds / 60), (int)seconds % 60);
}

static void print_step(const settings *s, const esp_step_stats *x, int64_t steps, double left) {
    printf("step %3lld/%lld", (long long)x->step, (long long)steps);
    if (s->trainer.kind == ESP_TRAIN_GRPO) {
        if (isfinite(x->reward)) printf("  reward %.3f", x->reward); /* files of rollouts may lack both */
        if (isfinite(x->exact)) printf("  exact %.3f", x->exact);
        if (isfinite(x->kl)) printf("  kl %.4f", x->kl);
        printf("  clip %.3f  entropy %.3f  length %.1f  zero-std %.2f", x->clip_ratio, x->entropy, x->mean_length, x->frac_reward_zero_std);
    } else {
        printf("  loss %.4f", x->loss);
    }
    printf("  |grad| %.4f  %.3f s  %.0f tok/s", x->grad_norm, x->seconds, x->tokens_per_second);
    print_time_left(left);
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

static int plot(const settings *s, const char *svg) {
    char metrics[4096];
    if (esp_comm_rank(ranks) > 0) return 0;
    if (snprintf(metrics, sizeof metrics, "%s/metrics.jsonl", s->trainer.out_dir) >= (int)sizeof metrics) {
        fprintf(stderr, "error: --out: got a path of %zu bytes, expected fewer than 4080\n", strlen(s->trainer.out_dir));
        return EXIT_USAGE;
    }
    CHECK(esp_plot_metrics(metrics, svg));
    return 0;
}

/* The curves so far, not more often than one can look at them. */
static int plot_live(const settings *s, double *last) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    const double seconds = (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
    if (!s->plot_file || seconds - *last < PLOT_SECONDS) return 0;
    *last = seconds;
    return plot(s, s->plot_file);
}

static int plot_last(const settings *s) {
    char svg[4096];
    snprintf(svg, sizeof svg, "%s/metrics.svg", s->trainer.out_dir);
    const int code = plot(s, svg);
    if (code != 0) return code;
    printf("plot: %s\n", svg);
    return s->plot_file ? plot(s, s->plot_file) : 0;
}

static void print_accuracy(const char *name, double share) {
    if (isfinite(share))
        printf("%s=%.4f ", name, share);
    else
        printf("%s=none ", name); /* without --eval */
}

static int report(esp_trainer *trainer, const settings *s, history *h, accuracy before, accuracy after) {
    size_t planned, peak;
    sparkline(s->trainer.kind == ESP_TRAIN_GRPO ? "reward" : "loss", h->score, h->n);
    const int code = s->trainer.out_dir ? plot_last(s) : 0;
    if (code != 0) return code;
    CHECK(esp_trainer_memory(trainer, &planned, &peak));
    printf("result: ");
    print_accuracy("before_sampled", before.sampled);
    print_accuracy("before_greedy", before.greedy);
    print_accuracy("after_sampled", after.sampled);
    print_accuracy("after_greedy", after.greedy);
    printf("steps=%lld ", (long long)esp_trainer_steps_done(trainer));
    if (h->n > 0)
        printf("step_seconds_median=%.6f ", median(h->seconds, h->n));
    else
        printf("step_seconds_median=none "); /* a resume that had nothing left to do */
    printf("peak_bytes=%zu planned_bytes=%zu\n", peak, planned);
    return 0;
}

static int interrupted(esp_trainer *trainer, const settings *s, int signal) {
    if (s->trainer.out_dir) {
        CHECK(esp_trainer_save(trainer));
        printf("signal %d: stopped after step %lld, saved; go on with --resume %s\n", signal, (long long)esp_trainer_steps_done(trainer),
               s->trainer.out_dir);
    } else {
        printf("signal %d: stopped after step %lld; nothing is saved without --out\n", signal, (long long)esp_trainer_steps_done(trainer));
    }
    return 128 + signal;
}

/* Several ranks end where all of them have heard of it: within a step, which tells. */
static int steps_of(esp_trainer *trainer, const settings *s, history *h) {
    const int64_t steps = s->trainer.steps;
    double spent = 0, plotted = 0;
    while (!esp_trainer_finished(trainer) && !h->stopped) {
        esp_step_stats stats = ESP_STEP_STATS_INIT;
        CHECK(esp_trainer_step(trainer, &stats));
        if (stats.interrupted || (stop_signal && esp_comm_size(ranks) == 1)) h->stopped = stop_signal ? (int)stop_signal : SIGTERM;
        if (stats.interrupted) break;
        h->seconds[h->n] = stats.seconds;
        h->score[h->n++] = s->trainer.kind == ESP_TRAIN_GRPO ? stats.reward : stats.loss;
        spent += stats.seconds;
        print_step(s, &stats, steps, spent / (double)h->n * (double)(steps - stats.step));
        if (stats.early_stop) printf("early stop: %d evaluations brought nothing better\n", s->trainer.early_stop);
        const int code = plot_live(s, &plotted);
        if (code != 0) return code;
    }
    return 0;
}

static int loop(esp_trainer *trainer, const settings *s, history *h) {
    accuracy before = {NAN, NAN}, after;
    if (s->trainer.eval_file) {
        CHECK(esp_trainer_evaluate(trainer, &before.sampled, &before.greedy));
        printf("before: sampled exact %.4f  greedy exact %.4f\n", before.sampled, before.greedy);
    }
    const int code = steps_of(trainer, s, h);
    if (code != 0) return code;
    if (h->stopped) return interrupted(trainer, s, h->stopped);
    after = before;
    if (s->trainer.eval_file) CHECK(esp_trainer_evaluate(trainer, &after.sampled, &after.greedy));
    return report(trainer, s, h, before, after);
}

/* What the run would do. */
static int tell(esp_trainer *trainer, const settings *s) {
    const esp_trainer_config *c = &s->trainer;
    const bool grpo = c->kind == ESP_TRAIN_GRPO;
    size_t planned, peak;
    CHECK(esp_trainer_memory(trainer, &planned, &peak));
    printf("settings (name, value, where it comes from, what it does; - and the default in brackets where nothing is set):\n");
    settings_print(s);
    const int64_t prompts = c->prompts_per_step ? c->prompts_per_step
                            : grpo              ? 16
                                                : 32,
                  group = grpo ? c->group_size ? c->group_size : 8 : 1;
    const int64_t per = c->steps_per_generation ? c->steps_per_generation : 1, rounds = c->updates_per_batch ? c->updates_per_batch : 1;
    printf("plan: %lld steps of %lld %s", (long long)c->steps, (long long)prompts * group, grpo ? "completions" : "lines");
    if (grpo)
        printf(" (%lld prompts, %lld each); a generation of %lld completions serves %lld steps", (long long)prompts, (long long)group,
               (long long)prompts * group * per, (long long)per * rounds);
    printf("\nmemory: %zu bytes planned\n", planned);
    return 0;
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
    if (s->plot_file && !s->trainer.out_dir) {
        fprintf(stderr, "error: --plot: set without --out, expected both: it is drawn from the metrics there\n");
        return EXIT_USAGE;
    }
    if (s->dry_run) s->trainer.out_dir = NULL;
    s->trainer.stop = stop_asked;
    s->ctx.log = print_log;
    s->ctx.comm = ranks;
    r->history.seconds = calloc((size_t)s->trainer.steps, sizeof(double));
    r->history.score = calloc((size_t)s->trainer.steps, sizeof(double));
    if (!r->history.seconds || !r->history.score) {
        fprintf(stderr, "error: no memory to remember %lld steps\n", (long long)s->trainer.steps);
        return EXIT_INTERNAL;
    }
    CHECK(esp_ctx_create(&r->ctx, &s->ctx));
    CHECK(esp_tokenizer_load(&r->tokenizer, s->model_dir));
    if (!s->ignore_memory) {
        size_t peak, host;
        CHECK(esp_trainer_plan(&peak, &host, r->ctx, s->model_dir, &s->model, r->tokenizer, &s->trainer));
        CHECK(esp_plan_check(r->ctx, peak, host));
    }
    CHECK(esp_model_load(&r->model, r->ctx, s->model_dir, &s->model));
    const esp_status created = esp_trainer_create(&r->trainer, r->model, r->tokenizer, &s->trainer);
    if (created != ESP_OK && stop_signal) { /* while a server was looked at */
        printf("signal %d: stopped before the run began; what there was to resume is as it was\n", (int)stop_signal);
        return 128 + (int)stop_signal;
    }
    CHECK(created);
    esp_model_info info = ESP_MODEL_INFO_INIT;
    CHECK(esp_model_info_get(r->model, &info));
    printf("%s: %s, %lld layers, %lld experts; %lld trained parameters; backend %s\n", s->model_dir, info.family, (long long)info.layers,
           (long long)info.experts, (long long)info.adapter_parameters, esp_ctx_backend(r->ctx));
    if (s->trainer.resume_dir)
        printf("resumed from %s after step %lld\n", s->trainer.resume_dir, (long long)esp_trainer_steps_done(r->trainer));
    return s->dry_run ? tell(r->trainer, s) : loop(r->trainer, s, &r->history);
}

/* The end of the ranks: together, or as soon as one of them failed. */
static void end_ranks(const settings *s, const run *r, int code, bool orderly) {
    if (!orderly && esp_comm_size(ranks) > 1) {
        if (esp_comm_rank(ranks) == 0) {
            fprintf(stderr, "the job of %d ranks ends with %d", esp_comm_size(ranks), code);
            if (r->trainer) fprintf(stderr, " after step %lld", (long long)esp_trainer_steps_done(r->trainer));
            if (r->trainer && s->trainer.out_dir) fprintf(stderr, "; go on from its last checkpoint with --resume %s", s->trainer.out_dir);
            fprintf(stderr, "\n");
        }
        fflush(stdout);
        esp_comm_abort(ranks, code);
    }
}

static int start_ranks(int *argc, char ***argv) {
    CHECK(esp_comm_init(&ranks, argc, argv));
    CHECK(esp_comm_watch(ranks, print_ranks_log, leave_at_once, NULL));
    /* All ranks would print the same. */
    if (esp_comm_rank(ranks) > 0 && !freopen("/dev/null", "w", stdout)) {
        fprintf(stderr, "error: /dev/null cannot be opened\n");
        return EXIT_FILES;
    }
    return 0;
}

int train_main(esp_trainer_kind kind, int argc, char **argv) {
    settings s = {0};
    run r = {0};
    int code = start_ranks(&argc, &argv);
    const outcome asked = code == 0 ? settings_read(&s, kind, argc, argv) : OUTCOME_WRONG;
    if (code == 0 && asked == OUTCOME_WRONG) code = EXIT_USAGE;
    if (asked == OUTCOME_RUN) {
        watch_signals();
        code = start(&r, &s);
    }
    if ((fflush(stdout) != 0 || ferror(stdout)) && code == 0) {
        fprintf(stderr, "error: standard output could not be written\n");
        code = EXIT_FILES;
    }
    end_ranks(&s, &r, code, code == 0 || r.history.stopped);
    esp_trainer_destroy(r.trainer);
    esp_tokenizer_destroy(r.tokenizer);
    esp_model_destroy(r.model);
    esp_ctx_destroy(r.ctx);
    free(r.history.seconds);
    free(r.history.score);
    settings_free(&s);
    esp_comm_destroy(ranks);
    return code;
}
