/* Scoring a batch by several rewards: see reward.h.  And the two built-in functions that task files are scored by. */
#include "rl/reward.h"

#include "core/clock.h"
#include "rl/ranks.h"

#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define WHY 256          /* bytes of a function's own explanation */
#define LAST_MOMENT 1e-3 /* seconds that a punctual function gets in any case: 0 would stand for no deadline */

int esp_reward_exact(void *user, const esp_reward_batch *batch, float *reward) {
    (void)user;
    for (int64_t i = 0; i < batch->n; i++) reward[i] = batch->stopped[i] && strcmp(batch->completion[i], batch->answer[i]) == 0;
    return 0;
}

/* The next character of UTF-8 text: its bytes, 0 at the end. */
static size_t character(const char *text) {
    if (!*text) return 0;
    size_t n = 1;
    while (((unsigned char)text[n] & 0xC0) == 0x80) n++;
    return n;
}

int esp_reward_match(void *user, const esp_reward_batch *batch, float *reward) {
    (void)user;
    for (int64_t i = 0; i < batch->n; i++) {
        const char *want = batch->answer[i], *got = batch->completion[i];
        int64_t length = 0, right = 0;
        for (size_t w; (w = character(want)) > 0; want += w, length++) {
            const size_t g = character(got);
            right += g == w && memcmp(want, got, w) == 0;
            got += g;
        }
        reward[i] = length ? (float)right / (float)length : (float)(*got == '\0');
    }
    return 0;
}

/* One extra scalar. */
typedef struct extra {
    char name[2 * ESPI_REWARD_NAME]; /* "<reward>/<name>" */
    double sum, calls;               /* calls 0: a count, whose sum is told */
} extra;

/* Where a call's scalars and its explanation go.  Each call has its own, so a function that was given up cannot write into the next. */
typedef struct notes {
    const char *reward;
    extra *items;
    int64_t n, capacity;
    bool lost; /* no memory for one */
    char why[WHY];
    int (*stop)(void *user); /* NULL: nobody to ask, or not on this thread */
    void *stop_user;
} notes;

/* The scalar of this full name, made if need be; NULL without memory. */
static extra *entry(notes *to, const char *full) {
    for (int64_t i = 0; i < to->n; i++)
        if (strcmp(to->items[i].name, full) == 0) return &to->items[i];
    if (to->n == to->capacity) {
        const int64_t capacity = 2 * to->capacity + 8;
        extra *grown = realloc(to->items, (size_t)capacity * sizeof *grown);
        to->lost = to->lost || !grown;
        if (!grown) return NULL;
        to->items = grown;
        to->capacity = capacity;
    }
    extra *e = &to->items[to->n++];
    *e = (extra){.sum = 0};
    snprintf(e->name, sizeof e->name, "%s", full);
    return e;
}

static void note(notes *to, const char *name, double value, bool counted) {
    char full[2 * ESPI_REWARD_NAME];
    if (!name || !isfinite(value)) return;
    snprintf(full, sizeof full, "%.*s/%.*s", ESPI_REWARD_NAME - 1, to->reward, ESPI_REWARD_NAME - 1, name);
    extra *e = entry(to, full);
    if (!e) return;
    e->sum += value;
    e->calls += counted ? 0 : 1;
}

static void log_value(void *log_to, const char *name, double value) {
    if (name && (strcmp(name, "mean") == 0 || strcmp(name, "std") == 0)) return; /* the reward's own */
    note(log_to, name, value, false);
}

static void explain(void *log_to, const char *why) {
    notes *to = log_to;
    if (why) snprintf(to->why, sizeof to->why, "%s", why);
}

void espi_reward_count(const esp_reward_batch *batch, const char *name, double events) {
    if (batch->log == log_value) note(batch->log_to, name, events, true);
}

bool espi_reward_stopped(const esp_reward_batch *batch) {
    const notes *to = batch->log_to;
    return batch->log == log_value && to->stop && to->stop(to->stop_user) != 0;
}

