// exp and tanh of kLanes floats, within about one unit in the last place.
#pragma once

#include "kvlink/cpu/simd/vec.hpp"

namespace kvlink::cpu::KVLINK_SIMD_LEVEL {

// e^x for x <= 88 of several vectors, side by side. Results below the smallest normal float are 0;
// NaN stays NaN. Not kExact: in fewer steps, with an error of up to 1.4e-8 |x| beside.
template <bool kExact, int kVecs>
KVLINK_INLINE void exp_each(Vec (&x)[kVecs]) {
  // x / ln 2 = n + r with |r| <= 1/2; adding 1.5 * 2^23 rounds to the nearest integer. 127 more,
  // and the last bits of the sum are the exponent of 2^n.
  constexpr float kLog2E = 1.44269502f, kLog2ERest = 1.92596299e-8f, kRound = 12582912.0f + 127.0f;
  // 2^r, exact for r = 0.
  constexpr float kSeries[] = {9.67157725e-3f, 5.55073470e-2f, 2.40222409e-1f, 6.93147004e-1f,
                               1.0f};
  Vec rounded[kVecs], r[kVecs], poly[kVecs];
  KVLINK_UNROLL
  for (int i = 0; i < kVecs; ++i) rounded[i] = x[i] * kLog2E + kRound;
  KVLINK_UNROLL
  for (int i = 0; i < kVecs; ++i) r[i] = x[i] * kLog2E - (rounded[i] - kRound);
  KVLINK_UNROLL
  for (int i = 0; kExact && i < kVecs; ++i) r[i] = x[i] * kLog2ERest + r[i];
  KVLINK_UNROLL
  for (int i = 0; i < kVecs; ++i) poly[i] = r[i] * 1.32646423e-3f + kSeries[0];
  KVLINK_UNROLL
  for (int step = 1; step < 5; ++step) {
    KVLINK_UNROLL
    for (int i = 0; i < kVecs; ++i) poly[i] = poly[i] * r[i] + kSeries[step];
  }
  KVLINK_UNROLL
  for (int i = 0; i < kVecs; ++i) {
    const VecU power = bits_of(rounded[i]) << 23;  // 2^n
    x[i] = select(x[i] < splat(-87.3f), Vec{}, poly[i] * from_bits(power));
  }
}

KVLINK_INLINE Vec exp(Vec x) {
  Vec each[1] = {x};
  exp_each<true>(each);
  return each[0];
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
