/* The table of the cpu backend of one instruction set. */
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/dense.h"
#include "kernels/cpu/packed.h"
#include "kernels/refuse.h"

#define STRING2(x) #x
#define STRING(x) STRING2(x)

/* cpu.c, which is compiled for any machine. */
bool ESPI_CPU(espi_cpu_available)(void);

extern const espi_backend ESPI_CPU(espi_backend_cpu);
const espi_backend ESPI_CPU(espi_backend_cpu) = {
    .name = "cpu-" STRING(ESPI_CPU_ISA),
    .real = ESP_F32,
    .act = ESP_F32,
#if defined(__AVX512BF16__)
    .bf16_products = true,
    .packed_bytes = espi_cpu_packed_bytes,
#if defined(__AMX_BF16__)
    .pack = espi_cpu_pack_tiles,
#else
    .pack = espi_cpu_pack,
#endif
    .describe = espi_dense_describe_bf16,
#else
    .describe = espi_dense_describe,
#endif
    .available = ESPI_CPU(espi_cpu_available),
#define ESPI_OP(op, args) .op.run = ESPI_CPU(espi_##op),
#include "kernels/ops.def"
#undef ESPI_OP
    .attention_fwd.scratch = ESPI_CPU(espi_attention_fwd_scratch),
    .attention_bwd.scratch = ESPI_CPU(espi_attention_bwd_scratch),
    .linear_fwd.scratch = ESPI_CPU(espi_linear_fwd_scratch),
    .linear_bwd.scratch = ESPI_CPU(espi_linear_bwd_scratch),
    .gate_up_fwd.scratch = ESPI_CPU(espi_gate_up_fwd_scratch),
    .down_fwd.scratch = ESPI_CPU(espi_down_fwd_scratch),
    .gate_up_bwd.scratch = ESPI_CPU(espi_gate_up_bwd_scratch),
    .down_bwd.scratch = ESPI_CPU(espi_down_bwd_scratch),
    .head_stats.scratch = ESPI_CPU(espi_head_stats_scratch),
    .head_grad.scratch = ESPI_CPU(espi_head_grad_scratch),
    .head_fused.scratch = ESPI_CPU(espi_head_fused_scratch),
    .head_logits.scratch = ESPI_CPU(espi_head_logits_scratch),
    .head_sample.scratch = ESPI_CPU(espi_head_sample_scratch),
    ESPI_REFUSALS,
};
