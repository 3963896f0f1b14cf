/* The communicator of one process, and what start-up says to a launcher's environment. */
#include "espalier/ctx.h"

#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>

static void clear_environment(void) {
    unsetenv("OMPI_COMM_WORLD_SIZE");
    unsetenv("PMI_SIZE");
    unsetenv("ESP_WORLD");
    unsetenv("ESP_RANK");
    unsetenv("ESP_RENDEZVOUS");
    unsetenv("ESP_DEADLINE");
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

static void expect_refusal(const char *part) {
    esp_comm *comm;
    cr_expect_eq(esp_comm_init(&comm, NULL, NULL), ESP_ERR_ARG, "%s", part);
    cr_expect_null(comm);
    cr_expect(strstr(esp_last_error(), part) != NULL, "\"%s\" is not in: %s", part, esp_last_error());
}

Test(comm, refuses_what_is_no_number, .init = clear_environment) {
    static const char *const variables[] = {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "ESP_WORLD", "ESP_DEADLINE"};
    for (int i = 0; i < 4; i++) {
        setenv(variables[i], "two", 1);
        expect_refusal(variables[i]);
        setenv(variables[i], "0", 1);
        expect_refusal(variables[i]);
        unsetenv(variables[i]);
    }
}

Test(comm, needs_rank_and_rendezvous, .init = clear_environment) {
    setenv("ESP_WORLD", "2", 1);
    expect_refusal("ESP_RANK=(unset)");
    setenv("ESP_RANK", "2", 1);
    setenv("ESP_RENDEZVOUS", "localhost:1", 1);
    expect_refusal("ESP_RANK=2");
    setenv("ESP_RANK", "1", 1);
    setenv("ESP_RENDEZVOUS", "localhost", 1);
    expect_refusal("host:port");
}
