/* See fake.h.  Memory is mapped page by page and protected while no op runs; new memory is filled with NaN. */
#define _DEFAULT_SOURCE /* MAP_ANONYMOUS */

#include "fake.h"

#include "core/status.h"
#include "espalier/quant.h"
#include "quant/quant.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { REGIONS = 512 };

typedef struct region {
    unsigned char *p; /* mapping */
    size_t bytes;     /* of it */
} region;

typedef struct transfer {
    void *to;
    const void *from;
    size_t bytes;
} transfer;

typedef struct call call;
typedef struct fake {
    region regions[REGIONS];
    fake_counts counts;
    fake_lane exchange;
    uint64_t marks[ESPI_MARKS], awaited; /* how many exchanges were queued before a mark, and must be done before anything else */
    esp_status (*watch)(void *user);
    void *watch_user;
    transfer fetched; /* on its way from the host's memory; bytes = 0: nothing is */
    bool recording;
    call *first, *last; /* of the present recording */
} fake;

/* A recorded op or zeroing. */
struct call {
    call *next;
    esp_status (*run)(const espi_exec *exec, const void *args);
    espi_exec exec;
    void *args;
};

static bool packing;

/* Like a GPU, which is the one that the thread last chose. */
static _Thread_local const fake *entered;

void fake_set_packing(bool on) {
    packing = on;
}

static esp_status fake_enter(void *device) {
    entered = device;
    return ESP_OK;
}

static void protect(fake *f, int mode) {
    for (int i = 0; i < REGIONS; i++)
        if (f->regions[i].p) (void)mprotect(f->regions[i].p, f->regions[i].bytes, mode);
}

static void unlock(fake *f) {
    protect(f, PROT_READ | PROT_WRITE);
}

static void lock(fake *f) {
    protect(f, PROT_NONE);
}

static void open_memory(void *device) {
    unlock(device);
}

static void close_memory(void *device) {
    lock(device);
}

static uint64_t done(const fake *f) {
    return f->exchange.done ? f->exchange.done(f->exchange.work) : f->exchange.queued;
}

/* Until the exchanges that the work waits for are done, or whoever watches has had enough. */
static esp_status settle(fake *f) {
    while (done(f) < f->awaited) {
        if (f->watch) ESPI_TRY(f->watch(f->watch_user));
        nanosleep(&(struct timespec){.tv_nsec = 100000}, NULL);
    }
    return ESP_OK;
}

static esp_status fake_start(void **device, int which) {
    fake *f = calloc(1, sizeof *f);
    *device = f;
    if (!f) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for a fake device");
    (void)which;
    entered = f;
    f->exchange = (fake_lane){.device = f, .open = open_memory, .close = close_memory};
    return ESP_OK;
}

static void fake_stop(void *device) {
    free(device);
}

static size_t whole_pages(size_t bytes) {
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    return (bytes + page - 1) / page * page;
}

