/* Draws metrics.jsonl as an SVG of small panels.  Plain shapes and text, colours that read on light and on dark ground. */
#include "core/status.h"
#include "espalier/trainer.h"
#include "io/file.h"

#include <jansson.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_METRICS ((size_t)1 << 30)
#define MAX_CURVES 3
#define COLUMNS 3
#define PANEL_WIDTH 320
#define PANEL_HEIGHT 210
#define LEFT 48 /* of the plot's frame inside its panel */
#define TOP 34
#define RIGHT 12
#define BOTTOM 34

typedef struct curve {
    const char *key, *label; /* label NULL: the panel has one curve and its title says it all */
    const char *colour;
    bool marks; /* measured now and then: points on a line */
} curve;

typedef struct panel {
    const char *title;
    curve curves[MAX_CURVES];
} panel;

#define BLUE "#3b82c4"
#define ORANGE "#d9822b"
#define GREEN "#3f9a5f"

static const panel panels[] = {
    {"reward", {{"reward", "mean", BLUE, false}, {"reward_std", "std in a group", ORANGE, false}}},
    {"accuracy (exact)",
     {{"eval/sampled_exact", "eval, sampled", BLUE, true},
      {"eval/greedy_exact", "eval, greedy", ORANGE, true},
      {"exact", "training", GREEN, false}}},
    {"KL to the base (nats a token)", {{"kl", NULL, BLUE, true}}},
    {"entropy (nats a token)", {{"entropy", NULL, BLUE, false}}},
    {"completion length (tokens)",
     {{"completions/mean_length", "mean", BLUE, false}, {"completions/max_length", "longest", ORANGE, false}}},
    {"groups without spread (share)", {{"frac_reward_zero_std", NULL, BLUE, false}}},
    {"loss", {{"loss", NULL, BLUE, false}}},
    {"gradient norm", {{"grad_norm", NULL, BLUE, false}}},
};

/* One number of the file. */
typedef struct point {
    double x, y;
} point;

typedef struct points {
    point *items;
    int64_t n;
} points;

/* The SVG while it is made. */
typedef struct drawing {
    char *text;
    size_t used, capacity;
    esp_status status;
} drawing;

static void put(drawing *d, const char *format, ...) __attribute__((format(printf, 2, 3)));
static void put(drawing *d, const char *format, ...) {
    char piece[1024];
    va_list arguments;
    va_start(arguments, format);
    const int n = vsnprintf(piece, sizeof piece, format, arguments);
    va_end(arguments);
    if (d->status != ESP_OK || n <= 0) return;
    const size_t bytes = (size_t)n < sizeof piece ? (size_t)n : sizeof piece - 1;
    if (d->used + bytes + 1 > d->capacity) {
        const size_t capacity = 2 * (d->used + bytes + 1) + 4096;
        char *grown = realloc(d->text, capacity);
        if (!grown) {
            d->status = ESPI_FAIL(ESP_ERR_MEMORY, "plot: no memory for %zu bytes of SVG", capacity);
            return;
        }
        d->text = grown;
        d->capacity = capacity;
    }
    memcpy(d->text + d->used, piece, bytes + 1);
    d->used += bytes;
}

static esp_status parse(json_t **lines, char *text, const char *path) {
    *lines = json_array();
    if (!*lines) return ESPI_FAIL(ESP_ERR_MEMORY, "%s: no memory for its lines", path);
    int64_t number = 0;
    for (char *line = text, *end; *line; line = end) {
        const size_t length = strcspn(line, "\n");
        end = line + length + (line[length] == '\n');
        number++;
        if (length == 0) continue;
        json_error_t error;
        json_t *object = json_loadb(line, length, 0, &error);
        if (!json_is_object(object) || !json_is_integer(json_object_get(object, "step"))) {
            json_decref(object);
            return ESPI_FAIL(ESP_ERR_FORMAT, "%s:%lld: got no JSON object with an integer \"step\", expected a trainer's metrics", path,
                             (long long)number);
        }
        if (json_array_append_new(*lines, object) != 0) return ESPI_FAIL(ESP_ERR_MEMORY, "%s: no memory for its lines", path);
    }
    if (json_array_size(*lines) == 0) return ESPI_FAIL(ESP_ERR_FORMAT, "%s: no line, expected at least one step's metrics", path);
    return ESP_OK;
}

