/* The families that this library knows, from the rows of families.def. */
#include "models/family.h"

#include <string.h>

static const espi_family *const families[] = {
#define ESPI_FAMILY(name) &espi_family_##name,
#include "models/families.def"
#undef ESPI_FAMILY
};

const espi_family *espi_family_find(const char *model_type) {
    for (int i = 0; i < ESPI_COUNT(families); i++)
        if (strcmp(families[i]->name, model_type) == 0) return families[i];
    return NULL;
}

const char *espi_family_list(void) {
    static const char list[] = ""
#define ESPI_FAMILY(name) ", " #name
#include "models/families.def"
#undef ESPI_FAMILY
        ;
    return list + 2; /* behind the first comma */
}