static esp_status fake_alloc(void *device, size_t bytes, void **out) {
    fake *f = device;
    entered = f;
    if (f->recording) return ESPI_FAIL(ESP_ERR_STATE, "memory wanted while recording");
    for (int i = 0; i < REGIONS; i++) {
        region *r = &f->regions[i];
        if (r->p) continue;
        r->bytes = whole_pages(bytes);
        r->p = mmap(NULL, r->bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (r->p == MAP_FAILED) {
            r->p = NULL;
            return ESPI_FAIL(ESP_ERR_MEMORY, "%zu bytes wanted of a fake device", bytes);
        }
        memset(r->p, 0xff, r->bytes);
        (void)mprotect(r->p, r->bytes, PROT_NONE);
        f->counts.allocations++;
        *out = r->p;
        return ESP_OK;
    }
    return ESPI_FAIL(ESP_ERR_INTERNAL, "the fake device has %d regions, expected fewer wanted", REGIONS);
}

static void fake_free(void *device, void *p) {
    fake *f = device;
    for (int i = 0; i < REGIONS; i++) {
        if (f->regions[i].p != p) continue;
        (void)munmap(p, f->regions[i].bytes);
        f->regions[i] = (region){0};
    }
}

static esp_status fake_alloc_host(void *device, size_t bytes, void **out) {
    fake *f = device;
    f->counts.pinned++;
    *out = aligned_alloc(64, (bytes + 63) / 64 * 64);
    return *out ? ESP_OK : ESPI_FAIL(ESP_ERR_MEMORY, "%zu bytes wanted", bytes);
}

static void fake_free_host(void *device, void *p) {
    (void)device;
    free(p);
}

static esp_status fake_left(void *device, uint64_t *bytes, uint64_t *number) {
    (void)device;
    *bytes = FAKE_LEFT;
    *number = 7;
    return ESP_OK;
}

/* Runs it now, or keeps a copy of its arguments in the recording. */
static esp_status queue(const espi_exec *exec, esp_status (*run)(const espi_exec *, const void *), const void *args, size_t bytes) {
    fake *f = exec->device;
    if (entered != f) return ESPI_FAIL(ESP_ERR_INTERNAL, "work is queued on a device that the thread has not entered");
    if (!f->recording) {
        ESPI_TRY(settle(f));
        unlock(f);
        const esp_status status = run(exec, args);
        lock(f);
        return status;
    }
    call *c = calloc(1, sizeof *c);
    if (c) c->args = malloc(bytes);
    if (!c || !c->args) {
        free(c);
        return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for a recording");
    }
    memcpy(c->args, args, bytes);
    c->run = run;
    c->exec = *exec;
    *(f->last ? &f->last->next : &f->first) = c;
    f->last = c;
    return ESP_OK;
}

static esp_status run_zero(const espi_exec *exec, const void *args) {
    (void)exec;
    const espi_zero *a = args;
    memset(a->out, 0, a->bytes);
    return ESP_OK;
}

static esp_status fake_zero(void *device, void *p, size_t bytes) {
    entered = device;
    return queue(&(espi_exec){.device = device}, run_zero, &(espi_zero){.out = p, .bytes = bytes}, sizeof(espi_zero));
}

static esp_status not_recording(const fake *f, const char *what) {
    return f->recording ? ESPI_FAIL(ESP_ERR_STATE, "%s while recording", what) : ESP_OK;
}

static esp_status fake_put(void *device, void *to, const void *from_host, size_t bytes) {
    fake *f = device;
    entered = f;
    ESPI_TRY(not_recording(f, "a put"));
    ESPI_TRY(settle(f));
    f->counts.puts++;
    unsigned char *copy = malloc(bytes); /* the source is read while the device is locked: it is host memory or faults */
    if (!copy) return ESPI_FAIL(ESP_ERR_MEMORY, "%zu bytes wanted", bytes);
    memcpy(copy, from_host, bytes);
    unlock(f);
    memcpy(to, copy, bytes);
    lock(f);
    free(copy);
    return ESP_OK;
}

static esp_status fake_get(void *device, void *to_host, const void *from, size_t bytes) {
    fake *f = device;
    ESPI_TRY(not_recording(f, "a get"));
    ESPI_TRY(settle(f));
    f->counts.gets++;
    unsigned char *copy = malloc(bytes);
    if (!copy) return ESPI_FAIL(ESP_ERR_MEMORY, "%zu bytes wanted", bytes);
    unlock(f);
    memcpy(copy, from, bytes);
    lock(f);
    memcpy(to_host, copy, bytes);
    free(copy);
    return ESP_OK;
}

static esp_status fake_wait(void *device) {
    fake *f = device;
    ESPI_TRY(not_recording(f, "a wait"));
    ESPI_TRY(settle(f));
    f->counts.waits++;
    return ESP_OK;
}

static esp_status fake_record_begin(void *device) {
    fake *f = device;
    entered = f;
    ESPI_TRY(not_recording(f, "a recording"));
    f->recording = true;
    f->first = f->last = NULL;
    f->counts.recordings++;
    return ESP_OK;
}

static esp_status fake_record_end(void *device, void **graph) {
    fake *f = device;
    if (!f->recording) return ESPI_FAIL(ESP_ERR_STATE, "a recording ends that never began");
    f->recording = false;
    *graph = f->first ? f->first : calloc(1, sizeof(call));
    f->first = f->last = NULL;
    return *graph ? ESP_OK : ESPI_FAIL(ESP_ERR_MEMORY, "no memory for a recording");
}

static esp_status fake_launch(void *device, void *graph) {
    fake *f = device;
    entered = f;
    esp_status status = not_recording(f, "a launch");
    f->counts.launches++;
    if (status == ESP_OK) status = settle(f);
    unlock(f);
    for (const call *c = graph; c && status == ESP_OK; c = c->next)
        if (c->run) status = c->run(&c->exec, c->args);
    lock(f);
    return status;
}

static void fake_graph_free(void *device, void *graph) {
    (void)device;
    for (call *c = graph, *next; c; c = next) {
        next = c->next;
        free(c->args);
        free(c);
    }
}

static void *fake_device_lane(void *device, espi_lane lane) {
    return lane == ESPI_LANE_EXCHANGE ? &((fake *)device)->exchange : NULL;
}

/* What is brought meanwhile is there when the ops wait for it, and until then nobody knows what lies in its place. */
static esp_status run_fetch(const espi_exec *exec, const void *args) {
    fake *f = exec->device;
    if (f->fetched.bytes > 0) return ESPI_FAIL(ESP_ERR_INTERNAL, "two things are brought at once");
    f->fetched = *(const transfer *)args;
    memset(f->fetched.to, 0xff, f->fetched.bytes);
    return ESP_OK;
}

static esp_status run_arrive(const espi_exec *exec, const void *args) {
    (void)args;
    fake *f = exec->device;
    if (f->fetched.bytes == 0) return ESPI_FAIL(ESP_ERR_INTERNAL, "nothing is being brought");
    memcpy(f->fetched.to, f->fetched.from, f->fetched.bytes);
    f->fetched.bytes = 0;
    return ESP_OK;
}

/* Within the device, or to or from memory of the host: what is on the lane of exchanges was ordered behind all that is done. */
static esp_status fake_copy(void *device, espi_lane lane, void *to, const void *from, size_t bytes) {
    if (lane == ESPI_LANE_FETCH) return queue(&(espi_exec){.device = device}, run_fetch, &(transfer){to, from, bytes}, sizeof(transfer));
    ESPI_TRY(settle(device));
    unlock(device);
    memcpy(to, from, bytes);
    lock(device);
    return ESP_OK;
}

static esp_status fake_order(void *device, espi_lane later, espi_lane earlier) {
    fake *f = device;
    if (later == ESPI_LANE_FETCH) return ESP_OK; /* all before is done */
    if (earlier == ESPI_LANE_FETCH) return queue(&(espi_exec){.device = device}, run_arrive, &(transfer){0}, sizeof(transfer));
    ESPI_TRY(not_recording(f, "an exchange"));
    if (earlier == ESPI_LANE_EXCHANGE) f->awaited = f->exchange.queued;
    return later == ESPI_LANE_EXCHANGE ? settle(f) : ESP_OK;
}

static esp_status fake_mark(void *device, espi_lane lane, int mark) {
    fake *f = device;
    f->marks[mark] = lane == ESPI_LANE_EXCHANGE ? f->exchange.queued : 0;
    return ESP_OK;
}

static esp_status fake_after(void *device, espi_lane lane, int mark) {
    fake *f = device;
    if (lane == ESPI_LANE_WORK && f->marks[mark] > f->awaited) f->awaited = f->marks[mark];
    return not_recording(f, "the end of an exchange");
}

static esp_status fake_passed(void *device, int mark, bool *passed) {
    const fake *f = device;
    *passed = done(f) >= f->marks[mark];
    return ESP_OK;
}

static void fake_set_watch(void *device, esp_status (*watch)(void *user), void *user) {
    fake *f = device;
    f->watch = watch;
    f->watch_user = user;
}

static const espi_device fake_device = {
    .start = fake_start,
    .enter = fake_enter,
    .stop = fake_stop,
    .alloc = fake_alloc,
    .free = fake_free,
    .alloc_host = fake_alloc_host,
    .free_host = fake_free_host,
    .left = fake_left,
    .zero = fake_zero,
    .put = fake_put,
    .get = fake_get,
    .wait = fake_wait,
    .record_begin = fake_record_begin,
    .record_end = fake_record_end,
    .launch = fake_launch,
    .graph_free = fake_graph_free,
    .lane = fake_device_lane,
    .copy = fake_copy,
    .order = fake_order,
    .mark = fake_mark,
    .after = fake_after,
    .passed = fake_passed,
    .set_watch = fake_set_watch,
};

/* ---- rounding ---- */

static bool rounding;

void fake_set_rounding(bool on) {
    rounding = on;
}

static void round_all(void *p, int64_t n) {
    float *x = p;
    for (int64_t i = 0; x && i < n; i++) x[i] = espi_bf16_value(espi_bf16_bits(x[i]));
}

/* The outputs of each op that are activations. */
static void round_outputs(espi_op_id op, const void *args) {
#define ARGS(name) const espi_##name *a = args
    switch (op) {
    case ESPI_OP_embed_fwd: {
        ARGS(embed_fwd);
        round_all(a->out, a->tokens * a->table.cols);
        break;
    }
    case ESPI_OP_add: {
        ARGS(add);
        round_all(a->out, a->n);
        break;
    }
    case ESPI_OP_rmsnorm_fwd: {
        ARGS(rmsnorm_fwd);
        round_all(a->y, a->rows * a->n);
        break;
    }
    case ESPI_OP_rmsnorm_bwd: {
        ARGS(rmsnorm_bwd);
        round_all(a->d_x, a->rows * a->n);
        break;
    }
    case ESPI_OP_rope_fwd:
    case ESPI_OP_rope_bwd: {
        ARGS(rope);
        round_all(a->x, a->tokens * a->heads * a->head_dim);
        break;
    }
    case ESPI_OP_attention_fwd: {
        ARGS(attention_fwd);
        round_all(a->out, a->spans.tokens * a->heads * a->head_dim);
        break;
    }
    case ESPI_OP_attention_bwd: {
        ARGS(attention_bwd);
        round_all(a->d_q, a->spans.tokens * a->heads * a->head_dim);
        round_all(a->d_k, a->spans.tokens * a->kv_heads * a->head_dim);
        round_all(a->d_v, a->spans.tokens * a->kv_heads * a->head_dim);
        break;
    }
    case ESPI_OP_linear_fwd: {
        ARGS(linear_fwd);
        round_all(a->y, a->tokens * a->w.rows);
        round_all(a->u, a->tokens * a->lora.r);
        break;
    }
    case ESPI_OP_linear_bwd: {
        ARGS(linear_bwd);
        round_all(a->d_x, a->tokens * a->w.cols);
        break;
    }
    case ESPI_OP_router_bwd: {
        ARGS(router_bwd);
        round_all(a->d_x, a->tokens * a->w.cols);
        break;
    }
    case ESPI_OP_gate_up_fwd: {
        ARGS(gate_up_fwd);
        const int64_t rows = a->routing.tokens * a->routing.top_k;
        round_all(a->gu, rows * a->w.rows);
        round_all(a->act, rows * a->w.rows / 2);
        round_all(a->u, rows * a->lora.r);
        break;
    }
    case ESPI_OP_gate_up_bwd: {
        ARGS(gate_up_bwd);
        round_all(a->d_rows, a->routing.tokens * a->routing.top_k * a->w.cols);
        break;
    }
    case ESPI_OP_swiglu_fwd: {
        ARGS(swiglu_fwd);
        round_all(a->act, a->rows * a->width);
        break;
    }
    case ESPI_OP_swiglu_bwd: {
        ARGS(swiglu_bwd);
        round_all(a->d_gu, a->rows * a->width * 2);
        break;
    }
    case ESPI_OP_down_fwd: {
        ARGS(down_fwd);
        const int64_t rows = a->routing.tokens * a->routing.top_k;
        round_all(a->y, rows * a->w.rows);
        round_all(a->u, rows * a->lora.r);
        break;
    }
    case ESPI_OP_down_bwd: {
        ARGS(down_bwd);
        round_all(a->d_gu, a->routing.tokens * a->routing.top_k * a->w.cols * 2);
        break;
    }
    case ESPI_OP_combine_fwd: {
        ARGS(combine_fwd);
        round_all(a->out, a->routing.tokens * a->hidden);
        break;
    }
    case ESPI_OP_combine_bwd: {
        ARGS(combine_bwd);
        round_all(a->d_x, a->routing.tokens * a->hidden);
        break;
    }
    default: /* statistics, or copies of what was rounded before */
        break;
    }
#undef ARGS
}

/* ---- experts ---- */

static bool packs(const espi_stack *w) {
    return packing && w->format != ESP_Q_NONE;
}

static size_t scales_bytes(const espi_stack *w) {
    return (size_t)(w->parts * w->part_blocks) * (w->format == ESP_MXFP4 ? 1 : sizeof(float));
}

static size_t codes_bytes(const espi_stack *w) {
    return ((size_t)w->parts * w->part_bytes + 63) / 64 * 64;
}

/* Codes with all bits turned, then the scales restored to one number a block. */
static size_t fake_packed_bytes(const espi_stack *w) {
    return packs(w) ? (codes_bytes(w) + scales_bytes(w) + 63) / 64 * 64 : 0;
}

typedef struct packed_args {
    void *packed;
    espi_stack one;
} packed_args;

static esp_status run_pack(const espi_exec *exec, const void *args) {
    (void)exec;
    const packed_args *a = args;
    const espi_stack *w = &a->one;
    unsigned char *to = a->packed;
    for (size_t i = 0; i < (size_t)w->parts * w->part_bytes; i++) to[i] = (unsigned char)~((const unsigned char *)w->data)[i];
    to += codes_bytes(w);
    for (int64_t p = 0; p < w->parts; p++)
        for (int64_t b = 0; b < w->part_blocks; b++) {
            const int64_t i = p * w->part_blocks + b;
            if (w->format == ESP_MXFP4)
                to[i] = w->scales[i];
            else
                ((float *)(void *)to)[i] =
                    w->absmax8
                        ? espi_absmax_restore(w->map[w->absmax8[i]], w->nested[p * w->part_nested + b / ESPI_NESTED_BLOCK], w->offset[p])
                        : w->absmax[i];
        }
    return ESP_OK;
}

static esp_status fake_pack(const espi_exec *exec, void *packed, const espi_stack *one) {
    return queue(exec, run_pack, &(packed_args){packed, *one}, sizeof(packed_args));
}

/* The stack as the reference reads it; free() *memory. */
static espi_stack unpacked(const espi_stack *w, void **memory) {
    *memory = NULL;
    if (!w->packed) return *w;
    espi_stack raw = *w;
    const size_t codes = (size_t)w->parts * w->part_bytes, scales = scales_bytes(w), experts = (size_t)w->experts;
    unsigned char *all = malloc(experts * (codes + scales) + 64);
    unsigned char *scale = all + (experts * codes + 63) / 64 * 64;
    for (size_t e = 0; e < experts; e++) {
        const unsigned char *from = (const unsigned char *)w->packed + e * fake_packed_bytes(w);
        for (size_t i = 0; i < codes; i++) all[e * codes + i] = (unsigned char)~from[i];
        memcpy(scale + e * scales, from + codes_bytes(w), scales);
    }
    raw.packed = NULL;
    raw.data = all;
    raw.absmax8 = NULL;
    raw.scales = scale;
    raw.absmax = (const float *)(const void *)scale;
    *memory = all;
    return raw;
}

static esp_status run_quantise(const espi_exec *exec, const void *args) {
    (void)exec;
    const espi_quantise *a = args;
    const esp_mxfp4_rule rule = a->round_up ? ESP_MXFP4_ROUND_UP : ESP_MXFP4_OCP;
    if (a->format == ESP_MXFP4) return esp_mxfp4_quantize(a->codes, a->scales, a->x, a->dtype, a->n, rule);
    return esp_quantize(a->codes, a->absmax, a->x, a->dtype, a->n, ESPI_QBLOCK, a->format);
}

static esp_status fake_quantise(const espi_exec *exec, const espi_quantise *a) {
    return queue(exec, run_quantise, a, sizeof *a);
}

/* ---- ops ---- */

#define STACK_OP(op)                                                                                                                       \
    static esp_status run_##op(const espi_exec *exec, const void *args) {                                                                  \
        espi_##op a = *(const espi_##op *)args;                                                                                            \
        void *memory;                                                                                                                      \
        a.w = unpacked(&a.w, &memory);                                                                                                     \
        const esp_status status = espi_backend_ref.op.run(exec, &a);                                                                       \
        if (rounding && status == ESP_OK) round_outputs(ESPI_OP_##op, args);                                                               \
        free(memory);                                                                                                                      \
        return status;                                                                                                                     \
    }
STACK_OP(gate_up_fwd)
STACK_OP(gate_up_bwd)
STACK_OP(down_fwd)
STACK_OP(down_bwd)

/* The caller's function is host code: it sees host arrays, and a locked device. */
typedef struct fused {
    fake *device;
    const espi_head_fused *a;
} fused;

static esp_status fused_coef(void *user, int64_t first, int64_t count) {
    const fused *f = user;
    const espi_head_fused *a = f->a;
    const size_t at = (size_t)first, n = (size_t)count * sizeof(float);
    memcpy((float *)a->host.lp + at, (float *)a->lp + at, n);
    memcpy((float *)a->host.entropy + at, (float *)a->entropy + at, n);
    lock(f->device);
    const esp_status status = a->coef(a->coef_user, first, count);
    unlock(f->device);
    memcpy((float *)a->g + at, (float *)a->host.g + at, n);
    memcpy((float *)a->e + at, (float *)a->host.e + at, n);
    return status;
}

static esp_status run_head_fused(const espi_exec *exec, const void *args) {
    espi_head_fused a = *(const espi_head_fused *)args;
    fused f = {exec->device, args};
    if (a.coef) {
        a.coef = fused_coef;
        a.coef_user = &f;
    }
    return espi_backend_ref.head_fused.run(exec, &a);
}

#define ESPI_OP(op, args)                                                                                                                  \
    static esp_status plain_##op(const espi_exec *exec, const void *a) {                                                                   \
        const esp_status status = espi_backend_ref.op.run(exec, a);                                                                        \
        if (rounding && status == ESP_OK) round_outputs(ESPI_OP_##op, a);                                                                  \
        return status;                                                                                                                     \
    }
#include "kernels/ops.def"
#undef ESPI_OP

/* Its own way of running, where an op has one. */
static esp_status (*special(espi_op_id op))(const espi_exec *, const void *) {
    switch (op) {
    case ESPI_OP_gate_up_fwd:
        return run_gate_up_fwd;
    case ESPI_OP_gate_up_bwd:
        return run_gate_up_bwd;
    case ESPI_OP_down_fwd:
        return run_down_fwd;
    case ESPI_OP_down_bwd:
        return run_down_bwd;
    case ESPI_OP_head_fused:
        return run_head_fused;
    default:
        return NULL;
    }
}

#define ESPI_OP(op, args)                                                                                                                  \
    static esp_status op_##op(const espi_exec *exec, const args *a) {                                                                      \
        return queue(exec, special(ESPI_OP_##op) ? special(ESPI_OP_##op) : plain_##op, a, sizeof *a);                                      \
    }                                                                                                                                      \
    static size_t op_##op##_scratch(const espi_exec *exec, const args *a) {                                                                \
        return espi_backend_ref.op.scratch ? espi_backend_ref.op.scratch(exec, a) : 0;                                                     \
    }                                                                                                                                      \
    static const char *op_##op##_refuse(const args *a) {                                                                                   \
        return espi_backend_ref.op.refuse ? espi_backend_ref.op.refuse(a) : NULL;                                                          \
    }
