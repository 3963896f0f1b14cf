/* The second half of a step: sequences become micro-batches, those gradients, and these one optimiser step.  Every micro-batch is divided
 * by the counts of the whole step, so that how it is cut does not matter. */
#include "contract/decoder.h"
#include "core/decimal.h"
#include "models/passes.h"
#include "rl/run.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* A group's prompt runs once, unless a router loss counts every token that it sees. */
static bool shares_prompts(const esp_trainer *t) {
    const esp_model_config *m = &t->model->options;
    return t->c.kind == ESP_TRAIN_GRPO && !t->c.no_shared_prompts && m->router_aux_coef == 0 && m->router_z_coef == 0;
}

/* Most tokens of a step. */
static int64_t step_tokens(const esp_trainer *t) {
    if (!shares_prompts(t) || t->source.own_prompts) return t->rows * t->longest;
    return t->c.prompts_per_step * (t->longest - t->c.max_new_tokens) + t->rows * t->c.max_new_tokens;
}

/* Most tokens of one micro-batch. */
static int64_t batch_capacity(const esp_trainer *t) {
    const int64_t all = step_tokens(t), asked = t->c.micro_batch_tokens;
    if (asked == 0 || asked > all) return all;
    return asked > t->longest ? asked : t->longest;
}

static int64_t most_sequences(const esp_trainer *t) {
    return t->rows + (shares_prompts(t) ? t->c.prompts_per_step : 0);
}

/* Bytes of a micro-batch of this shape; take: and makes room for it. */
static esp_status candidate(size_t *most, const esp_trainer *t, int64_t tokens, int32_t n_seqs, bool take) {
    const bool replays = t->c.kind == ESP_TRAIN_GRPO && t->c.replay != ESP_REPLAY_NONE;
    const esp_batch shape = ESP_BATCH(.n_tokens = tokens, .n_seqs = n_seqs, .n_kept = tokens * t->most_kept,
                                      .n_routed = replays ? tokens * t->info.layers * t->info.top_k : 0);
    espi_extent room;
    ESPI_TRY(espi_batch_bytes(&room, t->model, &shape, true));
    if (room.main > *most) *most = room.main;
    return take ? espi_model_reserve(t->model, &shape, true) : ESP_OK;
}

/* The largest number of tokens of which `kept` layers stay whole under the activation budget, between low and high. */
static esp_status largest_keeping(int64_t *tokens, esp_model *model, int64_t kept, int64_t low, int64_t high) {
    for (*tokens = low; high - *tokens > 0;) {
        const int64_t middle = *tokens + (high - *tokens + 1) / 2;
        int64_t first;
        ESPI_TRY(espi_decoder_first_kept(&first, model, middle));
        if (model->config.layers - first >= kept)
            *tokens = middle;
        else
            high = middle - 1;
    }
    return ESP_OK;
}

esp_status espi_update_reserve(size_t *bytes, esp_trainer *t, bool take) {
    esp_model *m = t->model;
    const int64_t capacity = batch_capacity(t);
    m->share.most_tokens = capacity; /* some rank may have as many while this one has fewer */
    /* Few long sequences have most rows in the loss head, many short ones most borders. */
    const int64_t most = most_sequences(t);
    const int32_t n_seqs[2] = {1, (int32_t)(most < capacity ? most : capacity)};
    *bytes = 0;
    for (int i = 0; i < 2; i++) {
        ESPI_TRY(candidate(bytes, t, capacity, n_seqs[i], take));
        /* Under a budget a smaller batch may keep a layer that a larger one runs again, and need more. */
        for (int64_t kept = 1; m->options.activation_budget > 0 && kept <= m->config.layers; kept++) {
            int64_t tokens;
            ESPI_TRY(largest_keeping(&tokens, m, kept, n_seqs[i], capacity));
            ESPI_TRY(candidate(bytes, t, tokens, n_seqs[i], take));
        }
    }
    return ESP_OK;
}

/* Two settings speak of the batch of one forward, as in TRL; cutting the step would silently make another objective of them. */
static esp_status check_cut(const esp_trainer *t, int64_t capacity) {
    const esp_objective *o = &t->c.objective;
    const int64_t all = step_tokens(t);
    if (t->c.kind != ESP_TRAIN_GRPO || capacity == all) return ESP_OK;
    if (o->loss == ESP_LOSS_BNPO)
        return ESPI_FAIL(
            ESP_ERR_ARG,
            "micro_batch_tokens: got %d with loss bnpo, expected at least %lld, the most tokens of a step: bnpo is a mean over the "
            "tokens of one micro-batch; set micro_batch_tokens 0, or loss dapo, the mean over those of the step",
            t->c.micro_batch_tokens, (long long)all);
    if (o->top_entropy_quantile == 0 || o->top_entropy_quantile == 1) return ESP_OK;
    return ESPI_FAIL(ESP_ERR_ARG,
                     "micro_batch_tokens: got %d with top_entropy_quantile %g, expected at least %lld, the most tokens of a step: each "
                     "micro-batch would pick tokens by a threshold of its own; set micro_batch_tokens or top_entropy_quantile 0",
                     t->c.micro_batch_tokens, (double)o->top_entropy_quantile, (long long)all);
}

