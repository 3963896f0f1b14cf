/* Double quantisation's scale in two roundings.  It is a function of its own file because backends are compiled with contraction on: inlined
 * there, product and sum would become one fused multiply-add, and the weights would not be those of bitsandbytes. */
#include "kernels/plain.h"

float espi_absmax_restore(float mapped, float nested, float offset) {
    const float centred = mapped * nested;
    return centred + offset;
}
