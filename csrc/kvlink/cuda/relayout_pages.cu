#include <algorithm>
#include <optional>
#include <vector>

#include "kvlink/cuda/copy_rows.cuh"
#include "kvlink/cuda/error_record.cuh"
#include "kvlink/cuda/launch.cuh"
#include "kvlink/cuda/move_rows.cuh"
#include "kvlink/cuda/relayout_pages.hpp"
#include "kvlink/cuda/scratch.hpp"
#include "kvlink/cuda/wait_ready.cuh"
#include "kvlink/params/plan_moves.hpp"

namespace kvlink::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kResident = 2;  // blocks on a processor that registers must suffice for

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
  LayerMoves moves;
  Side src, dst;
  int64_t num_rows, token_position;
  int32_t num_heads;
  unsigned long long* digest;  // null: none
  const int* go;               // null, or 0: nothing may be read
  int* skipped;                // null, or is told that there were bad page ids
  ErrorRecord* errors;
};

// Grid: rows (heads of tokens) in x, planes of layers in y.
template <int kLanes, bool kMove>
__global__ void __launch_bounds__(kThreads, kResident)
    move_rows(const __grid_constant__ MoveArgs args) {
  const Group<kLanes> group;
  if (args.go && *args.go == 0) return;
  const LayerMove move = args.moves.of(static_cast<int>(blockIdx.y));
  uint64_t sum = 0;
  const int64_t step = static_cast<int64_t>(gridDim.x) * (kThreads / kLanes);
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / kLanes) + threadIdx.x / kLanes;
       row < args.num_rows; row += step) {
    const int64_t token = row / args.num_heads, head = row % args.num_heads;
    RowPlace place{0, 0, move.all.src_head + head, 0, 0, move.all.dst_head + head};
    const bool report = group.lane == 0;
    bool there = args.dst.locate(token, &place.dst_page, &place.dst_slot, report, args.errors);
    if constexpr (kMove) {
      there =
          there && args.src.locate(token, &place.src_page, &place.src_slot, report, args.errors);
    }
    if (!there) {
      if (report && args.skipped) *args.skipped = 1;
      continue;
    }
    if constexpr (kMove) move_row(group, move, place);
    if (!args.digest) continue;
    group.sync();  // the row's lanes see what the others wrote
    sum += digest_row(group, move, place, move.all.model_head + static_cast<int32_t>(head),
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

// One side of rows that keep their bytes, of which all counts have 31 bits.
struct CopySide {
  const int32_t* pages;
  uint32_t first_slot;
  int32_t num_pages, first_head;
  Divisor page_size;
  BadEntry name;

  __device__ uint32_t entry(uint32_t token) const { return page_size.divide(first_slot + token); }
  __device__ bool locate(int32_t id, uint32_t token, bool reports, ErrorRecord* errors,
                         int64_t* page, int64_t* slot) const {
    if (id < 0 || id >= num_pages) {
      if (reports) record_error(errors, name, entry(token), id);
      return false;
    }
    *page = id;
    *slot = first_slot + token - entry(token) * page_size.value;
    return true;
  }
};

struct CopyArgs {
  LayerMoves moves;
  CopyShape shape;
  CopySide src, dst;
  const int* go;  // as those of MoveArgs
  int* skipped;
  ErrorRecord* errors;
};

struct FindPages {
  struct Ids {
    int32_t src, dst;
  };
  const CopyArgs& args;

  __device__ Ids ids(uint32_t token) const {
    return {args.src.pages[args.src.entry(token)], args.dst.pages[args.dst.entry(token)]};
  }
  __device__ bool place(const Ids& ids, uint32_t token, uint32_t head, bool reports,
                        RowPlace* place) const {
    place->src_head = args.src.first_head + static_cast<int32_t>(head);
    place->dst_head = args.dst.first_head + static_cast<int32_t>(head);
    const bool there =
        args.dst.locate(ids.dst, token, reports, args.errors, &place->dst_page, &place->dst_slot) &&
        args.src.locate(ids.src, token, reports, args.errors, &place->src_page, &place->src_slot);
    if (!there && reports && args.skipped) *args.skipped = 1;
    return there;
  }
};

// The same of rows that keep their bytes, without a digest.
__global__ void __launch_bounds__(kCopyThreads, kCopyResident)
    copy_moved(const __grid_constant__ CopyArgs args) {
  if (args.go && *args.go == 0) return;
  copy_rows(args.moves, args.shape, FindPages{args});
}

// What has 31 bits of it has. `first_head`: of the rows.
bool make_copy_side(const Side& side, int64_t num_tokens, int32_t first_head, CopySide* copy) {
  if (side.first_slot > kMostCopies - num_tokens || side.num_pages > kMostCopies) return false;
  *copy = {.pages = side.pages,
           .first_slot = static_cast<uint32_t>(side.first_slot),
           .num_pages = static_cast<int32_t>(side.num_pages),
           .first_head = first_head,
           .page_size = Divisor::of(side.page_size),
           .name = side.name};
  return true;
}

struct ReadyArgs {
  ReadyCounters ready;
  RaisedCounters raised;
  int *go, *skipped;
  ErrorRecord* errors;
};

// One thread, before the rows are moved.
__global__ void wait_for_rows(const __grid_constant__ ReadyArgs args) {
  *args.skipped = 0;
  *args.go = wait_ready(args.ready, args.errors);
}

// One thread, after that.
__global__ void raise_counters(const __grid_constant__ ReadyArgs args) {
  if (*args.go == 0 || *args.skipped != 0) return;
  for (int i = 0; i < args.raised.num_items; ++i) add_of_system(args.raised.items[i], 1);
}

RelayoutResult run(const std::vector<RowMove>& moves, int num_planes, MoveArgs args,
                   int64_t num_tokens, bool with_source, bool with_digest,
                   const DeviceOptions& options, cudaStream_t stream) {
  report_errors();
  if (num_tokens == 0) return {};
  // A digest that is waited for, and what kernels have to tell each other.
  std::optional<Scratch> scratch;
  const bool reads_digest = with_digest && !options.digest_into;
  KVLINK_CHECK(!reads_digest || !is_captured(stream),
               "digest_into: expected an array while a graph is captured; got None");
  const bool counts = options.ready.num_items > 0 || options.raised.num_items > 0;
  if (reads_digest || counts) scratch.emplace(16, stream);
  if (reads_digest) {
    check_cuda(cudaMemsetAsync(scratch->data(), 0, 8, stream), "cudaMemsetAsync");
    args.digest = reinterpret_cast<unsigned long long*>(scratch->data());
  } else if (with_digest) {
    args.digest = reinterpret_cast<unsigned long long*>(options.digest_into);
  }
  args.errors = error_record();
  ReadyArgs ready{options.ready, options.raised, nullptr, nullptr, args.errors};
  args.num_heads = moves[0].num_heads;
  args.num_rows = num_tokens * args.num_heads;
  int64_t row_bytes = 0;
  for (const RowMove& move : moves) {
    row_bytes = std::max(row_bytes, move.dims * dtype_bytes(move.dst.dtype));
  }
  const int lanes = group_lanes(row_bytes);
  const int64_t blocks = std::min<int64_t>(ceil_div(args.num_rows, kThreads / lanes), 1 << 16);
  const auto kernel = with_source ? kernel_for<true>(lanes) : kernel_for<false>(lanes);
  CopyArgs copy{};
  copy.errors = args.errors;
  const bool copies = with_source && !with_digest && copied_by_chunks(moves) &&
                      make_copy_side(args.src, num_tokens, moves[0].src_head, &copy.src) &&
                      make_copy_side(args.dst, num_tokens, moves[0].dst_head, &copy.dst);
  if (counts) {
    args.go = ready.go = reinterpret_cast<int*>(scratch->data() + 8);
    args.skipped = ready.skipped = ready.go + 1;
    copy.go = args.go, copy.skipped = args.skipped;
    load("relayout_pages", kernel);
    load("relayout_pages", copy_moved);
    load("relayout_pages: raise", raise_counters);
    launch("relayout_pages: wait", wait_for_rows, dim3(1), 1, 0, stream, ready);
  }
  size_t end = 0;
  for (size_t begin = 0; begin < moves.size(); begin = end) {
    args.moves = take_layers(moves, num_planes, begin, &end);
    if (copies && make_copy_shape(args.moves, args.num_rows, args.num_heads, &copy.shape)) {
      copy.moves = args.moves;
      const dim3 grid(num_copy_blocks(copy.shape), static_cast<unsigned>(end - begin));
      launch("relayout_pages", copy_moved, grid, kCopyThreads, 0, stream, copy);
      continue;
    }
    const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(end - begin));
    launch("relayout_pages", kernel, grid, kThreads, 0, stream, args);
  }
  if (options.raised.num_items > 0) {
    launch("relayout_pages: raise", raise_counters, dim3(1), 1, 0, stream, ready);
  }
  RelayoutResult result{.rows = static_cast<uint64_t>(args.num_rows) * moves.size(), .digest = 0};
  if (reads_digest) {
    check_cuda(cudaMemcpyAsync(&result.digest, scratch->data(), 8, cudaMemcpyDeviceToHost, stream),
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

RelayoutResult relayout_pages(const RelayoutParams& params, const DeviceOptions& options,
                              cudaStream_t stream) {
  const std::vector<RowMove> moves = plan_moves(params);
  const LayerView& src = params.src_layers[0];
  const LayerView& dst = params.dst_layers[0];
  check_run_bounds(params.src, params.num_tokens, src.layout.page_size, "src_pages");
  check_run_bounds(params.dst, params.num_tokens, dst.layout.page_size, "dst_pages");
  MoveArgs args{};
  args.src = make_side(params.src, src, BadEntry::kSrcPages);
  args.dst = make_side(params.dst, dst, BadEntry::kDstPages);
  args.token_position = params.token_position;
  const bool with_digest = params.with_digest || options.digest_into;
  return run(moves, num_planes(dst.layout), args, params.num_tokens, true, with_digest, options,
             stream);
}

RelayoutResult digest_pages(const DigestParams& params, const DeviceOptions& options,
                            cudaStream_t stream) {
  const std::vector<RowMove> moves = plan_digests(params);
  const LayerView& layer = params.layers[0];
  check_run_bounds(params.run, params.num_tokens, layer.layout.page_size, "pages");
  MoveArgs args{};
  args.dst = make_side(params.run, layer, BadEntry::kPages);
  args.token_position = params.token_position;
  return run(moves, num_planes(layer.layout), args, params.num_tokens, false, true, options,
             stream);
}

}  // namespace kvlink::cuda
