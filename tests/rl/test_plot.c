/* Plots of metrics.jsonl: well-formed XML, every curve where it belongs, whatever a killed or a running trainer left. */
#include "demo.h"
#include "program.h"

#include "io/file.h"
#include <math.h>

/* ---- a reader of XML that takes nothing on trust ---- */

typedef struct xml {
    const char *p, *text;
    int depth;
    char open[16][32];
} xml;

static void wrong(const xml *x, const char *why) {
    cr_assert_fail("%s at byte %d: %.60s", why, (int)(x->p - x->text), x->p);
}

static void name(xml *x, char out[32]) {
    int n = 0;
    while (n < 31 && ((*x->p >= 'a' && *x->p <= 'z') || (*x->p >= 'A' && *x->p <= 'Z') || *x->p == '-' || *x->p == ':' ||
                      (n > 0 && *x->p >= '0' && *x->p <= '9')))
        out[n++] = *x->p++;
    out[n] = 0;
    if (n == 0) wrong(x, "no name");
}

/* Characters up to `end`: no < and no bare &, no control characters. */
static void characters(xml *x, char end) {
    for (; *x->p && *x->p != end; x->p++) {
        if (*x->p == '<' || ((unsigned char)*x->p < 0x20 && *x->p != '\n')) wrong(x, "a character that is not allowed");
        if (*x->p != '&') continue;
        const size_t n = strspn(x->p + 1, "#0123456789");
        if (n < 2 || x->p[1] != '#' || x->p[1 + n] != ';') wrong(x, "a bare &");
    }
    if (end && *x->p != end) wrong(x, "an end that never comes");
}

static void attributes(xml *x) {
    char seen[16][32];
    int n = 0;
    while (*x->p == ' ') {
        x->p++;
        cr_assert_lt(n, 16);
        name(x, seen[n]);
        for (int i = 0; i < n; i++)
            if (strcmp(seen[i], seen[n]) == 0) wrong(x, "an attribute twice");
        n++;
        if (*x->p++ != '=' || *x->p++ != '"') wrong(x, "an attribute without a value");
        characters(x, '"');
        x->p++;
    }
}

static void element(xml *x) {
    char tag[32];
    if (*x->p == '/') {
        x->p++;
        name(x, tag);
        if (x->depth == 0 || strcmp(tag, x->open[--x->depth]) != 0) wrong(x, "an end without its start");
        if (*x->p++ != '>') wrong(x, "no >");
        return;
    }
    name(x, tag);
    attributes(x);
    if (*x->p == '/') {
        x->p++;
    } else {
        cr_assert_lt(x->depth, 16);
        strcpy(x->open[x->depth++], tag);
    }
    if (*x->p++ != '>') wrong(x, "no >");
}

static void well_formed(const char *text) {
    static const char head[] = "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n";
    xml x = {.p = text, .text = text};
    cr_assert_eq(strncmp(text, head, sizeof head - 1), 0);
    x.p += sizeof head - 1;
    do {
        if (*x.p++ != '<') wrong(&x, "no element");
        element(&x);
        if (x.depth > 0) characters(&x, '<');
    } while (x.depth > 0);
    cr_assert_str_eq(x.p, "\n", "something behind the root");
    cr_assert_null(strstr(text, "nan"));
    cr_assert_null(strstr(text, "inf"));
}

/* ---- plots of given lines ---- */

static void write_lines(char path[256], const char *file, const char *lines) {
    demo_folder(path, file);
    OK(espi_file_write_atomic(path, lines, strlen(lines)));
}

/* The plot of these lines; free() it. */
static char *plot_of(const char *lines, double smooth) {
    char in[256], out[256], *svg;
    write_lines(in, "plot.jsonl", lines);
    demo_folder(out, "plot.svg");
    const char *runs[] = {in};
    OK(esp_plot_runs(out, runs, 1, smooth));
    OK(espi_file_read_all(&svg, NULL, out, (size_t)1 << 24));
    well_formed(svg);
    remove(in);
    remove(out);
    return svg;
}

