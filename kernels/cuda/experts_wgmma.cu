/* Products with the packed expert stacks on sm_90a: 4-bit weights are decoded on their way into shared memory, where wgmma multiplies them with
 * the routed rows.
 *
 * D^T tile: 128 outputs (two warpgroups, 64 each) x up to `rows_max` routed rows of one expert, the rows on the N side so that a tile wastes
 * less than 16.  One warp brings the rows (by row index: the gather is part of the load), the others of the third and fourth warpgroup
 * decode whole k-blocks of 64 in turn; both run ahead by `stages` blocks.  The low-rank branch is one more, shorter k-block.  A backward
 * reads the same records across.  Two regimes, chosen by a kernel from the counts: `wide` for many rows per expert, `narrow` for few. */
#include "kernels/cuda/experts.cuh"

#define BLOCK 64            /* a record's side, and the width of a k-block */
#define SUBTILE 8192        /* bytes of 64 x 64 bf16 */
#define NARROW_MEAN_ROWS 96 /* mean rows per expert up to which the narrow regime runs */

template <bool wide> struct regime {
    static constexpr int rows_max = wide ? 256 : 64, stages = wide ? 4 : 8, decoders = wide ? 3 : 7, threads = (9 + decoders) * 32;
    static constexpr int lag = wide ? 2 : 5; /* k-blocks of rows on their way; at most stages - 2 */
    static constexpr int stage_bytes = 2 * SUBTILE + rows_max * 128, steps16 = rows_max / 16;
    static constexpr int staging = stages * stage_bytes, index = staging + 2 * SUBTILE, barriers = index + rows_max * 4;
    static constexpr int table = barriers + 16 * stages, shared_bytes = table + 64;
};

struct wgmma_args {
    product_args p;
    const int4 *plan; /* [0]: tiles of rows (wide, narrow); then per tile its expert, the expert's first tile, its tiles, rows of a tile */
    float *partial;   /* down_back: [S,blocks] */
    const uint8_t *weights;
    int64_t expert_bytes, row_bytes; /* row_bytes: of plain weights */
    int block_step, k_step;          /* records */
    int k_blocks, blocks, tiles_m;
    int low_steps; /* k16 steps of the low-rank block, 0: none */
    product_kind kind;
    bool halves; /* gate_up whose ups stand behind all gates: a tile takes 64 of each */
};

struct work {
    int expert, m, row0, rows;
};

static __device__ __forceinline__ work work_of(const wgmma_args &a, int index) {
    const int4 t = __ldg(a.plan + 1 + index / a.tiles_m);
    const int local = index - t.y * a.tiles_m, m = local / t.z, begin = __ldg(a.p.routing.offsets + t.x);
    const int skipped = (local - m * t.z) * t.w, rows = __ldg(a.p.routing.offsets + t.x + 1) - begin - skipped;
    return rows > 0 ? work{t.x, m, begin + skipped, min(rows, t.w)} : work{t.x, m, begin, 0};
}

/* Which 64 outputs warpgroup g of tile m makes. */
static __device__ __forceinline__ int block_of(const wgmma_args &a, int m, int g) {
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

/* Eight values by a table of 16 bf16, its low and high bytes apart. */
static __device__ __forceinline__ uint4 decode_table(uint32_t q, const uint32_t (&low)[4], const uint32_t (&high)[4]) {
    uint32_t s = q & 0x77777777u, upper = (q >> 1 & 0x44444444u) | 0x32103210u, words[4];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const uint32_t lo = dev_prmt(dev_prmt(low[0], low[1], s), dev_prmt(low[2], low[3], s), upper);
        const uint32_t hi = dev_prmt(dev_prmt(high[0], high[1], s), dev_prmt(high[2], high[3], s), upper);
        words[2 * i] = dev_prmt(lo, hi, 0x5140u), words[2 * i + 1] = dev_prmt(lo, hi, 0x7362u);
        s >>= 16, upper >>= 16;
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
}

/* Decodes a row and stores it into its sub-tile, swizzled. */
template <int format> static __device__ __forceinline__ void decode_row(uint32_t subtile, int row, const coded_row &c, uint32_t table) {
    const uint32_t q[8] = {c.q[0].x, c.q[0].y, c.q[0].z, c.q[0].w, c.q[1].x, c.q[1].y, c.q[1].z, c.q[1].w};
    uint4 out[8];
    if (format == ESP_MXFP4) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const uint32_t e = c.scale >> 8 * half & 255u, more = e > 128 ? (e - 1) * 0x00800080u : 0;
            const uint32_t factor = (min(e, 128u) + 126u) * 0x00800080u;
#pragma unroll
            for (int i = 0; i < 4; i++) out[4 * half + i] = decode_mx(q[4 * half + i], factor, more);
        }
    } else {
        const float absmax = __uint_as_float(c.scale);
        uint32_t low[4], high[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint4 v = dev_load_shared(table + 16 * i); /* from shared memory each time: 16 registers less */
            const uint32_t a = dev_bf16x2(__uint_as_float(v.x) * absmax, __uint_as_float(v.y) * absmax);
            const uint32_t b = dev_bf16x2(__uint_as_float(v.z) * absmax, __uint_as_float(v.w) * absmax);
            low[i] = dev_prmt(a, b, 0x6420u), high[i] = dev_prmt(a, b, 0x7531u);
        }
#pragma unroll
        for (int i = 0; i < 8; i++) out[i] = decode_table(q[i], low, high);
    }
