/* Who holds which expert, which rows travel when, and sums over ranks. */
#include "dist/share.h"

#include "core/select.h"
#include "dist/link.h"

#include <stdlib.h>
#include <string.h>

esp_status espi_share_make(espi_share *share, esp_comm *comm, int64_t experts, int spread, int64_t row_budget) {
    const int ranks = esp_comm_size(comm);
    if (spread == 0) spread = ranks;
    if (spread < 1 || ranks % spread != 0)
        return ESPI_FAIL(
            ESP_ERR_ARG,
            "expert_ranks: got %d with %d ranks, expected a divisor of that number (0 = all of them, 1 = every rank holds all experts)",
            spread, ranks);
    if (row_budget < 0)
        return ESPI_FAIL(ESP_ERR_ARG, "expert_rows: got %lld, expected the most rows that a rank takes at once, or 0",
                         (long long)row_budget);
    *share = (espi_share){
        .comm = comm, .rank = esp_comm_rank(comm), .ranks = ranks, .spread = spread, .experts = experts, .row_budget = row_budget};
    share->first = espi_share_border(share, espi_share_member(share));
    share->count = espi_share_border(share, espi_share_member(share) + 1) - share->first;
    return ESP_OK;
}

esp_status espi_share_meet(espi_share *share, int64_t tokens, bool routes_known) {
    typedef struct word {
        int64_t tokens, known;
    } word;
    share->most_tokens = tokens;
    share->routes_known = routes_known;
    if (!espi_share_travels(share)) return ESP_OK;
    const word mine = {tokens, routes_known};
    word *all = malloc((size_t)share->ranks * sizeof *all);
    if (!all) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for the sizes of %d batches", share->ranks);
    const esp_status status = espi_comm_gather(share->comm, (espi_place){"tokens of a pass", -1}, all, &mine, sizeof mine);
    for (int r = 0; r < share->ranks && status == ESP_OK; r++) {
        if (all[r].tokens > share->most_tokens) share->most_tokens = all[r].tokens;
        share->routes_known = share->routes_known && all[r].known;
    }
    free(all);
    return status;
}

static int64_t larger(int64_t a, int64_t b) {
    return a > b ? a : b;
}

int64_t espi_share_capacity(const espi_share *s, int64_t tokens, int64_t top_k) {
    const int64_t most = larger(tokens, s->most_tokens), owned = (s->experts + s->spread - 1) / s->spread;
    const int64_t worst = s->spread * most * (top_k < owned ? top_k : owned), even = most * top_k;
    const int64_t rows = larger(s->row_budget ? s->row_budget : even + (even + 1) / 2, most);
    return rows < worst ? rows : worst;
}

esp_status espi_share_counts(const espi_share *s, int64_t layer, int32_t *counts, const int32_t *offsets, int32_t *mine) {
    for (int64_t e = 0; e < s->experts; e++) mine[e] = offsets[e + 1] - offsets[e];
    return espi_comm_gather(s->comm, (espi_place){"rows of every expert", layer}, counts, mine, (size_t)s->experts * sizeof *mine);
}

esp_status espi_share_counts_of_all(const espi_share *s, int32_t *counts, const int32_t *mine, int64_t layers) {
    return espi_comm_gather(s->comm, (espi_place){"rows of every expert and layer", -1}, counts, mine,
                            (size_t)(layers * s->experts) * sizeof *mine);
}

static int64_t count_rows(const int32_t *counts, int64_t first, int64_t last) {
    int64_t rows = 0;
    for (int64_t e = first; e < last; e++) rows += counts[e];
    return rows;
}

/* What the receiver `to` gets of the rank `from` of its group. */
static const int32_t *counts_of(const espi_share *s, const int32_t *counts, int to, int from) {
    return counts + (to / s->spread * s->spread + from) * s->experts;
}

int64_t espi_share_batch_rows(const espi_share *s, const int32_t *counts, int m) {
    return count_rows(counts_of(s, counts, s->rank, m), 0, s->experts);
}

bool espi_share_fits(const espi_share *s, const int32_t *counts, int64_t capacity) {
    for (int to = 0; to < s->ranks; to++) {
        int64_t rows = 0;
        for (int from = 0; from < s->spread; from++)
            rows +=
                count_rows(counts_of(s, counts, to, from), espi_share_border(s, to % s->spread), espi_share_border(s, to % s->spread + 1));
        if (rows > capacity) return false;
    }
    return true;
}

