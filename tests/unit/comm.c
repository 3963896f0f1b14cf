/* The communicator of one process, and what it says under a launcher. */
#include "espalier/ctx.h"

#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>

static void clear_environment(void) {
    unsetenv("OMPI_COMM_WORLD_SIZE");
    unsetenv("PMI_SIZE");
    unsetenv("ESP_WORLD");
}

Test(comm, alone, .init = clear_environment) {
    esp_comm *comm = NULL;
    setenv("ESP_WORLD", "1", 1);
    cr_assert_eq(esp_comm_init(&comm, NULL, NULL), ESP_OK);
    cr_expect(esp_comm_rank(comm) == 0 && esp_comm_size(comm) == 1);
    esp_comm_destroy(comm);
    esp_comm_destroy(NULL);
    cr_expect_eq(esp_comm_init(NULL, NULL, NULL), ESP_ERR_ARG);
}

Test(comm, refuses_more_ranks, .init = clear_environment) {
    static const char *const variables[] = {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "ESP_WORLD"};
    for (int i = 0; i < 3; i++) {
        esp_comm *comm;
        setenv(variables[i], "2", 1);
        cr_expect_eq(esp_comm_init(&comm, NULL, NULL), ESP_ERR_UNSUPPORTED, "%s", variables[i]);
        cr_expect_null(comm);
        cr_expect(strstr(esp_last_error(), variables[i]) != NULL && strstr(esp_last_error(), "2 ranks") != NULL, "%s", esp_last_error());
        setenv(variables[i], "two", 1);
        cr_expect_eq(esp_comm_init(&comm, NULL, NULL), ESP_ERR_ARG, "%s", variables[i]);
        unsetenv(variables[i]);
    }
}
