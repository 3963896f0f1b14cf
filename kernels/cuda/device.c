/* The GPU: memory, copies through a ring of pinned memory, waiting, and recording what is queued so that it runs again at one launch. */
#include "kernels/cuda/device.h"

#include <sched.h>
#include <stdlib.h>

#define WORKSPACE ((size_t)32 << 20) /* what cuBLASLt asks for on this architecture */
#define SLOT ((size_t)4 << 20)
enum { SLOTS = 4 };

/* A piece of pinned memory that the stream still reads, until `read`. */
typedef struct slot {
    unsigned char *host;
    size_t used;
    cudaEvent_t read;
} slot;

typedef struct gpu {
    espi_cuda shared; /* first: the ops are given its address */
    slot slots[SLOTS];
    int now;
    uint32_t *fault_host; /* pinned */
    bool recording;
    int ordinal;                    /* as the runtime counts */
    cudaStream_t lanes[ESPI_LANES]; /* all but the first, which is the ops' stream */
    cudaEvent_t turn[ESPI_LANES];   /* the end of a lane, for another one to wait for */
    cudaEvent_t marks[ESPI_MARKS];
    esp_status (*watch)(void *user);
    void *watch_user;
} gpu;

esp_status espi_cuda_check(cudaError_t error, const char *what) {
    if (error == cudaSuccess) return ESP_OK;
    (void)cudaGetLastError(); /* or the next call would report it again */
    const esp_status code = error == cudaErrorMemoryAllocation ? ESP_ERR_MEMORY : ESP_ERR_DEVICE;
    return ESPI_FAIL(code, "%s: the GPU reports %s (%s), expected success: %s", what, cudaGetErrorName(error), cudaGetErrorString(error),
                     code == ESP_ERR_MEMORY ? "make batch, rank or context smaller, or free memory of the GPU"
                                            : "end the process and look at the driver's log (dmesg)");
}

static void destroy(cudaEvent_t *events, int n) {
    for (int i = 0; i < n; i++)
        if (events[i]) (void)cudaEventDestroy(events[i]);
}

static esp_status create(cudaEvent_t *events, int n) {
    for (int i = 0; i < n; i++) ESPI_CUDA_TRY(cudaEventCreateWithFlags(&events[i], cudaEventDisableTiming));
    return ESP_OK;
}

static void gpu_stop(void *device) {
    gpu *g = device;
    for (int i = 0; i < ESPI_LANES; i++)
        if (g->lanes[i]) (void)cudaStreamSynchronize(g->lanes[i]);
    if (g->shared.stream) (void)cudaStreamSynchronize(g->shared.stream);
    destroy(g->turn, ESPI_LANES);
    destroy(g->marks, ESPI_MARKS);
    destroy(&g->shared.asked, 1);
    destroy(&g->shared.made, 1);
    destroy(g->shared.gone, ESPI_CUDA_PIECES);
    if (g->shared.aside) (void)cudaStreamDestroy(g->shared.aside);
    if (g->shared.away) (void)cudaStreamDestroy(g->shared.away);
    espi_cuda_calls_free(&g->shared);
    if (g->shared.blas) (void)cublasLtDestroy(g->shared.blas);
    for (int i = 0; i < SLOTS; i++) {
        if (g->slots[i].read) (void)cudaEventDestroy(g->slots[i].read);
        (void)cudaFreeHost(g->slots[i].host);
    }
    (void)cudaFreeHost(g->fault_host);
    (void)cudaFree(g->shared.workspace);
    (void)cudaFree(g->shared.fault);
    for (int i = 0; i < ESPI_LANES; i++)
        if (g->lanes[i]) (void)cudaStreamDestroy(g->lanes[i]);
    if (g->shared.stream) (void)cudaStreamDestroy(g->shared.stream);
    (void)cudaGetLastError();
    free(g);
}

/* The runtime keeps for every thread which GPU its calls are of. */
static esp_status gpu_enter(void *device) {
    return espi_cuda_check(cudaSetDevice(((const gpu *)device)->ordinal), "choosing a GPU");
}