static void refused(const char *lines, const char *words) {
    char in[256], out[256];
    write_lines(in, "plot.jsonl", lines);
    demo_folder(out, "plot.svg");
    FAILS(ESP_ERR_FORMAT, words, esp_plot_metrics(in, out));
    cr_assert_not(espi_file_exists(out));
    remove(in);
}

static int count(const char *text, const char *part) {
    int n = 0;
    for (const char *p = text; (p = strstr(p, part)) != NULL; p += strlen(part)) n++;
    return n;
}

/* Words in, and words not in, the plot of these lines. */
static void shows(const char *lines, const char *in, const char *out) {
    char *svg = plot_of(lines, 0);
    cr_expect(strstr(svg, in), "no %s in the plot of %s", in, lines);
    cr_expect(!out || !strstr(svg, out), "%s in the plot of %s", out, lines);
    free(svg);
}

Test(plot, what_there_is_and_nothing_else) {
    shows("{\"step\":0,\"eval/sampled_exact\":0.25}\n{\"step\":1,\"reward\":0.5,\"kl\":null}\n", ">reward</text>", "KL to");
    shows("{\"step\":1,\"loss\":0.0}\n{\"step\":2,\"loss\":0.0}\n", ">loss</text>", ">reward");
    shows("{\"step\":0,\"loss\":1e-7}\n", ">loss</text>", NULL);
    shows("{\"step\":1,\"loss\":1e308}\n{\"step\":2,\"loss\":-1e308}\n{\"step\":3,\"loss\":3}\n", ">loss</text>", "e+308");
    shows("{\"step\":1,\"loss\":1.00000000000001}\n{\"step\":2,\"loss\":1.00000000000002}\n", ">loss</text>", NULL);
    shows("{\"step\":1,\"loss\":\"high\",\"reward\":true,\"kl\":[1],\"grad_norm\":2}\n", "gradient norm", ">loss");
    refused("", "no line");
    refused("{\"step\":1}\n", "none of the known metrics");
    refused("{\"step\":1,\"loss\":1}\n{\"loss\":1}\n", "plot.jsonl:2:");
    refused("{\"step\":1,\"loss\":1}\n{\"step\":2,\"lo\n{\"step\":3,\"loss\":1}\n", "plot.jsonl:2:");
}

Test(plot, all_panels_of_a_run) {
    static const char *const keys[] = {"reward",
                                       "reward_std",
                                       "eval/greedy_exact",
                                       "eval/sampled_exact",
                                       "exact",
                                       "kl",
                                       "entropy",
                                       "entropy_coef",
                                       "completions/mean_length",
                                       "completions/max_length",
                                       "completions/clipped_ratio",
                                       "clip_ratio/region_mean",
                                       "clip_ratio/low_mean",
                                       "clip_ratio/high_mean",
                                       "moe/route_flip_rate",
                                       "sampling/sampling_logp_difference/mean",
                                       "k3_kl",
                                       "frac_reward_zero_std",
                                       "grad_norm",
                                       "loss",
                                       "tokens_per_second",
                                       "step_time",
                                       "time/sample",
                                       "time/reward",
                                       "learning_rate",
                                       "moe/max_vio",
                                       "moe/min_vio",
                                       "rewards/exact/mean",
                                       "rewards/a&b<c>/mean",
                                       "rewards/exact/std",
                                       "rewards/exact/timeouts"};
    enum { KEYS = sizeof keys / sizeof *keys };
    char lines[8192], *w = lines;
    for (int step = 1; step <= 3; step++) {
        w += sprintf(w, "{\"step\":%d", step);
        for (int i = 0; i < KEYS; i++) w += sprintf(w, ",\"%s\":%g", keys[i], (step * (i + 3) % 7) / 8.0);
        w += sprintf(w, "}\n");
    }
    char *svg = plot_of(lines, 0);
    cr_expect_eq(count(svg, "class=\"title\""), 17);
    cr_expect_eq(count(svg, "class=\"line\""), KEYS - 2, "%d curves", count(svg, "class=\"line\""));
    cr_expect_eq(count(svg, ">step</text>"), 17, "axes without a name");
    cr_expect_not_null(strstr(svg, "a&#38;b&#60;c&#62; "));
    cr_expect_not_null(strstr(svg, "route flips (share)"));
    free(svg);
}

