/* What the files of the expert ops share: the 64 x 64 records of packed stacks, how a block finds its rows, the activation.
 *
 * A record holds 64 rows x 64 columns of an expert's matrix: the codes as [columns 0..31, 32..63][row][4 words], then the scales of each row
 * (NF4, FP4: one f32 absmax; MXFP4: two E8M0 bytes).  Word c has the columns 2c, 2c+1 of each eighth of a record: what lane c of four holds of
 * a row in the tensor cores' fragments.  Records stand [expert][64 rows][64 columns], in the order of the matrix's own rows. */
#ifndef ESPI_KERNELS_CUDA_EXPERTS_CUH
#define ESPI_KERNELS_CUDA_EXPERTS_CUH

#include "kernels/cuda/cuda.cuh"
#include "kernels/cuda/dev.cuh"
#include "kernels/ops.h"

#define RECORD_CODES 2048
#define RECORD_BYTES(format) (RECORD_CODES + ((format) == ESP_MXFP4 ? 128 : 256))

/* Rows row0 .. row0+rows-1 of the routed order, all of one expert; rows = 0: none. */
struct row_tile {
    int expert, row0, rows;
};

/* Tile `index` of the routed rows cut expert by expert into tiles of `height`.  Called by a whole warp. */
static __device__ __forceinline__ row_tile find_tile(const int32_t *offsets, int experts, int index, int height) {
    const int lane = threadIdx.x & 31;
    for (int first = 0; first < experts; first += 32) {
        const int e = first + lane;
        const int begin = e < experts ? offsets[e] : 0, end = e < experts ? offsets[e + 1] : 0;
        const int tiles = (end - begin + height - 1) / height;
        const int upto = espi_warp_sum_upto(tiles, lane);
        const unsigned reached = __ballot_sync(~0u, upto > index);
        if (reached) {
            const int owner = __ffs((int)reached) - 1;
            const int row0 = begin + (index - (upto - tiles)) * height;
            row_tile t = {first + owner, __shfl_sync(~0u, row0, owner), 0};
            t.rows = min(height, __shfl_sync(~0u, end, owner) - t.row0);
            return t;
        }
        index -= __shfl_sync(~0u, upto, 31);
    }
    return row_tile{0, 0, 0};
}

/* Of an array in scratch: the next one is aligned for vector access. */
static inline size_t rounded(size_t bytes) {
    return (bytes + 255) / 256 * 256;
}

/* No more tiles than this, however the rows fall. */
static inline int tile_bound(const espi_routing *r, int height) {
    const int64_t rows = r->tokens * r->top_k;
    return (int)((rows + height - 1) / height + (r->experts < rows ? r->experts : rows));
}

/* Without a limit it is infinite. */
struct glu_rule {
    int interleaved;
    float limit, slope, plus, decay; /* plus: what is added to the up value; decay: 2^(decay gate) = exp(-slope gate) */
};

static inline glu_rule glu_rule_of(const espi_glu *glu) {
    const float slope = glu->clamped ? (float)glu->alpha : 1.0f, decay = -1.4426950408889634f * slope;
    if (glu->clamped) return glu_rule{glu->interleaved, (float)glu->limit, slope, 1, decay};
    return glu_rule{glu->interleaved, INFINITY, slope, 0, decay};
}

/* Whether values need the clamps; asked once for all values that a thread makes side by side. */
static __device__ __forceinline__ bool is_clamped(const glu_rule &rule) {
    return rule.limit < INFINITY;
}

/* The activation of one gate and up value, and what its gradient takes from them. */
struct glu_value {
    float act, d_gate, d_up; /* d_*: factors of the gradient of act */
};

static __device__ __forceinline__ float logistic(float g, const glu_rule &rule) {
    return dev_reciprocal(1.0f + dev_exp2(rule.decay * g));
}

template <bool clamped> static __device__ __forceinline__ float glu(float g, float u, const glu_rule &rule) {
    if (clamped) g = fminf(g, rule.limit), u = rule.plus + fminf(fmaxf(u, -rule.limit), rule.limit);
    return g * logistic(g, rule) * u;
}

template <bool clamped> static __device__ __forceinline__ glu_value glu_slopes(float g, float u, const glu_rule &rule) {
    const bool gate_passes = !clamped || !(g >= rule.limit), up_passes = !clamped || !(u >= rule.limit || u <= -rule.limit);
    if (clamped) g = fminf(g, rule.limit), u = rule.plus + fminf(fmaxf(u, -rule.limit), rule.limit);
    const float sigma = logistic(g, rule), swish = g * sigma, slope = clamped ? rule.slope * swish : swish;
    glu_value v;
    v.act = swish * u;
    v.d_gate = gate_passes ? u * fmaf(slope, 1.0f - sigma, sigma) : 0.0f;
    v.d_up = up_passes ? swish : 0.0f;
    return v;
}

/* Eight neighbouring gates and their ups: two in a word. */
struct gate_up_words {
    uint32_t gate[4], up[4];
};

/* From the two 16-byte loads that hold them: gates and ups, or both interleaved. */
static __device__ __forceinline__ gate_up_words split_gate_up(uint4 first, uint4 second, bool interleaved) {
    if (!interleaved) return gate_up_words{{first.x, first.y, first.z, first.w}, {second.x, second.y, second.z, second.w}};
    return gate_up_words{{dev_prmt(first.x, first.y, 0x5410u), dev_prmt(first.z, first.w, 0x5410u), dev_prmt(second.x, second.y, 0x5410u),
                          dev_prmt(second.z, second.w, 0x5410u)},
                         {dev_prmt(first.x, first.y, 0x7632u), dev_prmt(first.z, first.w, 0x7632u), dev_prmt(second.x, second.y, 0x7632u),
                          dev_prmt(second.z, second.w, 0x7632u)}};
}

