/* The only file with device instructions: what CUDA C++ has no word for (barriers in shared memory, asynchronous copies, tensor cores, byte
 * permutes), one wrapper each. */
#ifndef ESPI_KERNELS_CUDA_DEV_CUH
#define ESPI_KERNELS_CUDA_DEV_CUH

#include <cuda_bf16.h>
#include <stdint.h>

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define DEV_HOPPER 1
#else
#define DEV_HOPPER 0
#endif

/* KB of shared memory that the blocks on a multiprocessor have together. */
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 860
#define DEV_SHARED_KB 164
#elif defined(__CUDA_ARCH__) && (__CUDA_ARCH__ < 900 || __CUDA_ARCH__ >= 1200)
#define DEV_SHARED_KB 100
#else
#define DEV_SHARED_KB 228
#endif

/* ---- words of two bf16 ---- */
/* Bytes of b:a by the nibbles of the selector, whose top bits must be 0. */
static __device__ __forceinline__ uint32_t dev_prmt(uint32_t a, uint32_t b, uint32_t selector) {
    uint32_t bytes;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(a), "r"(b), "r"(selector));
    return bytes;
}

/* a & mask | others, in one instruction. */
static __device__ __forceinline__ uint32_t dev_and_or(uint32_t a, uint32_t mask, uint32_t others) {
    uint32_t bits;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(bits) : "r"(a), "r"(mask), "r"(others));
    return bits;
}

/* The upper word of a product: a shift to the right by the multipliers, if the compiler does not see by how much. */
static __device__ __forceinline__ uint32_t dev_upper(uint32_t a, uint32_t b) {
    uint32_t upper;
    asm("{\n.reg .u32 lower;\n.reg .u64 product;\nmul.wide.u32 product, %1, %2;\nmov.b64 {lower, %0}, product;\n}"
        : "=r"(upper)
        : "r"(a), "r"(b));
    return upper;
}

/* low half: lo, high half: hi, each rounded to nearest even. */
static __device__ __forceinline__ uint32_t dev_bf16x2(float lo, float hi) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(hi), "f"(lo));
    return pair;
}

static __device__ __forceinline__ float dev_lo(uint32_t pair) {
    return __uint_as_float(pair << 16);
}

static __device__ __forceinline__ float dev_hi(uint32_t pair) {
    return __uint_as_float(pair & 0xffff0000u);
}

/* Both halves; subnormal operands and results are kept. */
static __device__ __forceinline__ uint32_t dev_mul_bf16x2(uint32_t a, uint32_t b) {
    uint32_t product;
#if __CUDA_ARCH__ >= 900
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
#else
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(product) : "r"(a), "r"(b), "r"(0x80008000u));
#endif
    return product;
}

/* 2^x to about two units in the last place; results below the smallest normal number are 0. */
static __device__ __forceinline__ float dev_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* 1 / x to one unit in the last place; infinity gives 0. */
static __device__ __forceinline__ float dev_reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* ---- shared memory ---- */
static __device__ __forceinline__ uint32_t dev_shared(const void *pointer) {
    return (uint32_t)__cvta_generic_to_shared(pointer);
}

static __device__ __forceinline__ void dev_store_shared(uint32_t address, uint4 v) {
    asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

static __device__ __forceinline__ void dev_store_shared(uint32_t address, uint32_t v) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(v) : "memory");
}

static __device__ __forceinline__ uint4 dev_load_shared(uint32_t address) {
    uint4 v;
    asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address) : "memory");
    return v;
}

static __device__ __forceinline__ uint32_t dev_load_shared4(uint32_t address) {
    uint32_t v;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
    return v;
}

static __device__ __forceinline__ void dev_store_shared8(uint32_t address, uint2 v) {
    asm volatile("st.shared.v2.b32 [%0], {%1,%2};" ::"r"(address), "r"(v.x), "r"(v.y) : "memory");
}

static __device__ __forceinline__ uint2 dev_load_shared8(uint32_t address) {
    uint2 v;
    asm volatile("ld.shared.v2.b32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address) : "memory");
    return v;
}

static __device__ __forceinline__ uint32_t dev_load_shared2(uint32_t address) {
    uint16_t v;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(address) : "memory");
    return v;
}

