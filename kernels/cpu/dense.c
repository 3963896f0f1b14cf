/* Dense products through oneDNN's C API (2.6 and 3.x) or a CBLAS. */
#include "kernels/cpu/dense.h"

#include <omp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#if defined(ESPI_HAVE_DNNL)
#include <dnnl.h>
#define HAS_ONEDNN "onednn, "
#else
#define HAS_ONEDNN ""
#endif
#if defined(ESPI_HAVE_CBLAS)
#include <cblas.h>
#define HAS_CBLAS "cblas, "
#else
#define HAS_CBLAS ""
#endif

/* Below this many weights the own kernel was as fast or faster wherever it was measured (esp_bench --only linear). */
static const int64_t onednn_pays = 1 << 22;

esp_status espi_dense_choose(espi_dense *choice, int64_t out, int64_t in, bool bf16) {
    const char *name = getenv("ESP_DENSE");
    *choice = ESPI_DENSE_OWN;
    if (name == NULL || name[0] == '\0') {
        const bool pays = !bf16 && out * in >= onednn_pays;
#if defined(ESPI_HAVE_DNNL)
        if (pays) *choice = ESPI_DENSE_ONEDNN;
#else
        (void)pays;
#endif
        return ESP_OK;
    }
    if (strcmp(name, "own") == 0) return ESP_OK;
#if defined(ESPI_HAVE_DNNL)
    if (strcmp(name, "onednn") == 0) {
        *choice = ESPI_DENSE_ONEDNN;
        return ESP_OK;
    }
#endif
#if defined(ESPI_HAVE_CBLAS)
    if (strcmp(name, "cblas") == 0) {
        *choice = ESPI_DENSE_CBLAS;
        return ESP_OK;
    }
#endif
    return ESPI_FAIL(ESP_ERR_ARG, "ESP_DENSE is \"%s\", expected one of: %s; unset it to let the library choose", name,
                     HAS_ONEDNN HAS_CBLAS "own");
}

const char *espi_dense_describe(void) {
    const char *name = getenv("ESP_DENSE");
    if (name != NULL && strcmp(name, "cblas") == 0)
        return "dense products by CBLAS (ESP_DENSE): a row's bits may depend on how many rows there are";
    if (name != NULL && strcmp(name, "onednn") == 0) return "dense products by oneDNN (ESP_DENSE)";
    if (name != NULL && name[0] != '\0') return "dense products by the own kernel unless ESP_DENSE is refused";
#if defined(ESPI_HAVE_DNNL)
    return "dense products by oneDNN from 2^22 weights, below by the own kernel";
#else
    return "dense products by the own kernel (built without oneDNN)";
#endif
}

const char *espi_dense_describe_bf16(void) {
    const char *name = getenv("ESP_DENSE");
    return name != NULL && name[0] != '\0' ? espi_dense_describe() : "dense products of bf16 by the own kernel";
}

#if defined(ESPI_HAVE_DNNL)
/* Primitives are kept for the process: making one takes longer than a small product. */
typedef struct primitive {
    int64_t n, k;
    bool transposed, add;
    dnnl_primitive_t run;
} primitive;
enum { PRIMITIVES = 256 };
static primitive primitives[PRIMITIVES];
static int n_primitives;
static dnnl_engine_t engine;

static esp_status check(dnnl_status_t status, const char *call) {
    if (status == dnnl_success) return ESP_OK;
    return ESPI_FAIL(ESP_ERR_UNSUPPORTED, "oneDNN: %s returned status %d, expected success: set ESP_DENSE=own to do without it", call,
                     (int)status);
}

/* Row-major [rows,cols], or the transpose of a row-major [cols,rows]. */
typedef struct matrix_desc {
#if DNNL_VERSION_MAJOR >= 3
    dnnl_memory_desc_t md;
#else
    dnnl_memory_desc_t storage, *md;
#endif
} matrix_desc;

static esp_status describe_matrix(matrix_desc *d, int64_t rows, int64_t cols, bool transposed) {
    const dnnl_dims_t dims = {rows, cols}, strides = {transposed ? 1 : cols, transposed ? rows : 1};
#if DNNL_VERSION_MAJOR >= 3
    return check(dnnl_memory_desc_create_with_strides(&d->md, 2, dims, dnnl_f32, strides), "dnnl_memory_desc_create_with_strides");
#else
    d->md = &d->storage;
    return check(dnnl_memory_desc_init_by_strides(&d->storage, 2, dims, dnnl_f32, strides), "dnnl_memory_desc_init_by_strides");
#endif
}