#pragma unroll
    for (int i = 0; i < 8; i++) dev_pin(out[i]);
#pragma unroll
    for (int i = 0; i < 8; i++) dev_store_shared(subtile + row * 128 + ((i ^ (row & 7)) << 4), out[i]);
}

/* A sub-tile of plain bf16 weights. */
static __device__ __forceinline__ void copy_plain(uint32_t subtile, const uint8_t *from, int64_t row_bytes, int lane) {
    const int piece = lane & 7;
#pragma unroll 1
    for (int first = lane / 8; first < 64; first += 16) {
        uint4 v[4];
#pragma unroll
        for (int i = 0; i < 4; i++) v[i] = dev_load_stream(from + (first + 4 * i) * row_bytes + 16 * piece);
#pragma unroll
        for (int i = 0; i < 4; i++) dev_store_shared(subtile + (first + 4 * i) * 128 + ((piece ^ (first + 4 * i & 7)) << 4), v[i]);
    }
}

static __device__ __forceinline__ uint4 scaled8(const float *from, float factor) {
    const float4 a = __ldg((const float4 *)from), b = __ldg((const float4 *)from + 1);
    return make_uint4(dev_bf16x2(factor * a.x, factor * a.y), dev_bf16x2(factor * a.z, factor * a.w),
                      dev_bf16x2(factor * b.x, factor * b.y), dev_bf16x2(factor * b.z, factor * b.w));
}

