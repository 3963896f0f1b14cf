/* What the tiled products with the expert stacks share (experts_wgmma.cu, experts_mma.cu): how a tile is named, weights on their way into
 * shared memory, and what becomes of a tile's sums.
 *
 * A tile is 128 outputs, two sub-tiles of 64, by routed rows of one expert; the contraction runs over k-blocks of 64.  In shared memory a
 * sub-tile is 64 rows of 128 bytes whose 16-byte piece c stands at c ^ (row & 7). */
#ifndef ESPI_KERNELS_CUDA_EXPERTS_TILE_CUH
#define ESPI_KERNELS_CUDA_EXPERTS_TILE_CUH

#include "kernels/cuda/experts.cuh"

#include <type_traits>

#define BLOCK 64       /* a record's side, and the width of a k-block */
#define SUBTILE 8192   /* bytes of 64 x 64 bf16 */
#define LOW_BYTES 2048 /* of 64 outputs x 16 ranks */

struct tile_args {
    product_args p;
    uint2 *plan;          /* [0]: how many tiles and of how many rows at most; [1]: how many were taken; then the work of each tile */
    float *partial;       /* down_back: [S,blocks] */
    uint8_t *low_weights; /* the low-rank branch's, rounded, as experts_wgmma.cu wants them: [E,blocks,low_steps] of LOW_BYTES */
    const uint8_t *weights;
    int64_t expert_bytes, row_bytes; /* row_bytes: of plain weights */
    int block_step, k_step;          /* records */
    int k_blocks, blocks, tiles_m;
    int low_steps; /* k16 steps of the low-rank block, 0: none */
    product_kind kind;
    int tiles_few; /* fours of 64 outputs, for experts_few.cu */
    int few_rows;  /* experts of up to so many rows are experts_few.cu's, all others have tiles */
    bool beside;   /* the kernel of few rows begins beside the plan, that of the tiles beside it: see launch_beside */
    bool halves;   /* gate_up whose ups stand behind all gates: a tile takes 64 of each */
};

struct work {
    int expert, m, row0, rows;
};

/* Two words: expert and m, row0 and rows (at most 256). */
static __device__ __forceinline__ uint2 pack_work(const work &w) {
    return make_uint2((uint32_t)w.expert << 16 | (uint32_t)w.m, (uint32_t)w.row0 << 9 | (uint32_t)w.rows);
}

static __device__ __forceinline__ work unpack_work(uint32_t x, uint32_t y) {
    return work{(int)(x >> 16), (int)(x & 0xffffu), (int)(y >> 9), (int)(y & 511u)};
}

static __device__ __forceinline__ uint2 packed_work_of(const tile_args &a, int index) {
    return __ldg(a.plan + 2 + index);
}

static __device__ __forceinline__ work work_of(const tile_args &a, int index) {
    const uint2 t = packed_work_of(a, index);
    return unpack_work(t.x, t.y);
}

/* Which 64 outputs warpgroup g of tile m makes. */
static __device__ __forceinline__ int block_of(const tile_args &a, int m, int g) {
    if (a.halves) return g ? m + a.tiles_m : m;
    return 2 * m + g;
}

/* ---- decoding: a lane owns a row of 64 values ---- */
struct coded_row {
    uint4 q[2];
    uint32_t scale;
};

template <int format> static __device__ __forceinline__ void load_row(coded_row &c, const uint8_t *record, int row) {
    c.q[0] = dev_load_stream(record + row * 16);
    c.q[1] = dev_load_stream(record + 1024 + row * 16);
    c.scale = format == ESP_MXFP4 ? (uint32_t)__ldg((const uint16_t *)(record + RECORD_CODES) + row)
                                  : __ldg((const uint32_t *)(record + RECORD_CODES) + row);
}

