/* route: which experts see a token, and with which weight.  Twins: forward/route.c, backward/route.c.
 * Routing is saved, never recomputed: a checkpointed layer keeps it. */
#ifndef ESPI_CONTRACT_ROUTE_H
#define ESPI_CONTRACT_ROUTE_H

#include "contract/pass.h"

typedef struct espi_route_saved {
    void *logits, *lse; /* real [T,E], [T] */
    int32_t *idx;       /* [T,K] ascending within a token */
    void *weight;       /* real [T,K] */
    espi_routing routing;
} espi_route_saved;

/* The router of a layer, or of a block that somebody holds by itself. */
typedef struct espi_router {
    espi_mat w; /* f32 [E,H] */
    void *d_w;  /* real [E,H] or NULL: frozen */
    int64_t top_k;
    const float *bias, *correction; /* [E] or NULL */
    espi_router_rule rule;
} espi_router;

/* layer: of pass->routes.chosen. */
esp_status espi_route_take_saved(espi_pass *pass, int64_t layer, const espi_router *router, espi_route_saved *saved);
/* x real [T,H].  layer: for the probe. */
esp_status espi_route_forward(espi_pass *pass, int64_t layer, const void *x, const espi_router *router, const espi_route_saved *saved);
/* d_x real [T,H]: ADDS to what the experts wrote.  d_weight real [T,K]. */
esp_status espi_route_backward(espi_pass *pass, int64_t layer, void *d_x, const void *d_weight, const void *x, const espi_router *router,
                               const espi_route_saved *saved);

/* The routed experts of a batch, before anything is computed: how many there are, of which size, and of each token and layer all ones or
 * K different experts; all ones at the last token of every sequence that is no prefix, or they are those of other tokens.
 * *replayed: pairs of a token and a layer that are not all ones.  ESP_ERR_SHAPE, ESP_ERR_ARG */
esp_status espi_routes_check(int64_t *replayed, const esp_model *model, const esp_batch *batch);
/* Whether where every token goes is known: `replayed`, and last tokens that follow. */
bool espi_routes_whole(const esp_model *model, const esp_batch *batch, int64_t replayed);
/* Fills chosen [L,T,K], in host memory, as espi_router_fwd takes it: ascending ids, -1 where the router is to choose; last tokens
 * that follow (esp_batch.last_follows) as -2 - id. */
void espi_routes_read(int32_t *chosen, const esp_model *model, const esp_batch *batch);
/* counts [L,E] overwrite: the rows of every expert in such a `chosen`, of which all is known. */
void espi_routes_count(int32_t *counts, const esp_model *model, const int32_t *chosen, int64_t tokens);
/* After a forward that records, from such an array: all ones in layers without experts and at the last token of every sequence that is no
 * prefix. */
void espi_routes_record(const esp_model *model, const esp_batch *batch, const int32_t *chosen);
/* Writes one layer's selection idx [T,K] into record [T,L,K]. */
void espi_routes_write(void *record, const espi_config *c, int64_t layer, const int32_t *idx, int64_t tokens);
/* Size of an element for this model. */
static inline int32_t espi_route_bytes(const espi_config *c) {
    return c->experts <= 255 ? 1 : 2;
}

#endif
