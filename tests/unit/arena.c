/* The arena: what a dry walk counts is what a real walk takes, to the byte. */
#include "core/arena.h"

#include <criterion/criterion.h>
#include <stdint.h>
#include <stdlib.h>

/* A call with a nested one: keeps two blocks, borrows others in between. */
static esp_status walk(espi_arena *arena, size_t n, unsigned char *taken[4]) {
    esp_status status = espi_arena_take(arena, n, &taken[0]);
    const espi_mark mark = espi_arena_mark(arena);
    if (status == ESP_OK) status = espi_arena_take(arena, 3 * n + 1, &taken[1]);
    if (status == ESP_OK) status = espi_arena_take(arena, 0, &taken[2]);
    espi_arena_release(arena, mark);
    if (status == ESP_OK) status = espi_arena_take(arena, 5, &taken[3]);
    return status;
}

Test(arena, dry_equals_real) {
    for (size_t n = 0; n < 300; n += 7) {
        unsigned char *taken[4];
        espi_arena dry = espi_arena_dry(false);
        cr_assert_eq(walk(&dry, n, taken), ESP_OK);
        for (int i = 0; i < 4; i++) cr_expect_null(taken[i]);
        cr_expect_eq(dry.main.high % ESPI_ALIGN, 0);
        cr_expect_eq(dry.main.high, ESPI_ALIGNED(n) + ESPI_ALIGNED(3 * n + 1));
        cr_expect_eq(dry.main.used, ESPI_ALIGNED(n) + ESPI_ALIGN);

        unsigned char *base = aligned_alloc(ESPI_ALIGN, dry.main.high);
        espi_arena real = espi_arena_over(base, dry.main.high);
        cr_assert_eq(walk(&real, n, taken), ESP_OK);
        cr_expect(real.main.high == dry.main.high && real.main.used == dry.main.used);
        cr_expect(taken[0] == (n ? base : NULL) && taken[1] == base + ESPI_ALIGNED(n) && taken[2] == NULL && taken[3] == taken[1]);
        /* The planned size is needed in full: 64 bytes less do not do. */
        real = espi_arena_over(base, dry.main.high - ESPI_ALIGN);
        cr_expect_eq(walk(&real, n, taken), ESP_ERR_MEMORY);
        free(base);
    }
}

Test(arena, refuses_what_would_wrap) {
    espi_arena dry = espi_arena_dry(false);
    void *p;
    cr_expect_eq(espi_arena_take(&dry, 100, &p), ESP_OK);
    cr_expect_eq(espi_arena_take(&dry, SIZE_MAX, &p), ESP_ERR_MEMORY);
    cr_expect_eq(espi_arena_take(&dry, SIZE_MAX - 200, &p), ESP_OK);
    cr_expect_eq(espi_arena_take(&dry, 100, &p), ESP_ERR_MEMORY);
    espi_arena_reset(&dry);
    cr_expect(dry.main.used == 0 && dry.main.high == 0);
}
