#include "kvlink/cpu/rope.hpp"

#include <algorithm>
#include <vector>

#include "kvlink/base/check.hpp"
#include "kvlink/base/math.hpp"
#include "kvlink/base/threads.hpp"

namespace kvlink::cpu {

namespace {

constexpr int64_t kTaskElements = 32 << 10;

}  // namespace

void check_rope(const RopeParams& rope, int64_t num_tokens, int64_t head_dim,
                const int64_t* slots) {
  check_rope_dims(rope, head_dim);
  for (int64_t t = 0; t < num_tokens; ++t) {
    if (slots && slots[t] < 0) continue;
    KVLINK_CHECK(rope.positions[t] >= 0 && rope.positions[t] < rope.num_positions,
                 "rope.positions[", t, "]: expected a row of cos_sin, 0 to ",
                 rope.num_positions - 1, "; got ", rope.positions[t]);
  }
}

void apply_rope(const ApplyRopeParams& params) {
  check_rope(params.rope, params.num_tokens, params.head_dim, nullptr);
  const auto rotate = KVLINK_SIMD_PICK(rotate_token_in_place);
  const int64_t token_elements = int64_t{params.num_heads} * params.head_dim;
  const int64_t step = std::max<int64_t>(1, kTaskElements / std::max<int64_t>(1, token_elements));
  const auto run = [&](int64_t task) {
    std::vector<float> row(params.head_dim);
    const int64_t end = std::min(params.num_tokens, (task + 1) * step);
    for (int64_t t = task * step; t < end; ++t) rotate(params, t, row.data());
  };
  const int64_t num_tasks = ceil_div(params.num_tokens, step);
  if (num_tasks == 1) return run(0);
  parallel_for(num_tasks, run);
}

}  // namespace kvlink::cpu