esp_status espi_round_take(espi_round *round, const espi_share *s, espi_arena *arena) {
    const size_t ranks = (size_t)s->ranks, spread = (size_t)s->spread;
    int64_t *room;
    ESPI_TRY(espi_arena_take_host(arena, (6 * ranks + 4 * spread) * sizeof *room, &room));
    if (arena->dry) return ESP_OK;
    *round = (espi_round){.out_at = room,
                          .out_rows = room + ranks,
                          .in_at = room + 2 * ranks,
                          .in_rows = room + 3 * ranks,
                          .source = room + 4 * ranks,
                          .expert = room + 5 * ranks,
                          .first = room + 6 * ranks,
                          .last = room + 6 * ranks + spread,
                          .coming = room + 6 * ranks + 2 * spread,
                          .going = room + 6 * ranks + 3 * spread};
    return ESP_OK;
}

void espi_round_begin(espi_round *round, const espi_share *s, const int32_t *counts, int64_t capacity) {
    round->counts = counts;
    round->capacity = capacity;
    round->begun = false;
    for (int to = 0; to < s->ranks; to++) {
        round->source[to] = 0;
        round->expert[to] = espi_share_border(s, to % s->spread);
    }
}

/* What a receiver gets in this round: of each rank of its group a range of experts. */
static void fill_receiver(espi_round *r, const espi_share *s, int to) {
    const int me = espi_share_member(s), group = espi_share_group(s);
    const bool ours = to / s->spread * s->spread == group;
    const int64_t begin = espi_share_border(s, to % s->spread), end = espi_share_border(s, to % s->spread + 1);
    int64_t rows = 0;
    for (int from = 0; from < s->spread; from++) {
        const int32_t *counts = counts_of(s, r->counts, to, from);
        int64_t first = end, last = end, came = 0;
        if (r->source[to] == from) {
            first = last = r->expert[to];
            while (last < end && rows + came + counts[last] <= r->capacity) came += counts[last++];
            r->expert[to] = last == end ? begin : last;
            r->source[to] += last == end;
        }
        if (to == s->rank) {
            r->first[from] = first;
            r->last[from] = last;
            r->in_at[group + from] = rows;
            r->in_rows[group + from] = came;
        }
        if (ours && from == me) {
            r->out_at[to] = count_rows(counts, 0, first);
            r->out_rows[to] = came;
        }
        rows += came;
    }
}

bool espi_round_next(espi_round *r, const espi_share *s) {
    bool left = !r->begun;
    for (int to = 0; to < s->ranks; to++) left = left || r->source[to] < s->spread;
    if (!left) return false;
    r->begun = true;
    for (int64_t i = 0; i < s->ranks; i++) r->out_at[i] = r->out_rows[i] = r->in_at[i] = r->in_rows[i] = 0;
    for (int to = 0; to < s->ranks; to++) fill_receiver(r, s, to);
    return true;
}

esp_status espi_share_open(const espi_share *s, esp_ctx *ctx) {
    espi_link *link;
    return s->ranks > 1 && ctx->device != NULL ? espi_link_of(&link, ctx) : ESP_OK;
}

/* Tensor memory is that of the host, or of a device. */
static esp_status exchange(esp_ctx *ctx, const espi_share *s, espi_place place, const espi_row_array *arrays, int n_arrays,
                           espi_row_ranges to, espi_row_ranges from) {
    if (ctx->device == NULL) return espi_comm_exchange(s->comm, place, arrays, n_arrays, to, from);
    espi_link *link;
    ESPI_TRY(espi_link_of(&link, ctx));
    return espi_link_exchange(link, place, arrays, n_arrays, to, from);
}

esp_status espi_share_exchange(esp_ctx *ctx, const espi_share *s, espi_place place, const espi_row_array *arrays, int n_arrays,
                               const espi_round *round, bool back) {
    const espi_row_ranges home = {round->out_at, round->out_rows}, there = {round->in_at, round->in_rows};
    return exchange(ctx, s, place, arrays, n_arrays, back ? home : there, back ? there : home);
}

/* NULL: everything is moved at once. */
static esp_status overlapping(espi_link **link, esp_ctx *ctx) {
    *link = NULL;
    if (ctx->device == NULL) return ESP_OK;
    ESPI_TRY(espi_link_of(link, ctx));
    if (!espi_link_overlaps(*link)) *link = NULL;
    return ESP_OK;
}

/* In every turn a rank sends to one member and gets from one, so that of two that are a turn's pair both know of it. */
esp_status espi_share_send(esp_ctx *ctx, const espi_share *s, espi_place place, const espi_row_array *arrays, int n_arrays,
                           const espi_round *round) {
    espi_link *link;
    ESPI_TRY(overlapping(&link, ctx));
    if (link == NULL) return espi_share_exchange(ctx, s, place, arrays, n_arrays, round, false);
    const int group = espi_share_group(s);
    for (int turn = 0; turn < s->spread; turn++) {
        const int from = espi_share_turn(s, turn), to = (espi_share_member(s) + turn) % s->spread;
        int ticket;
        ESPI_TRY(espi_link_begin_rows(link, place, arrays, n_arrays, (espi_row_ranges){round->in_at, round->in_rows},
                                      (espi_row_ranges){round->out_at, round->out_rows}, (espi_pair){group + to, group + from}, &ticket));
        round->coming[from] = ticket;
    }
    return ESP_OK;
}

