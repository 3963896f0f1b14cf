/* One Mixture-of-Experts layer by hand: quantise the experts, run forward and backward, and check the gradients by central differences.
 *
 * The loss is sum(c * out) for fixed random c, so d_out = c.  Runs under the "ref64" backend, where differences are exact to about 1e-9. */
#include <espalier/espalier.h>

#include <math.h>
#include <stdint.h>
#include <stdlib.h>

enum { T = 12, H = 48, E = 6, K = 2, I = 32, R = 4 };

/* A small deterministic generator for the example's weights (xorshift64*), uniform in [-1, 1). */
static double next_random(uint64_t *state) {
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return (double)((*state * 2685821657736338717ULL) >> 11) / 4503599627370496.0 - 1.0;
}

static void fill_float(float *x, int64_t n, double scale, uint64_t *state) {
    for (int64_t i = 0; i < n; i++) x[i] = (float)(scale * next_random(state));
}

static void fill_double(double *x, int64_t n, double scale, uint64_t *state) {
    for (int64_t i = 0; i < n; i++) x[i] = scale * next_random(state);
}

/* What one forward and backward need; T is fixed, so it is taken once. */
typedef struct memory {
    double x[T * H], out[T * H], c[T * H], d_x[T * H];
    void *saved, *scratch;
} memory;

static esp_status loss_of(double *loss, esp_moe *moe, memory *m) {
    const esp_status status = esp_moe_forward(moe, m->out, m->x, T, m->saved, m->scratch);
    *loss = 0;
    for (int i = 0; i < T * H; i++) *loss += m->c[i] * m->out[i];
    return status;
}

/* Largest relative difference between `grad` and central differences over every `stride`-th value of `data`. */
static int check(const char *name, esp_moe *moe, memory *m, double *data, const double *grad, int64_t n, int64_t stride) {
    const double step = 1e-5;
    double worst = 0, largest = 0;
    for (int64_t i = 0; i < n; i++) largest = fmax(largest, fabs(grad[i]));
    for (int64_t i = 0; i < n; i += stride) {
        const double keep = data[i];
        double up, down;
        data[i] = keep + step;
        ESP_CHECK(loss_of(&up, moe, m));
        data[i] = keep - step;
        ESP_CHECK(loss_of(&down, moe, m));
        data[i] = keep;
        worst = fmax(worst, fabs((up - down) / (2 * step) - grad[i]));
    }
    const double error = worst / largest;
    printf("  %-12s largest gradient %9.5f   worst relative difference %.1e\n", name, largest, error);
    return error <= 1e-6 ? 0 : 1;
}

static int set_weights(esp_moe *moe, uint64_t *state) {
    static float router[E * H], gate[I * H], up[I * H], down[H * I];
    fill_float(router, E * H, 0.5, state);
    ESP_CHECK(esp_moe_set_router(moe, router));
    for (int e = 0; e < E; e++) {
        fill_float(gate, I * H, 0.3, state);
        fill_float(up, I * H, 0.3, state);
        fill_float(down, H * I, 0.3, state);
        ESP_CHECK(esp_moe_set_expert(moe, e, gate, up, down)); /* becomes NF4 here */
    }
    /* B starts at zero, which would hide a wrong gradient of A: give it values. */
    const esp_moe_param bs[] = {ESP_MOE_GATE_UP_B, ESP_MOE_DOWN_B};
    for (int i = 0; i < 2; i++) {
        void *b;
        int64_t n;
        ESP_CHECK(esp_moe_param_get(moe, bs[i], &b, NULL, &n));
        fill_double(b, n, 0.1, state);
    }
    return 0;
}

int main(void) {
    uint64_t state = 0x9E3779B97F4A7C15ULL;
    esp_ctx *ctx;
    esp_moe *moe;
    static memory m;
    ESP_CHECK(esp_ctx_create(&ctx, &ESP_CTX_CONFIG(.backend = "ref64")));
    ESP_CHECK(esp_moe_create(&moe, ctx, &ESP_MOE_CONFIG(.hidden = H, .experts = E, .top_k = K, .width = I, .lora_rank = R)));
    if (set_weights(moe, &state) != 0) return 1;

    esp_moe_memory sizes = ESP_MOE_MEMORY_INIT;
    ESP_CHECK(esp_moe_sizes(moe, T, &sizes));
    m.saved = aligned_alloc(64, sizes.saved);
    m.scratch = aligned_alloc(64, sizes.scratch);
    if (!m.saved || !m.scratch) return 1;
    fill_double(m.x, T * H, 1.0, &state);
    fill_double(m.c, T * H, 1.0, &state);

    double loss;
    ESP_CHECK(loss_of(&loss, moe, &m));
    ESP_CHECK(esp_moe_backward(moe, m.d_x, m.c, m.x, T, m.saved, m.scratch));
    printf("one MoE block: T=%d H=%d E=%d K=%d I=%d R=%d, experts NF4, loss %.6f\n", T, H, E, K, I, R, loss);
    printf("kept for the backward: %zu bytes, scratch: %zu bytes\n", sizes.saved, sizes.scratch);

    int failed = check("x", moe, &m, m.x, m.d_x, T * H, 1);
    const struct {
        const char *name;
        esp_moe_param which;
    } params[] = {
        {"gate_up A", ESP_MOE_GATE_UP_A}, {"gate_up B", ESP_MOE_GATE_UP_B}, {"down A", ESP_MOE_DOWN_A}, {"down B", ESP_MOE_DOWN_B}};
    for (int i = 0; i < 4; i++) {
        void *data, *grad;
        int64_t n;
        ESP_CHECK(esp_moe_param_get(moe, params[i].which, &data, &grad, &n));
        failed |= check(params[i].name, moe, &m, data, grad, n, 7);
    }
    printf(failed ? "gradients differ\n" : "all gradients agree with central differences\n");
    esp_moe_destroy(moe);
    esp_ctx_destroy(ctx);
    free(m.saved);
    free(m.scratch);
    return failed;
}