/* Keeps a value in a register of its own up to here: several results are ready before the first is stored. */
static __device__ __forceinline__ void dev_pin(uint4 &v) {
    asm volatile("" : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w));
}

static __device__ __forceinline__ void dev_pin(uint32_t (&v)[8]) {
#pragma unroll
    for (int i = 0; i < 8; i++) asm volatile("" : "+r"(v[i])::"memory");
}

/* The same value, of which the compiler knows nothing: what follows from it is made again, not kept. */
static __device__ __forceinline__ int dev_opaque(int v) {
    asm volatile("" : "+r"(v));
    return v;
}

/* blockIdx.x, read where it is wanted: else it is kept in a register from the kernel's beginning on. */
static __device__ __forceinline__ int dev_block() {
    int block;
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(block));
    return block;
}

/* Streaming 16 bytes that are read once. */
static __device__ __forceinline__ uint4 dev_load_stream(const void *pointer) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.b32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(pointer));
    return v;
}

static __device__ __forceinline__ void dev_prefetch_l2(const void *pointer) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(pointer));
}

/* ---- asynchronous copies of 16 bytes; `bytes` 0 or 16: the rest is zero ---- */
static __device__ __forceinline__ void dev_copy16(uint32_t to, const void *from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

static __device__ __forceinline__ void dev_copy16_or_zero(uint32_t to, const void *from, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

static __device__ __forceinline__ void dev_copy4(uint32_t to, const void *from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}

static __device__ __forceinline__ void dev_copy_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

/* All but the last `pending` groups of this thread have arrived. */
template <int pending> static __device__ __forceinline__ void dev_copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

static __device__ __forceinline__ void dev_copy_wait_all() {
    asm volatile("cp.async.wait_all;" ::: "memory");
}

/* This thread arrives once all its copies so far are there. */
static __device__ __forceinline__ void dev_copy_arrive(uint32_t barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

/* ---- barriers ---- */
/* Ordinary writes to shared memory become visible to the tensor cores and the copy engine. */
static __device__ __forceinline__ void dev_fence_async() {
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

/* `threads` of the block, a multiple of 32, meet at hardware barrier `id`. */
static __device__ __forceinline__ void dev_meet(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

static __device__ __forceinline__ void dev_barrier_init(uint32_t barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

static __device__ __forceinline__ void dev_barrier_arrive(uint32_t barrier) {
    asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared::cta.b64 state, [%0];\n}" ::"r"(barrier) : "memory");
}

/* Until the phase of this parity is complete. */
static __device__ __forceinline__ void dev_barrier_wait(uint32_t barrier, uint32_t parity) {
#if __CUDA_ARCH__ >= 900
    uint32_t done;
    do {
        asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                     : "=r"(done)
                     : "r"(barrier), "r"(parity)
                     : "memory");
    } while (!done);
#endif
}

/* Arrives, and lets the phase wait for so many bytes of the copy engine besides. */
static __device__ __forceinline__ void dev_barrier_expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1;\n}" ::"r"(barrier), "r"(bytes)
                 : "memory");
}

/* The copy engine brings bytes that stand in a row, a multiple of 16. */
static __device__ __forceinline__ void dev_copy_bulk(uint32_t to, const void *from, uint32_t bytes, uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from), "r"(bytes),
                 "r"(barrier)
                 : "memory");
#endif
}

/* ---- pairs of blocks that read each other's shared memory: clusters, sm_90 ---- */
static __device__ __forceinline__ uint32_t dev_cluster_rank() {
    uint32_t rank = 0;
#if __CUDA_ARCH__ >= 900
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
    return rank;
}

/* All threads of the cluster; barriers that were made before are there for all. */
static __device__ __forceinline__ void dev_cluster_meet() {
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.mbarrier_init.release.cluster;\nbarrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::
                     : "memory");
#endif
}

/* At the barrier that stands in the same place of that block.  Of this thread's own writes nothing is said: it would wait for all of them. */
static __device__ __forceinline__ void dev_barrier_arrive_in(uint32_t barrier, uint32_t block) {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\nmbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(barrier),
        "r"(block)
        : "memory");