/* The low-rank block of a sub-tile: rows of B, or rows of A across; zero past the rank. */
template <bool across>
static __device__ __forceinline__ void low_block(uint32_t subtile, const wgmma_args &a, int expert, int block, int lane) {
    const int64_t outs = (int64_t)a.blocks * BLOCK, r = a.p.r;
    const int pieces = across ? 8 : 2 * a.low_steps, lines = across ? 16 * a.low_steps : 64;
    for (int i = lane; i < pieces * lines; i += 32) {
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

/* Where a decoder is: k-block `k` of tile `index`. */
struct decode_place {
    int index, k, expert, block[2];
    const uint8_t *from[2];
};

template <int format, bool across> static __device__ __forceinline__ void place_at(decode_place &d, const wgmma_args &a, bool new_tile) {
    if (new_tile) {
        const int4 t = __ldg(a.plan + 1 + d.index / a.tiles_m);
        d.expert = t.x;
        const int m = (d.index - t.y * a.tiles_m) / t.z;
        for (int g = 0; g < 2; g++) d.block[g] = min(block_of(a, m, g), a.blocks - 1);
    }
    for (int g = 0; g < 2; g++) {
        if (format == ESP_Q_NONE) {
            const int rows = across ? d.k : d.block[g], columns = across ? d.block[g] : d.k;
            d.from[g] = a.weights + d.expert * a.expert_bytes + rows * BLOCK * a.row_bytes + columns * BLOCK * 2;
        } else {
            d.from[g] = a.weights + d.expert * a.expert_bytes +
                        ((int64_t)d.block[g] * a.block_step + (int64_t)d.k * a.k_step) * RECORD_BYTES(format);
        }
    }
}

template <int format, bool across, bool wide>
static __device__ __forceinline__ void decode(const wgmma_args &a, uint32_t base, int decoder, int lane, int tiles) {
    using R = regime<wide>;
    const uint32_t full = base + R::barriers, empty = full + 8 * R::stages;
    const int blocks_k = a.k_blocks + (a.low_steps > 0);
    decode_place next;
    next.index = (int)blockIdx.x, next.k = decoder;
    bool first = true;
    auto settle = [&]() { /* rolls over into the tiles of this block */
                          bool new_tile = first;
                          for (; next.k >= blocks_k; next.k -= blocks_k) next.index += (int)gridDim.x, new_tile = true;
                          first = false;
                          if (next.index < tiles) place_at<format, across>(next, a, new_tile);
    };
    settle();
    coded_row codes[4];
    auto load = [&](int i) {
        if (format != ESP_Q_NONE) load_row<format>(codes[i], next.from[i / 2], lane + 32 * (i % 2));
    };
    if (next.index < tiles && next.k < a.k_blocks)
#pragma unroll
        for (int i = 0; i < 4; i++) load(i);
    for (uint32_t it = (uint32_t)decoder; next.index < tiles; it += R::decoders) {
        const decode_place now = next;
        next.k += R::decoders;
        settle();
        const bool more = next.index < tiles && next.k < a.k_blocks;
        const uint32_t stage = it % R::stages, to = base + stage * R::stage_bytes;
        dev_barrier_wait(empty + 8 * stage, (it / R::stages & 1) ^ 1);
        if (now.k < a.k_blocks && format != ESP_Q_NONE) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                decode_row<format>(to + i / 2 * SUBTILE, lane + 32 * (i % 2), codes[i], base + R::table);
                if (more) load(i);
            }
        } else if (now.k < a.k_blocks) {
            for (int g = 0; g < 2; g++) copy_plain(to + g * SUBTILE, now.from[g], a.row_bytes, lane);
        } else {
            for (int g = 0; g < 2; g++) low_block<across>(to + g * SUBTILE, a, now.expert, now.block[g], lane);
            if (more)
#pragma unroll
                for (int i = 0; i < 4; i++) load(i);
        }
        dev_fence_async();
        __syncwarp();
        if (lane == 0) dev_barrier_arrive(full + 8 * stage);
    }
}

/* ---- the rows: 16-byte pieces by row index, `lag` k-blocks in flight ---- */
template <bool wide> static __device__ __forceinline__ void bring_rows(const wgmma_args &a, uint32_t base, int lane, int tiles) {
    using R = regime<wide>;
    const uint32_t full = base + R::barriers, empty = full + 8 * R::stages, index_at = base + R::index;
    const int blocks_k = a.k_blocks + (a.low_steps > 0), quarter = lane / 8, piece = lane % 8;
    const uint32_t row_bytes = (uint32_t)a.k_blocks * BLOCK * 2;
    uint32_t it = 0, place[4];
#pragma unroll
    for (int i = 0; i < 4; i++) place[i] = (4 * quarter + i) * 128 + ((piece ^ (4 * (quarter & 1) + i)) << 4);
    auto arrived = [&](uint32_t block) {
        dev_fence_async();
        __syncwarp();
        if (lane == 0) dev_barrier_arrive(full + 8 * (block % R::stages));
    };
    for (int index = (int)blockIdx.x; index < tiles; index += (int)gridDim.x) {
        const work w = work_of(a, index);
        const int last = max(w.rows - 1, 0), steps = max((w.rows + 15) / 16, 1);
        __syncwarp();
        for (int i = lane; i < 16 * steps; i += 32) {
            const int s = w.row0 + min(i, last);
            const uint32_t row = a.p.in_row ? (uint32_t)__ldg(a.p.in_row + s) : (uint32_t)s;
            dev_store_shared(index_at + 4 * i, row);
        }
        __syncwarp();
        for (int k = 0; k < blocks_k; k++, it++) {
            const uint32_t stage = it % R::stages, to = base + stage * R::stage_bytes + 2 * SUBTILE;
            dev_barrier_wait(empty + 8 * stage, (it / R::stages & 1) ^ 1);
            if (k < a.k_blocks) {
                const char *from = (const char *)(a.p.in + k * BLOCK + 8 * piece);
#pragma unroll 4
                for (int i = 0; i < steps; i++) {
                    const uint4 rows = dev_load_shared(index_at + 64 * i + 16 * quarter);
                    dev_copy16(to + i * 2048 + place[0], from + (uint64_t)rows.x * row_bytes);
                    dev_copy16(to + i * 2048 + place[1], from + (uint64_t)rows.y * row_bytes);
                    dev_copy16(to + i * 2048 + place[2], from + (uint64_t)rows.z * row_bytes);
                    dev_copy16(to + i * 2048 + place[3], from + (uint64_t)rows.w * row_bytes);
                }
            } else {
                const int pieces = 2 * a.low_steps;
                for (int i = lane; i < 16 * steps * pieces; i += 32) {
                    const int row = i / pieces, c = i % pieces;
                    const bool there = 8 * c < a.p.r;
                    const bf16 *from = a.p.low + (int64_t)(w.row0 + min(row, last)) * a.p.r + (there ? 8 * c : 0);
                    dev_copy16_or_zero(to + row * 128 + ((c ^ (row & 7)) << 4), from, there ? 16 : 0);
                }
            }
            dev_copy_commit();
            if (a.kind == PRODUCT_DOWN_BACK && k == 0) /* what the epilogue will read */
                for (int i = lane; i < 4 * w.rows; i += 32) {
                    const bf16 *row = a.p.gu + (int64_t)(w.row0 + i / 4) * 2 * a.p.width;
                    const int64_t column = w.m * 128 + i % 2 * 64, at = a.p.glu.interleaved ? 2 * column : column;
                    if (column < a.p.width) dev_prefetch_l2(row + at + i % 4 / 2 * (a.p.glu.interleaved ? 64 : a.p.width));
                }
            if (it >= R::lag) {
                dev_copy_wait<R::lag>();
                arrived(it - R::lag);
            }
        }
    }
    dev_copy_wait<0>();
    for (uint32_t block = it > R::lag ? it - R::lag : 0; block < it; block++) arrived(block);
}