/* The activation of the eight, two in a word. */
template <bool clamped> static __device__ __forceinline__ uint4 activate8_as(const gate_up_words &v, const glu_rule &rule) {
    uint32_t out[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
        out[i] = dev_bf16x2(glu<clamped>(dev_lo(v.gate[i]), dev_lo(v.up[i]), rule), glu<clamped>(dev_hi(v.gate[i]), dev_hi(v.up[i]), rule));
    return make_uint4(out[0], out[1], out[2], out[3]);
}

static __device__ __forceinline__ uint4 activate8(const gate_up_words &v, const glu_rule &rule) {
    return is_clamped(rule) ? activate8_as<true>(v, rule) : activate8_as<false>(v, rule);
}

/* ---- pack.cu ---- */
/* Bytes of the records of one expert; 0: it does not tile or is not 4-bit.  Packs the experts of w, whose data must be aligned to 16. */
size_t espi_record_bytes(const espi_stack *w);
cudaError_t espi_pack_records(void *records, const espi_stack *w, cudaStream_t stream);

/* ---- products with the frozen stacks: experts_plain.cu (any shape) and experts_tiled.cu (whole records; on sm_90a by experts_wgmma.cu, elsewhere
 * by experts_mma.cu) ---- */
enum product_kind { PRODUCT_GATE_UP, PRODUCT_DOWN, PRODUCT_DOWN_BACK, PRODUCT_GATE_UP_BACK };

/* out_s = W_e in_s (or W_e^T in_s, when back) + factor * L_e low_s [+ bias_e], and what the kind makes of it. */
struct product_args {
    espi_stack w;
    espi_routing routing;
    const bf16 *in;        /* rows of the contracted width */
    const int32_t *in_row; /* row of `in` of a routed row, or NULL: the same */
    const float *bias;     /* [E,out] or NULL */
    const float *up;       /* L: B [E,out,r] of a forward, A [E,r,out] of a backward; NULL when r = 0 */
    const bf16 *low;       /* [S,r] */
    int r;
    float factor;
    glu_rule glu;
    int64_t width;       /* I */
    bf16 *out;           /* gu, y, d_gu or d_rows */
    bf16 *act;           /* gate_up: glu(gu) */
    const bf16 *gu;      /* down_back */
    float *d_row_weight; /* down_back: without the bias's share */
};

/* Bytes of scratch; the launch; the reason for a refusal, or NULL. */
size_t product_plain_scratch(const product_args *p, product_kind kind);
cudaError_t product_plain(const product_args *p, product_kind kind, void *scratch, cudaStream_t stream);
const char *product_tiled_describe();
const char *product_tiled_refusal(const espi_stack *w, const espi_lora *lora, const espi_routing *routing, product_kind kind);
size_t product_tiled_scratch(const product_args *p, product_kind kind);
cudaError_t product_tiled(const product_args *p, product_kind kind, void *scratch, int multiprocessors, cudaStream_t stream);

/* ---- low-rank branches: experts_lora.cu ---- */
/* low_s = A_e in_s, A: l [E,r,width]. */
struct low_args {
    bf16 *low, *weighted;
    const bf16 *in;
    const int32_t *in_row;
    const float *l, *weight; /* weighted, weight, factor: for lora_pair */
    int r;
    int64_t width;
    float factor;
};
cudaError_t lora_low(const low_args *a, const espi_routing *routing, cudaStream_t stream);

/* d[e] += factor * sum over the rows of e of in_s low_s^T.  in: rows of `width` (by in_row), or glu(gu) when gu.  d: [E,width,r], or
 * [E,r,width] when across. */
struct outer_args {
    float *d;
    const bf16 *in, *low;
    const int32_t *in_row;
    const float *weight; /* of a row; for lora_pair */
    const bf16 *gu;
    glu_rule glu;
    bool across;
    int r;
    int64_t width;
    float factor;
    void *scratch; /* lora_outer_scratch bytes */
};
size_t lora_outer_scratch(int64_t width, int r, const espi_routing *routing);
cudaError_t lora_outer(const outer_args *a, const espi_routing *routing, cudaStream_t stream);

/* Both at once, of the same rows, where their width is a multiple of 32 and the rank one of 8: low_s = factor * l_e^T in_s [, weighted_s =
 * weight_s * low_s] with l = B [E,width,r], and d[e] += factor * sum over the rows of e of in_s ([weight_s *] u_s)^T. */
struct pair_args {
    float *d;
    bf16 *low, *weighted;
    const bf16 *in, *u;
    const int32_t *in_row;
    const float *l, *weight;
    int r;
    int64_t width;
    float factor;
    void *scratch; /* lora_pair_scratch bytes */
};
size_t lora_pair_scratch(int64_t width, int r, const espi_routing *routing);
cudaError_t lora_pair(const pair_args *a, const espi_routing *routing, cudaStream_t stream);

/* d_row_weight_s += bias_e . d_out_token(s). */
cudaError_t bias_share(float *d_row_weight, const float *bias, const bf16 *d_out, int64_t width, const espi_routing *routing,
                       cudaStream_t stream);

#endif