#endif
}

/* The copy engine brings a box of a matrix from column x and row y on, in the order that its map says; what is outside of the matrix is 0. */
static __device__ __forceinline__ void dev_copy_box(uint32_t to, const void *map, int x, int y, uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
                 "l"(map), "r"(x), "r"(y), "r"(barrier)
                 : "memory");
#endif
}

/* To the same place of both blocks, and announced at the barriers of both. */
static __device__ __forceinline__ void dev_copy_box_both(uint32_t to, const void *map, int x, int y, uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, %3}], "
                 "[%4], %5;" ::"r"(to),
                 "l"(map), "r"(x), "r"(y), "r"(barrier), "h"((uint16_t)3)
                 : "memory");
#endif
}

/* ---- tensor cores: mma.sync m16n8k16, and the loads and stores of its fragments ---- */
static __device__ __forceinline__ void dev_mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                               uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

static __device__ __forceinline__ uint4 dev_ldmatrix(uint32_t address) {
    uint4 v;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(address)
                 : "memory");
    return v;
}

static __device__ __forceinline__ uint4 dev_ldmatrix_trans(uint32_t address) {
    uint4 v;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(address)
                 : "memory");
    return v;
}

/* 8 x 8 values, two of a row to a lane, turned. */
static __device__ __forceinline__ uint32_t dev_transposed(uint32_t v) {
    uint32_t turned;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(turned) : "r"(v));
    return turned;
}

static __device__ __forceinline__ void dev_stmatrix(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
#if __CUDA_ARCH__ >= 900
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
#endif
}

static __device__ __forceinline__ void dev_stmatrix_trans(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
#if __CUDA_ARCH__ >= 900
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(a), "r"(b), "r"(c), "r"(d)
                 : "memory");
#endif
}

/* ---- kernels that begin beside the one before: launch_beside ---- */
/* What is launched beside this kernel may begin once all its blocks have been here or are done. */
static __device__ __forceinline__ void dev_let_next_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/* Until the kernel before is done, and what it wrote is there. */
static __device__ __forceinline__ void dev_wait_for_last() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/* ---- tensor cores: wgmma.  Warpgroups of sm_90a only ---- */
template <int registers> static __device__ __forceinline__ void dev_registers_grow() {
#if DEV_HOPPER
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
#endif
}

template <int registers> static __device__ __forceinline__ void dev_registers_shrink() {
#if DEV_HOPPER
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
#endif
}

/* A tile of rows of 128 bytes, eight of which make a swizzled block of 1024: 16-byte piece c of row r stands at c ^ (r & 7).
 * `stride`: bytes from eight rows to the next eight. */
static __device__ __forceinline__ uint64_t dev_tile(uint32_t address, uint32_t stride) {
    return (uint64_t)(address >> 4 & 0x3fff) | (uint64_t)1 << 16 | (uint64_t)(stride >> 4) << 32 | (uint64_t)1 << 62;
}

