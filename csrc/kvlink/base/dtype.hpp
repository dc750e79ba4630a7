// Storage types. The numbers are part of the serialised layout (docs/kv_layout.md): never reuse
// one.
#pragma once

#include <cstdint>

#include "kvlink/base/hd.hpp"

namespace kvlink {

enum class DType : uint8_t {
  kFloat32 = 0,
  kFloat16 = 1,
  kBFloat16 = 2,
  kFloat8E4M3 = 3,  // OCP FP8 E4M3 "fn": no infinities, largest finite 448
  kFloat8E5M2 = 4,  // OCP FP8 E5M2: largest finite 57344
  kInt8 = 5,        // symmetric, values -127..127
  kUInt8 = 6,       // raw bytes of an opaque page
};
inline constexpr int kNumDTypes = 7;

KVLINK_HD constexpr int64_t dtype_bytes(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return 4;
    case DType::kFloat16:
    case DType::kBFloat16:
      return 2;
    default:
      return 1;
  }
}

// Largest magnitude a quantised type represents; a dynamic scale is amax / this. 0: not quantised.
KVLINK_HD float dtype_quant_max(DType dtype) {
  switch (dtype) {
    case DType::kFloat8E4M3:
      return 448.0f;
    case DType::kFloat8E5M2:
      return 57344.0f;
    case DType::kInt8:
      return 127.0f;
    default:
      return 0.0f;
  }
}

inline const char* dtype_name(DType dtype) {
  constexpr const char* kNames[kNumDTypes] = {"float32",     "float16", "bfloat16", "float8_e4m3",
                                              "float8_e5m2", "int8",    "uint8"};
  const auto idx = static_cast<uint8_t>(dtype);
  return idx < kNumDTypes ? kNames[idx] : "unknown";
}

}  // namespace kvlink
