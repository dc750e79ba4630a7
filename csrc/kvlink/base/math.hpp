#pragma once

#include <cstdint>

#include "kvlink/base/hd.hpp"

namespace kvlink {

KVLINK_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
KVLINK_HD int64_t round_up(int64_t a, int64_t multiple) { return ceil_div(a, multiple) * multiple; }

}  // namespace kvlink
