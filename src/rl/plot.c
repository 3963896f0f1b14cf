/* Draws the metrics.jsonl of one run, or of several for comparison, as an SVG of panels. */
#include "rl/plot.h"
#include "core/status.h"
#include "espalier/trainer.h"
#include "io/file.h"

#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_METRICS ((size_t)1 << 30)
#define MAX_CURVES 3
#define MAX_REWARDS 8 /* functions with a curve of their own */
#define MAX_RUNS 24
#define MAX_SERIES 512
#define LABEL 96
#define COLUMNS 3
#define MARGIN 10
#define LEGEND_LINE 20
#define LARGEST 1e300 /* values beyond are not drawn: their differences are infinite */

typedef struct named {
    const char *key, *label;
    bool marks;
} named;

typedef struct panel {
    const char *title;
    named curves[MAX_CURVES]; /* of several runs only the first one is compared */
    const char *compared;     /* the title then; NULL: the same */
} panel;

static const panel panels[] = {
    {"reward", {{"reward", "mean"}, {"reward_std", "std in a group"}}},
    {"accuracy (exact)",
     {{"eval/greedy_exact", "eval, greedy", true}, {"eval/sampled_exact", "eval, sampled", true}, {"exact", "training"}},
     "accuracy (exact, greedy, evaluation)"},
    {"KL to the reference (nats a token)", {{"kl", "", true}}},
    {"entropy (nats a token)", {{"entropy", "entropy"}, {"entropy_coef", "coefficient"}}},
    {"completion length (tokens)", {{"completions/mean_length", "mean"}, {"completions/max_length", "longest"}}},
    {"completions cut at the limit (share)", {{"completions/clipped_ratio", ""}}},
    {"clip ratio (share of tokens)", {{"clip_ratio/region_mean", "all"}, {"clip_ratio/low_mean", "low"}, {"clip_ratio/high_mean", "high"}}},
    {"route flips (share)", {{"moe/route_flip_rate", ""}}},
    {"sampler against trainer (nats)",
     {{"sampling/sampling_logp_difference/mean", "mean difference"}, {"k3_kl", "k3"}},
     "sampler against trainer (nats, mean)"},
    {"groups without spread (share)", {{"frac_reward_zero_std", ""}}},
    {"gradient norm", {{"grad_norm", ""}}},
    {"loss", {{"loss", ""}}},
    {"tokens a second", {{"tokens_per_second", ""}}},
    {"seconds of a step", {{"step_time", "all"}, {"time/sample", "sampling"}, {"time/reward", "rewards"}}},
    {"learning rate", {{"learning_rate", ""}}},
    {"expert load over even load, less 1", {{"moe/max_vio", "highest"}, {"moe/min_vio", "lowest"}}, "highest expert load, less 1"},
};

/* One key of the file. */
typedef struct series {
    char *key;
    double *y; /* [lines so far] NaN = absent or null */
    int64_t n; /* lines that y covers */
} series;

typedef struct run {
    char label[LABEL];
    double *step;
    int64_t n, capacity;
    series *series; /* [n_series] each with room for `capacity` lines */
    int n_series;
} run;

static void free_run(run *r) {
    for (int i = 0; i < r->n_series; i++) {
        free(r->series[i].key);
        free(r->series[i].y);
    }
    free(r->series);
    free(r->step);
}

/* ---- reading ---- */

static esp_status no_memory(const char *path) {
    return ESPI_FAIL(ESP_ERR_MEMORY, "%s: no memory for its curves", path);
}

static esp_status grow(run *r, const char *path) {
    const int64_t capacity = 2 * r->capacity + 64;
    double *step = realloc(r->step, (size_t)capacity * sizeof *step);
    if (!step) return no_memory(path);
    r->step = step;
    for (int i = 0; i < r->n_series; i++) {
        double *y = realloc(r->series[i].y, (size_t)capacity * sizeof *y);
        if (!y) return no_memory(path);
        r->series[i].y = y;
    }
    r->capacity = capacity;
    return ESP_OK;
}

static series *find(const run *r, const char *key) {
    for (int i = 0; i < r->n_series; i++)
        if (strcmp(r->series[i].key, key) == 0) return &r->series[i];
    return NULL;
}