static void forget_matrix(matrix_desc *d) {
#if DNNL_VERSION_MAJOR >= 3
    dnnl_memory_desc_destroy(d->md);
#else
    (void)d;
#endif
}

static esp_status make_attr(dnnl_primitive_attr_t attr, dnnl_post_ops_t ops) {
#if DNNL_VERSION_MAJOR >= 3
    ESPI_TRY(check(dnnl_post_ops_append_sum(ops, 1.0f, 0, dnnl_data_type_undef), "dnnl_post_ops_append_sum"));
#else
    ESPI_TRY(check(dnnl_post_ops_append_sum(ops, 1.0f), "dnnl_post_ops_append_sum"));
#endif
    return check(dnnl_primitive_attr_set_post_ops(attr, ops), "dnnl_primitive_attr_set_post_ops");
}

static esp_status make_primitive(primitive *p, const matrix_desc *a, const matrix_desc *b, const matrix_desc *c) {
    dnnl_primitive_attr_t attr = NULL;
    dnnl_post_ops_t ops = NULL;
    dnnl_primitive_desc_t pd = NULL;
    esp_status status = check(dnnl_primitive_attr_create(&attr), "dnnl_primitive_attr_create");
    if (status == ESP_OK) status = check(dnnl_post_ops_create(&ops), "dnnl_post_ops_create");
    if (status == ESP_OK && p->add) status = make_attr(attr, ops);
#if DNNL_VERSION_MAJOR >= 3
    if (status == ESP_OK)
        status =
            check(dnnl_matmul_primitive_desc_create(&pd, engine, a->md, b->md, NULL, c->md, attr), "dnnl_matmul_primitive_desc_create");
#else
    dnnl_matmul_desc_t matmul;
    if (status == ESP_OK) status = check(dnnl_matmul_desc_init(&matmul, a->md, b->md, NULL, c->md), "dnnl_matmul_desc_init");
    if (status == ESP_OK) status = check(dnnl_primitive_desc_create(&pd, &matmul, attr, engine, NULL), "dnnl_primitive_desc_create");
#endif
    if (status == ESP_OK) status = check(dnnl_primitive_create(&p->run, pd), "dnnl_primitive_create");
    if (pd) dnnl_primitive_desc_destroy(pd);
    if (ops) dnnl_post_ops_destroy(ops);
    if (attr) dnnl_primitive_attr_destroy(attr);
    return status;
}

static esp_status find_primitive(const primitive **found, int64_t n, int64_t k, bool transposed, bool add, const matrix_desc *a,
                                 const matrix_desc *b, const matrix_desc *c) {
    for (int i = 0; i < n_primitives; i++) {
        const primitive *p = &primitives[i];
        if (p->n != n || p->k != k || p->transposed != transposed || p->add != add) continue;
        *found = p;
        return ESP_OK;
    }
    if (n_primitives == PRIMITIVES)
        return ESPI_FAIL(ESP_ERR_UNSUPPORTED, "more than %d shapes of dense layers in one process; set ESP_DENSE=own", PRIMITIVES);
    if (!engine) ESPI_TRY(check(dnnl_engine_create(&engine, dnnl_cpu, 0), "dnnl_engine_create"));
    primitive *p = &primitives[n_primitives];
    *p = (primitive){.n = n, .k = k, .transposed = transposed, .add = add};
    ESPI_TRY(make_primitive(p, a, b, c));
    n_primitives++;
    *found = p;
    return ESP_OK;
}

/* One call on ESPI_DENSE_ROWS rows. */
static esp_status run_chunk(const primitive *p, const matrix_desc desc[3], void *const data[3]) {
    static const int role[3] = {DNNL_ARG_SRC, DNNL_ARG_WEIGHTS, DNNL_ARG_DST};
    dnnl_exec_arg_t args[3] = {{0}};
    dnnl_stream_t stream = NULL;
    esp_status status = check(dnnl_stream_create(&stream, engine, dnnl_stream_default_flags), "dnnl_stream_create");
    for (int i = 0; i < 3 && status == ESP_OK; i++) {
        args[i].arg = role[i];
        status = check(dnnl_memory_create(&args[i].memory, desc[i].md, engine, data[i]), "dnnl_memory_create");
    }
    if (status == ESP_OK) status = check(dnnl_primitive_execute(p->run, stream, 3, args), "dnnl_primitive_execute");
    if (status == ESP_OK) status = check(dnnl_stream_wait(stream), "dnnl_stream_wait");
    for (int i = 0; i < 3; i++)
        if (args[i].memory) dnnl_memory_destroy(args[i].memory);
    if (stream) dnnl_stream_destroy(stream);
    return status;
}

