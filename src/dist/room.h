/* Is there room for what the ranks of one host, or of one device, are going to take together? */
#ifndef ESPI_DIST_ROOM_H
#define ESPI_DIST_ROOM_H

#include "core/ctx.h"

typedef struct espi_memory_place {
    uint64_t number;  /* ranks that share the memory have the same one */
    uint64_t left;    /* bytes; UINT64_MAX: nobody knows */
    char name[64];    /* of the host */
    char source[200]; /* what states `left` */
} espi_memory_place;

/* Collective.  ESP_ERR_MEMORY on all ranks where it is too little for some. */
esp_status espi_room_check(esp_ctx *ctx, size_t peak, const espi_memory_place *place);

#endif