esp_status espi_share_came(esp_ctx *ctx, const espi_round *round, int member) {
    espi_link *link;
    ESPI_TRY(overlapping(&link, ctx));
    return link == NULL ? ESP_OK : espi_link_end(link, (int)round->coming[member]);
}

esp_status espi_share_return(esp_ctx *ctx, const espi_share *s, espi_place place, const espi_row_array *arrays, int n_arrays,
                             const espi_round *round, int turn) {
    espi_link *link;
    ESPI_TRY(overlapping(&link, ctx));
    if (link == NULL) return turn == s->spread - 1 ? espi_share_exchange(ctx, s, place, arrays, n_arrays, round, true) : ESP_OK;
    const int group = espi_share_group(s), to = espi_share_turn(s, turn), from = (espi_share_member(s) + turn) % s->spread;
    int ticket;
    ESPI_TRY(espi_link_begin_rows(link, place, arrays, n_arrays, (espi_row_ranges){round->out_at, round->out_rows},
                                  (espi_row_ranges){round->in_at, round->in_rows}, (espi_pair){group + to, group + from}, &ticket));
    round->going[turn] = ticket;
    return ESP_OK;
}

esp_status espi_share_returned(esp_ctx *ctx, const espi_share *s, const espi_round *round) {
    espi_link *link;
    ESPI_TRY(overlapping(&link, ctx));
    for (int turn = 0; turn < s->spread && link != NULL; turn++) ESPI_TRY(espi_link_end(link, (int)round->going[turn]));
    return ESP_OK;
}

size_t espi_share_add_bytes(const espi_share *s) {
    return s->ranks > 1 ? espi_comm_add_bytes(s->comm) : 0;
}

esp_status espi_share_add(const espi_share *s, const char *what, double *total, const double *mine, int64_t n, void *scratch) {
    if (n == 0) return ESP_OK;
    memset(total, 0, (size_t)n * sizeof *total);
    return espi_comm_add(s->comm, (espi_place){what, -1}, total, mine, n, ESP_F64, scratch);
}

/* ---- sums of gradients ---- */

enum { ARRAYS = 1024 }; /* that one exchange takes */
#define MOST_VALUES ((int64_t)1 << 23)

/* Ranks that hold other values of a sum than their neighbour, side by side; and those that hold the same. */
static int apart_of(const espi_share *s, bool of_experts) {
    return of_experts ? s->spread : 1;
}

/* Of the rank with most experts: so that all make the same exchanges. */
static int64_t most_of(const espi_share *s, int64_t n, int64_t each, bool of_experts) {
    return of_experts ? (s->experts + s->spread - 1) / s->spread * each : n;
}

int64_t espi_share_sum_values(const espi_share *s, int64_t n, int64_t each, bool of_experts) {
    const int64_t holders = s->ranks / apart_of(s, of_experts);
    return (most_of(s, n, each, of_experts) + holders - 1) / holders * s->ranks;
}

int64_t espi_share_sum_room(int64_t values) {
    return values < MOST_VALUES ? values : MOST_VALUES;
}

/* `n` values of a sum from `first` on.  Every rank that holds them has a slice of `cut`, the last ones less or nothing. */
typedef struct piece {
    const espi_sum *sum;
    int64_t first, n, cut;
    char *parts; /* what came of this rank's slice: [ranks][own] */
} piece;

typedef struct slice {
    int64_t at, n;
} slice;

/* Has a rank the same values? */
static bool holds(const espi_share *s, int apart, int rank) {
    return rank % apart == s->rank % apart;
}

static slice slice_of(const espi_share *s, const piece *p, int rank) {
    const int apart = apart_of(s, p->sum->of_experts);
    const int64_t at = rank / apart * p->cut, left = p->n - at;
    if (!holds(s, apart, rank) || left <= 0) return (slice){0, 0};
    return (slice){at, left < p->cut ? left : p->cut};
}

static espi_message message(const void *base, int64_t at, int64_t n, size_t size) {
    return (espi_message){n > 0 ? (char *)base + (size_t)at * size : NULL, (size_t)n * size};
}

static esp_status talk(esp_ctx *ctx, const espi_share *s, const espi_message *send, const espi_message *recv, int n) {
    const espi_place place = {"gradients", -1};
    if (ctx->device == NULL) return espi_comm_messages(s->comm, place, send, recv, n);
    espi_link *link;
    int ticket;
    ESPI_TRY(espi_link_of(&link, ctx));
    ESPI_TRY(espi_link_begin(link, place, send, recv, n, &ticket));
    return espi_link_end(link, ticket);
}

