/* Rewards -> advantages.  Every mean is taken as first + mean(x - first): a group of equal rewards then has a deviation and advantages of
 * exactly 0, and can be skipped. */
#include "core/status.h"
#include "espalier/grpo.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Divisor = deviation + this. */
#define DEVIATION_FLOOR 1e-4

typedef struct moments {
    double mean, deviation; /* unbiased; 0 of fewer than two values */
} moments;

/* Of the n values x[0], x[stride], ..; NaN is left out. */
static moments measure(const double *x, int64_t n, int64_t stride) {
    double origin = NAN, sum = 0, square = 0;
    int64_t count = 0;
    for (int64_t i = 0; i < n; i++) {
        double value = x[i * stride];
        if (isnan(value)) continue;
        if (count++ == 0) origin = value;
        sum += value - origin;
    }
    moments out = {0, 0};
    if (count > 0) out.mean = origin + sum / (double)count;
    for (int64_t i = 0; i < n; i++)
        if (!isnan(x[i * stride])) square += (x[i * stride] - out.mean) * (x[i * stride] - out.mean);
    if (count > 1) out.deviation = sqrt(square / (double)(count - 1));
    return out;
}

/* Weighted sum of a row, functions that abstained left out; NaN where all did. */
static double weighted_sum(const double *x, const double *weights, int64_t n) {
    double sum = 0;
    int64_t count = 0;
    for (int64_t f = 0; f < n; f++) {
        if (isnan(x[f])) continue;
        sum += (weights ? weights[f] : 1) * x[f];
        count++;
    }
    return count > 0 ? sum : NAN;
}

static double centred(double value, moments m, double divisor) {
    return isnan(value) ? 0 : (value - m.mean) / divisor;
}

/* advantage [n]: the sums, in place. */
static void sum_then_normalize(double *advantage, double *deviation, int64_t n_groups, int64_t group_size, esp_advantage_scale scale) {
    moments batch = measure(advantage, n_groups * group_size, 1);
    for (int64_t p = 0; p < n_groups; p++) {
        double *row = advantage + p * group_size;
        moments group = measure(row, group_size, 1);
        double spread = (scale == ESP_SCALE_BATCH ? batch : group).deviation;
        double divisor = scale == ESP_SCALE_NONE ? 1 : spread + DEVIATION_FLOOR;
        for (int64_t i = 0; i < group_size; i++) {
            row[i] = centred(row[i], group, divisor);
            if (deviation) deviation[p * group_size + i] = spread;
        }
    }
}

/* scores [n, n_rewards]: first each reward within its group, in place; then the weighted sum over the batch. */
static void normalize_then_sum(double *advantage, double *deviation, double *scores, const double *weights, int64_t n_groups,
                               int64_t group_size, int64_t n_rewards) {
    for (int64_t p = 0; p < n_groups; p++)
        for (int64_t f = 0; f < n_rewards; f++) {
            double *column = scores + p * group_size * n_rewards + f;
            moments group = measure(column, group_size, n_rewards);
            for (int64_t i = 0; i < group_size; i++)
                column[i * n_rewards] = (column[i * n_rewards] - group.mean) / (group.deviation + DEVIATION_FLOOR);
        }
    int64_t n = n_groups * group_size;
    for (int64_t i = 0; i < n; i++) advantage[i] = weighted_sum(scores + i * n_rewards, weights, n_rewards);
    moments batch = measure(advantage, n, 1);
    for (int64_t i = 0; i < n; i++) {
        advantage[i] = centred(advantage[i], batch, batch.deviation + DEVIATION_FLOOR);
        if (deviation) deviation[i] = batch.deviation;
    }
}

static esp_status check(const double *advantage, const double *rewards, const double *weights, int64_t n_groups, int64_t group_size,
                        int64_t n_rewards, esp_advantage_scale scale, esp_advantage_order order) {
    if (n_groups < 0 || group_size < 1 || n_rewards < 1)
        return ESPI_FAIL(ESP_ERR_ARG, "esp_advantages: %lld groups of %lld with %lld rewards, expected at least 0, 1 and 1",
                         (long long)n_groups, (long long)group_size, (long long)n_rewards);
    if (n_groups > 0 && (!advantage || !rewards)) return ESPI_FAIL(ESP_ERR_ARG, "esp_advantages: advantage and rewards must not be NULL");
    if ((int)scale < ESP_SCALE_NONE || (int)scale > ESP_SCALE_BATCH)
        return ESPI_FAIL(ESP_ERR_ARG, "esp_advantages: scale is %d, expected 0 to 2 (esp_advantage_scale)", (int)scale);
    if (order != ESP_SUM_THEN_NORMALIZE && order != ESP_NORMALIZE_THEN_SUM)
        return ESPI_FAIL(ESP_ERR_ARG, "esp_advantages: order is %d, expected 0 or 1 (esp_advantage_order)", (int)order);
    if (order == ESP_NORMALIZE_THEN_SUM && scale != ESP_SCALE_GROUP)
        return ESPI_FAIL(
            ESP_ERR_ARG,
            "esp_advantages: order normalize_then_sum divides by the deviation of the group, got scale %d; set ESP_SCALE_GROUP",
            (int)scale);
    for (int64_t f = 0; weights && f < n_rewards; f++)
        if (!isfinite(weights[f]))
            return ESPI_FAIL(ESP_ERR_ARG, "esp_advantages: weight %lld is %g, expected a finite number", (long long)f, weights[f]);
    for (int64_t i = 0; i < n_groups * group_size * n_rewards; i++)
        if (isinf(rewards[i]))
            return ESPI_FAIL(ESP_ERR_NONFINITE,
                             "esp_advantages: reward %lld of row %lld is %g, expected a finite number, or NaN to abstain",
                             (long long)(i % n_rewards), (long long)(i / n_rewards), rewards[i]);
    return ESP_OK;
}

esp_status esp_advantages(double *advantage, double *reward, double *deviation, const double *rewards, const double *weights,
                          int64_t n_groups, int64_t group_size, int64_t n_rewards, esp_advantage_scale scale, esp_advantage_order order) {
    ESPI_TRY(check(advantage, rewards, weights, n_groups, group_size, n_rewards, scale, order));
    int64_t n = n_groups * group_size;
    if (n == 0) return ESP_OK;
    double *scores = NULL; /* to be normalised before they are summed */
    if (order == ESP_NORMALIZE_THEN_SUM) {
        const size_t bytes = (size_t)(n * n_rewards) * sizeof *rewards;
        scores = malloc(bytes);
        if (!scores) return ESPI_FAIL(ESP_ERR_MEMORY, "esp_advantages: no memory for %lld rewards", (long long)(n * n_rewards));
        memcpy(scores, rewards, bytes);
    }
    for (int64_t i = 0; i < n; i++) {
        advantage[i] = weighted_sum(rewards + i * n_rewards, weights, n_rewards);
        if (reward) reward[i] = advantage[i];
    }
    if (!scores) {
        sum_then_normalize(advantage, deviation, n_groups, group_size, scale);
        return ESP_OK;
    }
    normalize_then_sum(advantage, deviation, scores, weights, n_groups, group_size, n_rewards);
    free(scores);
    return ESP_OK;
}