/* ---- the products ---- */
template <int n, bool across, bool wide>
static __device__ __forceinline__ void multiply(float (&d)[128], const wgmma_args &a, uint32_t base, uint32_t &it, int g, int lane) {
    using R = regime<wide>;
    constexpr uint64_t a_step = across ? 128 : 2;
    const uint32_t full = base + R::barriers, empty = full + 8 * R::stages;
    for (int k = 0; k < a.k_blocks; k++, it++) {
        const uint32_t stage = it % R::stages, at = base + stage * R::stage_bytes;
        dev_barrier_wait(full + 8 * stage, it / R::stages & 1);
        const uint64_t weights = dev_tile(at + g * SUBTILE, 1024), rows = dev_tile(at + 2 * SUBTILE, 1024);
        dev_wgmma_begin();
#pragma unroll
        for (int j = 0; j < 4; j++) dev_wgmma<n, across>::run(d, weights + j * a_step, rows + 2 * j, k | j);
        dev_wgmma_commit();
        dev_wgmma_wait<1>();
        if (k > 0 && lane == 0) dev_barrier_arrive(empty + 8 * ((it - 1) % R::stages)); /* the block before is read */
    }
    dev_wgmma_wait<0>();
    if (lane == 0) dev_barrier_arrive(empty + 8 * ((it - 1) % R::stages));
    if (a.low_steps > 0) {
        const uint32_t stage = it % R::stages, at = base + stage * R::stage_bytes;
        dev_barrier_wait(full + 8 * stage, it / R::stages & 1);
        const uint64_t weights = dev_tile(at + g * SUBTILE, 1024), rows = dev_tile(at + 2 * SUBTILE, 1024);
        for (int j = 0; j < a.low_steps; j++) {
            dev_wgmma_begin();
            dev_wgmma<n, across>::run(d, weights + j * a_step, rows + 2 * j, 1);
            dev_wgmma_commit();
            dev_wgmma_wait<0>();
        }
        if (lane == 0) dev_barrier_arrive(empty + 8 * stage);
        it++;
    }
    dev_wgmma_settle<8 * n>(d);
}

static __device__ __forceinline__ uint32_t staged(uint32_t staging, int row, int piece) {
    return staging + row * 128 + ((piece ^ (row & 7)) << 4);
}

static __device__ __forceinline__ float half_of(uint32_t word, int high) {
    return high ? dev_hi(word) : dev_lo(word);
}

/* Gate and up of value i of eight, from two loads of 16 bytes. */
static __device__ __forceinline__ void gate_up_of(float &gate, float &up, const uint32_t (&a)[4], const uint32_t (&b)[4], int i,
                                                  int interleaved) {
    if (interleaved) {
        const uint32_t pair = i < 4 ? a[i] : b[i - 4];
        gate = dev_lo(pair), up = dev_hi(pair);
    } else {
        gate = half_of(a[i / 2], i % 2), up = half_of(b[i / 2], i % 2);
    }
}