/* Eight values of MXFP4, exact: sign and e2m1 field moved to where bf16 has them, times 2^(scale - 1). */
static __device__ __forceinline__ uint4 decode_mx(uint32_t q, uint32_t factor, uint32_t more) {
    const uint32_t field = 0x81C081C0u;
    uint4 v = {q & field, q << 3 & field, q << 6 & field, (q << 1 & 0x80008000u) | (q >> 5 & 0x01000100u) | (q >> 4 & 0x00C000C0u)};
    v.x = dev_mul_bf16x2(v.x, factor), v.y = dev_mul_bf16x2(v.y, factor);
    v.z = dev_mul_bf16x2(v.z, factor), v.w = dev_mul_bf16x2(v.w, factor);
    if (more) { /* a scale above 2: the factor alone would not be a bf16 */
        v.x = dev_mul_bf16x2(v.x, more), v.y = dev_mul_bf16x2(v.y, more);
        v.z = dev_mul_bf16x2(v.z, more), v.w = dev_mul_bf16x2(v.w, more);
    }
    return v;
}

/* The 16 products of a row's scale with the values of the codes as bf16, their low and high bytes apart; MXFP4 needs none. */
struct byte_planes {
    uint32_t low[4], high[4];
};

/* The values of the codes, four in a piece; from shared memory. */
struct code_table {
    uint4 values[4];
};

static __device__ __forceinline__ code_table load_table(uint32_t table) {
    code_table t;
#pragma unroll
    for (int i = 0; i < 4; i++) t.values[i] = dev_load_shared(table + 16 * i);
    return t;
}

template <int format> static __device__ __forceinline__ byte_planes planes_of(uint32_t scale, const code_table &table) {
    byte_planes p;
    if (format == ESP_NF4) {
        const float absmax = __uint_as_float(scale);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint4 v = table.values[i];
            const uint32_t a = dev_bf16x2(__uint_as_float(v.x) * absmax, __uint_as_float(v.y) * absmax);
            const uint32_t b = dev_bf16x2(__uint_as_float(v.z) * absmax, __uint_as_float(v.w) * absmax);
            p.low[i] = dev_prmt(a, b, 0x6420u), p.high[i] = dev_prmt(a, b, 0x7531u);
        }
    }
    return p;
}

/* How decode_table shifts its selectors.  order: 0x32103210, or 0x76547654 where the planes have the values 8 to 15 first. */
struct plain_shifts {
    uint32_t order = 0x32103210u;
    __device__ __forceinline__ uint32_t merge(uint32_t q) const { return (q >> 1 & 0x44444444u) ^ order; }
    __device__ __forceinline__ uint32_t next(uint32_t selectors) const { return selectors >> 16; }
};

template <typename S> static __device__ __forceinline__ uint4 decode_table(uint32_t q, const byte_planes &p, const S &shifts) {
    uint32_t s = q & 0x77777777u, upper = shifts.merge(q), words[4];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const uint32_t lo = dev_prmt(dev_prmt(p.low[0], p.low[1], s), dev_prmt(p.low[2], p.low[3], s), upper);
        const uint32_t hi = dev_prmt(dev_prmt(p.high[0], p.high[1], s), dev_prmt(p.high[2], p.high[3], s), upper);
        words[2 * i] = dev_prmt(lo, hi, 0x5140u), words[2 * i + 1] = dev_prmt(lo, hi, 0x7362u);
        s = shifts.next(s), upper = shifts.next(upper);
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
}

/* 32 values of a row, in four pieces: a word of codes has two values of each.  exponent: of MXFP4's scale. */
template <int format>
static __device__ __forceinline__ void decode_words(uint4 (&out)[4], uint4 codes, uint32_t exponent, const byte_planes &p,
                                                    uint32_t order = 0x32103210u) {
    const uint32_t q[4] = {codes.x, codes.y, codes.z, codes.w}, more = exponent > 128 ? (exponent - 1) * 0x00800080u : 0;
    const uint32_t factor = (min(exponent, 128u) + 126u) * 0x00800080u;
    uint4 v[4];
#pragma unroll
    for (int i = 0; i < 4; i++) v[i] = format == ESP_MXFP4 ? decode_mx(q[i], factor, more) : decode_table(q[i], p, plain_shifts{order});
    out[0] = make_uint4(v[0].x, v[1].x, v[2].x, v[3].x), out[1] = make_uint4(v[0].y, v[1].y, v[2].y, v[3].y);
    out[2] = make_uint4(v[0].z, v[1].z, v[2].z, v[3].z), out[3] = make_uint4(v[0].w, v[1].w, v[2].w, v[3].w);
}

