/* `espalier verify` on a device: the golden models through the paths that a GPU takes, on the fake device, whose ops round to bf16 as a GPU's
 * do and whose memory no host code may touch. */
#include "cli/verify.h"
#include "fake.h"

#include <criterion/criterion.h>

static void verify_all(espi_verify *v) {
    static const char *const folders[] = {"go1", "go2", "mx", "ol", "q3a", "q3b", "q3c", "vl", "vla", "gla", "glb"};
    for (size_t i = 0; i < sizeof folders / sizeof *folders; i++) {
        char dir[1024];
        snprintf(dir, sizeof dir, "%s/tests/golden/data/%s", ESP_SOURCE_DIR, folders[i]);
        v->folder = folders[i];
        espi_verify_model(v, dir);
    }
}

static void with_device(espi_verify *v, bool rounding) {
    cr_assert_eq(fake_ctx(&v->ctx, NULL), ESP_OK);
    fake_set_packing(true);
    fake_set_rounding(rounding);
    verify_all(v);
    fake_set_rounding(false);
    esp_ctx_destroy(v->ctx);
}

Test(verify_device, plain_bf16_is_within_the_limits) {
    espi_verify v = {0};
    with_device(&v, true);
    cr_expect_eq(v.failed, 0, "%lld failed", (long long)v.failed);
    cr_expect_gt(v.passed, 2000, "%lld passed", (long long)v.passed);
    cr_expect_gt(v.skipped, 0);
}