static esp_status add_series(series **out, run *r, const char *key, const char *path) {
    *out = NULL;
    if (r->n_series == MAX_SERIES) return ESP_OK; /* no panel asks for that many names */
    if (!r->series) r->series = calloc(MAX_SERIES, sizeof *r->series);
    if (!r->series) return no_memory(path);
    series *s = &r->series[r->n_series];
    s->key = malloc(strlen(key) + 1);
    s->y = malloc((size_t)r->capacity * sizeof *s->y);
    r->n_series++;
    if (!s->key || !s->y) return no_memory(path);
    memcpy(s->key, key, strlen(key) + 1);
    *out = s;
    return ESP_OK;
}

/* Values up to line n that the key was absent from. */
static void pad(series *s, int64_t n) {
    while (s->n < n) s->y[s->n++] = NAN;
}

static esp_status add_line(run *r, const json_t *line, const char *path) {
    const char *key;
    json_t *value;
    if (r->n == r->capacity) ESPI_TRY(grow(r, path));
    json_object_foreach((json_t *)line, key, value) {
        if (!json_is_number(value) || !(fabs(json_number_value(value)) < LARGEST)) continue;
        series *s = find(r, key);
        if (!s) ESPI_TRY(add_series(&s, r, key, path));
        if (!s) continue;
        pad(s, r->n);
        s->y[s->n++] = json_number_value(value);
    }
    r->step[r->n++] = (double)json_integer_value(json_object_get(line, "step"));
    return ESP_OK;
}

/* A last line without its end is one that is being written, or was when the run was killed. */
static esp_status parse(run *r, char *text, const char *path) {
    int64_t number = 0;
    for (char *line = text, *end; *line; line = end) {
        const size_t length = strcspn(line, "\n");
        const bool ended = line[length] == '\n';
        end = line + length + ended;
        number++;
        if (length == 0) continue;
        json_t *object = json_loadb(line, length, 0, NULL);
        const bool good = json_is_object(object) && json_is_integer(json_object_get(object, "step"));
        const esp_status status = good ? add_line(r, object, path) : ESP_OK;
        json_decref(object);
        ESPI_TRY(status);
        if (!good && ended)
            return ESPI_FAIL(ESP_ERR_FORMAT, "%s:%lld: got no JSON object with an integer \"step\", expected a trainer's metrics", path,
                             (long long)number);
    }
    if (r->n == 0) return ESPI_FAIL(ESP_ERR_FORMAT, "%s: no line, expected at least one step's metrics", path);
    for (int i = 0; i < r->n_series; i++) pad(&r->series[i], r->n);
    return ESP_OK;
}

/* A run's folder stands for the metrics.jsonl in it. */
static esp_status read_run(run *r, const char *given) {
    char path[ESPI_PATH_MAX], *text = NULL;
    if (espi_dir_exists(given))
        ESPI_TRY(espi_path_join(path, given, "metrics.jsonl"));
    else if (snprintf(path, sizeof path, "%s", given) >= (int)sizeof path)
        return ESPI_FAIL(ESP_ERR_ARG, "path %.60s..: longer than %d bytes, use a shorter one", given, ESPI_PATH_MAX - 1);
    ESPI_TRY(espi_file_read_all(&text, NULL, path, MAX_METRICS));
    const esp_status status = parse(r, text, path);
    free(text);
    return status;
}

/* ---- names of the runs ---- */

/* The folder of .../NAME/metrics.jsonl or .../NAME/, else the file's own name. */
static void label_run(char out[LABEL], const char *given) {
    static const char usual[] = "metrics.jsonl";
    size_t end = strlen(given);
    while (end > 1 && given[end - 1] == '/') end--;
    const size_t n = sizeof usual - 1;
    if (end > n && strncmp(given + end - n, usual, n) == 0 && given[end - n - 1] == '/') end -= n + 1;
    size_t first = end;
    while (first > 0 && given[first - 1] != '/') first--;
    snprintf(out, LABEL, "%.*s", (int)(end - first), given + first);
}

static void label_runs(run *runs, const char *const *given, int n) {
    bool same = false;
    for (int i = 0; i < n; i++) label_run(runs[i].label, given[i]);
    for (int i = 0; i < n; i++)
        for (int j = 0; j < i; j++) same = same || strcmp(runs[i].label, runs[j].label) == 0;
    for (int i = 0; i < n && same; i++) snprintf(runs[i].label, LABEL, "%s", given[i]);
}