/* A call on a thread of its own, with all that it needs: it may go on when nobody waits for it any more. */
typedef struct job {
    pthread_mutex_t lock;
    pthread_cond_t ended;
    bool done, abandoned;
    esp_reward r;
    char name[ESPI_REWARD_NAME];
    esp_reward_batch batch;
    notes notes;
    void *block; /* all arrays and texts of the batch, and the rewards */
    float *reward;
    int code;
} job;

typedef struct member {
    esp_reward r;
    job *late; /* given up and still running */
} member;

struct espi_rewards {
    member *members;
    int32_t n;
    double deadline;
    notes totals;
    float *column;
    int64_t column_rows;
    int (*stop)(void *user);
    void *stop_user;
};

static esp_status check_entry(const esp_reward *list, int32_t f) {
    const esp_reward *r = &list[f];
    if (!r->name || !r->fn) return ESPI_FAIL(ESP_ERR_ARG, "rewards[%d]: name or fn is NULL, expected both", f);
    if (!isfinite(r->weight)) return ESPI_FAIL(ESP_ERR_ARG, "reward \"%s\": got weight %g, expected a finite number", r->name, r->weight);
    if (strlen(r->name) >= ESPI_REWARD_NAME)
        return ESPI_FAIL(ESP_ERR_ARG, "reward \"%.40s..\": a name of %zu bytes, expected fewer than %d", r->name, strlen(r->name),
                         ESPI_REWARD_NAME);
    for (int32_t other = 0; other < f; other++)
        if (strcmp(list[other].name, r->name) == 0)
            return ESPI_FAIL(ESP_ERR_ARG,
                             "rewards[%d] and rewards[%d] are both called \"%s\", expected names of their own: give one a name=", other, f,
                             r->name);
    return ESP_OK;
}

esp_status espi_rewards_create(espi_rewards **rewards, const esp_reward *list, int32_t n, double deadline) {
    *rewards = NULL;
    if (!list || n < 1) return ESPI_FAIL(ESP_ERR_ARG, "n_rewards: got %d, expected a positive number", n);
    if (!(deadline >= 0))
        return ESPI_FAIL(ESP_ERR_ARG, "reward deadline: got %g seconds, expected a positive number, or 0 for none", deadline);
    for (int32_t f = 0; f < n; f++) ESPI_TRY(check_entry(list, f));
    espi_rewards *set = calloc(1, sizeof *set);
    member *members = calloc((size_t)n, sizeof *members);
    if (!set || !members) {
        free(set);
        free(members);
        return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for %d rewards", n);
    }
    for (int32_t f = 0; f < n; f++) members[f].r = list[f];
    *set = (espi_rewards){.members = members, .n = n, .deadline = deadline};
    *rewards = set;
    return ESP_OK;
}

static void free_job(job *j) {
    pthread_cond_destroy(&j->ended);
    pthread_mutex_destroy(&j->lock);
    free(j->notes.items);
    free(j->block);
    free(j);
}

/* Whoever of the two comes last frees it.  True: it has ended, and the caller may read and must free it. */
static bool leave_job(job *j) {
    pthread_mutex_lock(&j->lock);
    const bool done = j->done;
    j->abandoned = !done;
    pthread_mutex_unlock(&j->lock);
    return done;
}

void espi_rewards_destroy(espi_rewards *rewards) {
    if (!rewards) return;
    for (int32_t f = 0; f < rewards->n; f++)
        if (rewards->members[f].late && leave_job(rewards->members[f].late)) free_job(rewards->members[f].late);
    free(rewards->members);
    free(rewards->totals.items);
    free(rewards->column);
    free(rewards);
}

static void *run_job(void *argument) {
    job *j = argument;
    const int code = j->r.fn(j->r.user, &j->batch, j->reward);
    pthread_mutex_lock(&j->lock);
    j->code = code;
    j->done = true;
    const bool abandoned = j->abandoned;
    pthread_cond_signal(&j->ended);
    pthread_mutex_unlock(&j->lock);
    if (abandoned) free_job(j);
    return NULL;
}

