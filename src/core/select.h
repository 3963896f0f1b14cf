/* Runs an op on the first backend of the context that takes it.  Scratch comes from the arena and goes back after the call.
 * On a dry arena nothing runs: only the bytes are counted. */
#ifndef ESPI_CORE_SELECT_H
#define ESPI_CORE_SELECT_H

#include "core/ctx.h"
#include "kernels/backend.h"

/* espi_op_rmsnorm_fwd(ctx, arena, &args), and so on for every row of ops.def.
 * ESP_ERR_UNSUPPORTED lists why each backend refused. */
#define ESPI_OP(name, args) esp_status espi_op_##name(esp_ctx *ctx, espi_arena *arena, const args *a);
#include "kernels/ops.def"
#undef ESPI_OP

/* The backends that a name means: "auto" or "cpu" (best instruction set that keeps f32, then ref), "cpu-bf16" (best one whose products are of
 * bf16, then ref), "cpu-avx2" .., "ref", "ref64", "cuda", or "any" (a GPU
 * where one can be used, else "cpu"; the log says which).  ESP_ERR_UNSUPPORTED: "cuda" without a GPU, or without its code.
 * ESP_ERR_ARG on an unknown name or an instruction set that this machine lacks; the sentence lists what there is. */
esp_status espi_select_backends(esp_ctx *ctx, const char *name);

#endif
