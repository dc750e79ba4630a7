#include <algorithm>
#include <vector>

#include "kvlink/cuda/error_record.cuh"
#include "kvlink/cuda/launch.cuh"
#include "kvlink/cuda/move_rows.cuh"
#include "kvlink/cuda/relayout_pages.hpp"
#include "kvlink/cuda/scratch.hpp"
#include "kvlink/params/plan_moves.hpp"

namespace kvlink::cuda {

namespace {

constexpr int kThreads = 256;

struct Side {
  const int32_t* pages = nullptr;
  int64_t first_slot = 0, num_pages = 0;  // num_pages: of the pool
  int32_t page_size = 1;
  BadEntry name = BadEntry::kPages;

  // False when the entry names no page of the pool.
  __device__ bool locate(int64_t token, int64_t* page, int64_t* slot, bool report,
                         ErrorRecord* errors) const {
    const int64_t at = first_slot + token, entry = at / page_size;
    *page = pages[entry];
    *slot = at % page_size;
    if (*page >= 0 && *page < num_pages) return true;
    if (report) record_error(errors, name, entry, *page);
    return false;
  }
};

struct MoveArgs {
  const RowMove* moves;  // [gridDim.y]
  Side src, dst;
  int64_t num_rows, token_position;
  int32_t num_heads;
  unsigned long long* digest;  // null: none
  ErrorRecord* errors;
};

// Grid: rows (heads of tokens) in x, planes of layers in y.
template <int kLanes, bool kMove>
__global__ void __launch_bounds__(kThreads) move_rows(const __grid_constant__ MoveArgs args) {
  const Group<kLanes> group;
  const RowMove& move = args.moves[blockIdx.y];
  uint64_t sum = 0;
  const int64_t step = static_cast<int64_t>(gridDim.x) * (kThreads / kLanes);
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / kLanes) + threadIdx.x / kLanes;
       row < args.num_rows; row += step) {
    const int64_t token = row / args.num_heads, head = row % args.num_heads;
    RowPlace place{0, 0, move.src_head + head, 0, 0, move.dst_head + head};
    const bool report = group.lane == 0;
    if (!args.dst.locate(token, &place.dst_page, &place.dst_slot, report, args.errors)) continue;
    if constexpr (kMove) {
      if (!args.src.locate(token, &place.src_page, &place.src_slot, report, args.errors)) continue;
      move_row(group, move, place);
    }
    if (!args.digest) continue;
    group.sync();  // the row's lanes see what the others wrote
    sum += digest_row(group, move, place, move.model_head + static_cast<int32_t>(head),
                      args.token_position + token);
  }
  if (!args.digest) return;
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    sum += group.exchange(sum, distance);
  }
  if (group.lane == 0 && sum != 0) atomicAdd(args.digest, static_cast<unsigned long long>(sum));
}

template <bool kMove>
auto* kernel_for(int lanes) {
  return lanes == 8    ? move_rows<8, kMove>
         : lanes == 16 ? move_rows<16, kMove>
                       : move_rows<32, kMove>;
}

RelayoutResult run(const std::vector<RowMove>& moves, MoveArgs args, int64_t num_tokens,
                   bool with_source, bool with_digest, cudaStream_t stream) {
  report_errors();
  if (num_tokens == 0) return {};
  const size_t moves_bytes = moves.size() * sizeof(RowMove);
  const Scratch scratch(8 + moves_bytes, stream);
  check_cuda(cudaMemcpyAsync(scratch.data() + 8, moves.data(), moves_bytes, cudaMemcpyHostToDevice,
                             stream),
             "cudaMemcpyAsync");
  if (with_digest) check_cuda(cudaMemsetAsync(scratch.data(), 0, 8, stream), "cudaMemsetAsync");
  args.moves = reinterpret_cast<const RowMove*>(scratch.data() + 8);
  args.num_heads = moves[0].num_heads;
  args.num_rows = num_tokens * args.num_heads;
  args.digest = with_digest ? reinterpret_cast<unsigned long long*>(scratch.data()) : nullptr;
  args.errors = error_record();
  int64_t row_bytes = 0;
  for (const RowMove& move : moves) {
    row_bytes = std::max(row_bytes, move.dims * dtype_bytes(move.dst.dtype));
  }
  const int lanes = group_lanes(row_bytes);
  const int64_t blocks = std::min<int64_t>(ceil_div(args.num_rows, kThreads / lanes), 1 << 16);
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(moves.size()));
  const auto kernel = with_source ? kernel_for<true>(lanes) : kernel_for<false>(lanes);
  launch("relayout_pages", kernel, grid, kThreads, 0, stream, args);
  RelayoutResult result{.rows = static_cast<uint64_t>(args.num_rows) * moves.size(), .digest = 0};
  if (with_digest) {
    check_cuda(cudaMemcpyAsync(&result.digest, scratch.data(), 8, cudaMemcpyDeviceToHost, stream),
               "cudaMemcpyAsync");
    check_cuda(cudaStreamSynchronize(stream), "relayout_pages");
    report_errors();
  }
  return result;
}

Side make_side(const TokenRun& run, const LayerView& layer, BadEntry name) {
  return {run.pages, run.first_slot, layer.num_pages, layer.layout.page_size, name};
}

}  // namespace

RelayoutResult relayout_pages(const RelayoutParams& params, cudaStream_t stream) {
  const std::vector<RowMove> moves = plan_moves(params);
  const LayerView& src = params.src_layers[0];
  const LayerView& dst = params.dst_layers[0];
  check_run_bounds(params.src, params.num_tokens, src.layout.page_size, "src_pages");
  check_run_bounds(params.dst, params.num_tokens, dst.layout.page_size, "dst_pages");
  MoveArgs args{};
  args.src = make_side(params.src, src, BadEntry::kSrcPages);
  args.dst = make_side(params.dst, dst, BadEntry::kDstPages);
  args.token_position = params.token_position;
  return run(moves, args, params.num_tokens, true, params.with_digest, stream);
}

RelayoutResult digest_pages(const DigestParams& params, cudaStream_t stream) {
  const std::vector<RowMove> moves = plan_digests(params);
  const LayerView& layer = params.layers[0];
  check_run_bounds(params.run, params.num_tokens, layer.layout.page_size, "pages");
  MoveArgs args{};
  args.dst = make_side(params.run, layer, BadEntry::kPages);
  args.token_position = params.token_position;
  return run(moves, args, params.num_tokens, false, true, stream);
}

}  // namespace kvlink::cuda
