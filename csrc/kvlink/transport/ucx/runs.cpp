#include "kvlink/transport/ucx/runs.hpp"

#include <algorithm>

#include "kvlink/base/check.hpp"
#include "kvlink/layout/rows.hpp"

namespace kvlink::transport::ucx {

namespace {

// How the rows of a box of tokens and heads fall into runs, the same on both sides.
struct Cut {
  int64_t elements = 0;           // of a run
  int64_t tokens = 1, heads = 1;  // that it spans
};

Cut cut_box(const Plane& a, const Plane& b, int64_t dims, int64_t num_heads, int64_t num_tokens) {
  const auto both = [&](int64_t Plane::* stride, int64_t value) {
    return a.*stride == value && b.*stride == value;
  };
  Cut cut{.elements = dims};
  if (num_heads == 1 || both(&Plane::stride_head, dims)) {
    cut = {.elements = num_heads * dims, .tokens = 1, .heads = num_heads};
    if (num_tokens == 1 || both(&Plane::stride_slot, cut.elements)) {
      cut = {.elements = num_tokens * cut.elements, .tokens = num_tokens, .heads = num_heads};
    }
  } else if (both(&Plane::stride_slot, dims)) {
    cut = {.elements = num_tokens * dims, .tokens = num_tokens, .heads = 1};
    if (both(&Plane::stride_head, cut.elements)) {
      cut = {.elements = num_heads * cut.elements, .tokens = num_tokens, .heads = num_heads};
    }
  }
  return cut;
}

const Plane& plane_of(const KVLayout& layout, int plane) {
  return plane == 0 ? layout.k : layout.v;
}

uint32_t find_block(uint64_t address, uint64_t size, const std::vector<RemoteBlock>& blocks) {
  for (size_t i = 0; i < blocks.size(); ++i) {
    const RemoteBlock& block = blocks[i];
    if (address >= block.address && size <= block.size &&
        address - block.address <= block.size - size) {
      return static_cast<uint32_t>(i);
    }
  }
  throw InvalidArgument("the peer's pages lie outside of the memory that it told of");
}

}  // namespace

bool same_bytes(const KVLayout& a, const KVLayout& b) {
  bool same = a.dtype == b.dtype && a.head_dim == b.head_dim && a.head_dim_v == b.head_dim_v &&
              a.has_v_plane() == b.has_v_plane() && !a.has_scales() && !b.has_scales();
  for (int plane = 0; same && plane < num_planes(a); ++plane) {
    same = plane_of(a, plane).stride_dim == 1 && plane_of(b, plane).stride_dim == 1;
  }
  return same;
}

int64_t run_bytes(const KVLayout& a, const KVLayout& b, int32_t num_heads) {
  const int64_t tokens = std::min(a.page_size, b.page_size);
  int64_t least = INT64_MAX;
  for (int plane = 0; plane < num_planes(a); ++plane) {
    const Cut cut =
        cut_box(plane_of(a, plane), plane_of(b, plane), row_dims(a, plane), num_heads, tokens);
    least = std::min(least, cut.elements * dtype_bytes(a.dtype));
  }
  return least;
}

std::vector<RemoteRun> cut_runs(const RelayoutParams& params, bool push) {
  const LayerView& src = *params.src_layers;
  const LayerView& dst = *params.dst_layers;
  std::vector<RemoteRun> runs;
  const auto add = [&](const char* from, const char* to, int64_t size) {
    const char* local = push ? from : to;
    const auto remote = reinterpret_cast<uint64_t>(push ? to : from);
    if (!runs.empty()) {
      RemoteRun& last = runs.back();
      if (static_cast<char*>(last.local) + last.size == local &&
          last.remote + last.size == remote) {
        last.size += static_cast<size_t>(size);
        return;
      }
    }
    runs.push_back({.local = const_cast<char*>(local),
                    .remote = remote,
                    .size = static_cast<size_t>(size),
                    .block = 0});
  };
  for (int plane = 0; plane < num_planes(dst.layout); ++plane) {
    const RowPlane from = row_plane(src, plane), to = row_plane(dst, plane);
    const int64_t dims = row_dims(dst.layout, plane);
    for (int64_t token = 0; token < params.num_tokens;) {
      const int64_t src_at = params.src.first_slot + token, dst_at = params.dst.first_slot + token;
      const int64_t src_slot = src_at % src.layout.page_size;
      const int64_t dst_slot = dst_at % dst.layout.page_size;
      const int64_t count = std::min({src.layout.page_size - src_slot,
                                      dst.layout.page_size - dst_slot, params.num_tokens - token});
      const int64_t src_page = params.src.pages[src_at / src.layout.page_size];
      const int64_t dst_page = params.dst.pages[dst_at / dst.layout.page_size];
      const Cut cut = cut_box(from.at, to.at, dims, params.num_heads, count);
      for (int64_t t = 0; t < count; t += cut.tokens) {
        for (int64_t h = 0; h < params.num_heads; h += cut.heads) {
          add(from.row(src_page, src_slot + t, params.src_head + h),
              to.row(dst_page, dst_slot + t, params.dst_head + h),
              cut.elements * dtype_bytes(dst.layout.dtype));
        }
      }
      token += count;
    }
  }
  return runs;
}

std::vector<RemoteRun> find_runs(const RelayoutParams& params, bool push,
                                 const std::vector<RemoteBlock>& blocks,
                                 const std::vector<uint32_t>& block_numbers) {
  std::vector<RemoteRun> runs = cut_runs(params, push);
  for (RemoteRun& run : runs) {
    run.block = block_numbers[find_block(run.remote, run.size, blocks)];
  }
  return runs;
}

}  // namespace kvlink::transport::ucx
