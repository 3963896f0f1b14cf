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

size_t espi_share_sum_bytes(const espi_share *s) {
    return s->ranks > 1 ? espi_comm_add_bytes(s->comm) : 0;
}

/* What the messages of a sum are described by. */
typedef struct sum_room {
    espi_row_array *parts;                    /* [spread] */
    int64_t *at, *rows, *part_at, *part_rows; /* [ranks] the slice of each; what it sends of this rank's slice */
} sum_room;

/* `n` values from `first` on, a slice for every rank that holds them: it gets what the others have of its own slice, adds all up in rank order,
 * and gives them the result.  So what a rank sends is twice the values, however many ranks there are.  Of experts, each has something of
 * every rank of its group. */
static esp_status add_block(esp_ctx *ctx, const espi_share *s, const espi_sum *sum, void *scratch, const sum_room *room, int64_t first,
                            int64_t n) {
    const espi_place place = {sum->of_experts ? "gradients of experts" : "gradients", -1};
    const int apart = sum->of_experts ? s->spread : 1, holders = s->ranks / apart;
    const int64_t most = (n + holders - 1) / holders;
    const size_t size = ctx->real_size;
    char *total = (char *)sum->total + (size_t)first * size;
    for (int r = 0; r < s->ranks; r++) {
        const int64_t begin = r / apart * most, left = n - begin;
        const bool has = r % apart == s->rank % apart;
        room->at[r] = begin < n ? begin : n;
        room->rows[r] = !has || left < 0 ? 0 : left < most ? left : most;
    }
    const int64_t own = room->rows[s->rank], own_at = room->at[s->rank];
    for (int r = 0; r < s->ranks; r++) {
        room->part_at[r] = r / apart * apart * own;
        room->part_rows[r] = r % apart == s->rank % apart ? own : 0;
    }
    for (int m = 0; m < apart; m++)
        room->parts[m] = (espi_row_array){.to = (char *)scratch + (size_t)(m * own) * size,
                                          .from = (const char *)sum->partial + (size_t)(m * sum->n + first) * size,
                                          .row_bytes = size};
    ESPI_TRY(exchange(ctx, s, place, room->parts, apart, (espi_row_ranges){room->part_at, room->part_rows},
                      (espi_row_ranges){room->at, room->rows}));
    espi_arena none = espi_arena_over(NULL, 0);
    const espi_parts_add args = {.total = total + (size_t)own_at * size, .parts = scratch, .n = own, .n_parts = s->ranks};
    if (own > 0) ESPI_TRY(espi_op_parts_add(ctx, &none, &args));
    for (int r = 0; r < s->ranks; r++) room->part_at[r] = own_at;
    room->rows[s->rank] = room->part_rows[s->rank] = 0;
    const espi_row_array result = {.to = total, .from = total, .row_bytes = size};
    return exchange(ctx, s, place, &result, 1, (espi_row_ranges){room->at, room->rows}, (espi_row_ranges){room->part_at, room->part_rows});
}

static esp_status add_up(esp_ctx *ctx, const espi_share *s, const espi_sum *sum, void *scratch, const sum_room *room) {
    const int64_t block = espi_comm_piece(s->comm) * (sum->of_experts ? espi_share_copies(s) : s->ranks);
    const int64_t owned = (s->experts + s->spread - 1) / s->spread;
    const int64_t most = sum->of_experts ? owned * sum->each : sum->n; /* as many blocks as the rank with most experts has */
    for (int64_t first = 0; first < most; first += block) {
        const int64_t left = sum->n - first;
        ESPI_TRY(add_block(ctx, s, sum, scratch, room, first, left < 0 ? 0 : left < block ? left : block));
    }
    return ESP_OK;
}

esp_status espi_share_sum(esp_ctx *ctx, const espi_share *s, const espi_sum *sums, int64_t n_sums, void *scratch) {
    if (n_sums == 0) return ESP_OK;
    int64_t *places = malloc(4 * (size_t)s->ranks * sizeof *places);
    sum_room room = {.parts = malloc((size_t)s->spread * sizeof *room.parts), .at = places};
    esp_status status = places != NULL && room.parts != NULL ? ESP_OK : ESPI_FAIL(ESP_ERR_MEMORY, "no memory for %d ranks", s->ranks);
    if (status == ESP_OK) {
        room.rows = places + s->ranks;
        room.part_at = places + 2 * s->ranks;
        room.part_rows = places + 3 * s->ranks;
    }
    for (int64_t i = 0; i < n_sums && status == ESP_OK; i++) status = add_up(ctx, s, &sums[i], scratch, &room);
    free(places);
    free(room.parts);
    return status;
}