Test(plot, lines_that_are_null_missing_or_unfinished) {
    /* A curve breaks where it was not measured; one that is measured now and then is joined. */
    char *svg = plot_of("{\"step\":1,\"loss\":1,\"kl\":1}\n{\"step\":2,\"loss\":2,\"kl\":null}\n\n{\"step\":3,\"loss\":null,\"kl\":2}\n"
                        "{\"step\":4}\n{\"step\":5,\"loss\":1}\n{\"step\":6,\"loss\":3}\n{\"step\":7,\"lo",
                        0);
    const char *kl = strstr(svg, ">KL to"), *loss = strstr(svg, ">loss<");
    cr_assert(kl && loss && kl < loss);
    const char *curve = strstr(loss, "class=\"line\""), *path = strstr(curve, " d=\"") + 4;
    const int moves = count(path, "M") - count(strchr(path, '"'), "M");
    cr_expect_eq(moves, 2, "%.80s", path);
    curve = strstr(kl, "class=\"line\"");
    path = strstr(curve, " d=\"") + 4;
    cr_expect_eq(count(path, "M") - count(strchr(path, '"'), "M"), 1, "%.80s", path);
    free(svg);
    svg = plot_of("{\"step\":1,\"loss\":1}\n{\"step\":2,\"loss\":null}\n{\"step\":3,\"loss\":1}", 0);
    cr_expect_eq(count(svg, "<circle"), 2, "values without neighbours are points");
    free(svg);
}

/* The y coordinates of the first path of this class. */
static int heights(double *y, int most, const char *svg, const char *class) {
    char start[64];
    int n = 0;
    snprintf(start, sizeof start, "class=\"%s\"", class);
    const char *path = strstr(svg, start);
    cr_assert_not_null(path, "no %s", class);
    path = strstr(path, " d=\"") + 4;
    for (const char *end = strchr(path, '"'); path < end && n < most; n++) {
        y[n] = atof(strchr(path, ' '));
        path += 1 + strcspn(path + 1, "ML\"");
    }
    return n;
}

Test(plot, values_stand_at_their_height) {
    double y[8];
    char *svg = plot_of("{\"step\":1,\"loss\":0}\n{\"step\":2,\"loss\":0.25}\n{\"step\":3,\"loss\":1}\n", 0);
    cr_assert_eq(heights(y, 8, svg, "line"), 3);
    cr_expect(fabs((y[0] - y[1]) / (y[0] - y[2]) - 0.25) < 1e-3, "%g %g %g", y[0], y[1], y[2]);
    cr_expect_gt(y[0], y[2], "up is up");
    free(svg);
}

Test(plot, a_running_mean_over_the_raw_curve) {
    enum { N = 50 };
    char lines[N * 40 + 1], *w = lines;
    double raw[N + 1], mean[N + 1];
    for (int i = 1; i <= N; i++) w += sprintf(w, "{\"step\":%d,\"loss\":%d}\n", i, i < 25 ? 0 : 1);
    char *svg = plot_of(lines, 4);
    cr_assert_eq(heights(raw, N, svg, "raw"), N);
    cr_assert_eq(heights(mean, N, svg, "mean"), N);
    const double low = raw[0], high = raw[N - 1];
    cr_expect_eq(count(svg, "stroke-opacity=\"0.35\""), 1);
    cr_expect(fabs(mean[10] - low) < 0.2 && fabs(mean[N - 1] - high) < 1, "a constant is its mean");
    /* Four steps behind a jump 1/e of the way is left: 5 values have come, each weighs exp(-age/4). */
    const double share = (mean[23 + 5] - low) / (high - low);
    double up = 0, all = 0;
    for (int age = 0; age < 29; age++) {
        all += exp(-age / 4.0);
        up += age < 5 ? exp(-age / 4.0) : 0;
    }
    cr_expect(fabs(share - up / all) < 2e-3, "%g, expected %g", share, up / all);
    free(svg);
    svg = plot_of(lines, -1);
    cr_expect_null(strstr(svg, "class=\"mean\""));
    cr_expect_not_null(strstr(svg, "class=\"line\""));
    free(svg);
}

