/* A device of host memory for tests on a CPU: what it gives out faults when it is touched outside of an op, so host code that reads or
 * writes tensor memory dies at the line that does it.  The ops are those of the reference, in f32, so results have the reference's bits. */
#ifndef ESP_TEST_FAKE_H
#define ESP_TEST_FAKE_H

#include "core/ctx.h"
#include "kernels/backend.h"

/* What the fake device gives for its lane of exchanges.  A library queues work there, does it in order when it is asked how far it is, and
 * opens the device's memory while it reads or writes it.  The other lane is done with each call. */
typedef struct fake_lane {
    void *device;
    void (*open)(void *device);
    void (*close)(void *device);
    uint64_t queued;
    uint64_t (*done)(void *work); /* how many of those queued; set with `work` by the library */
    void *work;
} fake_lane;

/* Like esp_ctx_create with backend "ref", but on the fake device.  esp_ctx_destroy() it. */
esp_status fake_ctx(esp_ctx **ctx, const esp_ctx_config *config);

/* Bytes that a fake device says are free; all say that they are the same one. */
#define FAKE_LEFT ((size_t)3 << 20)

/* What the device was asked for since it was started. */
typedef struct fake_counts {
    int64_t allocations, puts, gets, waits, launches, recordings, pinned;
} fake_counts;
fake_counts fake_counted(const esp_ctx *ctx);

/* Experts in 4 bits are kept packed, in a form that no op but those of the fake reads.  Before a model is loaded; off at first. */
void fake_set_packing(bool on);

/* Every activation and gradient of one is rounded to bf16 as an op leaves it: the plain bf16 run that a GPU's errors are measured by. */
void fake_set_rounding(bool on);

#endif
