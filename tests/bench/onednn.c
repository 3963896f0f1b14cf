/* See the header. */
#include "onednn.h"

#include "measure.h"

#include <omp.h>
#if defined(ESPI_HAVE_DNNL)
#include <dnnl.h>
#endif

#if defined(ESPI_HAVE_DNNL) && DNNL_VERSION_MAJOR == 2
struct onednn_product {
    dnnl_stream_t stream;
    dnnl_primitive_t run, round; /* round: NULL, or what makes rows of bf16 of floats */
    dnnl_memory_t floats, a, c, *w;
};

static void check(dnnl_status_t status, const char *call) {
    if (status != dnnl_success) die(call);
}

static dnnl_memory_t memory(const dnnl_memory_desc_t *md, dnnl_engine_t engine) {
    const size_t bytes = dnnl_memory_desc_get_size(md);
    void *data = allocate(bytes);
    dnnl_memory_t m;
    memset(data, 0x3d, bytes); /* 0.046 in bf16: neither 0 nor subnormal */
    check(dnnl_memory_create(&m, md, engine, data), "dnnl_memory_create");
    return m;
}

onednn_product *onednn_make(int64_t rows, int64_t out, int64_t in, int copies, int threads, bool floats) {
    static dnnl_engine_t engine;
    const dnnl_dims_t a_dims = {rows, in}, w_dims = {in, out}, c_dims = {rows, out};
    dnnl_memory_desc_t a, w, c, x;
    dnnl_matmul_desc_t matmul;
    dnnl_primitive_desc_t pd;
    onednn_product *p = allocate(sizeof *p);
    omp_set_num_threads(threads); /* a primitive is made for as many as there may be now */
    if (!engine) check(dnnl_engine_create(&engine, dnnl_cpu, 0), "dnnl_engine_create");
    check(dnnl_stream_create(&p->stream, engine, dnnl_stream_default_flags), "dnnl_stream_create");
    check(dnnl_memory_desc_init_by_tag(&a, 2, a_dims, dnnl_bf16, dnnl_ab), "dnnl_memory_desc_init_by_tag");
    check(dnnl_memory_desc_init_by_tag(&w, 2, w_dims, dnnl_bf16, dnnl_format_tag_any), "dnnl_memory_desc_init_by_tag");
    check(dnnl_memory_desc_init_by_tag(&c, 2, c_dims, floats ? dnnl_f32 : dnnl_bf16, dnnl_ab), "dnnl_memory_desc_init_by_tag");
    check(dnnl_matmul_desc_init(&matmul, &a, &w, NULL, &c), "dnnl_matmul_desc_init");
    check(dnnl_primitive_desc_create(&pd, &matmul, NULL, engine, NULL), "dnnl_primitive_desc_create");
    check(dnnl_primitive_create(&p->run, pd), "dnnl_primitive_create");
    p->a = memory(&a, engine);
    p->c = memory(&c, engine);
    p->w = allocate((size_t)copies * sizeof *p->w);
    for (int i = 0; i < copies; i++) p->w[i] = memory(dnnl_primitive_desc_query_md(pd, dnnl_query_weights_md, 0), engine);
    dnnl_primitive_desc_destroy(pd);
    p->round = NULL;
    if (!floats) return p;
    check(dnnl_memory_desc_init_by_tag(&x, 2, a_dims, dnnl_f32, dnnl_ab), "dnnl_memory_desc_init_by_tag");
    p->floats = memory(&x, engine);
    check(dnnl_reorder_primitive_desc_create(&pd, &x, engine, &a, engine, NULL), "dnnl_reorder_primitive_desc_create");
    check(dnnl_primitive_create(&p->round, pd), "dnnl_primitive_create");
    dnnl_primitive_desc_destroy(pd);
    return p;
}

void onednn_run(const onednn_product *p, int copy) {
    const dnnl_exec_arg_t rounding[] = {{DNNL_ARG_FROM, p->floats}, {DNNL_ARG_TO, p->a}};
    const dnnl_exec_arg_t args[] = {{DNNL_ARG_SRC, p->a}, {DNNL_ARG_WEIGHTS, p->w[copy]}, {DNNL_ARG_DST, p->c}};
    if (p->round) check(dnnl_primitive_execute(p->round, p->stream, 2, rounding), "dnnl_primitive_execute");
    check(dnnl_primitive_execute(p->run, p->stream, 3, args), "dnnl_primitive_execute");
    check(dnnl_stream_wait(p->stream), "dnnl_stream_wait");
}
#else
onednn_product *onednn_make(int64_t rows, int64_t out, int64_t in, int copies, int threads, bool floats) {
    (void)floats, (void)rows, (void)out, (void)in, (void)copies, (void)threads;
    return NULL;
}

void onednn_run(const onednn_product *p, int copy) {
    (void)p, (void)copy;
}
#endif
