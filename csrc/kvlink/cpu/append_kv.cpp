#include "kvlink/cpu/append_kv.hpp"

#include <algorithm>
#include <vector>

#include "kvlink/base/check.hpp"
#include "kvlink/cpu/move_rows.hpp"
#include "kvlink/cpu/rope.hpp"
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
void plan_boxes(const AppendKVParams& params, int64_t max_tokens, int64_t first, int64_t count,
                std::vector<RowBox>& boxes) {
  const int64_t page_size = params.kv.layout.page_size;
  for (int64_t t = first; t < first + count; ++t) {
    const int64_t slot = params.slots[t];
    if (slot < 0) continue;
    if (t > first && !boxes.empty() && params.slots[t - 1] == slot - 1 && slot % page_size != 0 &&
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
}

// Floats of turned keys that wait in the first cache to be stored.
constexpr int64_t kTurnedFloats = 4 << 10;

// move_rows, with the keys of `source` turned on the way.
void move_turned(const ApplyRopeParams& source, const RowMove& move, const RowBox* boxes,
                 int64_t num_boxes) {
  const auto rotate = KVLINK_SIMD_PICK(rotate_token);
  const auto store = KVLINK_SIMD_PICK(move_rows);
  const int64_t token_floats = int64_t{source.num_heads} * source.head_dim;
  const int64_t max_tokens = std::max<int64_t>(1, kTurnedFloats / token_floats);
  thread_local std::vector<float> turned;
  if (static_cast<int64_t>(turned.size()) < max_tokens * token_floats) {
    turned.resize(max_tokens * token_floats);
  }
  RowMove from = move;
  from.src = RowPlane{};
  from.src.data = reinterpret_cast<char*>(turned.data());
  from.src.at = {.stride_slot = token_floats, .stride_head = source.head_dim, .stride_dim = 1};
  from.verbatim = moves_verbatim(from);
  std::vector<RowBox> waiting;
  int64_t num_turned = 0;
  const auto flush = [&] {
    store(from, waiting.data(), waiting.size());
    waiting.clear();
    num_turned = 0;
  };
  for (int64_t i = 0; i < num_boxes; ++i) {
    RowBox rest = boxes[i];
    while (rest.num_tokens > 0) {
      RowBox part = rest;
      part.num_tokens = std::min(rest.num_tokens, max_tokens - num_turned);
      part.src_slot = num_turned;
      for (int64_t t = 0; t < part.num_tokens; ++t) {
        rotate(source, rest.src_slot + t, turned.data() + num_turned++ * token_floats);
      }
      waiting.push_back(part);
      rest.src_slot += part.num_tokens;
      rest.dst_slot += part.num_tokens;
      rest.num_tokens -= part.num_tokens;
      if (num_turned == max_tokens) flush();
    }
  }
  if (!waiting.empty()) flush();
}

ApplyRopeParams keys_of(const AppendKVParams& params) {
  return {.x = params.k,
          .dtype = params.dtype,
          .x_stride_token = params.k_stride_token,
          .x_stride_head = params.k_stride_head,
          .num_tokens = params.num_tokens,
          .num_heads = params.kv.layout.num_kv_heads,
          .head_dim = params.kv.layout.head_dim,
          .rope = *params.rope};
}

}  // namespace

void append_kv(const std::vector<AppendKVParams>& layers) {
  if (layers.empty()) return;
  const AppendKVParams& first = layers.front();
  std::vector<RowMove> moves;
  for (const AppendKVParams& layer : layers) {
    for (const RowMove& move : plan_append(layer)) {
      moves.push_back(move);
      moves.back().verbatim = moves_verbatim(move);
    }
  }
  check_slots(first);
  if (first.rope) {
    check_rope(*first.rope, first.num_tokens, first.kv.layout.head_dim, first.slots);
  }
  const int64_t planes = num_planes(first.kv.layout);
  const auto store = KVLINK_SIMD_PICK(move_rows);
  const auto write = [&](const RowMove& move, const RowBox* boxes, int64_t num_boxes) -> uint64_t {
    if (first.rope && move.model_plane == 0) {
      const int64_t layer = (&move - moves.data()) / planes;
      move_turned(keys_of(layers[layer]), move, boxes, num_boxes);
      return 0;
    }
    return store(move, boxes, num_boxes);
  };
  const int64_t max_tokens = box_tokens(moves);
  const auto planner = [&](int64_t token, int64_t count, std::vector<RowBox>& boxes) {
    plan_boxes(first, max_tokens, token, count, boxes);
  };
  for_each_box(moves, first.num_tokens, planner, write);
}

}  // namespace kvlink::cpu
