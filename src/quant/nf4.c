/* NF4: the 16 quantiles of a normal distribution that bitsandbytes fixes (Dettmers et al., 2305.14314).  Code order is value order;
 * the thresholds are the midpoints of neighbouring values, taken in f32. */
#include "quant/quant.h"

const espi_format espi_format_nf4 = {
    .name = "nf4",
    .id = ESP_NF4,
    .values = {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f, -0.18477343022823334f,
               -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
               0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f},
    .flat = true,
    .thresholds = {-0.848096371f, -0.610632896f, -0.45999527f, -0.33967942f, -0.234607399f, -0.137911737f, -0.0455250181f, 0.0397901498f,
                   0.120255247f, 0.203521252f, 0.292013764f, 0.389312536f, 0.501663446f, 0.64278692f, 0.861478448f},
    .code_of_rank = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
};
