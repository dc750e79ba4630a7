// exp and tanh of kLanes floats, within about one unit in the last place.
#pragma once

#include "kvlink/cpu/simd/vec.hpp"

namespace kvlink::cpu::KVLINK_SIMD_LEVEL {

// e^x for x <= 88. Results below the smallest normal float are 0; NaN stays NaN.
KVLINK_INLINE Vec exp(Vec x) {
  // x / ln 2 = n + r with |r| <= 1/2; adding 1.5 * 2^23 rounds to the nearest integer.
  constexpr float kLog2E = 1.44269502f, kLog2ERest = 1.92596299e-8f;
  const Vec rounded = x * kLog2E + 12582912.0f;
  const Vec n = rounded - 12582912.0f;
  const Vec r = x * kLog2ERest + (x * kLog2E - n);
  // 2^r, exact for r = 0.
  Vec poly = r * 1.32646423e-3f + 9.67157725e-3f;
  poly = poly * r + 5.55073470e-2f;
  poly = poly * r + 2.40222409e-1f;
  poly = poly * r + 6.93147004e-1f;
  poly = poly * r + 1.0f;
  const VecU power = (bits_of(rounded) + 127u) << 23;  // 2^n
  return select(x < splat(-87.3f), Vec{}, poly * from_bits(power));
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
