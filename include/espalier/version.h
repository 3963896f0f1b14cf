/// The version: the single source, parsed by CMakeLists.txt.
#ifndef ESPALIER_VERSION_H
#define ESPALIER_VERSION_H

#include "espalier/status.h"

#define ESP_VERSION_MAJOR 0
#define ESP_VERSION_MINOR 1
#define ESP_VERSION_PATCH 0

#ifdef __cplusplus
extern "C" {
#endif

/// "MAJOR.MINOR.PATCH" of the library that is loaded, which may differ from the header that was compiled against.
ESP_API const char *esp_version(void);

#ifdef __cplusplus
}
#endif
#endif