template <int format>
static __device__ __forceinline__ void decode_half(uint4 (&out)[4], const coded_row &c, int half, const byte_planes &p) {
    decode_words<format>(out, c.q[half], c.scale >> 8 * half & 255u, p);
}

/* Once all pieces are there: they are decoded side by side, before the first is stored. */
static __device__ __forceinline__ void store_half(uint32_t subtile, int row, int half, uint4 (&values)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) dev_pin(values[i]);
#pragma unroll
    for (int i = 0; i < 4; i++) dev_store_shared(subtile + row * 128 + (((4 * half + i) ^ (row & 7)) << 4), values[i]);
}

/* The 64 values of a row, into its sub-tile. */
template <int format>
static __device__ __forceinline__ void decode_row(uint32_t subtile, int row, const coded_row &c, const byte_planes &p) {
    uint4 low[4], high[4];
    decode_half<format>(low, c, 0, p);
    decode_half<format>(high, c, 1, p);
#pragma unroll
    for (int i = 0; i < 4; i++) dev_pin(low[i]), dev_pin(high[i]);
    store_half(subtile, row, 0, low);
    store_half(subtile, row, 1, high);
}

/* ---- decoding into the fragments of A: a lane has two rows, one column word in four of each ---- */
/* Where the lane's codes and scales are in records in shared memory. */
struct code_places {
    uint32_t code[2], scale[2];
};

/* The lane's codes of a k-block, with what decodes them: the products of an absmax with all values, of which each lane of a row makes the
 * four from 4 (lane % 4) on; of MXFP4 the scales. */
struct lane_codes {
    uint32_t q[2][2], scale[2]; /* of rows v; halves of the columns h */
    byte_planes planes[2];
};

template <int format>
static __device__ __forceinline__ void load_codes(lane_codes &c, uint32_t records, const code_places &at, const float (&values)[4]) {
#pragma unroll
    for (int v = 0; v < 2; v++) {
        c.q[v][0] = dev_load_shared4(records + at.code[v]), c.q[v][1] = dev_load_shared4(records + at.code[v] + 1024);
        c.scale[v] = format == ESP_MXFP4 ? dev_load_shared2(records + at.scale[v]) : dev_load_shared4(records + at.scale[v]);
    }
#pragma unroll
    for (int v = 0; v < 2 && format != ESP_MXFP4; v++) {
        const float absmax = __uint_as_float(c.scale[v]);
        const uint32_t a = dev_bf16x2(values[0] * absmax, values[1] * absmax), b = dev_bf16x2(values[2] * absmax, values[3] * absmax);
        const uint32_t low = dev_prmt(a, b, 0x6420u), high = dev_prmt(a, b, 0x7531u);
#pragma unroll
        for (int i = 0; i < 4; i++) c.planes[v].low[i] = __shfl_sync(~0u, low, i, 4), c.planes[v].high[i] = __shfl_sync(~0u, high, i, 4);
    }
}

/* Fragments of A of two k16 steps: word 4 j + 2 i + v has columns 32 h + 16 j + 8 i + 2 (lane % 4) .. of row v.  MXFP4: as if no scale were
 * above 2, until raise_fragments has been there. */
template <int format, typename S>
static __device__ __forceinline__ void decode_words(uint32_t (&out)[8], const lane_codes &c, int h, const S &shifts) {
#pragma unroll
    for (int v = 0; v < 2; v++) {
        const uint32_t factor = (min(c.scale[v] >> 8 * h & 255u, 128u) + 126u) * 0x00800080u;
        const uint4 w = format == ESP_MXFP4 ? decode_mx(c.q[v][h], factor, 0) : decode_table(c.q[v][h], c.planes[v], shifts);
        out[v] = w.x, out[2 + v] = w.y, out[4 + v] = w.z, out[6 + v] = w.w;
    }
}

