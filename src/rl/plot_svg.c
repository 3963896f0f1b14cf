/* One panel of a plot as SVG: see plot.h. */
#include "rl/plot.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

#define LEFT 50 /* of the frame inside its panel */
#define TOP 42
#define RIGHT 14
#define BOTTOM 36
#define MOST_TICKS 16
#define BUCKETS 400 /* of a curve: no more than the eye and the screen tell apart */
#define MOST_VALUES 6
#define FEW 20 /* values that need no running mean */

static const char *const colours[ESPI_PLOT_COLOURS] = {"#3b82c4", "#d9822b", "#3f9a5f", "#c0504d",
                                                       "#8064a2", "#2a9d9d", "#b5893a", "#7f7f7f"};

void espi_svg_add(espi_svg *svg, const char *text, size_t n) {
    if (svg->status == ESP_OK && !espi_bytes_add(&svg->bytes, text, n))
        svg->status = ESPI_FAIL(ESP_ERR_MEMORY, "plot: no memory for %zu bytes of SVG", svg->bytes.used + n);
}

void espi_svg_put(espi_svg *svg, const char *format, ...) {
    char piece[1024];
    va_list arguments;
    va_start(arguments, format);
    const int n = vsnprintf(piece, sizeof piece, format, arguments);
    va_end(arguments);
    if (n > 0) espi_svg_add(svg, piece, (size_t)n < sizeof piece ? (size_t)n : sizeof piece - 1);
}

void espi_svg_text(espi_svg *svg, const char *text) {
    const utf8proc_uint8_t *p = (const utf8proc_uint8_t *)text;
    for (utf8proc_ssize_t n; *p; p += n > 0 ? n : 1) {
        utf8proc_int32_t c;
        n = utf8proc_iterate(p, -1, &c);
        if (c < 0x20 || c == 0x7F || c == 0xFFFE || c == 0xFFFF)
            espi_svg_put(svg, "?");
        else if (c == '&' || c == '<' || c == '>' || c == '"')
            espi_svg_put(svg, "&#%d;", (int)c);
        else
            espi_svg_put(svg, "%.*s", (int)n, (const char *)p);
    }
}

void espi_svg_stroke(espi_svg *svg, int colour, double width, double opacity) {
    espi_svg_put(svg, " fill=\"none\" stroke=\"%s\" stroke-width=\"%g\" stroke-linejoin=\"round\"", colours[colour % ESPI_PLOT_COLOURS],
                 width);
    if (opacity < 1) espi_svg_put(svg, " stroke-opacity=\"%g\"", opacity);
    const int dashes = colour / ESPI_PLOT_COLOURS;
    if (dashes > 0) espi_svg_put(svg, " stroke-dasharray=\"%d 3\"", 3 * dashes);
}

/* ---- axes ---- */

/* What an axis covers, and the distance of its round numbers. */
typedef struct axis {
    double low, high, step;
} axis;

/* The distance of about `count` round ticks over `span`. */
static double tick_step(double span, int count) {
    const double raw = span / count, power = pow(10, floor(log10(raw))), part = raw / power;
    return power * (part <= 1 ? 1 : part <= 2 ? 2 : part <= 5 ? 5 : 10);
}

