/* Philox 4x32-10: constants and rounds of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11. */
#include "core/rng.h"

static void philox_round(uint32_t c[4], const uint32_t key[2]) {
    uint64_t p0 = (uint64_t)0xD2511F53u * c[0], p1 = (uint64_t)0xCD9E8D57u * c[2];
    uint32_t n0 = (uint32_t)(p1 >> 32) ^ c[1] ^ key[0], n2 = (uint32_t)(p0 >> 32) ^ c[3] ^ key[1];
    c[0] = n0;
    c[1] = (uint32_t)p1;
    c[2] = n2;
    c[3] = (uint32_t)p0;
}

void espi_philox(uint32_t out[4], uint64_t seed, espi_stream stream, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
    /* The stream takes the top byte of the key: streams of all seeds below 2^56 are disjoint. */
    uint64_t key64 = seed ^ (uint64_t)stream << 56;
    uint32_t key[2] = {(uint32_t)key64, (uint32_t)(key64 >> 32)};
    out[0] = c0;
    out[1] = c1;
    out[2] = c2;
    out[3] = c3;
    for (int round = 0; round < 10; round++) {
        philox_round(out, key);
        key[0] += 0x9E3779B9u;
        key[1] += 0xBB67AE85u;
    }
}

double espi_uniform(uint64_t seed, espi_stream stream, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
    uint32_t words[4];
    espi_philox(words, seed, stream, c0, c1, c2, c3);
    return ((double)(words[0] >> 5) * 67108864.0 + (double)(words[1] >> 6)) * 0x1p-53;
}
