/* Panels of curves as SVG: plain shapes and text, colours that read on light and on dark ground.
 *   plot.c      metrics.jsonl -> which curves in which panels
 *   plot_svg.c  a panel: axes, curves, legend */
#ifndef ESPI_RL_PLOT_H
#define ESPI_RL_PLOT_H

#include "core/bytes.h"
#include "core/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define ESPI_PANEL_WIDTH 340
#define ESPI_PANEL_HEIGHT 220
#define ESPI_PLOT_COLOURS 8

/* The SVG while it is made.  The first failure stays. */
typedef struct espi_svg {
    espi_bytes bytes; /* owned */
    esp_status status;
} espi_svg;

typedef struct espi_curve {
    const char *label;   /* "" = none: the title says it all */
    int colour;          /* any number; they come again with dashes after ESPI_PLOT_COLOURS */
    bool marks;          /* measured now and then: points on a line */
    const double *x, *y; /* [n], x ascending; y NaN: not measured there */
    int64_t n;
} espi_curve;

/* Where all panels of a plot agree. */
typedef struct espi_plot_frame {
    double first, last; /* steps */
    double smooth;      /* steps of the running mean that is drawn over a curve; 0 = none */
} espi_plot_frame;

/* Text as it is. */
void espi_svg_add(espi_svg *svg, const char *text, size_t n);
void espi_svg_put(espi_svg *svg, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* Any bytes as the text of an element: escaped, what XML does not allow as ?. */
void espi_svg_text(espi_svg *svg, const char *text);
/* A stroke's attributes. */
void espi_svg_stroke(espi_svg *svg, int colour, double width, double opacity);

/* A panel whose top left corner is x, y.  At least one of the curves has a value. */
void espi_svg_panel(espi_svg *svg, const char *title, const espi_curve *curves, int n, const espi_plot_frame *frame, double x, double y);

#endif
