/* The version of the library that is loaded. */
#include "espalier/version.h"

#define SPELL(number) #number
#define DOTTED(major, minor, patch) SPELL(major) "." SPELL(minor) "." SPELL(patch)

const char *esp_version(void) {
    return DOTTED(ESP_VERSION_MAJOR, ESP_VERSION_MINOR, ESP_VERSION_PATCH);
}
