/* Philox against the known answers of Random123 (kat_vectors), and the uniform draw against its definition. */
#include "core/rng.h"

#include <criterion/criterion.h>

/* Under stream 0 the seed is the key. */
static void check(uint64_t seed, const uint32_t counter[4], const uint32_t expected[4]) {
    uint32_t got[4];
    espi_philox(got, seed, (espi_stream)0, counter[0], counter[1], counter[2], counter[3]);
    for (int i = 0; i < 4; i++) cr_expect(got[i] == expected[i], "word %d: got %08x, expected %08x", i, got[i], expected[i]);
}

Test(rng, known_answers) {
    check(0, (uint32_t[4]){0, 0, 0, 0}, (uint32_t[4]){0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8});
    check(UINT64_MAX, (uint32_t[4]){UINT32_MAX, UINT32_MAX, UINT32_MAX, UINT32_MAX},
          (uint32_t[4]){0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd});
    check(0x299f31d0a4093822, (uint32_t[4]){0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
          (uint32_t[4]){0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1});
}

Test(rng, streams_and_counters_are_apart) {
    uint32_t a[4], b[4];
    espi_philox(a, 7, ESPI_STREAM_SAMPLE, 1, 2, 3, 4);
    espi_philox(b, 7, ESPI_STREAM_EVAL, 1, 2, 3, 4);
    cr_expect(a[0] != b[0] || a[1] != b[1]);
    for (int place = 0; place < 4; place++) {
        uint32_t c[4] = {1, 2, 3, 4};
        c[place]++;
        espi_philox(b, 7, ESPI_STREAM_SAMPLE, c[0], c[1], c[2], c[3]);
        cr_expect(a[0] != b[0] || a[1] != b[1], "counter word %d does not matter", place);
    }
}

Test(rng, uniform) {
    double sum = 0, least = 1, most = 0;
    enum { DRAWS = 20000 };
    for (uint32_t i = 0; i < DRAWS; i++) {
        double u = espi_uniform(3, ESPI_STREAM_SHUFFLE, 0, i, 0, 0);
        sum += u;
        least = u < least ? u : least;
        most = u > most ? u : most;
    }
    cr_expect(least >= 0 && least < 0.001 && most > 0.999 && most < 1, "range %g .. %g", least, most);
    /* The mean of n uniforms has deviation 1/sqrt(12 n) = 0.00204: four of them. */
    cr_expect(sum / DRAWS > 0.4918 && sum / DRAWS < 0.5082, "mean %g", sum / DRAWS);

    uint32_t words[4];
    espi_philox(words, 3, ESPI_STREAM_SHUFFLE, 0, 5, 0, 0);
    double expected = (double)(((uint64_t)(words[0] >> 5) << 26) | (words[1] >> 6)) / 9007199254740992.0;
    cr_expect(espi_uniform(3, ESPI_STREAM_SHUFFLE, 0, 5, 0, 0) == expected);
}