/* Rows 64 chunk .. of a tile, from both warpgroups' staging: gu and act. */
static __device__ __forceinline__ void finish_gate_up(const wgmma_args &a, const work &w, uint32_t staging, int chunk) {
    const int64_t width = a.p.width;
    const bool interleaved = a.p.glu.interleaved;
    for (int i = threadIdx.x; i < 512; i += 256) {
        const int row = i / 8, c = i % 8;
        if (64 * chunk + row >= w.rows) continue;
        const uint32_t first = interleaved ? staged(staging + c / 4 * SUBTILE, row, 2 * (c % 4)) : staged(staging, row, c);
        const uint32_t second = interleaved ? staged(staging + c / 4 * SUBTILE, row, 2 * (c % 4) + 1) : staged(staging + SUBTILE, row, c);
        const uint4 va = dev_load_shared(first), vb = dev_load_shared(second);
        const uint32_t x[4] = {va.x, va.y, va.z, va.w}, y[4] = {vb.x, vb.y, vb.z, vb.w};
        uint32_t act[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float g0, u0, g1, u1;
            gate_up_of(g0, u0, x, y, 2 * j, interleaved);
            gate_up_of(g1, u1, x, y, 2 * j + 1, interleaved);
            act[j] = dev_bf16x2(glu(g0, u0, a.p.glu), glu(g1, u1, a.p.glu));
        }
        const int64_t s = w.row0 + 64 * chunk + row;
        const int64_t at = w.m * BLOCK + 8 * c;
        bf16 *gu = a.p.out + s * 2 * width;
        *(uint4 *)(gu + (interleaved ? 2 * at : at)) = va;
        *(uint4 *)(gu + (interleaved ? 2 * at + 8 : at + width)) = vb;
        *(uint4 *)(a.p.act + s * width + at) = make_uint4(act[0], act[1], act[2], act[3]);
    }
}

/* The same of one warpgroup's 64 outputs: a_s = W^T d_out becomes d_gu, and this block's share of the row weight's gradient. */
static __device__ __forceinline__ void finish_down_back(const wgmma_args &a, const work &w, uint32_t staging, int block, int chunk) {
    const int64_t width = a.p.width;
    const bool interleaved = a.p.glu.interleaved;
    for (int i = threadIdx.x % 128; i < 512; i += 128) {
        const int row = i / 8, c = i % 8;
        const bool there = 64 * chunk + row < w.rows;
        const int64_t s = w.row0 + (there ? 64 * chunk + row : 0), at = block * BLOCK + 8 * c;
        const int64_t first = s * 2 * width + (interleaved ? 2 * at : at), second = interleaved ? first + 8 : first + width;
        const uint4 va = __ldg((const uint4 *)(a.p.gu + first)), vb = __ldg((const uint4 *)(a.p.gu + second));
        const uint4 vd = dev_load_shared(staged(staging, row, c));
        const float weight = __ldg((const float *)a.p.routing.row_weight + s);
        const uint32_t x[4] = {va.x, va.y, va.z, va.w}, y[4] = {vb.x, vb.y, vb.z, vb.w}, d[4] = {vd.x, vd.y, vd.z, vd.w};
        float dot = 0;
        uint32_t first_out[4], second_out[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float g0, u0, g1, u1;
            gate_up_of(g0, u0, x, y, 2 * j, interleaved);
            gate_up_of(g1, u1, x, y, 2 * j + 1, interleaved);
            const glu_value v0 = glu_slopes(g0, u0, a.p.glu), v1 = glu_slopes(g1, u1, a.p.glu);
            const float d0 = dev_lo(d[j]), d1 = dev_hi(d[j]), w0 = weight * d0, w1 = weight * d1;
            dot += v0.act * d0 + v1.act * d1;
            if (interleaved) {
                const uint32_t p0 = dev_bf16x2(v0.d_gate * w0, v0.d_up * w0), p1 = dev_bf16x2(v1.d_gate * w1, v1.d_up * w1);
                if (j < 2)
                    first_out[2 * j] = p0, first_out[2 * j + 1] = p1;
                else
                    second_out[2 * j - 4] = p0, second_out[2 * j - 3] = p1;
            } else {
                first_out[j] = dev_bf16x2(v0.d_gate * w0, v1.d_gate * w1);
                second_out[j] = dev_bf16x2(v0.d_up * w0, v1.d_up * w1);
            }
        }
        for (int step = 1; step < 8; step *= 2) dot += __shfl_xor_sync(~0u, dot, step);
        if (!there) continue;
        *(uint4 *)(a.p.out + first) = make_uint4(first_out[0], first_out[1], first_out[2], first_out[3]);
        *(uint4 *)(a.p.out + second) = make_uint4(second_out[0], second_out[1], second_out[2], second_out[3]);
        if (c == 0) a.partial[s * a.blocks + block] = dot;
    }
}