static esp_status collect(points *p, const json_t *lines, const char *key) {
    const size_t n = json_array_size(lines);
    p->n = 0;
    p->items = malloc(n * sizeof *p->items);
    if (!p->items) return ESPI_FAIL(ESP_ERR_MEMORY, "plot: no memory for %zu points", n);
    for (size_t i = 0; i < n; i++) {
        const json_t *line = json_array_get(lines, i), *value = json_object_get(line, key);
        if (json_is_number(value))
            p->items[p->n++] = (point){(double)json_integer_value(json_object_get(line, "step")), json_number_value(value)};
    }
    return ESP_OK;
}

/* The distance of about `count` round ticks over `span`. */
static double tick_step(double span, int count) {
    const double raw = span / count, power = pow(10, floor(log10(raw))), part = raw / power;
    return power * (part <= 1 ? 1 : part <= 2 ? 2 : part <= 5 ? 5 : 10);
}

/* An axis: what it covers, and its round numbers. */
typedef struct axis {
    double low, high, step;
} axis;

static axis make_axis(double low, double high, int ticks) {
    axis a = {low, high, 1};
    if (!(high > low)) {
        const double room = fabs(low) > 0 ? fabs(low) * 0.5 : 1;
        a.low = low - room;
        a.high = high + room;
    }
    a.step = tick_step(a.high - a.low, ticks);
    a.low = floor(a.low / a.step + 1e-9) * a.step;
    a.high = ceil(a.high / a.step - 1e-9) * a.step;
    return a;
}

static double place(const axis *a, double value, double from, double to) {
    return from + (value - a->low) / (a->high - a->low) * (to - from);
}

static void draw_axes(drawing *d, const axis *x, const axis *y, double left, double top, double right, double bottom) {
    for (double v = y->low; v <= y->high + y->step / 2; v += y->step) {
        const double at = place(y, v, bottom, top);
        put(d, "<path class=\"grid\" d=\"M%.1f %.1fH%.1f\"/><text class=\"tick\" x=\"%.1f\" y=\"%.1f\" text-anchor=\"end\">%g</text>\n",
            left, at, right, left - 6, at + 3.5, fabs(v) < y->step * 1e-6 ? 0 : v);
    }
    for (double v = x->low; v <= x->high + x->step / 2; v += x->step) {
        const double at = place(x, v, left, right);
        put(d, "<path class=\"axis\" d=\"M%.1f %.1fv4\"/><text class=\"tick\" x=\"%.1f\" y=\"%.1f\" text-anchor=\"middle\">%g</text>\n", at,
            bottom, at, bottom + 15, v);
    }
    put(d, "<path class=\"axis\" d=\"M%.1f %.1fV%.1fH%.1f\"/><text class=\"tick\" x=\"%.1f\" y=\"%.1f\" text-anchor=\"end\">step</text>\n",
        left, top, bottom, right, right, bottom + 27);
}

static void draw_curve(drawing *d, const curve *c, const points *p, const axis *x, const axis *y, double left, double top, double right,
                       double bottom) {
    put(d, "<path fill=\"none\" stroke=\"%s\" stroke-width=\"1.8\" stroke-linejoin=\"round\" d=\"", c->colour);
    for (int64_t i = 0; i < p->n; i++)
        put(d, "%c%.1f %.1f", i ? 'L' : 'M', place(x, p->items[i].x, left, right), place(y, p->items[i].y, bottom, top));
    put(d, "\"/>\n");
    for (int64_t i = 0; i < p->n && (c->marks || p->n == 1); i++)
        put(d, "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"2.8\" fill=\"%s\"/>\n", place(x, p->items[i].x, left, right),
            place(y, p->items[i].y, bottom, top), c->colour);
}

/* Names of the curves, each in its colour, at the right of the title's line. */
static void draw_legend(drawing *d, const panel *p, const points *all, double right, double y) {
    put(d, "<text class=\"legend\" x=\"%.1f\" y=\"%.1f\" text-anchor=\"end\">", right, y);
    for (int c = 0; c < MAX_CURVES; c++)
        if (all[c].n > 0 && p->curves[c].label) put(d, "<tspan dx=\"8\" fill=\"%s\">%s</tspan>", p->curves[c].colour, p->curves[c].label);
    put(d, "</text>\n");
}