/* Scales above 2 are two factors: one alone would not be a bf16. */
static __device__ __forceinline__ void raise_fragments(uint32_t (&out)[8], const lane_codes &c, int h) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const uint32_t e = c.scale[i % 2] >> 8 * h & 255u;
        out[i] = dev_mul_bf16x2(out[i], e > 128 ? (e - 1) * 0x00800080u : 0x3f803f80u);
    }
}

template <int format> static __device__ __forceinline__ void decode_fragments(uint32_t (&out)[8], const lane_codes &c, int h) {
    decode_words<format>(out, c, h, plain_shifts{});
    if (format == ESP_MXFP4 && __any_sync(~0u, max(c.scale[0] >> 8 * h & 255u, c.scale[1] >> 8 * h & 255u) > 128))
        raise_fragments(out, c, h);
}

/* A sub-tile of plain bf16 weights, queued; by `threads` threads. */
static __device__ __forceinline__ void copy_plain(uint32_t subtile, const uint8_t *from, int64_t row_bytes, int thread, int threads) {
    const int piece = thread & 7;
#pragma unroll 4
    for (int row = thread / 8; row < 64; row += threads / 8)
        dev_copy16(subtile + row * 128 + ((piece ^ (row & 7)) << 4), from + row * row_bytes + 16 * piece);
}

static __device__ __forceinline__ uint4 scaled8(const float *from, float factor) {
    const float4 a = __ldg((const float4 *)from), b = __ldg((const float4 *)from + 1);
    return make_uint4(dev_bf16x2(factor * a.x, factor * a.y), dev_bf16x2(factor * a.z, factor * a.w),
                      dev_bf16x2(factor * b.x, factor * b.y), dev_bf16x2(factor * b.z, factor * b.w));
}

/* The low-rank block of a sub-tile: rows of B, or rows of A across; zero past the rank. */
template <bool across>
static __device__ __forceinline__ void low_block(uint32_t subtile, const tile_args &a, int expert, int block, int thread, int threads) {
    const int64_t outs = (int64_t)a.blocks * BLOCK, r = a.p.r;
    const int pieces = across ? 8 : 2 * a.low_steps, lines = across ? 16 * a.low_steps : 64;
    for (int i = thread; i < pieces * lines; i += threads) {
        const int line = i / pieces, piece = i % pieces;
        const bool there = across ? line < r : 8 * piece < r;
        uint4 v = make_uint4(0, 0, 0, 0);
        if (there) {
            const float *from = across ? a.p.up + (expert * r + line) * outs + block * BLOCK + 8 * piece
                                       : a.p.up + (expert * outs + block * BLOCK + line) * r + 8 * piece;
            v = scaled8(from, a.p.factor);
        }
        dev_store_shared(subtile + line * 128 + ((piece ^ (line & 7)) << 4), v);
    }
}

/* ---- what becomes of the sums ---- */
static __device__ __forceinline__ uint32_t staged(uint32_t staging, int row, int piece) {
    return staging + row * 128 + ((piece ^ (row & 7)) << 4);
}

/* Eight gates and ups from place `at` of a row on, as they stand in memory. */
static __device__ __forceinline__ void store_pairs(bf16 *row, int64_t at, int64_t width, const gate_up_words &v, bool interleaved) {
    if (!interleaved) {
        *(uint4 *)(row + at) = make_uint4(v.gate[0], v.gate[1], v.gate[2], v.gate[3]);
        *(uint4 *)(row + at + width) = make_uint4(v.up[0], v.up[1], v.up[2], v.up[3]);
        return;
    }
#pragma unroll
    for (int j = 0; j < 4; j += 2)
        *(uint4 *)(row + 2 * at + 4 * j) =
            make_uint4(dev_prmt(v.gate[j], v.up[j], 0x5410u), dev_prmt(v.gate[j], v.up[j], 0x7632u),
                       dev_prmt(v.gate[j + 1], v.up[j + 1], 0x5410u), dev_prmt(v.gate[j + 1], v.up[j + 1], 0x7632u));
}

