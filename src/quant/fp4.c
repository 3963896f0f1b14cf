/* FP4: bitsandbytes' 4-bit float, sign in bit 3.  Codes 0..7 are not in value order, and code 8 is a second zero.
 * The thresholds are the midpoints of neighbouring values, taken in f32: 16-bit inputs do fall on them.  There is one less than codes. */
#include "quant/quant.h"

#include <math.h>

const espi_format espi_format_fp4 = {
    .name = "fp4",
    .id = ESP_FP4,
    .values = {0.0f, 0.0052083334885537624f, 0.6666666865348816f, 1.0f, 0.3333333432674408f, 0.5f, 0.1666666716337204f, 0.25f, 0.0f,
               -0.0052083334885537624f, -0.6666666865348816f, -1.0f, -0.3333333432674408f, -0.5f, -0.1666666716337204f, -0.25f},
    .flat = true,
    .thresholds = {-0.833333373f, -0.583333373f, -0.416666687f, -0.291666687f, -0.208333343f, -0.0859375f, -0.00260416674f, 0.00260416674f,
                   0.0859375f, 0.208333343f, 0.291666687f, 0.416666687f, 0.583333373f, 0.833333373f, INFINITY},
    .code_of_rank = {11, 10, 13, 12, 15, 14, 9, 0, 1, 6, 7, 4, 5, 2, 3, 3},
};