#include "kernels/ops.def"
#undef ESPI_OP

static const espi_backend fake_backend = {
    .name = "fake",
    .real = ESP_F32,
    .act = ESP_F32,
    .device = &fake_device,
    .quantise = fake_quantise,
    .packed_bytes = fake_packed_bytes,
    .pack = fake_pack,
#define ESPI_OP(op, args) .op = {.run = op_##op, .scratch = op_##op##_scratch, .refuse = op_##op##_refuse},
#include "kernels/ops.def"
#undef ESPI_OP
};

esp_status fake_ctx(esp_ctx **ctx, const esp_ctx_config *config) {
    esp_ctx_config settings = config ? *config : ESP_CTX_CONFIG(.log = NULL);
    settings.backend = "ref";
    ESPI_TRY(esp_ctx_create(ctx, &settings));
    (*ctx)->backends[0] = &fake_backend;
    (*ctx)->n_backends = 1;
    (*ctx)->device_ops = &fake_device;
    const esp_status status = fake_start(&(*ctx)->device, 0);
    if (status != ESP_OK) {
        (*ctx)->device_ops = NULL;
        esp_ctx_destroy(*ctx);
    }
    return status;
}

fake_counts fake_counted(const esp_ctx *ctx) {
    return ((const fake *)ctx->device)->counts;
}