/* ---- panels ---- */

/* What is drawn: the runs, and the page that grows downwards. */
typedef struct page {
    const run *runs;
    int n_runs, drawn;
    double top;
    espi_plot_frame frame;
    espi_svg svg;
} page;

static void add_panel(page *p, const char *title, const espi_curve *curves, int n) {
    if (n == 0) return;
    const int row = p->drawn / COLUMNS, column = p->drawn % COLUMNS;
    espi_svg_panel(&p->svg, title, curves, n, &p->frame, column * ESPI_PANEL_WIDTH, p->top + row * ESPI_PANEL_HEIGHT);
    p->drawn++;
}

static int add_curve(espi_curve *curves, int n, const run *r, const char *key, const char *label, int colour, bool marks) {
    const series *s = find(r, key);
    if (!s) return n;
    curves[n] = (espi_curve){.label = label, .colour = colour, .marks = marks, .x = r->step, .y = s->y, .n = r->n};
    return n + 1;
}

static void draw_one(page *p, const panel *panel) {
    espi_curve curves[MAX_CURVES];
    int n = 0;
    for (int c = 0; c < MAX_CURVES && panel->curves[c].key; c++)
        n = add_curve(curves, n, p->runs, panel->curves[c].key, panel->curves[c].label, c, panel->curves[c].marks);
    add_panel(p, panel->title, curves, n);
}

static void draw_compared(page *p, const panel *panel) {
    espi_curve curves[MAX_RUNS];
    const named *c = &panel->curves[0];
    int n = 0;
    for (int i = 0; i < p->n_runs; i++) n = add_curve(curves, n, &p->runs[i], c->key, "", i, c->marks);
    add_panel(p, panel->compared ? panel->compared : panel->title, curves, n);
}

/* "NAME" of "rewards/NAME/mean"; false: another key. */
static bool reward_name(char out[LABEL], const char *key) {
    static const char head[] = "rewards/", tail[] = "/mean";
    const size_t n = strlen(key), least = sizeof head + sizeof tail - 2;
    if (n <= least || strncmp(key, head, sizeof head - 1) != 0 || strcmp(key + n - (sizeof tail - 1), tail) != 0) return false;
    snprintf(out, LABEL, "%.*s", (int)(n - least), key + sizeof head - 1);
    return true;
}

static void draw_rewards(page *p) {
    espi_curve curves[MAX_REWARDS];
    char names[MAX_REWARDS][LABEL];
    int n = 0;
    for (int i = 0; i < p->runs->n_series && n < MAX_REWARDS; i++)
        if (reward_name(names[n], p->runs->series[i].key)) n = add_curve(curves, n, p->runs, p->runs->series[i].key, names[n], n, false);
    if (n > 1) add_panel(p, "rewards by function (mean)", curves, n);
}

/* Runs in their colours over the panels. */
static void draw_runs(page *p) {
    double x = MARGIN;
    for (int i = 0; i < p->n_runs; i++) {
        const double width = 34 + 7.2 * (double)strlen(p->runs[i].label);
        if (i > 0 && x + width > COLUMNS * ESPI_PANEL_WIDTH) {
            x = MARGIN;
            p->top += LEGEND_LINE;
        }
        espi_svg_put(&p->svg, "<path d=\"M%.1f %.1fh18\"", x, p->top + 10);
        espi_svg_stroke(&p->svg, i, 2.4, 1);
        espi_svg_put(&p->svg, "/><text class=\"run\" x=\"%.1f\" y=\"%.1f\">", x + 24, p->top + 14);
        espi_svg_text(&p->svg, p->runs[i].label);
        espi_svg_put(&p->svg, "</text>\n");
        x += width;
    }
    p->top += LEGEND_LINE;
}

static esp_status draw(page *p) {
    p->top = MARGIN;
    draw_runs(p);
    for (int i = 0; i < ESPI_COUNT(panels); i++) {
        if (p->n_runs > 1)
            draw_compared(p, &panels[i]);
        else
            draw_one(p, &panels[i]);
        if (i == 0 && p->n_runs == 1) draw_rewards(p);
    }
    return p->svg.status;
}

