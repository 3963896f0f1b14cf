/* Uses the installed library as a stranger would: header and library agree, a context works, a call computes. */
#include <espalier/espalier.h>
#include <string.h>

int main(void) {
    char header[40];
    snprintf(header, sizeof header, "%d.%d.%d", ESP_VERSION_MAJOR, ESP_VERSION_MINOR, ESP_VERSION_PATCH);
    if (strcmp(header, esp_version()) != 0) return 100;

    esp_ctx *ctx;
    ESP_CHECK(esp_ctx_create(&ctx, &ESP_CTX_CONFIG(.threads = 1)));
    esp_memory memory = ESP_MEMORY_INIT;
    ESP_CHECK(esp_ctx_memory(ctx, &memory));

    double advantage[4];
    ESP_CHECK(esp_advantages(advantage, NULL, NULL, (double[]){1, 0, 0, 1}, NULL, 1, 4, 1, ESP_SCALE_NONE, ESP_SUM_THEN_NORMALIZE));
    if (advantage[0] != 0.5 || advantage[1] != -0.5) return 101;
    printf("espalier %s on %s\n", esp_version(), esp_ctx_backend(ctx));
    esp_ctx_destroy(ctx);
    return 0;
}