/* Room for the routes of a micro-batch, once it is known that there are any. */
esp_status espi_update_routes(esp_trainer *t) {
    espi_packed *p = &t->packed;
    const espi_rollouts_shape *s = &t->rollouts.shape;
    if (s->route_bytes == 0) return ESP_OK;
    p->route_width = s->layers * s->top_k * s->route_bytes;
    if (!p->routes) ESPI_TRY(espi_take_array(&p->routes, p->capacity * p->route_width, 1));
    return p->recorded ? ESP_OK : espi_take_array(&p->recorded, p->capacity * p->route_width, 1);
}

esp_status espi_update_create(esp_trainer *t) {
    espi_packed *p = &t->packed;
    const int64_t n = batch_capacity(t);
    ESPI_TRY(check_cut(t, n));
    p->capacity = n;
    p->most_seqs = most_sequences(t);
    p->share = shares_prompts(t);
    ESPI_TRY(espi_take_array(&t->sequences, t->rows, sizeof *t->sequences));
    ESPI_TRY(espi_take_array(&t->groups, t->rows * t->c.steps_per_generation, sizeof *t->groups));
    ESPI_TRY(espi_take_array(&t->load, t->info.experts, sizeof *t->load));
    t->told_bytes = sizeof(espi_micro_stats) + (size_t)t->info.experts * sizeof *t->load;
    ESPI_TRY(espi_take_array(&t->told, espi_ranks_count(t->model) + 1, t->told_bytes));
    ESPI_TRY(espi_take_array(&t->dealt, espi_ranks_count(t->model) + 1, sizeof *t->dealt));
    ESPI_TRY(espi_take_array(&p->borders, espi_ranks_count(t->model) + 1, sizeof *p->borders));
    ESPI_TRY(espi_take_array(&p->tokens, n, sizeof *p->tokens));
    ESPI_TRY(espi_take_array(&p->cu, p->most_seqs + 1, sizeof *p->cu));
    ESPI_TRY(espi_take_array(&p->prefix_of, p->most_seqs, sizeof *p->prefix_of));
    ESPI_TRY(espi_take_array(&p->mask, n, sizeof *p->mask));
    ESPI_TRY(espi_take_array(&p->advantage, p->most_seqs, sizeof *p->advantage));
    ESPI_TRY(espi_take_array(&p->kept_offsets, n + 1, sizeof *p->kept_offsets));
    ESPI_TRY(espi_take_array(&p->which, t->rows, sizeof *p->which));
    ESPI_TRY(espi_take_array(&p->prompt, t->rows, sizeof *p->prompt));
    ESPI_TRY(espi_take_array(&p->middle, t->rows, sizeof *p->middle));
    float **const scalars[] = {&p->sampler, &p->old, &p->ref, &p->ratio, &p->out};
    for (int i = 0; i < ESPI_COUNT(scalars); i++) ESPI_TRY(espi_take_array(scalars[i], n, sizeof(float)));
    return ESP_OK;
}

void espi_update_free(esp_trainer *t) {
    espi_packed *p = &t->packed;
    void *const arrays[] = {t->load,     t->told,         t->dealt,    t->sequences, t->groups, p->tokens, p->cu,     p->prefix_of,
                            p->mask,     p->advantage,    p->sampler,  p->old,       p->ref,    p->ratio,  p->out,    p->routes,
                            p->recorded, p->kept_offsets, p->kept_ids, p->which,     p->prompt, p->middle, p->borders};
    for (int i = 0; i < ESPI_COUNT(arrays); i++) free(arrays[i]);
}

