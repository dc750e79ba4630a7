#include "kvlink/cpu/append_kv.hpp"

#include <algorithm>
#include <vector>

#include "kvlink/base/check.hpp"
#include "kvlink/cpu/move_rows.hpp"
#include "kvlink/params/plan_moves.hpp"

namespace kvlink::cpu {

namespace {

void check_slots(const AppendKVParams& params) {
  const int64_t num_slots = params.kv.num_pages * params.kv.layout.page_size;
  for (int64_t t = 0; t < params.num_tokens; ++t) {
    const int64_t slot = params.slots[t];
    KVLINK_CHECK(slot >= -1 && slot < num_slots, "slots[", t, "]: expected -1 or a slot in [0, ",
                 num_slots, "); got ", slot);
  }
}

// Tokens that go to consecutive slots of a page make one box.
std::vector<RowBox> plan_boxes(const AppendKVParams& params, int64_t max_tokens) {
  const int64_t page_size = params.kv.layout.page_size;
  std::vector<RowBox> boxes;
  for (int64_t t = 0; t < params.num_tokens; ++t) {
    const int64_t slot = params.slots[t];
    if (slot < 0) continue;
    if (t > 0 && !boxes.empty() && params.slots[t - 1] == slot - 1 && slot % page_size != 0 &&
        boxes.back().num_tokens < max_tokens) {
      ++boxes.back().num_tokens;
      continue;
    }
    boxes.push_back({.src_page = 0,
                     .src_slot = t,
                     .dst_page = slot / page_size,
                     .dst_slot = slot % page_size,
                     .num_tokens = 1});
  }
  return boxes;
}

}  // namespace

void append_kv(const AppendKVParams& params) {
  std::vector<RowMove> moves = plan_append(params);
  check_slots(params);
  for (RowMove& move : moves) move.verbatim = moves_verbatim(move);
  for_each_box(moves, plan_boxes(params, box_tokens(moves)), KVLINK_SIMD_PICK(move_rows));
}

}  // namespace kvlink::cpu
