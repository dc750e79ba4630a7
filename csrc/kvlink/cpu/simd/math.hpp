// exp and tanh of kLanes floats, within about one unit in the last place.
#pragma once

#include "kvlink/cpu/simd/vec.hpp"

namespace kvlink::cpu::KVLINK_SIMD_LEVEL {

// e^x for x <= 88. Results below the smallest normal float are 0; NaN stays NaN.
KVLINK_INLINE Vec exp(Vec x) {
  // x = n * ln 2 + r with |r| <= ln 2 / 2; adding 1.5 * 2^23 rounds to the nearest integer.
  const Vec rounded = x * 1.44269504f + 12582912.0f;
  const Vec n = rounded - 12582912.0f;
  const Vec r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  Vec poly = (r * 1.98412698e-4f + 1.38888889e-3f) * r + 8.33333333e-3f;
  poly = poly * r + 4.16666667e-2f;
  poly = poly * r + 1.66666667e-1f;
  poly = poly * r + 0.5f;
  poly = (poly * r) * r + r;
  const VecU power = (bits_of(rounded) + 127u) << 23;  // 2^n
  const Vec value = (poly + 1.0f) * from_bits(power);
  return select(x < splat(-87.3f), Vec{}, value);
}

// tanh(x): a series near 0, where 1 - 2 / (e^2x + 1) would cancel.
KVLINK_INLINE Vec tanh(Vec x) {
  const Vec magnitude = from_bits(bits_of(x) & 0x7fffffffu);
  const VecU sign = bits_of(x) & 0x80000000u;
  const Vec square = x * x;
  Vec series = square * -8.86323553e-3f + 2.18694885e-2f;
  series = series * square - 5.39682540e-2f;
  series = series * square + 1.33333333e-1f;
  series = series * square - 3.33333333e-1f;
  series = (series * square) * x + x;
  const Vec bounded = select(magnitude > splat(10.0f), splat(10.0f), magnitude);
  const Vec large = 1.0f - 2.0f / (exp(2.0f * bounded) + 1.0f);
  const Vec signed_large = from_bits(bits_of(large) | sign);
  return select(magnitude < splat(0.3f), series, signed_large);
}

}  // namespace kvlink::cpu::KVLINK_SIMD_LEVEL