/* Tokens first .. first+n-1 of a sequence, at the end of what is packed; counted: they are its completion. */
static esp_status put_tokens(esp_trainer *t, int32_t at, const espi_sequence *s, int32_t first, int32_t n, bool counted) {
    espi_packed *p = &t->packed;
    const struct {
        float *to;
        const float *from;
    } scalars[] = {{p->sampler, s->sampler}, {p->old, s->old}, {p->ref, s->ref}, {p->ratio, s->ratio}};
    memcpy(p->tokens + at, s->tokens + first, (size_t)n * sizeof *p->tokens);
    memset(p->mask + at, counted, (size_t)n);
    if (counted && s->mask) memcpy(p->mask + at, s->mask, (size_t)n);
    for (int i = 0; i < ESPI_COUNT(scalars); i++)
        if (scalars[i].from) memcpy(scalars[i].to + at, scalars[i].from + first, (size_t)n * sizeof(float));
    if (s->routes) memcpy(p->routes + at * p->route_width, s->routes + first * p->route_width, (size_t)(n * p->route_width));
    if (!s->kept_offsets) return ESP_OK;
    const int64_t begin = s->kept_offsets[first], kept = s->kept_offsets[first + n] - begin, there = p->kept_offsets[at];
    if (there + kept > p->kept_capacity) {
        const int64_t capacity = 2 * (there + kept);
        int32_t *grown = realloc(p->kept_ids, (size_t)capacity * sizeof *grown);
        if (!grown) return ESPI_FAIL(ESP_ERR_MEMORY, "trainer: no memory for %lld kept ids", (long long)capacity);
        p->kept_ids = grown;
        p->kept_capacity = capacity;
    }
    if (kept > 0) memcpy(p->kept_ids + there, t->rollouts.kept_ids + begin, (size_t)kept * sizeof *p->kept_ids);
    for (int32_t k = 0; k < n; k++) p->kept_offsets[at + k + 1] = there + s->kept_offsets[first + k + 1] - begin;
    return ESP_OK;
}

/* Where sequences go: the packed ones, and the group whose prompt stands there to be used, with its number. */
typedef struct packing {
    int32_t n_seqs, prefix;
    int64_t group;
} packing;

static esp_status put(esp_trainer *t, packing *to, const espi_sequence *s, int64_t which) {
    espi_packed *p = &t->packed;
    const bool shared = p->share && s->group >= 0;
    if (shared && to->group != s->group) {
        const int32_t at = p->cu[to->n_seqs];
        ESPI_TRY(put_tokens(t, at, s, 0, s->n_prompt, false));
        p->prefix_of[to->n_seqs] = -1;
        p->advantage[to->n_seqs] = 0;
        to->group = s->group;
        to->prefix = to->n_seqs++;
        p->cu[to->n_seqs] = at + s->n_prompt;
    }
    const int32_t at = p->cu[to->n_seqs], middle = shared ? at : at + s->n_prompt;
    if (!shared) ESPI_TRY(put_tokens(t, at, s, 0, s->n_prompt, false));
    ESPI_TRY(put_tokens(t, middle, s, s->n_prompt, s->n_completion, true));
    p->which[p->n] = which;
    p->prompt[p->n] = shared ? p->cu[to->prefix] : at;
    p->middle[p->n++] = middle;
    p->prefix_of[to->n_seqs] = shared ? to->prefix : -1;
    p->advantage[to->n_seqs++] = (float)s->advantage;
    p->cu[to->n_seqs] = middle + s->n_completion;
    return ESP_OK;
}

/* Where the micro-batch from sequence `first` on ends; *count: how many sequences it has.  Neither depends on the ranks. */
static int64_t cut(int64_t *count, const esp_trainer *t, const espi_sequence *sequences, int64_t n, int64_t first, bool all) {
    const espi_packed *p = &t->packed;
    int64_t tokens = 0, n_seqs = 0, group = -1, i = first;
    for (*count = 0; i < n && *count < t->rows; i++) {
        const espi_sequence *s = &sequences[i];
        if (s->skip && !all) continue;
        const bool shared = p->share && s->group >= 0, follows = shared && group == s->group;
        const int64_t more = (follows ? 0 : s->n_prompt) + s->n_completion;
        if (tokens + more > p->capacity || (n_seqs + 2 > p->most_seqs && !follows && p->share)) break;
        tokens += more;
        n_seqs += shared && !follows ? 2 : 1;
        if (shared) group = s->group;
        ++*count;
    }
    return i;
}

