/* Advantages beyond the golden values: what must be exactly zero, who abstains, and what is refused. */
#include "espalier/grpo.h"

#include <criterion/criterion.h>
#include <math.h>
#include <string.h>

enum { GROUPS = 3, SIZE = 7, N = GROUPS * SIZE };

/* 0.1 seven times over does not add up to 0.7: a plain mean would leave 1e-17 and a step of the optimiser with it. */
Test(advantage, equal_rewards_have_exactly_none) {
    double rewards[N], advantage[N];
    for (int i = 0; i < N; i++) rewards[i] = i < SIZE ? 0.1 : 0.3 + 0.01 * i;
    for (int scale = ESP_SCALE_NONE; scale <= ESP_SCALE_BATCH; scale++) {
        cr_assert_eq(
            esp_advantages(advantage, NULL, NULL, rewards, NULL, GROUPS, SIZE, 1, (esp_advantage_scale)scale, ESP_SUM_THEN_NORMALIZE),
            ESP_OK, "%s", esp_last_error());
        for (int i = 0; i < SIZE; i++) cr_expect_eq(advantage[i], 0, "scale %d: %g", scale, advantage[i]);
        for (int g = 1; g < GROUPS; g++) {
            double sum = 0;
            for (int i = 0; i < SIZE; i++) sum += advantage[g * SIZE + i];
            cr_expect(fabs(sum) <= 1e-14 && fabs(advantage[g * SIZE]) > 1e-3, "scale %d: group %d sums to %g", scale, g, sum);
        }
    }
}

/* By hand: rewards 0, 1, 3 of a group; mean 4/3, unbiased deviation sqrt(7/3). */
Test(advantage, scales_by_hand) {
    const double rewards[] = {0, 1, 3}, mean = 4.0 / 3, deviation = sqrt(7.0 / 3);
    double advantage[3];
    cr_assert_eq(esp_advantages(advantage, NULL, NULL, rewards, NULL, 1, 3, 1, ESP_SCALE_NONE, ESP_SUM_THEN_NORMALIZE), ESP_OK);
    for (int i = 0; i < 3; i++) cr_expect(fabs(advantage[i] - (rewards[i] - mean)) <= 1e-15);
    cr_assert_eq(esp_advantages(advantage, NULL, NULL, rewards, NULL, 1, 3, 1, ESP_SCALE_GROUP, ESP_SUM_THEN_NORMALIZE), ESP_OK);
    for (int i = 0; i < 3; i++) cr_expect(fabs(advantage[i] - (rewards[i] - mean) / (deviation + 1e-4)) <= 1e-15);
}

/* Two groups by hand, 0 1 and 2 6: deviations sqrt(1/2) and sqrt(8), over the batch sqrt(83/12); scaled or not, the group's is handed out.
 * Each normalised, then summed: a deviation of the whole batch. */
Test(advantage, deviations_by_hand) {
    const double rewards[] = {0, 1, 2, 6}, group[] = {sqrt(0.5), sqrt(0.5), sqrt(8), sqrt(8)};
    double advantage[4], deviation[4], plain[4];
    for (int scale = ESP_SCALE_NONE; scale <= ESP_SCALE_BATCH; scale++) {
        cr_assert_eq(esp_advantages(advantage, NULL, deviation, rewards, NULL, 2, 2, 1, (esp_advantage_scale)scale, ESP_SUM_THEN_NORMALIZE),
                     ESP_OK);
        cr_assert_eq(esp_advantages(plain, NULL, NULL, rewards, NULL, 2, 2, 1, (esp_advantage_scale)scale, ESP_SUM_THEN_NORMALIZE), ESP_OK);
        cr_expect(memcmp(plain, advantage, sizeof plain) == 0, "scale %d: advantages depend on asking for the deviation", scale);
        for (int i = 0; i < 4; i++) {
            const double expected = scale == ESP_SCALE_BATCH ? sqrt(83.0 / 12) : group[i];
            cr_expect(fabs(deviation[i] - expected) <= 1e-15 * expected * 4, "scale %d, row %d: %.17g", scale, i, deviation[i]);
        }
    }
    cr_assert_eq(esp_advantages(advantage, NULL, deviation, rewards, NULL, 2, 2, 1, ESP_SCALE_GROUP, ESP_NORMALIZE_THEN_SUM), ESP_OK);
    const double a = 0.5 / (sqrt(0.5) + 1e-4), b = 2 / (sqrt(8) + 1e-4), expected = sqrt((2 * a * a + 2 * b * b) / 3);
    for (int i = 0; i < 4; i++)
        cr_expect(fabs(deviation[i] - expected) <= 1e-15 * 4, "row %d: %.17g, expected %.17g", i, deviation[i], expected);
}