/* Room in a job's block, aligned for pointers; base NULL: only counts. */
static void *carve(char *base, size_t *used, size_t bytes) {
    void *at = base ? base + *used : NULL;
    *used += (bytes + sizeof(void *) - 1) / sizeof(void *) * sizeof(void *);
    return at;
}

static const char *const *copy_texts(char *base, size_t *used, const char *const *texts, int64_t n) {
    if (!texts) return NULL;
    char **copy = carve(base, used, (size_t)n * sizeof *copy);
    for (int64_t i = 0; i < n; i++) {
        const size_t bytes = texts[i] ? strlen(texts[i]) + 1 : 0;
        char *text = carve(base, used, bytes);
        if (!base) continue;
        if (bytes) memcpy(text, texts[i], bytes);
        copy[i] = bytes ? text : NULL;
    }
    return (const char *const *)copy;
}

static const int32_t *const *copy_ids(char *base, size_t *used, const int32_t *const *ids, const int32_t *lengths, int64_t n) {
    if (!ids || !lengths) return NULL;
    int32_t **copy = carve(base, used, (size_t)n * sizeof *copy);
    for (int64_t i = 0; i < n; i++) {
        int32_t *row = carve(base, used, (size_t)lengths[i] * sizeof *row);
        if (!base) continue;
        if (lengths[i] > 0) memcpy(row, ids[i], (size_t)lengths[i] * sizeof *row);
        copy[i] = row;
    }
    return (const int32_t *const *)copy;
}

static void *copy_values(char *base, size_t *used, const void *values, size_t bytes) {
    if (!values) return NULL;
    void *copy = carve(base, used, bytes);
    if (base && bytes) memcpy(copy, values, bytes);
    return copy;
}

/* One walk that measures (block NULL) and one that copies. */
static size_t copy_batch(job *j, char *base, const esp_reward_batch *b) {
    size_t used = 0;
    const size_t n = (size_t)b->n;
    j->batch = *b;
    j->batch.prompt = copy_texts(base, &used, b->prompt, b->n);
    j->batch.completion = copy_texts(base, &used, b->completion, b->n);
    j->batch.answer = copy_texts(base, &used, b->answer, b->n);
    j->batch.completion_ids = copy_ids(base, &used, b->completion_ids, b->completion_length, b->n);
    j->batch.prompt_ids = copy_ids(base, &used, b->prompt_ids, b->prompt_length, b->n);
    j->batch.completion_length = copy_values(base, &used, b->completion_length, n * sizeof *b->completion_length);
    j->batch.prompt_length = copy_values(base, &used, b->prompt_length, n * sizeof *b->prompt_length);
    j->batch.stopped = copy_values(base, &used, b->stopped, n * sizeof *b->stopped);
    j->reward = carve(base, &used, n * sizeof *j->reward);
    return used;
}

static esp_status make_job(job **out, const esp_reward *r, const esp_reward_batch *batch) {
    job *j = calloc(1, sizeof *j);
    if (j) {
        const size_t bytes = copy_batch(j, NULL, batch);
        j->block = malloc(bytes + 1);
    }
    if (!j || !j->block) {
        free(j);
        return ESPI_FAIL(ESP_ERR_MEMORY, "reward \"%s\": no memory for a copy of its batch", r->name);
    }
    copy_batch(j, j->block, batch);
    j->r = *r;
    snprintf(j->name, sizeof j->name, "%s", r->name);
    j->notes.reward = j->name;
    j->batch.log_to = &j->notes;
    for (int64_t i = 0; i < batch->n; i++) j->reward[i] = NAN;
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&j->ended, &monotonic);
    pthread_condattr_destroy(&monotonic);
    pthread_mutex_init(&j->lock, NULL);
    *out = j;
    return ESP_OK;
}

