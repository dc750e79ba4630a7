// Products of warp groups (wgmma), warp by warp: each has 16 of the group's 64 rows.
//
// A product may read its operands at any time from its call to the wait that it has ended by, and
// that is what happens here: at once, or in the wait, as the schedule draws. Its sums are NaN in
// between. So shared memory that is reused too early, and registers that are touched too early,
// give wrong results under some schedule.
#pragma once

#include <cstdint>

namespace kvlink::emulation {

struct ProductArgs {
  float* sums;           // [num_sums], of the calling lane
  int num_sums;          // half of the columns
  const uint32_t* rows;  // [4], of the calling lane; null: by descriptor
  uint64_t rows_descriptor;
  uint64_t columns_descriptor;
  bool columns_across;  // rows of the second matrix in memory are those of its first axis
  bool adds;            // to what sums hold
  float (*load)(uint16_t);
};

// By all lanes of a warp. Throws unless begin_products came before it, where that is needed.
void multiply(const ProductArgs& args);
void begin_products();
void commit_products();
void wait_products(int groups_left);

// The 16 bytes of a swizzled row: bits 4 to 6 of an address are exchanged for their xor with the
// three above.
inline uint32_t swizzle(uint32_t address) { return address ^ (address >> 3 & 0x70); }

}  // namespace kvlink::emulation