Test(advantage, abstaining_leaves_the_mean) {
    const double rewards[] = {1, NAN, 3, NAN, NAN, 5}, weights[] = {2, 10};
    double advantage[3], reward[3];
    cr_assert_eq(esp_advantages(advantage, reward, NULL, rewards, weights, 1, 3, 2, ESP_SCALE_NONE, ESP_SUM_THEN_NORMALIZE), ESP_OK);
    cr_expect(reward[0] == 2 && reward[1] == 6 && reward[2] == 50);
    cr_expect(fabs(advantage[0] - (2 - 58.0 / 3)) <= 1e-14);
    const double silent[] = {1, NAN, 4};
    cr_assert_eq(esp_advantages(advantage, reward, NULL, silent, NULL, 1, 3, 1, ESP_SCALE_GROUP, ESP_SUM_THEN_NORMALIZE), ESP_OK);
    cr_expect(isnan(reward[1]) && advantage[1] == 0);
    cr_expect(fabs(advantage[0] + advantage[2]) <= 1e-15 && advantage[2] > 0);
}

Test(advantage, group_of_one_has_none) {
    const double rewards[] = {5, -3};
    double advantage[2];
    for (int scale = ESP_SCALE_NONE; scale <= ESP_SCALE_BATCH; scale++) {
        cr_assert_eq(esp_advantages(advantage, NULL, NULL, rewards, NULL, 2, 1, 1, (esp_advantage_scale)scale, ESP_SUM_THEN_NORMALIZE),
                     ESP_OK);
        cr_expect(advantage[0] == 0 && advantage[1] == 0);
    }
    cr_expect_eq(esp_advantages(NULL, NULL, NULL, NULL, NULL, 0, 4, 1, ESP_SCALE_NONE, ESP_SUM_THEN_NORMALIZE), ESP_OK);
}

Test(advantage, bad_input_is_refused_by_name) {
    double rewards[] = {0, 1, 2, INFINITY}, advantage[4];
    const double weights[] = {1, NAN};
    cr_expect_eq(esp_advantages(advantage, NULL, NULL, rewards, NULL, 2, 2, 1, ESP_SCALE_NONE, ESP_SUM_THEN_NORMALIZE), ESP_ERR_NONFINITE);
    cr_expect(strstr(esp_last_error(), "row 3"), "%s", esp_last_error());
    rewards[3] = 0;
    cr_expect_eq(esp_advantages(advantage, NULL, NULL, rewards, weights, 1, 2, 2, ESP_SCALE_NONE, ESP_SUM_THEN_NORMALIZE), ESP_ERR_ARG);
    cr_expect(strstr(esp_last_error(), "weight 1"), "%s", esp_last_error());
    cr_expect_eq(esp_advantages(advantage, NULL, NULL, rewards, NULL, 2, 0, 1, ESP_SCALE_NONE, ESP_SUM_THEN_NORMALIZE), ESP_ERR_ARG);
    cr_expect_eq(esp_advantages(advantage, NULL, NULL, rewards, NULL, 2, 2, 1, (esp_advantage_scale)3, ESP_SUM_THEN_NORMALIZE),
                 ESP_ERR_ARG);
    cr_expect_eq(esp_advantages(advantage, NULL, NULL, rewards, NULL, 2, 2, 1, ESP_SCALE_NONE, (esp_advantage_order)2), ESP_ERR_ARG);
    cr_expect_eq(esp_advantages(advantage, NULL, NULL, rewards, NULL, 2, 2, 1, ESP_SCALE_BATCH, ESP_NORMALIZE_THEN_SUM), ESP_ERR_ARG);
    cr_expect(strstr(esp_last_error(), "normalize_then_sum") && strstr(esp_last_error(), "scale"), "%s", esp_last_error());
}
