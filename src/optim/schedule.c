/* Learning-rate schedules, as transformers has them. */
#include "espalier/optim.h"

#include <math.h>

double esp_schedule_multiplier(esp_schedule schedule, int64_t n, int64_t warmup_steps, int64_t total_steps, double num_cycles) {
    const double pi = 3.14159265358979323846;
    if (n < warmup_steps) return (double)n / (double)warmup_steps;
    if (schedule == ESP_SCHEDULE_CONSTANT) return 1;
    double length = (double)(total_steps > warmup_steps ? total_steps - warmup_steps : 1);
    if (schedule == ESP_SCHEDULE_LINEAR) return fmax(0, (double)(total_steps - n) / length);
    double progress = (double)(n - warmup_steps) / length;
    if (schedule == ESP_SCHEDULE_COSINE) {
        double cycles = num_cycles != 0 ? num_cycles : 0.5;
        return fmax(0, 0.5 * (1 + cos(pi * 2 * cycles * progress)));
    }
    if (progress >= 1) return 0;
    double cycles = num_cycles != 0 ? num_cycles : 1;
    return fmax(0, 0.5 * (1 + cos(pi * fmod(cycles * progress, 1))));
}
