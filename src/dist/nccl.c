/* Finding NCCL at run time. */
#include "dist/nccl.h"

#include "core/log.h"
#include "core/status.h"

#include <dlfcn.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* What is missing of a library, "ncclSend, ncclRecv". */
typedef struct missing {
    char needed[256], others[256];
} missing;

static void add(char list[256], const char *name) {
    const size_t length = strlen(list);
    snprintf(list + length, 256 - length, "%s%s", length ? ", " : "", name);
}

static void find(espi_nccl_library *library, missing *lacks, void *handle) {
    void *symbol;
    /* A pointer to an object becomes one to a function as POSIX says it may, by its bytes. */
#define FUNCTION(name, is_needed, result, parameters)                                                                                      \
    symbol = dlsym(handle, "nccl" #name);                                                                                                  \
    memcpy(&library->name, &symbol, sizeof symbol);                                                                                        \
    if (symbol == NULL) add(is_needed ? lacks->needed : lacks->others, "nccl" #name);
    ESPI_NCCL_FUNCTIONS(FUNCTION)
#undef FUNCTION
}

/* 22809: "2.28.9" */
static void version_text(char text[32], int version) {
    snprintf(text, 32, "%d.%d.%d", version / 10000, version / 100 % 100, version % 100);
}

esp_status espi_nccl_open(espi_nccl_library *library, const esp_ctx *ctx) {
    const char *stated = getenv("ESP_NCCL"), *name = stated != NULL && stated[0] != '\0' ? stated : "libnccl.so.2";
    missing lacks = {.needed = ""};
    char has[32], expected[32];
    int version = 0;
    /* Multicast over NVLink is read once, when the library is loaded; sends do not use it, and it can put the GPUs of a host out of service. */
    if (setenv("NCCL_NVLS_ENABLE", "0", 1) != 0) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory to set NCCL_NVLS_ENABLE=0");
    void *handle = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (handle == NULL) {
        char reason[256];
        snprintf(reason, sizeof reason, "%s", dlerror());
        return ESPI_FAIL(ESP_ERR_UNSUPPORTED, "NCCL cannot be loaded: %s", reason);
    }
    find(library, &lacks, handle);
    version_text(expected, ESPI_NCCL_WRITTEN_FOR);
    if (library->GetVersion == NULL || library->GetVersion(&version) != ESPI_NCCL_SUCCESS)
        return ESPI_FAIL(ESP_ERR_UNSUPPORTED, "%s does not say which version of NCCL it is, expected %s or a later 2", name, expected);
    version_text(has, version);
    if (version < ESPI_NCCL_OLDEST || version >= ESPI_NCCL_NEXT_MAJOR)
        return ESPI_FAIL(ESP_ERR_UNSUPPORTED, "%s is NCCL %s, expected 2.18 or a later 2 (this is written for %s)", name, has, expected);
    if (lacks.needed[0] != '\0')
        return ESPI_FAIL(ESP_ERR_UNSUPPORTED, "%s (NCCL %s) lacks %s, expected the interface of NCCL %s", name, has, lacks.needed,
                         expected);
    espi_log(ctx, ESP_LOG_SELECT, "rows between ranks: NCCL %s of %s, written for %s%s%s", has, name, expected,
             lacks.others[0] ? "; done without what it lacks: " : "", lacks.others);
    return ESP_OK;
}