/* Eight gates and ups of routed row s: gu and act. */
static __device__ __forceinline__ void store_gate_up(const tile_args &a, int64_t s, int64_t at, const gate_up_words &v) {
    const int64_t width = a.p.width;
    store_pairs(a.p.out + s * 2 * width, at, width, v, a.p.glu.interleaved);
    *(uint4 *)(a.p.act + s * width + at) = activate8(v, a.p.glu);
}

/* Rows 64 chunk .. of a tile of plain order, from both warpgroups' staging. */
static __device__ __forceinline__ void finish_gate_up(const tile_args &a, const work &w, uint32_t staging, int chunk) {
    const bool interleaved = a.p.glu.interleaved;
#pragma unroll 1
    for (int i = threadIdx.x; i < 512; i += 256) {
        const int row = i / 8, c = i % 8;
        if (64 * chunk + row >= w.rows) continue;
        const uint32_t first = interleaved ? staged(staging + c / 4 * SUBTILE, row, 2 * (c % 4)) : staged(staging, row, c);
        const uint32_t second = interleaved ? staged(staging + c / 4 * SUBTILE, row, 2 * (c % 4) + 1) : staged(staging + SUBTILE, row, c);
        const gate_up_words v = split_gate_up(dev_load_shared(first), dev_load_shared(second), interleaved);
        store_gate_up(a, w.row0 + 64 * chunk + row, w.m * BLOCK + 8 * c, v);
    }
}

/* The functions below are of a warpgroup's 64 outputs, for its thread `thread`. */
/* Which of the four rows of a chunk that a thread has in finish_down_back, and what it reads for one: eight gates and ups. */
static __device__ __forceinline__ int back_row(int thread, int chunk, int i) {
    return 64 * chunk + 16 * i + thread / 8;
}

struct gu_row {
    uint4 first, second;
};

static __device__ __forceinline__ void load_gu(gu_row &v, const tile_args &a, const work &w, int block, int thread, int chunk, int i) {
    const int at = block * BLOCK + 8 * (thread % 8), width = (int)a.p.width;
    const int first = a.p.glu.interleaved ? 2 * at : at, second = a.p.glu.interleaved ? first + 8 : first + width;
    const bf16 *row = a.p.gu + (int64_t)(w.row0 + min(back_row(thread, chunk, i), w.rows - 1)) * 2 * width;
    v.first = __ldg((const uint4 *)(row + first)), v.second = __ldg((const uint4 *)(row + second));
}

/* Eight gates and ups become their gradients, from that of their activation, d; returns the eight's share of the row weight's gradient. */
template <bool clamped>
static __device__ __forceinline__ float slopes8(gate_up_words &p, const uint32_t (&d)[4], float weight, const glu_rule &rule) {
    float dot = 0;
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const glu_value v0 = glu_slopes<clamped>(dev_lo(p.gate[j]), dev_lo(p.up[j]), rule),
                        v1 = glu_slopes<clamped>(dev_hi(p.gate[j]), dev_hi(p.up[j]), rule);
        const float d0 = dev_lo(d[j]), d1 = dev_hi(d[j]);
        dot += v0.act * d0 + v1.act * d1;
        p.gate[j] = dev_bf16x2(v0.d_gate * (weight * d0), v1.d_gate * (weight * d1));
        p.up[j] = dev_bf16x2(v0.d_up * (weight * d0), v1.d_up * (weight * d1));
    }
    return dot;
}