static esp_status set_up(gpu *g, int which) {
    espi_cuda *c = &g->shared;
    const char *reason = espi_cublaslt_open();
    if (reason != NULL) return ESPI_FAIL(ESP_ERR_UNSUPPORTED, "no GPU backend: %s", reason);
    int gpus;
    ESPI_CUDA_TRY(cudaGetDeviceCount(&gpus));
    g->ordinal = which % gpus;
    ESPI_TRY(gpu_enter(g));
    ESPI_CUDA_TRY(cudaDeviceGetAttribute(&c->sms, cudaDevAttrMultiProcessorCount, g->ordinal));
    ESPI_CUDA_TRY(cudaDeviceGetAttribute(&c->major, cudaDevAttrComputeCapabilityMajor, g->ordinal));
    ESPI_CUDA_TRY(cudaStreamCreateWithFlags(&c->stream, cudaStreamNonBlocking));
    for (int i = ESPI_LANE_WORK + 1; i < ESPI_LANES; i++) ESPI_CUDA_TRY(cudaStreamCreateWithFlags(&g->lanes[i], cudaStreamNonBlocking));
    ESPI_TRY(create(g->turn, ESPI_LANES));
    ESPI_TRY(create(g->marks, ESPI_MARKS));
    ESPI_CUDA_TRY(cudaStreamCreateWithFlags(&c->aside, cudaStreamNonBlocking));
    ESPI_TRY(create(&c->asked, 1));
    ESPI_TRY(create(&c->made, 1));
    ESPI_TRY(create(c->gone, ESPI_CUDA_PIECES));
    ESPI_CUDA_TRY(cudaStreamCreateWithFlags(&c->away, cudaStreamNonBlocking));
    if (cublasLtCreate(&c->blas) != CUBLAS_STATUS_SUCCESS)
        return ESPI_FAIL(ESP_ERR_DEVICE, "cublasLtCreate failed, expected a handle: is the GPU's memory full?");
    c->workspace_bytes = WORKSPACE;
    ESPI_CUDA_TRY(cudaMalloc(&c->workspace, WORKSPACE));
    ESPI_CUDA_TRY(cudaMalloc((void **)&c->fault, sizeof *c->fault));
    ESPI_CUDA_TRY(cudaMemsetAsync(c->fault, 0, sizeof *c->fault, c->stream));
    ESPI_CUDA_TRY(cudaHostAlloc((void **)&g->fault_host, sizeof *g->fault_host, cudaHostAllocDefault));
    for (int i = 0; i < SLOTS; i++) {
        ESPI_CUDA_TRY(cudaHostAlloc((void **)&g->slots[i].host, SLOT, cudaHostAllocDefault));
        ESPI_CUDA_TRY(cudaEventCreateWithFlags(&g->slots[i].read, cudaEventDisableTiming));
    }
    return ESP_OK;
}

static esp_status gpu_start(void **device, int which) {
    gpu *g = calloc(1, sizeof *g);
    if (g == NULL) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for the bookkeeping of a GPU (%zu bytes)", sizeof *g);
    const esp_status status = set_up(g, which);
    if (status != ESP_OK) {
        gpu_stop(g);
        return status;
    }
    *device = g;
    return ESP_OK;
}

static esp_status not_recording(const gpu *g, const char *what) {
    if (!g->recording) return ESP_OK;
    return ESPI_FAIL(ESP_ERR_STATE, "%s while work is being recorded, expected it before or after: it would not run again with the rest",
                     what);
}

static esp_status gpu_alloc(void *device, size_t bytes, void **out) {
    ESPI_TRY(not_recording(device, "memory wanted"));
    ESPI_TRY(gpu_enter(device));
    const cudaError_t error = cudaMalloc(out, bytes);
    if (error != cudaErrorMemoryAllocation) return espi_cuda_check(error, "taking memory of the GPU");
    (void)cudaGetLastError();
    size_t left = 0, all = 0;
    (void)cudaMemGetInfo(&left, &all);
    return ESPI_FAIL(ESP_ERR_MEMORY, "%zu bytes of GPU memory wanted, %zu of %zu are free: make batch, rank or context smaller", bytes,
                     left, all);
}

static void gpu_free(void *device, void *p) {
    (void)device;
    (void)cudaFree(p);
}

static esp_status gpu_alloc_host(void *device, size_t bytes, void **out) {
    ESPI_TRY(not_recording(device, "pinned memory wanted"));
    ESPI_TRY(gpu_enter(device));
    return espi_cuda_check(cudaHostAlloc(out, bytes, cudaHostAllocDefault), "taking pinned memory");
}

static void gpu_free_host(void *device, void *p) {
    (void)device;
    (void)cudaFreeHost(p);
}

static esp_status gpu_left(void *device, uint64_t *bytes, uint64_t *number) {
    static const enum cudaDeviceAttr where[] = {cudaDevAttrPciDomainId, cudaDevAttrPciBusId, cudaDevAttrPciDeviceId};
    size_t left, all;
    int part;
    ESPI_TRY(gpu_enter(device));
    ESPI_CUDA_TRY(cudaMemGetInfo(&left, &all));
    *bytes = left;
    *number = 0;
    for (int i = 0; i < 3; i++) {
        ESPI_CUDA_TRY(cudaDeviceGetAttribute(&part, where[i], ((const gpu *)device)->ordinal));
        *number = *number << 16 | (uint64_t)part;
    }
    return ESP_OK;
}

