#include "kvlink/base/simd_level.hpp"

#include <atomic>
#include <cstdlib>
#include <string>

#include "kvlink/base/check.hpp"

namespace kvlink {

namespace {

constexpr SimdLevel kLevels[] = {SimdLevel::kPortable, SimdLevel::kAvx2, SimdLevel::kAvx512};

bool cpu_supports([[maybe_unused]] SimdLevel level) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (level == SimdLevel::kAvx2) return avx2;
  if (level == SimdLevel::kAvx512) {
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
#endif
  return level == SimdLevel::kPortable;
}

SimdLevel checked_level(std::string_view name, const char* argument) {
  std::string supported;
  for (const SimdLevel level : supported_simd_levels()) {
    if (name == simd_level_name(level)) return level;
    supported += concat(supported.empty() ? "" : ", ", simd_level_name(level));
  }
  throw InvalidArgument(concat(argument, ": expected a level that this CPU runs (", supported,
                               "); got '", name, "'"));
}

std::atomic<int> current_level{-1};

}  // namespace

const char* simd_level_name(SimdLevel level) {
  constexpr const char* kNames[] = {"portable", "avx2", "avx512"};
  return kNames[static_cast<int>(level)];
}

std::vector<SimdLevel> supported_simd_levels() {
  std::vector<SimdLevel> levels;
  for (const SimdLevel level : kLevels) {
    if (cpu_supports(level)) levels.push_back(level);
  }
  return levels;
}

SimdLevel simd_level() {
  int level = current_level.load(std::memory_order_relaxed);
  if (level < 0) {
    const char* wanted = std::getenv("KVLINK_SIMD");
    level = static_cast<int>(wanted && *wanted ? checked_level(wanted, "KVLINK_SIMD")
                                               : supported_simd_levels().back());
    current_level.store(level, std::memory_order_relaxed);
  }
  return static_cast<SimdLevel>(level);
}

void set_simd_level(std::string_view name) {
  current_level.store(static_cast<int>(checked_level(name, "simd_level")),
                      std::memory_order_relaxed);
}

}  // namespace kvlink