/* To every rank what this one has of its slice; of experts, each has something of every rank of its group. */
static int list_parts(espi_message *send, espi_message *recv, const espi_share *s, const piece *p, size_t size) {
    const int apart = apart_of(s, p->sum->of_experts);
    const int64_t own = slice_of(s, p, s->rank).n;
    for (int m = 0; m < apart; m++)
        for (int r = 0; r < s->ranks; r++) {
            const slice to = slice_of(s, p, r);
            send[m * s->ranks + r] = message(p->sum->partial, m * p->sum->n + p->first + to.at, to.n, size);
            recv[m * s->ranks + r] = message(p->parts, (r / apart * apart + m) * own, holds(s, apart, r) ? own : 0, size);
        }
    return apart;
}

static void list_totals(espi_message *send, espi_message *recv, const espi_share *s, const piece *p, size_t size) {
    const int apart = apart_of(s, p->sum->of_experts);
    const slice own = slice_of(s, p, s->rank);
    for (int r = 0; r < s->ranks; r++) {
        const bool other = r != s->rank && holds(s, apart, r);
        const slice from = slice_of(s, p, r);
        send[r] = message(p->sum->total, p->first + own.at, other ? own.n : 0, size);
        recv[r] = message(p->sum->total, p->first + from.at, other ? from.n : 0, size);
    }
}

/* Every rank gets what the others have of its own slices, adds all up in rank order, and gives them the results: what a rank sends is at most
 * twice its values, however many ranks there are. */
static esp_status add_pieces(esp_ctx *ctx, const espi_share *s, const piece *pieces, int n, espi_message *send, espi_message *recv) {
    const size_t size = ctx->real_size;
    espi_arena none = espi_arena_over(NULL, 0);
    int arrays = 0;
    for (int i = 0; i < n; i++) arrays += list_parts(send + arrays * s->ranks, recv + arrays * s->ranks, s, &pieces[i], size);
    ESPI_TRY(talk(ctx, s, send, recv, arrays));
    for (int i = 0; i < n; i++) {
        const piece *p = &pieces[i];
        const slice own = slice_of(s, p, s->rank);
        const espi_parts_add args = {
            .total = (char *)p->sum->total + (size_t)(p->first + own.at) * size, .parts = p->parts, .n = own.n, .n_parts = s->ranks};
        if (own.n > 0) ESPI_TRY(espi_op_parts_add(ctx, &none, &args));
        list_totals(send + i * s->ranks, recv + i * s->ranks, s, p, size);
    }
    return talk(ctx, s, send, recv, n);
}

/* As many pieces together as there is room for, so that small gradients do not cost an exchange each. */
static esp_status add_sums(esp_ctx *ctx, const espi_share *s, const espi_sum *sums, int64_t n_sums, void *scratch, int64_t values,
                           espi_message *room) {
    piece pieces[ESPI_SUMS_TOGETHER];
    espi_message *recv = room + (size_t)(ARRAYS + s->spread) * (size_t)s->ranks;
    int n = 0, arrays = 0;
    int64_t used = 0;
    for (int64_t i = 0; i < n_sums; i++) {
        const espi_sum *sum = &sums[i];
        const int apart = apart_of(s, sum->of_experts);
        const int64_t most = most_of(s, sum->n, sum->each, sum->of_experts), holders = s->ranks / apart;
        for (int64_t first = 0, length; first < most; first += length) {
            if (n == ESPI_SUMS_TOGETHER || arrays >= ARRAYS || values - used < s->ranks) {
                ESPI_TRY(add_pieces(ctx, s, pieces, n, room, recv));
                n = arrays = 0;
                used = 0;
            }
            const int64_t fits = (values - used) / s->ranks * holders, left = most - first, here = sum->n - first;
            length = left < fits ? left : fits;
            pieces[n++] = (piece){.sum = sum,
                                  .first = first,
                                  .n = here < 0        ? 0
                                       : here < length ? here
                                                       : length,
                                  .cut = (length + holders - 1) / holders,
                                  .parts = (char *)scratch + (size_t)used * ctx->real_size};
            used += pieces[n - 1].cut * s->ranks;
            arrays += apart;
        }
    }
    return n > 0 ? add_pieces(ctx, s, pieces, n, room, recv) : ESP_OK;
}

esp_status espi_share_sum(esp_ctx *ctx, const espi_share *s, const espi_sum *sums, int64_t n_sums, void *scratch, int64_t values) {
    const size_t arrays = ARRAYS + (size_t)s->spread;
    espi_message *room = malloc(2 * arrays * (size_t)s->ranks * sizeof *room);
    if (room == NULL) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for the messages of %d ranks", s->ranks);
    const esp_status status = add_sums(ctx, s, sums, n_sums, scratch, values, room);
    free(room);
    return status;
}