/* True when it ended within `seconds`. */
static bool wait_job(job *j, double seconds) {
    const double until = espi_seconds() + seconds;
    const struct timespec at = {.tv_sec = (time_t)until, .tv_nsec = (long)((until - floor(until)) * 1e9)};
    int code = 0;
    pthread_mutex_lock(&j->lock);
    while (!j->done && code == 0) code = pthread_cond_timedwait(&j->ended, &j->lock, &at);
    const bool done = j->done;
    pthread_mutex_unlock(&j->lock);
    return done;
}

static esp_status start_job(job *j) {
    pthread_t thread;
    pthread_attr_t detached;
    pthread_attr_init(&detached);
    pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
    const int code = pthread_create(&thread, &detached, run_job, j);
    pthread_attr_destroy(&detached);
    if (code == 0) return ESP_OK;
    return ESPI_FAIL(ESP_ERR_MEMORY, "reward \"%s\": no thread for it: %s", j->name, strerror(code));
}

/* What a call came to: its rewards and notes are the caller's. */
typedef struct outcome {
    float *reward;
    notes notes;
    int code;
    bool timed_out;
} outcome;

/* On a thread, with a deadline.  *late: the job, when it has not ended. */
static esp_status call_aside(outcome *o, job **late, const esp_reward *r, const esp_reward_batch *batch) {
    job *j = NULL;
    if (*late && wait_job(*late, 0)) {
        free_job(*late);
        *late = NULL;
    }
    o->timed_out = *late != NULL;
    if (o->timed_out) return ESP_OK;
    ESPI_TRY(make_job(&j, r, batch));
    const esp_status started = start_job(j);
    if (started != ESP_OK) {
        free_job(j);
        return started;
    }
    o->timed_out = !wait_job(j, batch->seconds_left);
    if (o->timed_out) {
        *late = j;
        return ESP_OK;
    }
    memcpy(o->reward, j->reward, (size_t)batch->n * sizeof *o->reward);
    o->notes = j->notes;
    o->notes.reward = r->name;
    o->code = j->code;
    j->notes.items = NULL;
    free_job(j);
    return ESP_OK;
}

static void add_notes(notes *to, const notes *from) {
    for (int64_t i = 0; i < from->n; i++) {
        extra *e = entry(to, from->items[i].name);
        if (!e) return;
        e->sum += from->items[i].sum;
        e->calls += from->items[i].calls;
    }
}

static esp_status check_outcome(const outcome *o, const esp_reward *r, const esp_reward_batch *b) {
    if (o->code != 0 && o->notes.why[0])
        return ESPI_FAIL(ESP_ERR_CALLBACK, "reward function \"%s\" failed at step %lld: %s", r->name, (long long)b->step, o->notes.why);
    if (o->code != 0)
        return ESPI_FAIL(ESP_ERR_CALLBACK, "reward function \"%s\" returned %d at step %lld, expected 0: see its own message", r->name,
                         o->code, (long long)b->step);
    if (o->notes.lost) return ESPI_FAIL(ESP_ERR_MEMORY, "reward function \"%s\": no memory for the numbers that it logs", r->name);
    for (int64_t i = 0; i < b->n; i++)
        if (isinf(o->reward[i]))
            return ESPI_FAIL(ESP_ERR_NONFINITE,
                             "reward function \"%s\" gave %g for completion %lld of step %lld, expected a finite number, or NaN to abstain",
                             r->name, (double)o->reward[i], (long long)i, (long long)b->step);
    return ESP_OK;
}

static esp_status call(outcome *o, member *m, const esp_reward_batch *batch) {
    esp_reward_batch b = *batch;
    for (int64_t i = 0; i < b.n; i++) o->reward[i] = NAN;
    o->notes.reward = m->r.name;
    b.log = log_value;
    b.explain = explain;
    b.log_to = &o->notes;
    if (isinf(b.seconds_left) || m->r.punctual) {
        b.seconds_left = fmax(b.seconds_left, LAST_MOMENT);
        o->code = m->r.fn(m->r.user, &b, o->reward);
    } else if (b.seconds_left <= 0) {
        o->timed_out = true;
    } else {
        ESPI_TRY(call_aside(o, &m->late, &m->r, &b));
    }
    if (o->timed_out) note(&o->notes, "timeouts", (double)b.n, true);
    return check_outcome(o, &m->r, &b);
}

