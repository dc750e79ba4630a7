// Scalar conversions between float32 and the storage types, one meaning for host and device.
//
// Rounding is to nearest, ties to even. float16 and bfloat16 overflow to infinity; float8 saturates
// at its largest finite value, infinities included; int8 saturates at -127 and 127. NaN stays NaN
// (its sign and leading payload bits are kept, as x86 and Arm do), except that int8 stores 0.
//
// Everything is integer arithmetic and selects, plus additions of normal numbers: loops over these
// vectorise, and neither flush-to-zero nor denormals-are-zero changes a result.
#pragma once

#include <cstdint>
#include <cstring>

#include "kvlink/base/dtype.hpp"
#include "kvlink/base/hd.hpp"

namespace kvlink {

KVLINK_HD uint32_t float_bits(float value) { return __builtin_bit_cast(uint32_t, value); }
KVLINK_HD float float_from_bits(uint32_t bits) { return __builtin_bit_cast(float, bits); }

// --- to float32 -----------------------------------------------------------------------------

KVLINK_HD float float_from_bfloat16(uint16_t stored) {
  return float_from_bits(static_cast<uint32_t>(stored) << 16);
}

KVLINK_HD float float_from_float16(uint16_t stored) {
  const uint32_t magnitude = static_cast<uint32_t>(stored & 0x7fffu) << 13;
  const uint32_t sign = static_cast<uint32_t>(stored & 0x8000u) << 16;
  // Subnormals: put the mantissa below 2^-14 and subtract 2^-14, which is exact.
  const uint32_t small =
      float_bits(float_from_bits(magnitude + 0x38800000u) - float_from_bits(0x38800000u));
  const uint32_t normal = magnitude + 0x38000000u;
  const uint32_t special = (magnitude + 0x70000000u) | (magnitude > 0x0f800000u ? 0x400000u : 0u);
  const uint32_t finite = magnitude < 0x00800000u ? small : normal;
  return float_from_bits(sign | (magnitude >= 0x0f800000u ? special : finite));
}

KVLINK_HD float float_from_float8_e4m3(uint8_t stored) {
  const uint32_t magnitude = static_cast<uint32_t>(stored & 0x7fu) << 20;
  const uint32_t sign = static_cast<uint32_t>(stored & 0x80u) << 24;
  const uint32_t small =
      float_bits(float_from_bits(magnitude + 0x3c800000u) - float_from_bits(0x3c800000u));
  const uint32_t normal = magnitude + 0x3c000000u;
  const uint32_t finite = magnitude < 0x00800000u ? small : normal;
  return float_from_bits(sign | (magnitude == 0x07f00000u ? 0x7ff00000u : finite));
}

KVLINK_HD float float_from_float8_e5m2(uint8_t stored) {
  return float_from_float16(static_cast<uint16_t>(static_cast<uint32_t>(stored) << 8));
}

KVLINK_HD float float_from_int8(int8_t stored) { return static_cast<float>(stored); }

// --- from float32 ---------------------------------------------------------------------------

KVLINK_HD uint16_t bfloat16_from_float(float value) {
  const uint32_t bits = float_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t nan = (bits >> 16) | 0x40u;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
}

KVLINK_HD uint16_t float16_from_float(float value) {
  const uint32_t bits = float_bits(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t sign = (bits >> 16) & 0x8000u;
  // 2^16 and more is infinity; so is what rounds up to it.
  const uint32_t bounded = magnitude < 0x47800000u ? magnitude : 0x47800000u;
  const uint32_t normal = (bounded - 0x38000000u + 0xfffu + ((bounded >> 13) & 1u)) >> 13;
  // Below 2^-14: adding 0.5 leaves the rounded subnormal in the low bits.
  const uint32_t small = float_bits(float_from_bits(bounded) + 0.5f) - 0x3f000000u;
  const uint32_t finite = magnitude < 0x38800000u ? small : normal;
  const uint32_t nan = 0x7e00u | ((magnitude >> 13) & 0x1ffu);
  return static_cast<uint16_t>(sign | (magnitude > 0x7f800000u ? nan : finite));
}

KVLINK_HD uint8_t float8_e4m3_from_float(float value) {
  const uint32_t bits = float_bits(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t sign = (bits >> 24) & 0x80u;
  const uint32_t bounded = magnitude < 0x43e00000u ? magnitude : 0x43e00000u;  // 448
  const uint32_t normal = (bounded - 0x3c000000u + 0x7ffffu + ((bounded >> 20) & 1u)) >> 20;
  const uint32_t small = float_bits(float_from_bits(bounded) + 16384.0f) - 0x46800000u;
  const uint32_t finite = magnitude < 0x3c800000u ? small : normal;
  return static_cast<uint8_t>(sign | (magnitude > 0x7f800000u ? 0x7fu : finite));
}

KVLINK_HD uint8_t float8_e5m2_from_float(float value) {
  const uint32_t bits = float_bits(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t sign = (bits >> 24) & 0x80u;
  const uint32_t bounded = magnitude < 0x47600000u ? magnitude : 0x47600000u;  // 57344
  const uint32_t normal = (bounded - 0x38000000u + 0xfffffu + ((bounded >> 21) & 1u)) >> 21;
  const uint32_t small = float_bits(float_from_bits(bounded) + 128.0f) - 0x43000000u;
  const uint32_t finite = magnitude < 0x38800000u ? small : normal;
  return static_cast<uint8_t>(sign | (magnitude > 0x7f800000u ? 0x7fu : finite));
}

KVLINK_HD int8_t int8_from_float(float value) {
  const uint32_t bits = float_bits(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t bounded = magnitude < 0x42fe0000u ? magnitude : 0x42fe0000u;  // 127
  const uint32_t finite = magnitude > 0x7f800000u ? 0u : bounded | (bits & 0x80000000u);
  // Adding 1.5 * 2^23 leaves the rounded integer in the low bits.
  return static_cast<int8_t>(float_bits(float_from_bits(finite) + 12582912.0f));
}

// --- storage types as template arguments -----------------------------------------------------

template <DType kDType>
struct Storage;

template <>
struct Storage<DType::kFloat32> {
  using Type = float;
  KVLINK_HD static float load(Type stored) { return stored; }
  KVLINK_HD static Type store(float value) { return value; }
};
template <>
struct Storage<DType::kFloat16> {
  using Type = uint16_t;
  KVLINK_HD static float load(Type stored) { return float_from_float16(stored); }
  KVLINK_HD static Type store(float value) { return float16_from_float(value); }
};
template <>
struct Storage<DType::kBFloat16> {
  using Type = uint16_t;
  KVLINK_HD static float load(Type stored) { return float_from_bfloat16(stored); }
  KVLINK_HD static Type store(float value) { return bfloat16_from_float(value); }
};
template <>
struct Storage<DType::kFloat8E4M3> {
  using Type = uint8_t;
  KVLINK_HD static float load(Type stored) { return float_from_float8_e4m3(stored); }
  KVLINK_HD static Type store(float value) { return float8_e4m3_from_float(value); }
};
template <>
struct Storage<DType::kFloat8E5M2> {
  using Type = uint8_t;
  KVLINK_HD static float load(Type stored) { return float_from_float8_e5m2(stored); }
  KVLINK_HD static Type store(float value) { return float8_e5m2_from_float(value); }
};
template <>
struct Storage<DType::kInt8> {
  using Type = int8_t;
  KVLINK_HD static float load(Type stored) { return float_from_int8(stored); }
  KVLINK_HD static Type store(float value) { return int8_from_float(value); }
};

// --- quantisation ---------------------------------------------------------------------------

// The scale that a row quantised on the way in gets, from the largest magnitude among its finite
// values. 1 when there is nothing to scale: zeros, or values so small that the scale would be
// subnormal; and for types that are not quantised.
KVLINK_HD float dynamic_scale(float amax, DType dtype) {
  const float largest = dtype_quant_max(dtype);
  const float scale = largest > 0.0f ? amax / largest : 0.0f;
  return scale >= 1.17549435e-38f ? scale : 1.0f;
}

}  // namespace kvlink
