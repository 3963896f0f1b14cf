/* A library with NCCL's functions for ranks that are threads of one process, each with a fake device (fake.h).  It counts, and it fails in the
 * ways that the real one has.  Tests load it as the project loads NCCL, and find `fake_nccl` in it by name. */
#ifndef ESP_TEST_FAKE_NCCL_H
#define ESP_TEST_FAKE_NCCL_H

#include <stdatomic.h>

typedef enum fake_nccl_fault {
    FAKE_NCCL_RIGHT,
    FAKE_NCCL_NO_ID,      /* no id is made */
    FAKE_NCCL_NO_JOIN,    /* the rank's start fails */
    FAKE_NCCL_AWAY,       /* the rank never joins: it goes on as if it had */
    FAKE_NCCL_BAD_SEND,   /* a send is refused */
    FAKE_NCCL_STUCK,      /* a group of the rank is never launched */
    FAKE_NCCL_MUTE,       /* what the rank sends never comes */
    FAKE_NCCL_REMOTE,     /* the rank's next group never ends, and some time later it is told that a peer failed */
    FAKE_NCCL_NO_FAREWELL /* leaving never ends */
} fake_nccl_fault;

typedef struct fake_nccl_state {
    _Atomic int fault, rank; /* which rank it strikes */
    atomic_long sends, recvs, nothing, groups, empty, aborted, destroyed;
    _Atomic int most_under_way; /* groups of a rank that were queued and not yet done */
} fake_nccl_state;

#endif