static __device__ __forceinline__ void finish_rows(const wgmma_args &a, const work &w, uint32_t staging, int block, int chunk) {
    const int64_t outs = (int64_t)a.blocks * BLOCK;
    for (int i = threadIdx.x % 128; i < 512; i += 128) {
        const int row = i / 8, c = i % 8;
        if (64 * chunk + row >= w.rows) continue;
        *(uint4 *)(a.p.out + (w.row0 + 64 * chunk + row) * outs + block * BLOCK + 8 * c) = dev_load_shared(staged(staging, row, c));
    }
}

/* Turns D^T into rows of 64 outputs by way of shared memory, 64 routed rows at a time. */
template <bool across, bool wide>
static __device__ __forceinline__ void finish(float (&d)[128], const wgmma_args &a, const work &w, uint32_t base, int g, int lane) {
    using R = regime<wide>;
    const bool both = !across && a.kind == PRODUCT_GATE_UP;
    const int warp = (int)(threadIdx.x / 32) % 4, meeting = both ? 1 : 1 + g, members = both ? 256 : 128;
    const int block = block_of(a, w.m, g);
    const uint32_t staging = base + R::staging, own = staging + g * SUBTILE;
    float bias0 = 0, bias1 = 0;
    if (!across && a.p.bias && block < a.blocks) {
        const float *bias = a.p.bias + ((int64_t)w.expert * a.blocks + block) * BLOCK + 16 * warp + lane / 4;
        bias0 = __ldg(bias), bias1 = __ldg(bias + 8);
    }
#pragma unroll
    for (int chunk = 0; chunk < R::rows_max / 64; chunk++) {
        if (64 * chunk < w.rows) {
            dev_meet(meeting, members); /* the staging is read */
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float *v = d + 32 * chunk + 8 * i;
                dev_stmatrix_trans(staged(own, 16 * i + lane / 16 * 8 + lane % 8, 2 * warp + lane / 8 % 2),
                                   dev_bf16x2(v[0] + bias0, v[1] + bias0), dev_bf16x2(v[2] + bias1, v[3] + bias1),
                                   dev_bf16x2(v[4] + bias0, v[5] + bias0), dev_bf16x2(v[6] + bias1, v[7] + bias1));
            }
            dev_meet(meeting, members);
            if (both)
                finish_gate_up(a, w, staging, chunk);
            else if (block < a.blocks && across && a.kind == PRODUCT_DOWN_BACK)
                finish_down_back(a, w, own, block, chunk);
            else if (block < a.blocks)
                finish_rows(a, w, own, block, chunk);
        }
    }
}