static axis make_axis(double low, double high, int ticks) {
    axis a = {low, high, 1};
    if (!(high - low > 1e-9 * fmax(fabs(low), fabs(high)))) { /* one value, or as good as one */
        const double room = fabs(low) > 0 ? fabs(low) * 0.5 : 1;
        a.low = low == 0 ? 0 : low - room; /* what never happened is drawn on the ground */
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

/* Short and exact: 12000 is 12k. */
static void tell(char out[32], double v, double step) {
    static const char units[] = " kMGT";
    int unit = 0;
    if (fabs(v) < step * 1e-6) v = 0;
    while (fabs(v) >= 10000 && unit < 4) {
        v /= 1000;
        unit++;
    }
    snprintf(out, 32, unit ? "%.4g%c" : "%.4g", v, units[unit]);
}

/* The frame of a panel on the page. */
typedef struct box {
    double left, top, right, bottom;
    axis x, y;
} box;

static int ticks_of(const axis *a) {
    const double n = (a->high - a->low) / a->step;
    return n < MOST_TICKS ? (int)(n + 0.5) : MOST_TICKS;
}

static void draw_axes(espi_svg *svg, const box *b) {
    char text[32];
    for (int i = 0; i <= ticks_of(&b->y); i++) {
        const double v = b->y.low + i * b->y.step, at = place(&b->y, v, b->bottom, b->top);
        tell(text, v, b->y.step);
        espi_svg_put(
            svg, "<path class=\"grid\" d=\"M%.1f %.1fH%.1f\"/><text class=\"tick\" x=\"%.1f\" y=\"%.1f\" text-anchor=\"end\">%s</text>\n",
            b->left, at, b->right, b->left - 6, at + 3.5, text);
    }
    for (int i = 0; i <= ticks_of(&b->x); i++) {
        const double v = b->x.low + i * b->x.step, at = place(&b->x, v, b->left, b->right);
        tell(text, v, b->x.step);
        espi_svg_put(
            svg, "<path class=\"axis\" d=\"M%.1f %.1fv4\"/><text class=\"tick\" x=\"%.1f\" y=\"%.1f\" text-anchor=\"middle\">%s</text>\n",
            at, b->bottom, at, b->bottom + 15, text);
    }
    espi_svg_put(
        svg,
        "<path class=\"axis\" d=\"M%.1f %.1fV%.1fH%.1f\"/><text class=\"tick\" x=\"%.1f\" y=\"%.1f\" text-anchor=\"end\">step</text>\n",
        b->left, b->top, b->bottom, b->right, b->right, b->bottom + 28);
}

/* ---- curves ---- */

/* A running mean that forgets: what is `smooth` steps back counts 1/e. */
static void smooth_curve(double *out, const espi_curve *c, double smooth) {
    double sum = 0, weight = 0, last = 0;
    for (int64_t i = 0; i < c->n; i++) {
        out[i] = NAN;
        if (isnan(c->y[i])) continue;
        const double keep = weight > 0 ? exp(-(c->x[i] - last) / smooth) : 0;
        sum = sum * keep + c->y[i];
        weight = weight * keep + 1;
        last = c->x[i];
        out[i] = sum / weight;
    }
}

static void draw_point(espi_svg *svg, const box *b, char verb, double x, double y) {
    espi_svg_put(svg, "%c%.1f %.1f", verb, place(&b->x, x, b->left, b->right), place(&b->y, y, b->bottom, b->top));
}

/* The lowest and the highest value of a bucket, in the order in which they came: a spike is seen however long the run is. */
static void draw_bucket(espi_svg *svg, const box *b, const double *x, const double *y, int64_t first, int64_t end, bool *pen, bool joins) {
    int64_t low = -1, high = -1;
    for (int64_t i = first; i < end; i++) {
        if (isnan(y[i])) {
            if (!joins && low < 0) *pen = false;
            continue;
        }
        low = low < 0 || y[i] < y[low] ? i : low;
        high = high < 0 || y[i] > y[high] ? i : high;
    }
    if (low < 0) return;
    const int64_t one = low < high ? low : high, other = low < high ? high : low;
    draw_point(svg, b, *pen ? 'L' : 'M', x[one], y[one]);
    if (other != one) draw_point(svg, b, 'L', x[other], y[other]);
    *pen = true;
}

/* joins: over what was not measured. */
static void draw_line(espi_svg *svg, const box *b, const espi_curve *c, const double *y, bool joins) {
    const int64_t buckets = c->n < 2 * BUCKETS ? c->n : BUCKETS;
    bool pen = false;
    espi_svg_put(svg, " d=\"");
    for (int64_t k = 0; k < buckets; k++) draw_bucket(svg, b, c->x, y, k * c->n / buckets, (k + 1) * c->n / buckets, &pen, joins);
    espi_svg_put(svg, "\"/>\n");
}

static int64_t values_of(const espi_curve *c, int64_t *last) {
    int64_t n = 0;
    for (int64_t i = 0; i < c->n; i++) {
        if (isnan(c->y[i])) continue;
        *last = i;
        n++;
    }
    return n;
}

/* A value without neighbours has no line: it is a point.  Of many values the line is enough. */
static void draw_marks(espi_svg *svg, const box *b, const espi_curve *c, int64_t values) {
    for (int64_t i = 0; i < c->n && values < BUCKETS; i++) {
        const bool alone = (i == 0 || isnan(c->y[i - 1])) && (i + 1 == c->n || isnan(c->y[i + 1]));
        if (!isnan(c->y[i]) && (c->marks || alone))
            espi_svg_put(svg, "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"%g\" fill=\"%s\"/>\n", place(&b->x, c->x[i], b->left, b->right),
                         place(&b->y, c->y[i], b->bottom, b->top), c->marks ? 2.6 : 1.6, colours[c->colour % ESPI_PLOT_COLOURS]);
    }
}

static void draw_curve(espi_svg *svg, const box *b, const espi_curve *c, double smooth) {
    int64_t last = 0;
    const int64_t n = values_of(c, &last);
    if (n == 0) return;
    const bool smoothed = !c->marks && smooth > 0 && n >= FEW;
    double *mean = smoothed ? malloc((size_t)c->n * sizeof *mean) : NULL;
    if (smoothed && !mean) svg->status = ESPI_FAIL(ESP_ERR_MEMORY, "plot: no memory for a mean over %lld values", (long long)c->n);
    espi_svg_put(svg, "<path class=\"%s\"", mean ? "raw" : "line");
    espi_svg_stroke(svg, c->colour, mean ? 1 : 1.8, mean ? 0.35 : 1);
    draw_line(svg, b, c, c->y, c->marks);
    draw_marks(svg, b, c, n);
    if (!mean) return;
    smooth_curve(mean, c, smooth);
    espi_svg_put(svg, "<path class=\"mean\"");
    espi_svg_stroke(svg, c->colour, 1.8, 1);
    draw_line(svg, b, c, mean, true);
    free(mean);
}

/* Name and last value of each curve, in its colour, under the title. */
static void draw_legend(espi_svg *svg, const espi_curve *curves, int n, const box *b) {
    if (n > MOST_VALUES) return; /* they would run out of the panel; who is who stands above them all */
    espi_svg_put(svg, "<text class=\"legend\" x=\"%.1f\" y=\"%.1f\" text-anchor=\"end\">", b->right, b->top - 8);
    for (int c = 0; c < n; c++) {
        char value[32];
        int64_t last = 0;
        if (values_of(&curves[c], &last) == 0) continue;
        tell(value, curves[c].y[last], 0);
        espi_svg_put(svg, "<tspan dx=\"8\" fill=\"%s\">", colours[curves[c].colour % ESPI_PLOT_COLOURS]);
        espi_svg_text(svg, curves[c].label);
        espi_svg_put(svg, "%s%s</tspan>", *curves[c].label ? " " : "", value);
    }
    espi_svg_put(svg, "</text>\n");
}

void espi_svg_panel(espi_svg *svg, const char *title, const espi_curve *curves, int n, const espi_plot_frame *frame, double x, double y) {
    box b = {.left = x + LEFT, .top = y + TOP, .right = x + ESPI_PANEL_WIDTH - RIGHT, .bottom = y + ESPI_PANEL_HEIGHT - BOTTOM};
    double low = INFINITY, high = -INFINITY;
    for (int c = 0; c < n; c++)
        for (int64_t i = 0; i < curves[c].n; i++) {
            low = fmin(low, curves[c].y[i]);
            high = fmax(high, curves[c].y[i]);
        }
    if (low > 0 && low < 0.6 * high) low = 0; /* a curve that falls to nearly nothing should be seen to */
    b.x = make_axis(frame->first, frame->last, 6);
    b.y = make_axis(low, high, 5);
    espi_svg_put(svg, "<g><text class=\"title\" x=\"%.1f\" y=\"%.1f\">", b.left, y + 16);
    espi_svg_text(svg, title);
    espi_svg_put(svg, "</text>\n");
    draw_legend(svg, curves, n, &b);
    draw_axes(svg, &b);
    for (int c = 0; c < n; c++) draw_curve(svg, &b, &curves[c], frame->smooth);
    espi_svg_put(svg, "</g>\n");
}