static esp_status gpu_zero(void *device, void *p, size_t bytes) {
    const gpu *g = device;
    return espi_cuda_check(cudaMemsetAsync(p, 0, bytes, g->shared.stream), "zeroing memory of the GPU");
}

static esp_status is_past(cudaEvent_t event, bool *past) {
    const cudaError_t error = cudaEventQuery(event);
    *past = error == cudaSuccess;
    if (error != cudaErrorNotReady) return espi_cuda_check(error, "asking how far the GPU is");
    (void)cudaGetLastError(); /* it is no failure of the kernel launched next */
    return ESP_OK;
}

/* Waits for an event.  Where somebody watches, the wait asks them over and over: what it waits for may wait for a rank that is gone. */
static esp_status await(const gpu *g, cudaEvent_t event) {
    if (g->watch == NULL) return espi_cuda_check(cudaEventSynchronize(event), "waiting for the GPU");
    for (;;) {
        bool past;
        ESPI_TRY(is_past(event, &past));
        if (past) return ESP_OK;
        ESPI_TRY(g->watch(g->watch_user));
        sched_yield();
    }
}

/* A slot with room, its former contents read. */
static esp_status next_slot(gpu *g) {
    ESPI_CUDA_TRY(cudaEventRecord(g->slots[g->now].read, g->shared.stream));
    g->now = (g->now + 1) % SLOTS;
    g->slots[g->now].used = 0;
    return await(g, g->slots[g->now].read);
}

static esp_status gpu_put(void *device, void *to, const void *from_host, size_t bytes) {
    gpu *g = device;
    ESPI_TRY(not_recording(g, "a copy to the GPU"));
    ESPI_TRY(gpu_enter(g));
    for (size_t done = 0; done < bytes;) {
        if (g->slots[g->now].used == SLOT) ESPI_TRY(next_slot(g));
        slot *s = &g->slots[g->now];
        const size_t room = SLOT - s->used, n = bytes - done < room ? bytes - done : room;
        memcpy(s->host + s->used, (const unsigned char *)from_host + done, n);
        ESPI_CUDA_TRY(cudaMemcpyAsync((unsigned char *)to + done, s->host + s->used, n, cudaMemcpyDefault, g->shared.stream));
        const size_t next = s->used + (n + 255) / 256 * 256;
        s->used = next < SLOT ? next : SLOT;
        done += n;
    }
    return ESP_OK;
}

/* Waits, and reports what kernels and callbacks found on the way: once. */
static esp_status settle(gpu *g) {
    espi_cuda *c = &g->shared;
    ESPI_CUDA_TRY(cudaMemcpyAsync(g->fault_host, c->fault, sizeof *c->fault, cudaMemcpyDeviceToHost, c->stream));
    ESPI_CUDA_TRY(cudaEventRecord(g->turn[ESPI_LANE_WORK], c->stream));
    ESPI_TRY(await(g, g->turn[ESPI_LANE_WORK]));
    const esp_status called = c->callback_status;
    const uint32_t fault = *g->fault_host;
    if (called == ESP_OK && fault == 0) return ESP_OK;
    c->callback_status = ESP_OK;
    ESPI_CUDA_TRY(cudaMemsetAsync(c->fault, 0, sizeof *c->fault, c->stream));
    if (called != ESP_OK)
        return ESPI_FAIL(called, "a loss's coefficients of a chunk of rows: the function that makes them failed with %d, expected ESP_OK",
                         (int)called);
    if (fault & ESPI_CUDA_FAULT_ROUTER)
        return ESPI_FAIL(ESP_ERR_NONFINITE, "router: a logit is not finite, expected finite logits: look at the hidden states");
    return ESPI_FAIL(ESP_ERR_INTERNAL, "a kernel reported the fault bits %#x, which nobody knows", (unsigned)fault);
}

static esp_status gpu_get(void *device, void *to_host, const void *from, size_t bytes) {
    gpu *g = device;
    ESPI_TRY(not_recording(g, "a copy from the GPU"));
    ESPI_CUDA_TRY(cudaMemcpyAsync(to_host, from, bytes, cudaMemcpyDefault, g->shared.stream));
    return settle(g);
}

static esp_status gpu_wait(void *device) {
    gpu *g = device;
    ESPI_TRY(not_recording(g, "a wait"));
    return settle(g);
}

