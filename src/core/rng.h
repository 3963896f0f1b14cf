/* Counter-based random numbers (Philox 4x32-10, Salmon et al., SC'11): the value depends on key and counter alone, so on no order of
 * calls, no thread count and no batch layout. */
#ifndef ESPI_CORE_RNG_H
#define ESPI_CORE_RNG_H

#include <stdint.h>

/* Streams keep draws for different purposes apart; the stream is part of the key. */
typedef enum espi_stream {
    ESPI_STREAM_LORA_INIT = 1, /* counter (layer, expert, matrix, element block) */
    ESPI_STREAM_SAMPLE = 2,    /* counter (step, prompt, sample, position) */
    ESPI_STREAM_SHUFFLE = 3,   /* counter (epoch, index, 0, 0) */
    ESPI_STREAM_EVAL = 4,      /* counter (step, prompt, sample, position) */
    ESPI_STREAM_CONTROL = 5,   /* --shuffle-rewards: counter (step, index, 0, 0) */
    ESPI_STREAM_SLICES = 6,    /* groups of a generation among its steps: counter (generation, round, index, 0) */
    ESPI_STREAM_BACKOFF = 32,  /* delays between tries of a request: counter (step, request, try, 0) */
    ESPI_STREAM_SERVER = 33    /* seeds sent to a server: counter (step, prompt, 0, 0) */
} espi_stream;

/* Four 32-bit words for (seed, stream) and a 128-bit counter. */
void espi_philox(uint32_t out[4], uint64_t seed, espi_stream stream, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3);

/* Uniform in [0, 1) with 53 bits, from words 0 and 1 of that draw. */
double espi_uniform(uint64_t seed, espi_stream stream, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3);

#endif