template <bool across, bool wide>
static __global__ __launch_bounds__(regime<wide>::threads, 1) void product_wgmma_kernel(const __grid_constant__ wgmma_args a) {
#if DEV_HOPPER
    using R = regime<wide>;
    extern __shared__ __align__(1024) uint8_t shared[];
    const int4 counts = __ldg(a.plan);
    const int tiles = (wide ? counts.x : counts.y) * a.tiles_m;
    if ((int)blockIdx.x >= tiles) return;
    const uint32_t base = dev_shared(shared);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (a.p.w.format != ESP_Q_NONE && threadIdx.x < 16)
        dev_store_shared(base + R::table + 4 * threadIdx.x, __float_as_uint(a.p.w.lut[threadIdx.x]));
    if (threadIdx.x == 0) {
        for (int i = 0; i < R::stages; i++) {
            dev_barrier_init(base + R::barriers + 8 * i, 2);               /* full: a decoder and the rows */
            dev_barrier_init(base + R::barriers + 8 * (R::stages + i), 8); /* empty: the warps that multiply */
        }
        dev_fence_async();
    }
    __syncthreads();
    if (warp >= 8) {
        if (wide) dev_registers_shrink<120>();
        if (warp == 8)
            bring_rows<wide>(a, base, lane, tiles);
        else if (a.p.w.format == ESP_MXFP4)
            decode<ESP_MXFP4, across, wide>(a, base, warp - 9, lane, tiles);
        else if (a.p.w.format == ESP_Q_NONE)
            decode<ESP_Q_NONE, across, wide>(a, base, warp - 9, lane, tiles);
        else
            decode<ESP_NF4, across, wide>(a, base, warp - 9, lane, tiles);
    } else {
        if (wide) dev_registers_grow<192>();
        const int g = warp / 4;
        uint32_t it = 0;
        work w = work_of(a, (int)blockIdx.x);
        for (int index = (int)blockIdx.x; index < tiles; index += (int)gridDim.x) {
            const work next = index + (int)gridDim.x < tiles ? work_of(a, index + (int)gridDim.x) : w;
            float d[128];
#define MULTIPLY(n)                                                                                                                        \
    case n:                                                                                                                                \
        if (n <= R::steps16) multiply<n <= R::steps16 ? n : 1, across, wide>(d, a, base, it, g, lane);                                     \
        break
            switch (max((w.rows + 15) / 16, 1)) {
                MULTIPLY(1);
                MULTIPLY(2);
                MULTIPLY(3);
                MULTIPLY(4);
                MULTIPLY(5);
                MULTIPLY(6);
                MULTIPLY(7);
                MULTIPLY(8);
                MULTIPLY(9);
                MULTIPLY(10);
                MULTIPLY(11);
                MULTIPLY(12);
                MULTIPLY(13);
                MULTIPLY(14);
                MULTIPLY(15);
                MULTIPLY(16);
            }
#undef MULTIPLY
            finish<across, wide>(d, a, w, base, g, lane);
            w = next;
        }
    }
#endif
}

/* ---- the plan: experts with the most rows first, their rows cut into even tiles ---- */
#define PLAN_THREADS 512

static __global__ __launch_bounds__(PLAN_THREADS) void plan_tiles(int4 *plan, const int32_t *offsets, int experts, int narrow_rows) {
    extern __shared__ int rows_of[];
    int active = 0;
    for (int first = 0; first < experts; first += PLAN_THREADS) {
        const int e = first + (int)threadIdx.x, rows = e < experts ? offsets[e + 1] - offsets[e] : 0;
        if (e < experts) rows_of[e] = rows;
        active += __syncthreads_count(rows > 0);
    }
    const bool narrow = offsets[experts] <= (int64_t)active * narrow_rows;
    const int height = narrow ? regime<false>::rows_max : regime<true>::rows_max;
    for (int e = threadIdx.x; e < experts; e += PLAN_THREADS) {
        const int rows = rows_of[e], tiles = (rows + height - 1) / height;
        int before = 0;
        for (int other = 0; other < experts; other++)
            if (rows_of[other] > rows || (rows_of[other] == rows && other < e)) before += (rows_of[other] + height - 1) / height;
        const int even = tiles ? ((rows + tiles - 1) / tiles + 15) / 16 * 16 : 0;
        for (int i = 0; i < tiles; i++) plan[1 + before + i] = make_int4(e, before, tiles, even);
    }
    if (threadIdx.x == 0) {
        int total = 0;
        for (int e = 0; e < experts; e++) total += (rows_of[e] + height - 1) / height;
        plan[0] = make_int4(narrow ? 0 : total, narrow ? total : 0, 0, 0);
    }
}

/* One thread per routed row: the shares of the blocks, in order. */
static __global__ void sum_shares(float *d_row_weight, const float *partial, const int32_t *offsets, int experts, int blocks) {
    const int64_t s = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (s >= offsets[experts]) return;
    float sum = 0;
    for (int i = 0; i < blocks; i++) sum += partial[s * blocks + i];
    d_row_weight[s] = sum;
}

/* Built for other targets the kernel is empty: it has no registers to speak of. */
bool product_wgmma_available() {
    cudaFuncAttributes attributes;
    const bool known = cudaFuncGetAttributes(&attributes, product_wgmma_kernel<false, true>) == cudaSuccess;
    if (!known) (void)cudaGetLastError();
    return known && attributes.binaryVersion == 90 && attributes.numRegs > 64;
}

