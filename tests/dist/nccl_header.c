/* What src/dist/nccl.h says of NCCL is what NCCL's own header says: compiled where that is installed. */
#include "dist/nccl.h"

#include <nccl.h>
#include <stdio.h>

#define SAME(ours, theirs) _Static_assert((int)(ours) == (int)(theirs), #ours)
#define SAME_PLACE(ours, theirs)                                                                                                           \
    _Static_assert(offsetof(espi_nccl_config, ours) == offsetof(ncclConfig_t, theirs) &&                                                   \
                       sizeof(((espi_nccl_config *)0)->ours) == sizeof(((ncclConfig_t *)0)->theirs),                                       \
                   #ours)

_Static_assert(NCCL_MAJOR == 2 && NCCL_VERSION_CODE >= ESPI_NCCL_OLDEST, "another interface");
SAME(ESPI_NCCL_SUCCESS, ncclSuccess);
SAME(ESPI_NCCL_IN_PROGRESS, ncclInProgress);
SAME(ESPI_NCCL_INT8, ncclInt8);
SAME(ESPI_NCCL_UNDEFINED, NCCL_CONFIG_UNDEF_INT);
_Static_assert(sizeof(espi_nccl_id) == sizeof(ncclUniqueId) && sizeof(espi_nccl_result) == sizeof(ncclResult_t), "sizes");
SAME_PLACE(size, size);
SAME_PLACE(magic, magic);
SAME_PLACE(version, version);
SAME_PLACE(blocking, blocking);
SAME_PLACE(cga_cluster_size, cgaClusterSize);
SAME_PLACE(min_ctas, minCTAs);
SAME_PLACE(max_ctas, maxCTAs);
SAME_PLACE(net_name, netName);
SAME_PLACE(split_share, splitShare);

/* Calls of their functions with our parameters would not compile if these were others. */
static bool takes(espi_nccl_config *ours) {
    const ncclConfig_t theirs = NCCL_CONFIG_INITIALIZER;
    return ours->magic == theirs.magic && ours->net_name == theirs.netName;
}

int main(void) {
    espi_nccl_config config = {.magic = ESPI_NCCL_MAGIC};
    const bool same = takes(&config);
    printf("NCCL %d: %s\n", NCCL_VERSION_CODE, same ? "as declared" : "another configuration");
    return same ? 0 : 1;
}
