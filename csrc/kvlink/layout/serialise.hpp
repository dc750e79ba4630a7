// The canonical bytes of a layout (docs/kv_layout.md), as kvlink/layout.py writes them.
#pragma once

#include <array>
#include <cstddef>
#include <string_view>

#include "kvlink/layout/kv_layout.hpp"

namespace kvlink {

inline constexpr uint16_t kLayoutVersion = 1;
inline constexpr size_t kLayoutBytes = 188;

std::array<char, kLayoutBytes> layout_to_bytes(const KVLayout& layout);
// Throws InvalidArgument on anything that is not a valid layout.
KVLayout layout_from_bytes(std::string_view bytes);

}  // namespace kvlink