/* Steps that all runs lie in, and how much to smooth them. */
static espi_plot_frame frame_of(const run *runs, int n, double smooth) {
    espi_plot_frame f = {.first = 0, .last = 0};
    for (int i = 0; i < n; i++) f.last = fmax(f.last, runs[i].step[runs[i].n - 1]);
    f.smooth = smooth < 0 ? 0 : smooth > 0 ? smooth : f.last / 25;
    return f;
}

/* The head goes before what was drawn, once its height is known. */
static esp_status write_page(const page *p, const char *svg_file) {
    const int width = COLUMNS * ESPI_PANEL_WIDTH, rows = (p->drawn + COLUMNS - 1) / COLUMNS;
    const int height = (int)p->top + rows * ESPI_PANEL_HEIGHT + MARGIN;
    espi_svg whole = {.status = ESP_OK};
    espi_svg_put(&whole,
                 "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %d %d\" width=\"%d\" "
                 "height=\"%d\" font-family=\"system-ui,-apple-system,Helvetica,Arial,sans-serif\">\n",
                 width, height, width, height);
    espi_svg_put(&whole,
                 "<style>.title{font-size:13px;font-weight:600;fill:#6b7280}.tick{font-size:10px;fill:#7f8794}.legend{font-size:10px}"
                 ".run{font-size:12px;fill:#6b7280}.grid{stroke:#888;stroke-opacity:.22}.axis{stroke:#888;fill:none}</style>\n");
    espi_svg_add(&whole, p->svg.bytes.data, p->svg.bytes.used);
    espi_svg_put(&whole, "</svg>\n");
    esp_status status = whole.status;
    if (status == ESP_OK) status = espi_file_write_atomic(svg_file, whole.bytes.data, whole.bytes.used);
    free(whole.bytes.data);
    return status;
}

static esp_status plot(run *runs, const char *svg_file, const char *const *given, int n, double smooth) {
    for (int i = 0; i < n; i++) ESPI_TRY(read_run(&runs[i], given[i]));
    label_runs(runs, given, n);
    page p = {.runs = runs, .n_runs = n, .frame = frame_of(runs, n, smooth)};
    esp_status status = draw(&p);
    if (status == ESP_OK && p.drawn == 0)
        status = ESPI_FAIL(ESP_ERR_FORMAT, "%s: none of the known metrics in it, expected a trainer's metrics.jsonl", given[0]);
    if (status == ESP_OK) status = write_page(&p, svg_file);
    free(p.svg.bytes.data);
    return status;
}

esp_status esp_plot_runs(const char *svg_file, const char *const *runs, int32_t n_runs, double smooth) {
    if (!runs || !svg_file) return ESPI_FAIL(ESP_ERR_ARG, "esp_plot_runs: svg_file or runs is NULL, expected both");
    if (n_runs < 1 || n_runs > MAX_RUNS) return ESPI_FAIL(ESP_ERR_ARG, "esp_plot_runs: got %d runs, expected 1 to %d", n_runs, MAX_RUNS);
    for (int32_t i = 0; i < n_runs; i++)
        if (!runs[i]) return ESPI_FAIL(ESP_ERR_ARG, "esp_plot_runs: runs[%d] is NULL, expected a path", i);
    if (!isfinite(smooth)) return ESPI_FAIL(ESP_ERR_ARG, "esp_plot_runs: got smooth %g, expected steps, 0 or less", smooth);
    run *read = calloc((size_t)n_runs, sizeof *read);
    if (!read) return ESPI_FAIL(ESP_ERR_MEMORY, "plot: no memory for %d runs", n_runs);
    const esp_status status = plot(read, svg_file, runs, n_runs, smooth);
    for (int32_t i = 0; i < n_runs; i++) free_run(&read[i]);
    free(read);
    return status;
}

esp_status esp_plot_metrics(const char *metrics_file, const char *svg_file) {
    if (!metrics_file || !svg_file) return ESPI_FAIL(ESP_ERR_ARG, "esp_plot_metrics: a path is NULL, expected both");
    return esp_plot_runs(svg_file, &metrics_file, 1, 0);
}
