#include <algorithm>
#include <vector>

#include "kvlink/base/check.hpp"
#include "kvlink/cuda/append_kv.hpp"
#include "kvlink/cuda/copy_rows.cuh"
#include "kvlink/cuda/error_record.cuh"
#include "kvlink/cuda/launch.cuh"
#include "kvlink/cuda/move_rows.cuh"
#include "kvlink/params/plan_moves.hpp"

namespace kvlink::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kResident = 2;  // blocks on a processor that registers must suffice for

struct AppendArgs {
  LayerMoves moves;
  RopeParams rope;
  const int64_t* slots;
  int64_t num_rows, num_slots;
  int32_t page_size;
  ErrorRecord* errors;
};

// Grid: rows (heads of tokens) in x, planes of layers in y.
template <int kLanes, bool kTurns>
__global__ void __launch_bounds__(kThreads, kResident)
    append_rows(const __grid_constant__ AppendArgs args) {
  const Group<kLanes> group;
  const LayerMove move = args.moves.of(static_cast<int>(blockIdx.y));
  const int64_t step = static_cast<int64_t>(gridDim.x) * (kThreads / kLanes);
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / kLanes) + threadIdx.x / kLanes;
       row < args.num_rows; row += step) {
    const int64_t token = row / move.all.num_heads, head = row % move.all.num_heads;
    const int64_t slot = args.slots[token];
    if (slot == -1) continue;
    if (slot < 0 || slot >= args.num_slots) {
      if (group.lane == 0) record_error(args.errors, BadEntry::kSlots, token, slot);
      continue;
    }
    const RowPlace place{0, token, head, slot / args.page_size, slot % args.page_size, head};
    if constexpr (kTurns) {
      const int64_t position = args.rope.positions[token];
      if (position < 0 || position >= args.rope.num_positions) {
        if (group.lane == 0) record_error(args.errors, BadEntry::kRopePositions, token, position);
        continue;
      }
      if (move.all.model_plane == 0) {
        turn_row(group, move, place, args.rope,
                 args.rope.cos_sin + position * args.rope.stride_position);
        continue;
      }
    }
    move_row(group, move, place);
  }
}

struct CopyArgs {
  LayerMoves moves;
  CopyShape shape;
  Divisor page_size;
  const int64_t* slots;
  uint32_t num_slots;
  ErrorRecord* errors;
};

struct FindSlot {
  using Ids = int64_t;
  const CopyArgs& args;

  __device__ Ids ids(uint32_t token) const { return args.slots[token]; }
  __device__ bool place(Ids slot, uint32_t token, uint32_t head, bool reports,
                        RowPlace* place) const {
    if (slot < 0 || slot >= args.num_slots) {
      if (slot != -1 && reports) record_error(args.errors, BadEntry::kSlots, token, slot);
      return false;
    }
    const auto at = static_cast<uint32_t>(slot);
    const uint32_t page = args.page_size.divide(at);
    *place = {0, token, head, page, at - page * args.page_size.value, head};
    return true;
  }
};

// The same of rows that keep their bytes.
__global__ void __launch_bounds__(kCopyThreads, kCopyResident)
    copy_appended(const __grid_constant__ CopyArgs args) {
  copy_rows(args.moves, args.shape, FindSlot{args});
}

template <bool kTurns>
auto* kernel_for(int lanes) {
  return lanes == 8    ? append_rows<8, kTurns>
         : lanes == 16 ? append_rows<16, kTurns>
                       : append_rows<32, kTurns>;
}

}  // namespace

void append_kv(const std::vector<AppendKVParams>& layers, cudaStream_t stream) {
  if (layers.empty()) return;
  const AppendKVParams& first = layers.front();
  const KVLayout& layout = first.kv.layout;
  std::vector<RowMove> moves;
  for (const AppendKVParams& layer : layers) {
    for (const RowMove& move : plan_append(layer)) moves.push_back(move);
  }
  if (first.rope) check_rope_dims(*first.rope, layout.head_dim);
  report_errors();
  if (first.num_tokens == 0) return;
  int64_t row_bytes = 0;
  for (const RowMove& move : moves) {
    row_bytes = std::max(row_bytes, move.dims * dtype_bytes(move.dst.dtype));
  }
  const int lanes = group_lanes(row_bytes);
  const auto kernel = first.rope ? kernel_for<true>(lanes) : kernel_for<false>(lanes);
  const int64_t num_rows = first.num_tokens * layout.num_kv_heads;
  const int64_t num_slots = first.kv.num_pages * layout.page_size;
  const bool copies = !first.rope && num_slots <= INT32_MAX && copied_by_chunks(moves);
  size_t end = 0;
  for (size_t begin = 0; begin < moves.size(); begin = end) {
    CopyArgs copy{.moves = take_layers(moves, num_planes(layout), begin, &end),
                  .shape = {},
                  .page_size = Divisor::of(layout.page_size),
                  .slots = first.slots,
                  .num_slots = static_cast<uint32_t>(num_slots),
                  .errors = error_record()};
    if (copies && make_copy_shape(copy.moves, num_rows, layout.num_kv_heads, &copy.shape)) {
      const dim3 grid(num_copy_blocks(copy.shape), static_cast<unsigned>(end - begin));
      launch("append_kv", copy_appended, grid, kCopyThreads, 0, stream, copy);
      continue;
    }
    const AppendArgs args{.moves = copy.moves,
                          .rope = first.rope ? *first.rope : RopeParams{},
                          .slots = first.slots,
                          .num_rows = num_rows,
                          .num_slots = num_slots,
                          .page_size = layout.page_size,
                          .errors = error_record()};
    const int64_t blocks = std::min<int64_t>(ceil_div(args.num_rows, kThreads / lanes), 1 << 16);
    const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(end - begin));
    launch("append_kv", kernel, grid, kThreads, 0, stream, args);
  }
}

}  // namespace kvlink::cuda