esp_status espi_rewards_score(double *parts, espi_rewards *rewards, const esp_reward_batch *batch) {
    const double start = espi_seconds();
    if (batch->n > rewards->column_rows) {
        float *grown = realloc(rewards->column, (size_t)batch->n * sizeof *grown);
        if (!grown) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for %lld rewards", (long long)batch->n);
        rewards->column = grown;
        rewards->column_rows = batch->n;
    }
    for (int32_t f = 0; f < rewards->n; f++) {
        esp_reward_batch b = *batch;
        outcome o = {.reward = rewards->column, .notes = {.stop = rewards->stop, .stop_user = rewards->stop_user}};
        b.struct_size = sizeof b;
        b.seconds_left = rewards->deadline > 0 ? rewards->deadline - (espi_seconds() - start) : INFINITY;
        const esp_status status = call(&o, &rewards->members[f], &b);
        if (status == ESP_OK) add_notes(&rewards->totals, &o.notes);
        free(o.notes.items);
        ESPI_TRY(status);
        if (rewards->totals.lost) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for the numbers that rewards log");
        for (int64_t i = 0; i < b.n; i++) parts[i * rewards->n + f] = o.reward[i];
    }
    return ESP_OK;
}

/* mine [most], all [ranks,most]: padded to the longest list. */
static esp_status add_lists(espi_rewards *rewards, const esp_model *model, const int64_t *counts, int64_t most, extra *mine, extra *all) {
    notes *totals = &rewards->totals;
    if (totals->n > 0) memcpy(mine, totals->items, (size_t)totals->n * sizeof *mine);
    ESPI_TRY(espi_ranks_gather(all, model, "numbers that rewards log", mine, (size_t)most * sizeof *mine));
    totals->n = 0;
    for (int r = 0; r < espi_ranks_count(model); r++) add_notes(totals, &(notes){.items = all + r * most, .n = counts[r]});
    return totals->lost ? ESPI_FAIL(ESP_ERR_MEMORY, "no memory for the numbers that rewards log") : ESP_OK;
}

static esp_status gather(espi_rewards *rewards, const esp_model *model, int64_t *counts) {
    int64_t most = 0;
    ESPI_TRY(espi_ranks_gather(counts, model, "how many numbers rewards log", &rewards->totals.n, sizeof *counts));
    for (int r = 0; r < espi_ranks_count(model); r++) most = counts[r] > most ? counts[r] : most;
    if (most == 0) return ESP_OK;
    extra *room = calloc((size_t)(most * (espi_ranks_count(model) + 1)), sizeof *room);
    if (!room) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for the numbers that rewards log");
    const esp_status status = add_lists(rewards, model, counts, most, room, room + most);
    free(room);
    return status;
}

esp_status espi_rewards_gather(espi_rewards *rewards, const esp_model *model) {
    const int ranks = espi_ranks_count(model);
    if (ranks == 1) return ESP_OK;
    int64_t *counts = calloc((size_t)ranks, sizeof *counts);
    if (!counts) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for the numbers that rewards log on %d ranks", ranks);
    const esp_status status = gather(rewards, model, counts);
    free(counts);
    return status;
}

void espi_rewards_stop_by(espi_rewards *rewards, int (*stop)(void *user), void *user) {
    rewards->stop = stop;
    rewards->stop_user = user;
}

void espi_rewards_reset(espi_rewards *rewards) {
    rewards->totals.n = 0;
}

int64_t espi_rewards_extra_count(const espi_rewards *rewards) {
    return rewards->totals.n;
}

const char *espi_rewards_extra_get(double *value, const espi_rewards *rewards, int64_t i) {
    const extra *e = &rewards->totals.items[i];
    *value = e->calls > 0 ? e->sum / e->calls : e->sum;
    return e->name;
}
