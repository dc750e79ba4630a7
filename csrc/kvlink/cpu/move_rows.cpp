#include "kvlink/cpu/move_rows.hpp"

#include <algorithm>
#include <atomic>

#include "kvlink/base/check.hpp"
#include "kvlink/base/math.hpp"
#include "kvlink/base/threads.hpp"
#include "kvlink/params/plan_moves.hpp"

namespace kvlink::cpu {

namespace {

constexpr int64_t kTaskBytes = 256 << 10;
constexpr int64_t kInlineTaskBytes = 1 << 20;  // no other thread takes a part of them

}  // namespace

int64_t token_bytes(const RowMove& move) {
  return move.num_planes * move.num_heads * move.dims * dtype_bytes(move.dst.dtype);
}

bool moves_verbatim(const RowMove& move) {
  if (move.src.dtype != move.dst.dtype || move.src.token_scale != move.dst.token_scale)
    return false;
  if (move.src.token_scale) return true;
  for (int32_t head = 0; head < move.num_heads; ++head) {
    const float src = move.src.scale ? *move.src.row_scale(0, 0, move.src_head + head) : 1.0f;
    const float dst = move.dst.scale ? *move.dst.row_scale(0, 0, move.dst_head + head) : 1.0f;
    if (src != dst) return false;
  }
  return true;
}

std::vector<RowMove> join_planes(const std::vector<RowMove>& moves) {
  const auto same_rows = [](const RowPlane& k, const RowPlane& v) {
    return k.dtype == v.dtype && k.at.stride_page == v.at.stride_page &&
           k.at.stride_slot == v.at.stride_slot && k.at.stride_head == v.at.stride_head &&
           k.at.stride_dim == 1 && v.at.stride_dim == 1 && !k.token_scale && !v.token_scale;
  };
  const auto same_pages = [&](const RowPlane& k, const RowPlane& v) {
    const int64_t page_bytes = k.at.stride_page * dtype_bytes(k.dtype);
    return same_rows(k, v) && v.data > k.data && v.data - k.data < page_bytes;
  };
  std::vector<RowMove> joined;
  for (size_t i = 0; i + 1 < moves.size(); i += 2) {
    RowMove move = moves[i];
    const RowMove& next = moves[i + 1];
    const bool at_rest = !move.src.data;
    const bool joins =
        next.model_plane == 1 && move.dims == next.dims && same_pages(move.dst, next.dst) &&
        (at_rest || (move.verbatim && next.verbatim && same_pages(move.src, next.src)));
    if (!joins) return moves;
    move.num_planes = 2;
    move.src_plane_bytes = at_rest ? 0 : next.src.data - move.src.data;
    move.dst_plane_bytes = next.dst.data - move.dst.data;
    joined.push_back(move);
  }
  return moves.size() % 2 == 0 ? joined : moves;
}

void check_run(const TokenRun& run, int64_t num_tokens, const LayerView& layer, const char* name) {
  const int64_t page_size = layer.layout.page_size;
  check_run_bounds(run, num_tokens, page_size, name);
  if (num_tokens == 0) return;
  const int64_t end = ceil_div(run.first_slot + num_tokens, page_size);
  for (int64_t i = run.first_slot / page_size; i < end; ++i) {
    const int32_t page = run.pages[i];
    if (page >= 0 && page < layer.num_pages) continue;
    throw PageTableError(concat(name, "[", i, "]: expected a page in [0, ", layer.num_pages,
                                "); got ", page, page == -1 ? " (unmapped)" : ""));
  }
}

int64_t box_tokens(const std::vector<RowMove>& moves) {
  int64_t limit = INT32_MAX;
  for (const RowMove& move : moves) limit = std::min(limit, kTaskBytes / token_bytes(move));
  return std::max<int64_t>(limit, 1);
}

uint64_t for_each_box(const std::vector<RowMove>& moves, int64_t num_tokens,
                      const BoxPlanner& planner, const std::function<RowFunction>& function) {
  if (moves.empty() || num_tokens == 0) return 0;
  int64_t num_bytes = 0;
  for (const RowMove& move : moves) num_bytes += num_tokens * token_bytes(move);
  // Every task takes a layer's planes and a stretch of tokens, one plane after the other: K and V
  // of a page are near each other, so the second finds the page's addresses translated.
  const int64_t num_planes = moves.size() > 1 && moves[1].model_plane == 1 ? 2 : 1;
  const int64_t num_layers = ceil_div(moves.size(), num_planes);
  const int64_t task_bytes = runs_inline() ? kInlineTaskBytes : kTaskBytes;
  const int64_t parts = std::clamp<int64_t>(num_bytes / num_layers / task_bytes, 1, num_tokens);
  const int64_t tokens_per_part = ceil_div(num_tokens, parts);
  std::atomic<uint64_t> sum{0};
  const auto run_part = [&](int64_t task) {
    thread_local std::vector<RowBox> boxes;
    boxes.clear();
    const int64_t first = task / num_layers * tokens_per_part;
    planner(first, std::min(tokens_per_part, num_tokens - first), boxes);
    const RowMove* layer = &moves[task % num_layers * num_planes];
    uint64_t part_sum = 0;
    for (int64_t plane = 0; plane < num_planes; ++plane) {
      part_sum += function(layer[plane], boxes.data(), std::ssize(boxes));
    }
    sum.fetch_add(part_sum, std::memory_order_relaxed);
  };
  const int64_t num_tasks = num_layers * ceil_div(num_tokens, tokens_per_part);
  if (num_bytes < kTaskBytes) {  // not worth waking a thread
    for (int64_t task = 0; task < num_tasks; ++task) run_part(task);
  } else {
    parallel_for(num_tasks, run_part);
  }
  return sum;
}

}  // namespace kvlink::cpu