static __device__ __forceinline__ void dev_wgmma_begin() {
#if DEV_HOPPER
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

static __device__ __forceinline__ void dev_wgmma_commit() {
#if DEV_HOPPER
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

template <int pending> static __device__ __forceinline__ void dev_wgmma_wait() {
#if DEV_HOPPER
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
#endif
}

/* The two words of a tile whose rows follow each other: the next eight are 1024 bytes on. */
#define DEV_TILE_HIGH 0x40000040
static __device__ __forceinline__ uint32_t dev_tile_low(uint32_t address) {
    return (address >> 4 & 0x3fff) | 1u << 16;
}

/* D [64, 16 n] of the warpgroup = A [64,16] B [16, 16 n] + (keep ? D : 0).  A: rows of 16 k, or across: 16 rows k of 64 values.  B: rows of
 * 16 k.  Both by the low words of their tiles; A may be in the warps' registers, as mma.sync has it.  In D, d[8 i + 4 h + 2 v + w] of a lane is row 16 warp + 8 v + lane / 4 and column 16 i + 8 h + 2 (lane % 4) + w. */
template <int n, int across> struct dev_wgmma;
#if DEV_HOPPER
#define DEV_P1 "%0,%1,%2,%3,%4,%5,%6,%7"
#define DEV_P2 DEV_P1 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define DEV_P3 DEV_P2 ",%16,%17,%18,%19,%20,%21,%22,%23"
#define DEV_P4 DEV_P3 ",%24,%25,%26,%27,%28,%29,%30,%31"
#define DEV_P5 DEV_P4 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define DEV_P6 DEV_P5 ",%40,%41,%42,%43,%44,%45,%46,%47"
#define DEV_P7 DEV_P6 ",%48,%49,%50,%51,%52,%53,%54,%55"
#define DEV_P8 DEV_P7 ",%56,%57,%58,%59,%60,%61,%62,%63"
#define DEV_P9 DEV_P8 ",%64,%65,%66,%67,%68,%69,%70,%71"
#define DEV_P10 DEV_P9 ",%72,%73,%74,%75,%76,%77,%78,%79"
#define DEV_P11 DEV_P10 ",%80,%81,%82,%83,%84,%85,%86,%87"
#define DEV_P12 DEV_P11 ",%88,%89,%90,%91,%92,%93,%94,%95"
#define DEV_P13 DEV_P12 ",%96,%97,%98,%99,%100,%101,%102,%103"
#define DEV_P14 DEV_P13 ",%104,%105,%106,%107,%108,%109,%110,%111"
#define DEV_P15 DEV_P14 ",%112,%113,%114,%115,%116,%117,%118,%119"
#define DEV_P16 DEV_P15 ",%120,%121,%122,%123,%124,%125,%126,%127"
#define DEV_R(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define DEV_R1 DEV_R(0), DEV_R(4)
#define DEV_R2 DEV_R1, DEV_R(8), DEV_R(12)
#define DEV_R3 DEV_R2, DEV_R(16), DEV_R(20)
#define DEV_R4 DEV_R3, DEV_R(24), DEV_R(28)
#define DEV_R5 DEV_R4, DEV_R(32), DEV_R(36)
#define DEV_R6 DEV_R5, DEV_R(40), DEV_R(44)
#define DEV_R7 DEV_R6, DEV_R(48), DEV_R(52)
#define DEV_R8 DEV_R7, DEV_R(56), DEV_R(60)
#define DEV_R9 DEV_R8, DEV_R(64), DEV_R(68)
#define DEV_R10 DEV_R9, DEV_R(72), DEV_R(76)
#define DEV_R11 DEV_R10, DEV_R(80), DEV_R(84)
#define DEV_R12 DEV_R11, DEV_R(88), DEV_R(92)
#define DEV_R13 DEV_R12, DEV_R(96), DEV_R(100)
#define DEV_R14 DEV_R13, DEV_R(104), DEV_R(108)
#define DEV_R15 DEV_R14, DEV_R(112), DEV_R(116)
#define DEV_R16 DEV_R15, DEV_R(120), DEV_R(124)
/* a0 .. a6: the places behind the sums. */
#define DEV_WGMMA(n, columns, a0, a1, a2, a3, a4, a5, a6)                                                                                  \
    template <int across> struct dev_wgmma<n, across> {                                                                                    \
        static __device__ __forceinline__ void run(float (&d)[128], uint32_t a, uint32_t b, int keep) {                                    \
            asm volatile("{\n.reg .pred p;\n.reg .b64 ta, tb;\nsetp.ne.b32 p, %" a2 ", 0;\nmov.b64 ta, {%" a0 ", %" a4                     \
                         "};\nmov.b64 tb, {%" a1 ", %" a4 "};\nwgmma.mma_async.sync.aligned.m64n" columns "k16.f32.bf16.bf16 {" DEV_P##n   \
                         "}, ta, tb, p, 1, 1, %" a3 ", 0;\n}"                                                                              \
                         : DEV_R##n                                                                                                        \
                         : "r"(a), "r"(b), "r"(keep), "n"(across), "n"(DEV_TILE_HIGH));                                                    \
        }                                                                                                                                  \
        static __device__ __forceinline__ void run(float (&d)[128], const uint32_t *a, uint32_t b, int keep) {                             \
            asm volatile("{\n.reg .pred p;\n.reg .b64 tb;\nsetp.ne.b32 p, %" a5 ", 0;\nmov.b64 tb, {%" a4 ", %" a6                         \
                         "};\nwgmma.mma_async.sync.aligned.m64n" columns "k16.f32.bf16.bf16 {" DEV_P##n "}, {%" a0 ",%" a1 ",%" a2 ",%" a3 \
                                                                                                        "}, tb, p, 1, 1, 0;\n}"            \
                         : DEV_R##n                                                                                                        \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"(keep), "n"(DEV_TILE_HIGH));                             \
        }                                                                                                                                  \
    };
DEV_WGMMA(1, "16", "8", "9", "10", "11", "12", "13", "14")
DEV_WGMMA(2, "32", "16", "17", "18", "19", "20", "21", "22")
DEV_WGMMA(3, "48", "24", "25", "26", "27", "28", "29", "30")
DEV_WGMMA(4, "64", "32", "33", "34", "35", "36", "37", "38")
DEV_WGMMA(5, "80", "40", "41", "42", "43", "44", "45", "46")
DEV_WGMMA(6, "96", "48", "49", "50", "51", "52", "53", "54")
DEV_WGMMA(7, "112", "56", "57", "58", "59", "60", "61", "62")
DEV_WGMMA(8, "128", "64", "65", "66", "67", "68", "69", "70")
DEV_WGMMA(9, "144", "72", "73", "74", "75", "76", "77", "78")
DEV_WGMMA(10, "160", "80", "81", "82", "83", "84", "85", "86")
DEV_WGMMA(11, "176", "88", "89", "90", "91", "92", "93", "94")
DEV_WGMMA(12, "192", "96", "97", "98", "99", "100", "101", "102")
DEV_WGMMA(13, "208", "104", "105", "106", "107", "108", "109", "110")
DEV_WGMMA(14, "224", "112", "113", "114", "115", "116", "117", "118")
DEV_WGMMA(15, "240", "120", "121", "122", "123", "124", "125", "126")
DEV_WGMMA(16, "256", "128", "129", "130", "131", "132", "133", "134")
#undef DEV_WGMMA
#else
template <int n, int across> struct dev_wgmma {
    static __device__ __forceinline__ void run(float (&)[128], uint32_t, uint32_t, int) {}
    static __device__ __forceinline__ void run(float (&)[128], const uint32_t *, uint32_t, int) {}
};
#endif

/* The accumulators are read or written by ordinary instructions from here on. */
template <int count> static __device__ __forceinline__ void dev_wgmma_settle(float (&d)[128]) {
#pragma unroll
    for (int i = 0; i < count; i++) asm volatile("" : "+f"(d[i])::"memory");
}

/* The products of attention: D [64,64] of the warpgroup, with sums as dev_wgmma has them. */
#if DEV_HOPPER
#define DEV_SUMS32(d)                                                                                                                      \
    "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]),   \
        "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]),  \
        "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]),  \
        "+f"(d[31])
#define DEV_PLACES32                                                                                                                       \
    "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}"
#endif

/* A [64,16] B [16,64] + (keep ? D : 0), both as rows of 16 k. */
static __device__ __forceinline__ void dev_wgmma64(float (&d)[32], uint64_t a, uint64_t b, int keep) {
#if DEV_HOPPER
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " DEV_PLACES32
                 ", %32, %33, p, 1, 1, 0, 0;\n}"
                 : DEV_SUMS32(d)
                 : "l"(a), "l"(b), "r"(keep));
#endif
}

/* D += A B, A from the warps' registers as mma.sync has it, B as 16 rows k of 64 values. */
static __device__ __forceinline__ void dev_wgmma64_across(float (&d)[32], uint4 a, uint64_t b) {
#if DEV_HOPPER
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " DEV_PLACES32
                 ", {%32,%33,%34,%35}, %36, p, 1, 1, 1;\n}"
                 : DEV_SUMS32(d)
                 : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "l"(b));
#endif
}

static __device__ __forceinline__ void dev_wgmma64_settle(float (&d)[32]) {
#pragma unroll
    for (int i = 0; i < 32; i++) asm volatile("" : "+f"(d[i])::"memory");
}

#endif