Test(plot, a_long_run_stays_small_and_keeps_its_spikes) {
    enum { N = 20000 };
    char *lines = malloc(N * 48), *w = lines;
    double y[1000], top = 1e9;
    cr_assert_not_null(lines);
    for (int i = 1; i <= N; i++) w += sprintf(w, "{\"step\":%d,\"loss\":%g,\"kl\":1}\n", i, i == 7777 ? 9.0 : i % 10 / 10.0);
    char *svg = plot_of(lines, -1);
    const char *loss = strstr(svg, ">loss<");
    cr_assert_not_null(loss);
    const int n = heights(y, 1000, loss, "line");
    cr_expect_leq(n, 800);
    for (int i = 0; i < n; i++) top = fmin(top, y[i]);
    cr_expect(top < y[0] - 100, "the spike is lost");
    cr_expect_lt(strlen(svg), 400000);
    free(svg);
    free(lines);
}

/* ---- several runs ---- */

static void make_run(const char *dir, int mark) {
    char path[ESPI_PATH_MAX], line[128];
    OK(espi_dir_make(dir));
    OK(espi_path_join(path, dir, "metrics.jsonl"));
    snprintf(line, sizeof line, "{\"step\":1,\"reward\":0.%d,\"reward_std\":0.1}\n{\"step\":%d,\"reward\":1}\n", mark, 2 + mark);
    OK(espi_file_write_atomic(path, line, strlen(line)));
}

static char *compare(const char *const *runs, int n) {
    char out[256], *svg;
    demo_folder(out, "compared.svg");
    OK(esp_plot_runs(out, runs, n, 0));
    OK(espi_file_read_all(&svg, NULL, out, (size_t)1 << 24));
    well_formed(svg);
    remove(out);
    return svg;
}

static void drop_run(const char *dir) {
    char path[ESPI_PATH_MAX];
    OK(espi_path_join(path, dir, "metrics.jsonl"));
    remove(path);
    remove(dir);
}

Test(plot, several_runs_in_one) {
    char base[256], dirs[9][300], files[9][320];
    const char *runs[9];
    demo_folder(base, "runs");
    for (int i = 0; i < 9; i++) {
        snprintf(dirs[i], sizeof dirs[i], "%s/%s%d", base, i == 1 ? "a&b<c>\xFF" : "run", i);
        make_run(dirs[i], i);
        snprintf(files[i], sizeof files[i], i % 2 ? "%s/metrics.jsonl" : "%s/", dirs[i]);
        runs[i] = files[i];
    }
    char *svg = compare(runs, 9);
    cr_expect_eq(count(svg, "class=\"title\""), 1, "reward_std is of no first rank");
    cr_expect_eq(count(svg, "class=\"line\""), 9);
    cr_expect_not_null(strstr(svg, ">a&#38;b&#60;c&#62;?1</text>"));
    cr_expect_not_null(strstr(svg, ">run8</text>"));
    cr_expect_eq(count(svg, "stroke-dasharray"), 2, "the ninth run, in the list and in the panel");
    cr_expect_not_null(strstr(svg, ">10</text>"), "the axis holds the longest run");
    free(svg);
    /* Runs of one name are told apart by their paths. */
    runs[1] = files[0];
    svg = compare(runs, 2);
    cr_expect_null(strstr(svg, ">run0</text>"));
    cr_expect_not_null(strstr(svg, "runs/run0/</text>"));
    free(svg);
    const char *absent[] = {dirs[0], "/nonexistent"};
    FAILS(ESP_ERR_IO, "/nonexistent", esp_plot_runs("/tmp/never.svg", absent, 2, 0));
    FAILS(ESP_ERR_ARG, "got 0 runs", esp_plot_runs("/tmp/never.svg", absent, 0, 0));
    FAILS(ESP_ERR_ARG, "got 25 runs", esp_plot_runs("/tmp/never.svg", absent, 25, 0));
    FAILS(ESP_ERR_ARG, "NULL", esp_plot_runs(NULL, absent, 1, 0));
    FAILS(ESP_ERR_ARG, "smooth", esp_plot_runs("/tmp/never.svg", absent, 1, NAN));
    for (int i = 0; i < 9; i++) drop_run(dirs[i]);
    cr_expect_eq(remove(base), 0);
}

