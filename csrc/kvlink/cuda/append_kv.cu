#include <algorithm>
#include <vector>

#include "kvlink/base/check.hpp"
#include "kvlink/cuda/append_kv.hpp"
#include "kvlink/cuda/error_record.cuh"
#include "kvlink/cuda/launch.cuh"
#include "kvlink/cuda/move_rows.cuh"
#include "kvlink/params/plan_moves.hpp"

namespace kvlink::cuda {

namespace {

constexpr int kThreads = 256;

struct AppendArgs {
  RowMove planes[2];
  const int64_t* slots;
  int64_t num_rows, num_slots;
  int32_t page_size;
  ErrorRecord* errors;
};

// Grid: rows (heads of tokens) in x, planes in y.
template <int kLanes>
__global__ void __launch_bounds__(kThreads) append_rows(const __grid_constant__ AppendArgs args) {
  const Group<kLanes> group;
  const RowMove& move = args.planes[blockIdx.y];
  const int64_t step = static_cast<int64_t>(gridDim.x) * (kThreads / kLanes);
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / kLanes) + threadIdx.x / kLanes;
       row < args.num_rows; row += step) {
    const int64_t token = row / move.num_heads, head = row % move.num_heads;
    const int64_t slot = args.slots[token];
    if (slot == -1) continue;
    if (slot < 0 || slot >= args.num_slots) {
      if (group.lane == 0) record_error(args.errors, BadEntry::kSlots, token, slot);
      continue;
    }
    move_row(group, move, {0, token, head, slot / args.page_size, slot % args.page_size, head});
  }
}

}  // namespace

void append_kv(const AppendKVParams& params, cudaStream_t stream) {
  const std::vector<RowMove> moves = plan_append(params);
  report_errors();
  if (params.num_tokens == 0) return;
  AppendArgs args{.planes = {},
                  .slots = params.slots,
                  .num_rows = params.num_tokens * params.kv.layout.num_kv_heads,
                  .num_slots = params.kv.num_pages * params.kv.layout.page_size,
                  .page_size = params.kv.layout.page_size,
                  .errors = error_record()};
  int64_t row_bytes = 0;
  for (size_t i = 0; i < moves.size(); ++i) {
    args.planes[i] = moves[i];
    row_bytes = std::max(row_bytes, moves[i].dims * dtype_bytes(moves[i].dst.dtype));
  }
  const int lanes = group_lanes(row_bytes);
  const int64_t blocks = std::min<int64_t>(ceil_div(args.num_rows, kThreads / lanes), 1 << 16);
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(moves.size()));
  const auto kernel = lanes == 8 ? append_rows<8> : lanes == 16 ? append_rows<16> : append_rows<32>;
  launch("append_kv", kernel, grid, kThreads, 0, stream, args);
}

}  // namespace kvlink::cuda