const char *product_wgmma_refusal(const espi_stack *w, const espi_lora *lora, const espi_routing *routing, product_kind kind) {
    const int64_t width = kind == PRODUCT_GATE_UP ? w->rows / 2 : w->cols;
    if (w->rows % BLOCK || w->cols % BLOCK || width % BLOCK) return "rows, columns or width of the experts are not multiples of 64";
    if (w->format == ESP_Q_NONE) {
        if (w->dtype != ESP_BF16) return "plain experts are not bf16";
    } else if (!w->packed) {
        return "4-bit experts are not packed";
    }
    if (lora->r % 8 || lora->r > BLOCK) return "the rank is not a multiple of 8 up to 64";
    if (routing->experts > 8192) return "more than 8192 experts";
    if (routing->tokens * routing->top_k > INT32_MAX / 64) return "more routed rows than tile numbers";
    return NULL;
}

static size_t plan_bytes(const espi_routing *routing) {
    return (size_t)(1 + tile_bound(routing, regime<false>::rows_max)) * sizeof(int4);
}

size_t product_wgmma_scratch(const product_args *p, product_kind kind) {
    const size_t shares =
        kind == PRODUCT_DOWN_BACK ? (size_t)(p->routing.tokens * p->routing.top_k * (p->width / BLOCK)) * sizeof(float) : 0;
    return plan_bytes(&p->routing) + shares;
}

template <bool across, bool wide> static cudaError_t launch(const wgmma_args &a, int multiprocessors, cudaStream_t stream) {
    using R = regime<wide>;
    static_assert(R::shared_bytes <= 232448 && R::lag <= R::stages - 2 && R::decoders <= R::stages, "");
    const cudaError_t error =
        cudaFuncSetAttribute(product_wgmma_kernel<across, wide>, cudaFuncAttributeMaxDynamicSharedMemorySize, R::shared_bytes);
    if (error != cudaSuccess) return error;
    product_wgmma_kernel<across, wide><<<multiprocessors, R::threads, R::shared_bytes, stream>>>(a);
    return cudaGetLastError();
}

/* Both regimes: the one that the plan has no tiles for ends at once. */
template <bool across> static cudaError_t launch_regimes(const wgmma_args &a, int multiprocessors, cudaStream_t stream) {
    const cudaError_t error = launch<across, true>(a, multiprocessors, stream);
    return error != cudaSuccess ? error : launch<across, false>(a, multiprocessors, stream);
}

cudaError_t product_wgmma(const product_args *p, product_kind kind, void *scratch, int multiprocessors, cudaStream_t stream) {
    const bool back = kind == PRODUCT_DOWN_BACK || kind == PRODUCT_GATE_UP_BACK;
    const int row_blocks = (int)(p->w.rows / BLOCK), column_blocks = (int)(p->w.cols / BLOCK), experts = (int)p->routing.experts;
    wgmma_args a = {};
    a.p = *p;
    a.plan = (const int4 *)scratch;
    a.partial = (float *)((char *)scratch + plan_bytes(&p->routing));
    a.weights = (const uint8_t *)(p->w.format == ESP_Q_NONE ? p->w.data : p->w.packed);
    a.row_bytes = p->w.cols * 2;
    a.expert_bytes = p->w.format == ESP_Q_NONE ? p->w.rows * a.row_bytes : (int64_t)row_blocks * column_blocks * RECORD_BYTES(p->w.format);
    a.block_step = back ? 1 : column_blocks;
    a.k_step = back ? column_blocks : 1;
    a.k_blocks = back ? row_blocks : column_blocks;
    a.blocks = back ? column_blocks : row_blocks;
    a.tiles_m = (a.blocks + 1) / 2;
    a.low_steps = (p->r + 15) / 16;
    a.kind = kind;
    a.halves = kind == PRODUCT_GATE_UP && !p->glu.interleaved;
    plan_tiles<<<1, PLAN_THREADS, experts * sizeof(int), stream>>>((int4 *)scratch, p->routing.offsets, experts, NARROW_MEAN_ROWS);
    cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) return error;
    error = back ? launch_regimes<true>(a, multiprocessors, stream) : launch_regimes<false>(a, multiprocessors, stream);
    if (error != cudaSuccess || kind != PRODUCT_DOWN_BACK) return error;
    const unsigned rows = (unsigned)(p->routing.tokens * p->routing.top_k);
    sum_shares<<<(rows + 255) / 256, 256, 0, stream>>>(p->d_row_weight, a.partial, p->routing.offsets, experts, a.blocks);
    return cudaGetLastError();
}