Test(plot, the_command) {
    char one[256], two[256], command[1024];
    demo_folder(one, "first");
    demo_folder(two, "second");
    make_run(one, 1);
    make_run(two, 2);
    snprintf(command, sizeof command, "cd %s && " ESP_PROGRAM " plot . %s -o both.svg && cat both.svg && rm both.svg", one, two);
    program_run run = program(command);
    cr_expect_eq(run.code, 0, "%s", run.out);
    cr_expect_eq(strncmp(run.out, "both.svg\n", 9), 0);
    cr_expect_eq(count(run.out, "class=\"run\""), 2);
    free(run.out);
    run = program(ESP_PROGRAM " plot");
    cr_expect_eq(run.code, 2);
    cr_expect_not_null(strstr(run.out, "RUN.. is missing"), "%s", run.out);
    free(run.out);
    drop_run(one);
    drop_run(two);
}

/* A live plot: the file is the old one or the new one, never half of one, and never gone. */
Test(plot, a_drawing_that_fails_leaves_the_old_one) {
    char in[256], out[256], *svg;
    demo_folder(out, "live.svg");
    write_lines(in, "live.jsonl", "{\"step\":1,\"loss\":1}\n");
    OK(esp_plot_metrics(in, out));
    write_lines(in, "live.jsonl", "not ours\n");
    FAILS(ESP_ERR_FORMAT, "live.jsonl:1", esp_plot_metrics(in, out));
    OK(espi_file_read_all(&svg, NULL, out, 1 << 20));
    well_formed(svg);
    free(svg);
    write_lines(in, "live.jsonl", "{\"step\":1,\"loss\":1}\n");
    FAILS(ESP_ERR_IO, "/tmp/absent-folder/x.svg", esp_plot_metrics(in, "/tmp/absent-folder/x.svg"));
    remove(in);
    remove(out);
}

/* The first point of the evaluation's curves is what the model could before: also when the caller has already asked for it. */
Test(plot, a_run_starts_at_step_0) {
    char dir[256], path[300], *text;
    double sampled, greedy;
    demo_folder(dir, "start");
    const esp_trainer_config c = ESP_TRAINER_CONFIG(.kind = ESP_TRAIN_GRPO, .train_file = DEMO_PROMPTS, .eval_file = DEMO_EVAL,
                                                    .out_dir = dir, .steps = 1, .prompts_per_step = 2, .group_size = 2, .eval_samples = 1);
    demo d = demo_trainer(&c);
    OK(esp_trainer_evaluate(d.trainer, &sampled, &greedy));
    OK(esp_trainer_step(d.trainer, NULL));
    demo_free(&d);
    snprintf(path, sizeof path, "%s/metrics.jsonl", dir);
    OK(espi_file_read_all(&text, NULL, path, 1 << 20));
    cr_expect_eq(strncmp(text, "{\"step\":0,\"eval/", 16), 0, "%.60s", text);
    cr_expect_eq(count(text, "\n"), 2);
    free(text);
    demo_remove(dir);
}