/* The micro-batch of sequences first .. last-1. */
static esp_status pack(esp_batch *batch, esp_trainer *t, const espi_sequence *sequences, int64_t first, int64_t last, bool all) {
    espi_packed *p = &t->packed;
    packing to = {.group = -1};
    p->n = 0;
    p->cu[0] = 0;
    for (int64_t i = first; i < last; i++)
        if (all || !sequences[i].skip) ESPI_TRY(put(t, &to, &sequences[i], i));
    const espi_rollouts_shape *shape = &t->rollouts.shape;
    *batch = ESP_BATCH(.tokens = p->tokens, .cu_seqlens = p->cu, .n_tokens = p->cu[to.n_seqs], .n_seqs = to.n_seqs, .loss_mask = p->mask,
                       .prefix_of = p->share ? p->prefix_of : NULL);
    if (sequences->routes) { /* so have all, or none; an empty batch says so too */
        batch->routed_experts = p->routes;
        batch->last_follows = true; /* what comes of it is in no loss */
        batch->routed_bytes = (int32_t)shape->route_bytes;
        batch->n_routed = batch->n_tokens * shape->layers * shape->top_k;
    }
    if (sequences->kept_offsets) {
        batch->kept_offsets = p->kept_offsets;
        batch->kept_ids = p->kept_ids;
        batch->n_kept = p->kept_offsets[batch->n_tokens];
    }
    return ESP_OK;
}

esp_status espi_pack(esp_batch *batch, esp_trainer *t, const espi_sequence *sequences, int64_t n, int64_t *next, bool all) {
    espi_packed *p = &t->packed;
    p->borders[0] = *next;
    p->n_batches = 0;
    for (int r = 0; r < espi_ranks_count(t->model); r++) {
        int64_t count;
        p->borders[r + 1] = cut(&count, t, sequences, n, p->borders[r], all);
        p->n_batches += count > 0;
    }
    const int own = espi_ranks_own(t->model);
    *next = p->borders[espi_ranks_count(t->model)];
    return pack(batch, t, sequences, p->borders[own], p->borders[own + 1], all);
}

static void add_stats(espi_step_sums *sums, const esp_grpo_stats *s) {
    const double n = (double)s->tokens;
    sums->loss += s->loss;
    sums->policy_loss += s->policy_loss;
    sums->kl += n * s->kl;
    sums->entropy += n * s->entropy;
    sums->ratio += n * s->ratio_mean;
    sums->clip_low += n * s->clip_low;
    sums->clip_high += n * s->clip_high;
    sums->clip_low_least = sums->tokens > 0 ? fmin(sums->clip_low_least, s->clip_low) : s->clip_low;
    sums->clip_high_most = fmax(sums->clip_high_most, s->clip_high);
    sums->abs_g += n * s->mean_abs_g;
    sums->diff_mean += (double)s->sampler_tokens * s->logp_diff_mean;
    sums->diff_max = fmax(sums->diff_max, s->logp_diff_max);
    sums->diff_tokens += (double)s->sampler_tokens;
    sums->tokens += n;
}

static esp_status loss(espi_micro_stats *stats, esp_trainer *t, esp_batch *batch, const esp_tensor *hidden, esp_tensor *d_hidden) {
    if (t->c.kind == ESP_TRAIN_SFT) return esp_model_cross_entropy(t->model, batch, hidden, &stats->loss, d_hidden);
    const espi_rollouts *r = &t->rollouts;
    esp_objective objective = t->c.objective;
    if (t->c.entropy_target != 0) objective.entropy_coef = (float)t->entropy_coef * (float)t->entropy_acts;
    batch->objective = &objective;
    batch->advantage = t->packed.advantage;
    batch->sampler_logprob = t->packed.sampler;
    batch->old_logprob = t->slices > 1 ? t->packed.old : NULL; /* else the current policy is the old one, exactly */
    batch->ref_logprob = r->has_ref && objective.beta > 0 ? t->packed.ref : NULL;
    batch->is_ratio = r->has_ratio ? t->packed.ratio : NULL;
    stats->grpo = (esp_grpo_stats)ESP_GRPO_STATS_INIT;
    const esp_status status = esp_grpo_loss(t->model, batch, hidden, d_hidden, &stats->grpo);
    batch->objective = NULL;
    return status;
}

/* What the routers did in the last forward. */
static esp_status note_routing(espi_micro_stats *stats, const esp_trainer *t) {
    esp_model *m = t->model;
    double z;
    ESPI_TRY(esp_model_route_flips(m, &stats->route_flips, &stats->routes_replayed));
    ESPI_TRY(espi_ctx_get(m->ctx, stats->load, m->saved->router_counts, (size_t)t->info.experts * sizeof *stats->load));
    stats->forward_tokens = m->saved->tokens;
    return m->options.router_aux_coef == 0 ? ESP_OK : esp_model_router_losses(m, &stats->aux_loss, &z);
}

