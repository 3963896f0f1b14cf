/* The expert ops on a GPU: which kernels make a layer step, and what they need.  Everything about the routing is read on the device. */
#include "kernels/cuda/device.h"
#include "kernels/cuda/experts.cuh"

static size_t low_bytes(const espi_lora *lora, const espi_routing *routing) {
    return rounded((size_t)(routing->tokens * routing->top_k * lora->r) * sizeof(bf16));
}

/* Whether the tensor-core kernels take the case; else the plain ones do. */
static bool is_fast(const espi_stack *w, const espi_lora *lora, const espi_routing *routing, product_kind kind) {
    return !product_tiled_refusal(w, lora, routing, kind);
}

static size_t product_scratch(const product_args *p, const espi_lora *lora, product_kind kind) {
    return is_fast(&p->w, lora, &p->routing, kind) ? product_tiled_scratch(p, kind) : product_plain_scratch(p, kind);
}

static esp_status product(const espi_exec *exec, const product_args *p, const espi_lora *lora, product_kind kind, size_t used) {
    const espi_cuda *cuda = (const espi_cuda *)exec->device;
    void *scratch = (char *)exec->scratch + used;
    if (is_fast(&p->w, lora, &p->routing, kind))
        return espi_cuda_check(product_tiled(p, kind, scratch, cuda->sms, cuda->stream), "the product with packed experts");
    return espi_cuda_check(product_plain(p, kind, scratch, cuda->stream), "the product with experts");
}

static product_args gate_up_product(const espi_gate_up_fwd *a) {
    product_args p = {};
    p.w = a->w, p.routing = a->routing, p.bias = a->bias, p.glu = glu_rule_of(&a->glu), p.width = a->w.rows / 2;
    p.in = (const bf16 *)a->x, p.in_row = a->routing.row_token;
    p.up = (const float *)a->lora.b, p.low = (const bf16 *)a->u, p.r = (int)a->lora.r, p.factor = (float)a->lora.scale;
    p.out = (bf16 *)a->gu, p.act = (bf16 *)a->act;
    return p;
}

static product_args down_product(const espi_down_fwd *a) {
    product_args p = {};
    p.w = a->w, p.routing = a->routing, p.bias = a->bias, p.width = a->w.cols;
    p.in = (const bf16 *)a->act;
    p.up = (const float *)a->lora.b, p.low = (const bf16 *)a->u, p.r = (int)a->lora.r, p.factor = (float)a->lora.scale;
    p.out = (bf16 *)a->y;
    return p;
}

static product_args gate_up_back_product(const espi_gate_up_bwd *a, void *scratch) {
    product_args p = {};
    p.w = a->w, p.routing = a->routing, p.width = a->w.rows / 2;
    p.in = (const bf16 *)a->d_gu;
    p.up = (const float *)a->lora.a, p.low = (const bf16 *)scratch, p.r = (int)a->lora.r, p.factor = 1;
    p.out = (bf16 *)a->d_rows;
    return p;
}

static product_args down_back_product(const espi_down_bwd *a, void *scratch) {
    product_args p = {};
    p.w = a->w, p.routing = a->routing, p.glu = glu_rule_of(&a->glu), p.width = a->w.cols;
    p.in = (const bf16 *)a->d_out, p.in_row = a->routing.row_token;
    p.up = (const float *)a->lora.a, p.low = (const bf16 *)scratch, p.r = (int)a->lora.r, p.factor = 1;
    p.out = (bf16 *)a->d_gu, p.gu = (const bf16 *)a->gu, p.d_row_weight = (float *)a->d_row_weight;
    return p;
}

/* A forward: u = A in of every row, then the product. */
static esp_status forward(const espi_exec *exec, const product_args *p, const espi_lora *lora, void *u, product_kind kind) {
    if (p->r) {
        low_args low = {};
        low.low = (bf16 *)u, low.in = p->in, low.in_row = p->in_row, low.l = (const float *)lora->a;
        low.r = p->r, low.width = p->w.cols, low.factor = 1;
        ESPI_CUDA_TRY(lora_low(&low, &p->routing, ((const espi_cuda *)exec->device)->stream));
    }
    return product(exec, p, lora, kind, 0);
}

extern "C" size_t espi_gate_up_fwd_scratch_cuda(const espi_exec *exec, const espi_gate_up_fwd *a) {
    (void)exec;
    const product_args p = gate_up_product(a);
    return product_scratch(&p, &a->lora, PRODUCT_GATE_UP);
}

extern "C" esp_status espi_gate_up_fwd_cuda(const espi_exec *exec, const espi_gate_up_fwd *a) {
    if (a->routing.tokens == 0) return ESP_OK;
    const product_args p = gate_up_product(a);
    return forward(exec, &p, &a->lora, a->u, PRODUCT_GATE_UP);
}

extern "C" size_t espi_down_fwd_scratch_cuda(const espi_exec *exec, const espi_down_fwd *a) {
    (void)exec;
    const product_args p = down_product(a);
    return product_scratch(&p, &a->lora, PRODUCT_DOWN);
}

