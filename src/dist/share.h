/* Who holds which expert: `spread` neighbouring ranks share the experts of one model, so R ranks hold R / spread models.
 * spread = 1: every rank has all experts, and tokens stay; spread = R: one model, and tokens travel to the experts that they chose. */
#ifndef ESPI_DIST_SHARE_H
#define ESPI_DIST_SHARE_H

#include "core/arena.h"
#include "dist/comm.h"

typedef struct espi_share {
    esp_comm *comm; /* NULL: alone */
    int rank, ranks;
    int spread;
    int64_t experts;      /* of the model */
    int64_t first, count; /* this rank's own */
    int64_t row_budget;   /* routed rows that a rank takes at once; 0: one and a half times its even share */
    int64_t most_tokens;  /* of any rank in the passes that follow; rooms are as large as the busiest rank needs */
    bool routes_known;    /* ... and every rank replays where all its tokens go: counted once for all layers */
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

/* On devices: finds the way between them now, so that what stands against it is said before anything is loaded. */
esp_status espi_share_open(const espi_share *share, esp_ctx *ctx);

/* Before a pass: how many tokens has every rank, and does it know where they go?  share->most_tokens, routes_known. */
esp_status espi_share_meet(espi_share *share, int64_t tokens, bool routes_known);
/* Rows that a rank of the group takes at once, when each token goes to top_k experts and no rank has more than `tokens` or most_tokens.
 * Never less than what one expert may get from one rank, which is not cut: its products are the same in any number of rounds. */
int64_t espi_share_capacity(const espi_share *share, int64_t tokens, int64_t top_k);

/* counts [ranks, experts] overwrite: the routed rows of every rank for every expert.  offsets [experts+1]: of this rank's rows, in host
 * memory.  mine: room for one row of counts. */
esp_status espi_share_counts(const espi_share *share, int64_t layer, int32_t *counts, const int32_t *offsets, int32_t *mine);
/* The same of `layers` layers at once: counts [ranks, layers, experts], mine [layers, experts]. */
esp_status espi_share_counts_of_all(const espi_share *share, int32_t *counts, const int32_t *mine, int64_t layers);
/* The routed rows of member m's whole batch. */
int64_t espi_share_batch_rows(const espi_share *share, const int32_t *counts, int m);
/* Do the rows that every rank gets fit at once? */
bool espi_share_fits(const espi_share *share, const int32_t *counts, int64_t capacity);

/* One round of rows on their way to the experts.  What goes in which round follows from the counts, and every rank finds the same. */
typedef struct espi_round {
    /* [ranks] in routed order here: what goes to each rank; where what came from each rank lies there. */
    int64_t *out_at, *out_rows, *in_at, *in_rows;
    int64_t *first, *last;    /* [spread] experts, counted from the model's first, whose rows came from each member */
    int64_t *source, *expert; /* [ranks] of every receiver: the next piece, and the member of its group that it comes from */
    int64_t *coming, *going;  /* [spread] tickets of rows under way, from every member, and of results in every turn */
    const int32_t *counts;
    int64_t capacity;
    bool begun;
} espi_round;
/* The arrays; nothing is written. */
esp_status espi_round_take(espi_round *round, const espi_share *share, espi_arena *arena);
void espi_round_begin(espi_round *round, const espi_share *share, const int32_t *counts, int64_t capacity);
/* False when all have gone.  At least one round is made, though it may be empty: every rank makes the same calls. */
bool espi_round_next(espi_round *round, const espi_share *share);

/* Rows to the experts' ranks, or, back: results to the ranks where the rows came from. */
esp_status espi_share_exchange(esp_ctx *ctx, const espi_share *share, espi_place place, const espi_row_array *arrays, int n_arrays,
                               const espi_round *round, bool back);

/* The same source by source, so that experts work on what has come while the rest is under way; where nothing can go on beside the work, all
 * is moved at once.  Rows are sent; what came from each member is waited for; results are returned to every member in the order of
 * espi_share_turn, turn 0 to spread - 1; what this rank gets back is waited for. */
static inline int espi_share_turn(const espi_share *s, int turn) {
    return (espi_share_member(s) - turn + s->spread) % s->spread; /* oneself first, then those whose rows come next */
}
esp_status espi_share_send(esp_ctx *ctx, const espi_share *share, espi_place place, const espi_row_array *arrays, int n_arrays,
                           const espi_round *round);
esp_status espi_share_came(esp_ctx *ctx, const espi_round *round, int member);
esp_status espi_share_return(esp_ctx *ctx, const espi_share *share, espi_place place, const espi_row_array *arrays, int n_arrays,
                             const espi_round *round, int turn);
esp_status espi_share_returned(esp_ctx *ctx, const espi_share *share, const espi_round *round);

/* Of what several ranks hold, one speaks for all. */
static inline bool espi_share_speaks(const espi_share *s, bool of_experts) {
    return of_experts ? s->rank < s->spread : s->rank == 0;
}
/* total [n] overwrite: the sum of every rank's `mine`, in host memory.  scratch: espi_share_add_bytes(). */
size_t espi_share_add_bytes(const espi_share *share);
esp_status espi_share_add(const espi_share *share, const char *what, double *total, const double *mine, int64_t n, void *scratch);

/* A gradient that is the sum of what all ranks add.  Of experts: of the ranks that hold the same; `partial` has what came from every rank
 * of this group, one after the other. */
typedef struct espi_sum {
    void *total, *partial;
    int64_t n;    /* values here */
    int64_t each; /* of one expert */
    bool of_experts;
} espi_sum;
/* Sums that go together in one exchange, or rather two: of parts, and of results. */
enum { ESPI_SUMS_TOGETHER = 64 };
/* Values of work memory that the sum of such a gradient wants; and how many are best taken for sums that want so many together. */
int64_t espi_share_sum_values(const espi_share *share, int64_t n, int64_t each, bool of_experts);
int64_t espi_share_sum_room(int64_t values);
/* total += partial of rank 0, then of rank 1, ..: on every rank the same bits as if one rank had seen the batches in that order.
 * scratch: real [values], at least as many as ranks. */
esp_status espi_share_sum(esp_ctx *ctx, const espi_share *share, const espi_sum *sums, int64_t n_sums, void *scratch, int64_t values);

#endif