/* a_s = W^T d_out of one row becomes d_gu, and this block's share of the row weight's gradient. */
static __device__ __forceinline__ void finish_down_back(const tile_args &a, const work &w, uint32_t staging, uint32_t row_weights,
                                                        int block, int thread, int chunk, int i, const gu_row &v) {
    const int c = thread % 8, width = (int)a.p.width, row = back_row(thread, chunk, i);
    const float weight = __uint_as_float(dev_load_shared4(row_weights + 4 * min(row, w.rows - 1)));
    const uint4 from = dev_load_shared(staged(staging, row % 64, c));
    const uint32_t d[4] = {from.x, from.y, from.z, from.w};
    gate_up_words p = split_gate_up(v.first, v.second, a.p.glu.interleaved);
    float dot = is_clamped(a.p.glu) ? slopes8<true>(p, d, weight, a.p.glu) : slopes8<false>(p, d, weight, a.p.glu);
#pragma unroll
    for (int step = 1; step < 8; step *= 2) dot += __shfl_xor_sync(~0u, dot, step);
    if (row >= w.rows) return;
    const int64_t s = w.row0 + row;
    store_pairs(a.p.out + s * 2 * width, block * BLOCK + 8 * c, width, p, a.p.glu.interleaved);
    if (c == 0) a.partial[s * a.blocks + block] = dot;
}

static __device__ __forceinline__ void finish_rows(const tile_args &a, const work &w, uint32_t staging, int block, int thread, int chunk) {
    const int64_t outs = (int64_t)a.blocks * BLOCK;
    for (int i = thread; i < 512; i += 128) {
        const int row = i / 8, c = i % 8;
        if (64 * chunk + row >= w.rows) continue;
        *(uint4 *)(a.p.out + (w.row0 + 64 * chunk + row) * outs + block * BLOCK + 8 * c) = dev_load_shared(staged(staging, row, c));
    }
}

/* The kind as a constant: launch(std::integral_constant<product_kind, ..>{}). */
template <typename F> static inline cudaError_t with_kind(product_kind kind, const F &launch) {
    switch (kind) {
    case PRODUCT_GATE_UP:
        return launch(std::integral_constant<product_kind, PRODUCT_GATE_UP>{});
    case PRODUCT_DOWN:
        return launch(std::integral_constant<product_kind, PRODUCT_DOWN>{});
    case PRODUCT_DOWN_BACK:
        return launch(std::integral_constant<product_kind, PRODUCT_DOWN_BACK>{});
    case PRODUCT_GATE_UP_BACK:
        return launch(std::integral_constant<product_kind, PRODUCT_GATE_UP_BACK>{});
    }
    return cudaErrorInvalidValue;
}

/* The launch of a kernel; a.beside: it need not wait until the blocks of the one before are done, only until they let it begin.  It has to wait
 * for them itself before it ends, or those behind it would not. */
template <typename K, typename... More>
static inline cudaError_t launch_beside(K kernel, const tile_args &a, int blocks, int threads, int bytes, cudaStream_t stream,
                                        const More &...more) {
    cudaLaunchAttribute beside = {};
    beside.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    beside.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t launch = {};
    launch.gridDim = dim3((unsigned)blocks), launch.blockDim = dim3((unsigned)threads), launch.dynamicSmemBytes = (size_t)bytes;
    launch.stream = stream, launch.attrs = &beside, launch.numAttrs = a.beside ? 1 : 0;
    return cudaLaunchKernelEx(&launch, kernel, a, more...);
}

/* The launches over a plan that is there, and the rows that their tiles have at most. */
cudaError_t launch_wgmma(const tile_args &a, int multiprocessors, cudaStream_t stream);
cudaError_t launch_mma(const tile_args &a, bool back, int multiprocessors, cudaStream_t stream);
cudaError_t launch_few(const tile_args &a, int multiprocessors, cudaStream_t stream);
bool wgmma_available();

#define WIDE_ROWS 256
#define MIDDLE_ROWS 128
#define NARROW_ROWS 64
#define FEW_ROWS 32     /* of an expert that is experts_few.cu's although others have more, and of a tile there */
#define FEW_EXPERTS 512 /* that experts_few.cu has room for */

#endif
