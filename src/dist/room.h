/* Is there room for what the ranks of one host, or of one device, are going to take together? */
#ifndef ESPI_DIST_ROOM_H
#define ESPI_DIST_ROOM_H

#include "core/ctx.h"

typedef struct espi_memory_place {
    uint64_t number;  /* ranks that share the memory have the same one */
    uint64_t left;    /* bytes; UINT64_MAX: nobody knows */
    char name[80];    /* "node7", "a GPU of node7" */
    char source[200]; /* what states `left` */
} espi_memory_place;

/* What a rank takes at a place: where its tensors lie, and beside a device in the memory of the host. */
enum { ESPI_ROOM_TENSORS, ESPI_ROOM_HOST, ESPI_ROOMS };
typedef struct espi_demand {
    espi_memory_place place;
    uint64_t bytes; /* 0: nothing */
} espi_demand;

/* Collective.  ESP_ERR_MEMORY on all ranks where it is too little for some. */
esp_status espi_room_check(esp_ctx *ctx, const espi_demand demands[ESPI_ROOMS]);

#endif
