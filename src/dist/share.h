/* Who holds which expert: `spread` neighbouring ranks share the experts of one model, so R ranks hold R / spread models.
 * spread = 1: every rank has all experts, and tokens stay; spread = R: one model, and tokens travel to the experts that they chose. */
#ifndef ESPI_DIST_SHARE_H
#define ESPI_DIST_SHARE_H

#include "dist/comm.h"

typedef struct espi_share {
    esp_comm *comm; /* NULL: alone */
    int rank, ranks;
    int spread;
    int64_t experts;      /* of the model */
    int64_t first, count; /* this rank's own */
    int64_t row_budget;   /* routed rows that a rank takes at once; 0: one and a half times its even share */
    int64_t most_tokens;  /* of any rank in the passes that follow; rooms are as large as the busiest rank needs */
} espi_share;

/* The first expert of member m of a group; m = spread: one behind the last.  Any number of experts, any number of ranks. */
static inline int64_t espi_share_border(const espi_share *s, int m) {
    return s->experts * m / s->spread;
}
/* Which of its group a rank is, and the group's first rank. */
static inline int espi_share_member(const espi_share *s) {
    return s->rank % s->spread;
}
static inline int espi_share_group(const espi_share *s) {
    return s->rank - espi_share_member(s);
}
/* Ranks that hold the same experts. */
static inline int espi_share_copies(const espi_share *s) {
    return s->ranks / s->spread;
}
/* Do rows travel? */
static inline bool espi_share_travels(const espi_share *s) {
    return s->spread > 1;
}
/* Are gradients of this kind summed over ranks?  Those of experts are complete on their owner where there is one owner. */
static inline bool espi_share_sums(const espi_share *s, bool of_experts) {
    return of_experts ? espi_share_copies(s) > 1 : s->ranks > 1;
}

/* spread 0: as many as there are ranks.  ESP_ERR_ARG: spread does not divide the number of ranks. */
esp_status espi_share_make(espi_share *share, esp_comm *comm, int64_t experts, int spread, int64_t row_budget);

#endif