static esp_status gpu_record_begin(void *device) {
    gpu *g = device;
    ESPI_TRY(not_recording(g, "a recording"));
    ESPI_TRY(gpu_enter(g));
    ESPI_CUDA_TRY(cudaStreamBeginCapture(g->shared.stream, cudaStreamCaptureModeThreadLocal));
    g->recording = true;
    return ESP_OK;
}

static esp_status gpu_record_end(void *device, void **graph) {
    gpu *g = device;
    if (!g->recording) return ESPI_FAIL(ESP_ERR_STATE, "a recording ends, but none was begun");
    g->recording = false;
    cudaGraph_t recorded = NULL;
    cudaGraphExec_t exec = NULL;
    ESPI_CUDA_TRY(cudaStreamEndCapture(g->shared.stream, &recorded));
    esp_status status = espi_cuda_check(cudaGraphInstantiate(&exec, recorded, 0), "making a graph of what was recorded");
    (void)cudaGraphDestroy(recorded);
    if (status == ESP_OK) {
        status = espi_cuda_check(cudaGraphUpload(exec, g->shared.stream), "uploading a graph");
        if (status != ESP_OK) (void)cudaGraphExecDestroy(exec);
    }
    *graph = status == ESP_OK ? exec : NULL;
    return status;
}

static esp_status gpu_launch(void *device, void *graph) {
    gpu *g = device;
    ESPI_TRY(not_recording(g, "a recording launched"));
    ESPI_TRY(gpu_enter(g));
    return espi_cuda_check(cudaGraphLaunch(graph, g->shared.stream), "launching a graph");
}

static void gpu_graph_free(void *device, void *graph) {
    const gpu *g = device;
    (void)cudaStreamSynchronize(g->shared.stream);
    (void)cudaGraphExecDestroy(graph);
}

static cudaStream_t stream_of(const gpu *g, espi_lane lane) {
    return lane == ESPI_LANE_WORK ? g->shared.stream : g->lanes[lane];
}

static void *gpu_lane(void *device, espi_lane lane) {
    return stream_of(device, lane);
}

static esp_status gpu_copy(void *device, espi_lane lane, void *to, const void *from, size_t bytes) {
    return espi_cuda_check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream_of(device, lane)), "copying on the GPU");
}

static esp_status gpu_order(void *device, espi_lane later, espi_lane earlier) {
    const gpu *g = device;
    if (later == ESPI_LANE_EXCHANGE || earlier == ESPI_LANE_EXCHANGE) ESPI_TRY(not_recording(g, "an exchange between ranks"));
    ESPI_CUDA_TRY(cudaEventRecord(g->turn[earlier], stream_of(g, earlier)));
    ESPI_CUDA_TRY(cudaStreamWaitEvent(stream_of(g, later), g->turn[earlier], 0));
    return ESP_OK;
}

static esp_status gpu_mark(void *device, espi_lane lane, int mark) {
    const gpu *g = device;
    return espi_cuda_check(cudaEventRecord(g->marks[mark], stream_of(g, lane)), "marking a place in the work");
}

static esp_status gpu_after(void *device, espi_lane lane, int mark) {
    const gpu *g = device;
    ESPI_TRY(not_recording(g, "the end of an exchange between ranks"));
    return espi_cuda_check(cudaStreamWaitEvent(stream_of(g, lane), g->marks[mark], 0), "waiting for a mark");
}

static esp_status gpu_passed(void *device, int mark, bool *passed) {
    return is_past(((const gpu *)device)->marks[mark], passed);
}

static void gpu_set_watch(void *device, esp_status (*watch)(void *user), void *user) {
    gpu *g = device;
    g->watch = watch;
    g->watch_user = user;
}

const espi_device espi_device_cuda = {
    .start = gpu_start,
    .enter = gpu_enter,
    .stop = gpu_stop,
    .alloc = gpu_alloc,
    .free = gpu_free,
    .alloc_host = gpu_alloc_host,
    .free_host = gpu_free_host,
    .left = gpu_left,
    .zero = gpu_zero,
    .put = gpu_put,
    .get = gpu_get,
    .wait = gpu_wait,
    .record_begin = gpu_record_begin,
    .record_end = gpu_record_end,
    .launch = gpu_launch,
    .graph_free = gpu_graph_free,
    .lane = gpu_lane,
    .copy = gpu_copy,
    .order = gpu_order,
    .mark = gpu_mark,
    .after = gpu_after,
    .passed = gpu_passed,
    .set_watch = gpu_set_watch,
};