static esp_status onednn_product(float *c, const float *a, const float *w, float *tail, int64_t m, int64_t n, int64_t k, bool transposed,
                                 bool add, int threads) {
    matrix_desc desc[3];
    const primitive *p = NULL;
    const int64_t whole = m / ESPI_DENSE_ROWS, rest = m % ESPI_DENSE_ROWS;
    ESPI_TRY(describe_matrix(&desc[0], ESPI_DENSE_ROWS, k, false));
    ESPI_TRY(describe_matrix(&desc[1], k, n, transposed));
    ESPI_TRY(describe_matrix(&desc[2], ESPI_DENSE_ROWS, n, false));
    esp_status status = ESP_OK;
    const int before = omp_get_max_threads();
    omp_set_num_threads(1); /* a primitive is made for as many threads as it may use: one */
#pragma omp critical(espi_dense)
    status = find_primitive(&p, n, k, transposed, add, &desc[0], &desc[1], &desc[2]);
    float *tail_a = tail, *tail_c = tail + ESPI_DENSE_ROWS * k;
    if (status == ESP_OK && rest) {
        memset(tail, 0, (size_t)(ESPI_DENSE_ROWS * (n + k)) * sizeof *tail);
        memcpy(tail_a, a + whole * ESPI_DENSE_ROWS * k, (size_t)(rest * k) * sizeof *a);
        if (add) memcpy(tail_c, c + whole * ESPI_DENSE_ROWS * n, (size_t)(rest * n) * sizeof *c);
    }
    bool failed = status != ESP_OK;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1 && !failed) reduction(|| : failed)
    for (int64_t chunk = 0; chunk < whole + (rest != 0); chunk++) {
        if (failed) continue;
        omp_set_num_threads(1);
        void *const data[3] = {chunk == whole ? tail_a : (float *)a + chunk * ESPI_DENSE_ROWS * k, (float *)w,
                               chunk == whole ? tail_c : c + chunk * ESPI_DENSE_ROWS * n};
        failed = run_chunk(p, desc, data) != ESP_OK;
    }
    omp_set_num_threads(before);
    if (!failed && rest) memcpy(c + whole * ESPI_DENSE_ROWS * n, tail_c, (size_t)(rest * n) * sizeof *c);
    for (int i = 0; i < 3; i++) forget_matrix(&desc[i]);
    if (status == ESP_OK && failed)
        return ESPI_FAIL(ESP_ERR_UNSUPPORTED, "oneDNN failed on a product of [%lld,%lld] with [%lld,%lld]; set ESP_DENSE=own", (long long)m,
                         (long long)k, (long long)k, (long long)n);
    return status;
}
#endif

esp_status espi_dense_product(espi_dense choice, float *c, const float *a, const float *w, float *tail, int64_t m, int64_t n, int64_t k,
                              bool transposed, bool add, int threads) {
    if (m == 0) return ESP_OK;
#if defined(ESPI_HAVE_CBLAS)
    if (choice == ESPI_DENSE_CBLAS) {
        cblas_sgemm(CblasRowMajor, CblasNoTrans, transposed ? CblasTrans : CblasNoTrans, (int)m, (int)n, (int)k, 1.0f, a, (int)k, w,
                    (int)(transposed ? k : n), add ? 1.0f : 0.0f, c, (int)n);
        return ESP_OK;
    }
#endif
#if defined(ESPI_HAVE_DNNL)
    if (choice == ESPI_DENSE_ONEDNN) return onednn_product(c, a, w, tail, m, n, k, transposed, add, threads);
#endif
    (void)c, (void)a, (void)w, (void)tail, (void)n, (void)k, (void)transposed, (void)add, (void)threads; /* without either library */
    return ESPI_FAIL(ESP_ERR_UNSUPPORTED, "dense product by library %d, which was not built in", (int)choice);
}