static void add_micro_stats(esp_trainer *t, const espi_micro_stats *stats) {
    espi_step_sums *sums = &t->sums;
    sums->route_flips += (double)stats->route_flips;
    sums->routes_replayed += (double)stats->routes_replayed;
    sums->forward_tokens += (double)stats->forward_tokens;
    sums->aux_loss += stats->aux_loss * (double)stats->forward_tokens;
    for (int64_t e = 0; e < t->info.experts; e++) t->load[e] += stats->load[e];
    if (t->c.kind == ESP_TRAIN_SFT)
        sums->loss += stats->loss;
    else
        add_stats(sums, &stats->grpo);
}

static espi_micro_stats *told_by(const esp_trainer *t, int rank) {
    return (espi_micro_stats *)(void *)(t->told + (size_t)rank * t->told_bytes);
}

static esp_status forward(espi_micro_stats *stats, esp_trainer *t, esp_batch *batch, esp_tensor *d_hidden) {
    esp_tensor hidden;
    const double start = espi_seconds();
    ESPI_TRY(esp_model_forward(t->model, batch, &hidden));
    ESPI_TRY(note_routing(stats, t));
    t->sums.seconds_forward += espi_seconds() - start;
    return loss(stats, t, batch, &hidden, d_hidden);
}

/* The gradients of the micro-batches that are run at the same time. */
static esp_status accumulate(esp_trainer *t, esp_batch *batch) {
    esp_tensor d_hidden;
    espi_micro_stats *mine = told_by(t, espi_ranks_count(t->model));
    const double start = espi_seconds(), before = t->sums.seconds_forward;
    memset(mine, 0, t->told_bytes);
    ESPI_TRY(espi_ranks_agree(t->model, "the loss", forward(mine, t, batch, &d_hidden)));
    ESPI_TRY(espi_ranks_gather(t->told, t->model, "statistics", mine, t->told_bytes));
    for (int r = 0; r < t->packed.n_batches; r++) add_micro_stats(t, told_by(t, r));
    ESPI_TRY(esp_model_backward(t->model, batch, &d_hidden));
    t->sums.seconds_backward += espi_seconds() - start - (t->sums.seconds_forward - before);
    return ESP_OK;
}

/* Skipped sequences count, and have an entropy all the same. */
static void count_skipped(esp_trainer *t) {
    for (int64_t i = 0; i < t->n_sequences; i++) {
        const espi_sequence *s = &t->sequences[i];
        if (!s->skip) continue;
        t->sums.tokens_skipped += s->n_counted;
        /* Its entropies are not known without the forward: what was sampled stands in for them, -log p. */
        for (int32_t k = 0; k < s->n_completion; k++) {
            const float lp = s->sampler[s->n_prompt + k];
            if (s->mask[k] && !isnan(lp)) t->sums.entropy -= (double)lp;
        }
    }
}

/* Skywork-OR1's controller (2505.22312): the coefficient takes a step up while the entropy is below its target, down while above, and acts
 * only at or below it. */
static void control_entropy(esp_trainer *t) {
    const double all = t->sums.tokens + t->sums.tokens_skipped, target = espi_decimal(t->c.entropy_target);
    if (target == 0 || all == 0) return;
    const double entropy = t->sums.entropy / all, step = espi_decimal(t->c.entropy_step);
    t->entropy_coef += entropy < target ? step : -step;
    t->entropy_coef = fmin(fmax(t->entropy_coef, 0), espi_decimal(t->c.entropy_max));
    t->entropy_acts = entropy <= target;
}

esp_status espi_update(esp_trainer *t) {
    double counted = 0;
    for (int64_t i = 0; i < t->n_sequences; i++) counted += t->sequences[i].n_counted;
    ESPI_TRY(espi_update_routes(t));
    memset(t->load, 0, (size_t)t->info.experts * sizeof *t->load);
    for (int64_t next = 0; next < t->n_sequences;) {
        esp_batch batch;
        ESPI_TRY(espi_pack(&batch, t, t->sequences, t->n_sequences, &next, false));
        if (t->packed.n_batches == 0) break;
        batch.step_tokens = counted;
        batch.step_seqs = (double)t->n_sequences;
        ESPI_TRY(accumulate(t, &batch));
    }
    count_skipped(t);
    control_entropy(t);
    const double start = espi_seconds();
    ESPI_TRY(esp_optim_step(t->optim));
    esp_optim_stats stats = ESP_OPTIM_STATS_INIT;
    ESPI_TRY(esp_optim_stats_get(t->optim, &stats));
    t->sums.grad_norm = stats.grad_norm;
    t->sums.lr = stats.lr;
    t->sums.seconds_optim += espi_seconds() - start;
    return ESP_OK;
}
