/* An adapter with something in it: B = 0, as it is made, would hide a wrong gradient of A. */
#ifndef ESP_TEST_LORA_WAVE_H
#define ESP_TEST_LORA_WAVE_H

#include "espalier/model.h"
#include "scratch.h"

#include <math.h>

/* Fills every B of a model whose parameters lie in host memory. */
static inline void lora_wave(esp_model *model) {
    for (int64_t i = 0; i < esp_model_param_count(model); i++) {
        esp_param p = ESP_PARAM_INIT;
        OK(esp_model_param_get(model, i, &p));
        const esp_tensor view = esp_tensor_view(p.data, p.dtype, p.rank, p.dims);
        for (int64_t j = 0; strstr(p.name, "lora_B") && j < esp_tensor_count(&view); j++) {
            const double value = 0.05 * sin(1.0 + 0.7 * (double)j + (double)i);
            if (p.dtype == ESP_F64)
                ((double *)p.data)[j] = value;
            else
                ((float *)p.data)[j] = (float)value;
        }
    }
}

#endif