extern "C" esp_status espi_down_fwd_cuda(const espi_exec *exec, const espi_down_fwd *a) {
    if (a->routing.tokens == 0) return ESP_OK;
    const product_args p = down_product(a);
    return forward(exec, &p, &a->lora, a->u, PRODUCT_DOWN);
}

/* Of the gradients of B, with q, and of A, and of the product, one after the other in the same place. */
static size_t back_scratch(const product_args *p, const espi_lora *lora, product_kind kind) {
    size_t most = product_scratch(p, lora, kind);
    if (lora->r) {
        const size_t pair = lora_pair_scratch(p->w.rows, (int)lora->r, &p->routing);
        const size_t outer = lora_outer_scratch(p->w.cols, (int)lora->r, &p->routing);
        most = pair > most ? pair : most, most = outer > most ? outer : most;
    }
    return most;
}

/* q of every row, then that. */
extern "C" size_t espi_gate_up_bwd_scratch_cuda(const espi_exec *exec, const espi_gate_up_bwd *a) {
    (void)exec;
    const product_args p = gate_up_back_product(a, NULL);
    return low_bytes(&a->lora, &a->routing) + back_scratch(&p, &a->lora, PRODUCT_GATE_UP_BACK);
}

extern "C" esp_status espi_gate_up_bwd_cuda(const espi_exec *exec, const espi_gate_up_bwd *a) {
    const espi_cuda *cuda = (const espi_cuda *)exec->device;
    if (a->routing.tokens == 0) return ESP_OK;
    const product_args p = gate_up_back_product(a, exec->scratch);
    if (p.r) {
        pair_args pair = {};
        pair.d = (float *)a->lora.d_b, pair.low = (bf16 *)exec->scratch, pair.in = p.in, pair.u = (const bf16 *)a->u;
        pair.l = (const float *)a->lora.b, pair.r = p.r, pair.width = a->w.rows, pair.factor = (float)a->lora.scale;
        pair.scratch = (char *)exec->scratch + low_bytes(&a->lora, &a->routing);
        ESPI_CUDA_TRY(lora_pair(&pair, &a->routing, cuda->stream));
        outer_args d_a = {};
        d_a.d = (float *)a->lora.d_a, d_a.in = (const bf16 *)a->x, d_a.in_row = a->routing.row_token, d_a.low = p.low, d_a.across = true;
        d_a.r = p.r, d_a.width = a->w.cols, d_a.factor = 1, d_a.scratch = pair.scratch;
        ESPI_CUDA_TRY(lora_outer(&d_a, &a->routing, cuda->stream));
    }
    return product(exec, &p, &a->lora, PRODUCT_GATE_UP_BACK, low_bytes(&a->lora, &a->routing));
}

/* q and weighted q of every row, then that. */
extern "C" size_t espi_down_bwd_scratch_cuda(const espi_exec *exec, const espi_down_bwd *a) {
    (void)exec;
    const product_args p = down_back_product(a, NULL);
    return 2 * low_bytes(&a->lora, &a->routing) + back_scratch(&p, &a->lora, PRODUCT_DOWN_BACK);
}

extern "C" esp_status espi_down_bwd_cuda(const espi_exec *exec, const espi_down_bwd *a) {
    const espi_cuda *cuda = (const espi_cuda *)exec->device;
    if (a->routing.tokens == 0) return ESP_OK;
    const size_t one = low_bytes(&a->lora, &a->routing);
    const product_args p = down_back_product(a, exec->scratch);
    if (p.r) {
        pair_args pair = {};
        pair.d = (float *)a->lora.d_b, pair.low = (bf16 *)exec->scratch, pair.weighted = (bf16 *)((char *)exec->scratch + one);
        pair.in = p.in, pair.in_row = p.in_row, pair.u = (const bf16 *)a->u, pair.l = (const float *)a->lora.b;
        pair.weight = (const float *)a->routing.row_weight, pair.scratch = (char *)exec->scratch + 2 * one;
        pair.r = p.r, pair.width = a->w.rows, pair.factor = (float)a->lora.scale;
        ESPI_CUDA_TRY(lora_pair(&pair, &a->routing, cuda->stream));
        outer_args d_a = {};
        d_a.d = (float *)a->lora.d_a, d_a.gu = p.gu, d_a.glu = p.glu, d_a.low = pair.weighted, d_a.across = true;
        d_a.r = p.r, d_a.width = a->w.cols, d_a.factor = 1, d_a.scratch = pair.scratch;
        ESPI_CUDA_TRY(lora_outer(&d_a, &a->routing, cuda->stream));
    }
    ESPI_TRY(product(exec, &p, &a->lora, PRODUCT_DOWN_BACK, 2 * one));
    if (a->bias) ESPI_CUDA_TRY(bias_share(p.d_row_weight, a->bias, p.in, a->w.rows, &a->routing, cuda->stream));
    return ESP_OK;
}

extern "C" const char *espi_experts_describe_cuda(void) {
    return product_tiled_describe();
}

extern "C" size_t espi_packed_bytes_cuda(const espi_stack *w) {
    return espi_record_bytes(w);
}

extern "C" esp_status espi_pack_cuda(const espi_exec *exec, void *packed, const espi_stack *one) {
    return espi_cuda_check(espi_pack_records(packed, one, ((const espi_cuda *)exec->device)->stream), "packing experts");
}
