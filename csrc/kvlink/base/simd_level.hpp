// Which build of the vector code runs. Every *_simd.cpp is compiled once per level into the
// namespace kvlink::cpu::<level>; the level is chosen at run time, never when building.
//
//   KVLINK_SIMD_DECLARE(void scale_rows(const ScaleParams& params);)  // in the header of an op
//   KVLINK_SIMD_PICK(scale_rows)(params);                             // in its host code
#pragma once

#include <string_view>
#include <vector>

namespace kvlink {

enum class SimdLevel : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

const char* simd_level_name(SimdLevel level);
// Levels that this build has and this CPU runs, lowest first.
std::vector<SimdLevel> supported_simd_levels();

// The level in use: the highest supported one, or what KVLINK_SIMD (portable, avx2, avx512)
// demands. Throws InvalidArgument when KVLINK_SIMD names no level or one that is not supported.
SimdLevel simd_level();
// For tests. Throws InvalidArgument like KVLINK_SIMD.
void set_simd_level(std::string_view name);

template <typename Function>
Function* pick_simd_level(Function* portable, Function* avx2, Function* avx512) {
  switch (simd_level()) {
    case SimdLevel::kAvx512:
      return avx512;
    case SimdLevel::kAvx2:
      return avx2;
    case SimdLevel::kPortable:
      break;
  }
  return portable;
}

}  // namespace kvlink

#if defined(__x86_64__)
#define KVLINK_SIMD_DECLARE(...) \
  namespace portable {           \
  __VA_ARGS__                    \
  }                              \
  namespace avx2 {               \
  __VA_ARGS__                    \
  }                              \
  namespace avx512 {             \
  __VA_ARGS__                    \
  }
#define KVLINK_SIMD_PICK(function) \
  ::kvlink::pick_simd_level(&portable::function, &avx2::function, &avx512::function)
#else
#define KVLINK_SIMD_DECLARE(...) \
  namespace portable {           \
  __VA_ARGS__                    \
  }
#define KVLINK_SIMD_PICK(function) (&portable::function)
#endif