static void draw_panel(drawing *d, const panel *p, const points *all, double x0, double y0, double last_step) {
    const double left = x0 + LEFT, top = y0 + TOP, right = x0 + PANEL_WIDTH - RIGHT, bottom = y0 + PANEL_HEIGHT - BOTTOM;
    double low = INFINITY, high = -INFINITY;
    for (int c = 0; c < MAX_CURVES; c++)
        for (int64_t i = 0; i < all[c].n; i++) {
            low = fmin(low, all[c].items[i].y);
            high = fmax(high, all[c].items[i].y);
        }
    if (low > 0 && low < 0.6 * high) low = 0; /* a curve that falls to nearly nothing should be seen to */
    const axis x = make_axis(0, last_step, 6), y = make_axis(low, high, 5);
    put(d, "<text class=\"title\" x=\"%.1f\" y=\"%.1f\">%s</text>\n", x0 + LEFT, y0 + 14, p->title);
    draw_legend(d, p, all, right, y0 + 27);
    draw_axes(d, &x, &y, left, top, right, bottom);
    for (int c = 0; c < MAX_CURVES; c++)
        if (all[c].n > 0) draw_curve(d, &p->curves[c], &all[c], &x, &y, left, top, right, bottom);
}

/* All curves of one panel; n of a curve that is not in the file stays 0. */
static esp_status collect_panel(points all[MAX_CURVES], bool *any, const panel *p, const json_t *lines) {
    *any = false;
    for (int c = 0; c < MAX_CURVES && p->curves[c].key; c++) {
        ESPI_TRY(collect(&all[c], lines, p->curves[c].key));
        *any = *any || all[c].n > 0;
    }
    return ESP_OK;
}

static esp_status draw(drawing *d, const json_t *lines, const char *path) {
    const json_t *last = json_array_get(lines, json_array_size(lines) - 1);
    const double last_step = (double)json_integer_value(json_object_get(last, "step"));
    int drawn = 0;
    for (int i = 0; i < ESPI_COUNT(panels); i++) {
        points all[MAX_CURVES] = {{NULL, 0}};
        bool any;
        const esp_status status = collect_panel(all, &any, &panels[i], lines);
        if (status == ESP_OK && any) {
            draw_panel(d, &panels[i], all, (drawn % COLUMNS) * PANEL_WIDTH, (double)(drawn / COLUMNS) * PANEL_HEIGHT + 8, last_step);
            drawn++;
        }
        for (int c = 0; c < MAX_CURVES; c++) free(all[c].items);
        ESPI_TRY(status);
    }
    return drawn ? ESP_OK : ESPI_FAIL(ESP_ERR_FORMAT, "%s: none of the known metrics in it, expected a trainer's metrics.jsonl", path);
}

static int panels_present(const json_t *lines) {
    int n = 0;
    for (int i = 0; i < ESPI_COUNT(panels); i++) {
        bool any = false;
        size_t at;
        json_t *line;
        json_array_foreach((json_t *)lines, at, line) {
            for (int c = 0; c < MAX_CURVES && panels[i].curves[c].key; c++)
                any = any || json_is_number(json_object_get(line, panels[i].curves[c].key));
        }
        n += any;
    }
    return n;
}

static esp_status make_svg(drawing *d, const json_t *lines, const char *path) {
    const int n = panels_present(lines), rows = (n + COLUMNS - 1) / COLUMNS;
    put(d,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %d %d\" width=\"%d\" height=\"%d\" "
        "font-family=\"system-ui,-apple-system,Helvetica,Arial,sans-serif\">\n",
        COLUMNS * PANEL_WIDTH, rows * PANEL_HEIGHT + 8, COLUMNS * PANEL_WIDTH, rows * PANEL_HEIGHT + 8);
    put(d, "<style>.title{font-size:13px;font-weight:600;fill:#6b7280}.tick{font-size:10px;fill:#7f8794}.legend{font-size:10px}"
           ".grid{stroke:#888;stroke-opacity:.22}.axis{stroke:#888;fill:none}</style>\n");
    ESPI_TRY(draw(d, lines, path));
    put(d, "</svg>\n");
    return d->status;
}

esp_status esp_plot_metrics(const char *metrics_file, const char *svg_file) {
    if (!metrics_file || !svg_file) return ESPI_FAIL(ESP_ERR_ARG, "esp_plot_metrics: a path is NULL, expected both");
    char *text = NULL;
    json_t *lines = NULL;
    drawing d = {.status = ESP_OK};
    ESPI_TRY(espi_file_read_all(&text, NULL, metrics_file, MAX_METRICS));
    esp_status status = parse(&lines, text, metrics_file);
    if (status == ESP_OK) status = make_svg(&d, lines, metrics_file);
    if (status == ESP_OK) status = espi_file_write_atomic(svg_file, d.text, d.used);
    json_decref(lines);
    free(text);
    free(d.text);
    return status;
}
