#include "kvlink/cpu/paged_attention.hpp"

#include <algorithm>
#include <limits>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "kvlink/base/check.hpp"
#include "kvlink/base/math.hpp"
#include "kvlink/base/threads.hpp"
#include "kvlink/cpu/paged_attention_tile.hpp"

namespace kvlink::cpu {

namespace {

constexpr int64_t kTileRows = 96;  // query rows that share a pass over K and V
constexpr int64_t kMaxWorkspaceFloats = int64_t{1} << 24;
constexpr int64_t kUnitsPerThread = 4;  // enough for an even load

bool is_float(DType dtype) {
  return dtype == DType::kFloat32 || dtype == DType::kFloat16 || dtype == DType::kBFloat16;
}

void check_shapes(const PagedAttentionParams& p) {
  const KVLayout& layout = p.kv.layout;
  if (layout.form == KVForm::kOpaque) {
    throw Unsupported("pool: attention needs K and V; the pool's pages are opaque");
  }
  if (!is_float(p.q_dtype)) {
    throw Unsupported(
        concat("q: supported dtypes are float32, float16, bfloat16; got ", dtype_name(p.q_dtype)));
  }
  if (layout.head_dim > kMaxHeadDim || layout.head_dim_v > kMaxHeadDim) {
    throw Unsupported(concat("head_dim: supported up to ", kMaxHeadDim, "; got ", layout.head_dim,
                             " and head_dim_v ", layout.head_dim_v));
  }
  KVLINK_CHECK(p.num_q_heads > 0 && p.num_q_heads % layout.num_kv_heads == 0,
               "q: expected a number of query heads that is a multiple of the ",
               layout.num_kv_heads, " KV heads; got ", p.num_q_heads);
  KVLINK_CHECK(p.window >= 0, "window: expected >= 0 (0: everything); got ", p.window);
  KVLINK_CHECK(p.softcap >= 0.0f, "softcap: expected >= 0 (0: none); got ", p.softcap);
}

struct Sequence {
  const int32_t* pages;
  int64_t num_pages;  // entries readable at pages
  int64_t seq_len;
  int64_t first_row;
  int64_t num_rows;

  int64_t first_position() const { return seq_len - num_rows; }
};

Sequence sequence_at(const PagedAttentionParams& p, int64_t seq) {
  Sequence s{};
  s.seq_len = p.seq_lens[seq];
  s.first_row = p.q_indptr ? p.q_indptr[seq] : seq;
  s.num_rows = (p.q_indptr ? p.q_indptr[seq + 1] : seq + 1) - s.first_row;
  const int64_t begin = p.page_indptr ? p.page_indptr[seq] : seq * p.page_table_stride;
  s.pages = p.page_table + begin;
  s.num_pages = p.page_indptr ? p.page_indptr[seq + 1] - begin : p.num_entries;
  return s;
}

void check_indptr(const int32_t* indptr, int64_t num_seqs, int64_t total, const char* name) {
  KVLINK_CHECK(indptr[0] == 0, name, "[0]: expected 0; got ", indptr[0]);
  for (int64_t seq = 0; seq < num_seqs; ++seq) {
    KVLINK_CHECK(indptr[seq + 1] >= indptr[seq], name, "[", seq + 1, "]: expected at least ",
                 indptr[seq], ", the entry before it; got ", indptr[seq + 1]);
  }
  KVLINK_CHECK(indptr[num_seqs] == total, name, "[", num_seqs, "]: expected ", total,
               ", the rows or entries that it divides; got ", indptr[num_seqs]);
}

// Positions that any row of the sequence reads.
VisibleRange sequence_range(const PagedAttentionParams& p, const Sequence& s) {
  if (s.num_rows == 0) return {0, 0};
  return {visible_range(p, s.first_position(), s.seq_len).begin,
          visible_range(p, s.seq_len - 1, s.seq_len).end};
}

void check_sequence(const PagedAttentionParams& p, int64_t seq, const Sequence& s) {
  KVLINK_CHECK(s.seq_len >= 0, "seq_lens[", seq, "]: expected >= 0; got ", s.seq_len);
  // A sequence of length 0 is an idle place in the batch, whatever rows it has.
  KVLINK_CHECK(s.seq_len == 0 || s.num_rows <= s.seq_len, "seq_lens[", seq, "]: expected at least ",
               s.num_rows, ", the sequence's query rows (new tokens count); got ", s.seq_len);
  const VisibleRange range = sequence_range(p, s);
  const int64_t page_size = p.kv.layout.page_size;
  const int64_t end = ceil_div(range.end, page_size);
  KVLINK_CHECK(end <= s.num_pages, "page_table: sequence ", seq, " of length ", s.seq_len,
               " needs ", end, " pages of ", page_size, "; got ", s.num_pages, " entries");
  for (int64_t i = range.begin / page_size; i < end; ++i) {
    if (s.pages[i] < 0 || s.pages[i] >= p.kv.num_pages) {
      throw PageTableError(concat("page_table: sequence ", seq, ", index ", i, ": ",
                                  s.pages[i] == -1 ? "page is unmapped (-1)" : "no such page: ",
                                  s.pages[i] == -1 ? "" : std::to_string(s.pages[i]),
                                  "; the pool has ", p.kv.num_pages, " pages"));
    }
  }
}

// A tile and the splits it sees.
struct Unit {
  AttentionTile tile;
  int64_t first_split, last_split;
  int64_t first_state = -1;  // in the workspace, one a split; -1: folded where it is attended

  int64_t num_splits() const { return last_split - first_split; }
  int64_t num_rows() const {  // but for the query heads that share a KV head
    return int64_t{tile.num_tokens} * tile.num_kv_heads;
  }
};

// One call of the vector code.
struct Task {
  int64_t unit;
  int64_t split;  // -1: all of the unit
};

struct Plan {
  std::vector<Unit> units;
  std::vector<Task> tasks;
  std::vector<int64_t> folded_later;  // units whose splits are tasks of their own
  int64_t num_states = 0;
  int64_t max_rows = 0;
};

// `max_heads` KV heads share a tile where they read K and V in place: memory is then read in long
// runs.
void add_units(const PagedAttentionParams& p, const Sequence& s, int64_t max_heads, Plan& plan) {
  const KVLayout& layout = p.kv.layout;
  const int64_t group = p.num_q_heads / layout.num_kv_heads;
  const int64_t tile_tokens = std::max<int64_t>(1, kTileRows / group);
  for (int64_t token = 0; token < s.num_rows; token += tile_tokens) {
    const int64_t num_tokens = std::min(tile_tokens, s.num_rows - token);
    const int64_t rows = num_tokens * group;
    const int64_t heads =
        attends_in_place(layout, rows) ? std::min(max_heads, kTileRows / rows) : 1;
    const int64_t first_position = s.first_position() + token;
    VisibleRange range{0, 0};
    if (s.seq_len > 0) {
      range = {visible_range(p, first_position, s.seq_len).begin,
               visible_range(p, first_position + num_tokens - 1, s.seq_len).end};
    }
    for (int64_t head = 0; head < layout.num_kv_heads; head += heads) {
      const int64_t num_heads = std::min(heads, layout.num_kv_heads - head);
      plan.max_rows = std::max(plan.max_rows, rows * num_heads);
      plan.units.push_back({.tile = {.params = &p,
                                     .pages = s.pages,
                                     .seq_len = s.seq_len,
                                     .first_row = s.first_row + token,
                                     .first_position = first_position,
                                     .num_tokens = static_cast<int32_t>(num_tokens),
                                     .first_kv_head = static_cast<int32_t>(head),
                                     .num_kv_heads = static_cast<int32_t>(num_heads)},
                            .first_split = range.begin / kSplitTokens,
                            .last_split = ceil_div(range.end, kSplitTokens)});
    }
  }
}

// As many KV heads a tile as leave enough tiles for the threads.
int64_t heads_per_tile(const PagedAttentionParams& p, int threads) {
  int64_t splits = 0;
  for (int64_t seq = 0; seq < p.num_seqs; ++seq) splits += ceil_div(p.seq_lens[seq], kSplitTokens);
  const int64_t heads = p.kv.layout.num_kv_heads;
  if (threads == 1) return heads;
  const int64_t tiles = ceil_div(threads * kUnitsPerThread, std::max<int64_t>(1, splits));
  return std::max<int64_t>(1, heads / tiles);
}

int64_t num_state_floats(int64_t num_rows, int64_t out_stride) {
  return round_up(num_rows * (out_stride + 2), kRowAlignment);
}

// Splits of units that would keep one thread busy while the others wait become tasks of their own.
// This decides who computes what, never what is computed.
Plan make_plan(const PagedAttentionParams& p) {
  Plan plan;
  const int threads = num_threads();
  const int64_t max_heads = heads_per_tile(p, threads);
  for (int64_t seq = 0; seq < p.num_seqs; ++seq) add_units(p, sequence_at(p, seq), max_heads, plan);
  int64_t total = 0;
  for (const Unit& unit : plan.units) total += unit.num_splits() * unit.num_rows();
  const int64_t share = std::max<int64_t>(1, total / (threads * kUnitsPerThread));
  const int64_t state_floats = num_state_floats(plan.max_rows, padded_row(p.kv.layout.head_dim_v));
  for (size_t i = 0; i < plan.units.size(); ++i) {
    Unit& unit = plan.units[i];
    const bool heavy = unit.num_splits() * unit.num_rows() > share && unit.num_splits() > 1;
    const bool fits = (plan.num_states + unit.num_splits()) * state_floats <= kMaxWorkspaceFloats;
    if (threads == 1 || !heavy || !fits) {
      plan.tasks.push_back({static_cast<int64_t>(i), -1});
      continue;
    }
    unit.first_state = plan.num_states;
    plan.num_states += unit.num_splits();
    plan.folded_later.push_back(static_cast<int64_t>(i));
    for (int64_t split = unit.first_split; split < unit.last_split; ++split) {
      plan.tasks.push_back({static_cast<int64_t>(i), split});
    }
  }
  return plan;
}

// Memory that a thread keeps from call to call.
class Buffer {
 public:
  float* reserve(int64_t num_floats) {
    if (num_floats > size_) {
      data_.reset();
      const auto bytes = static_cast<size_t>(round_up(num_floats * 4, kAlignment));
      data_.reset(static_cast<float*>(::operator new(bytes, std::align_val_t{kAlignment})));
      size_ = num_floats;
    }
    return data_.get();
  }

 private:
  static constexpr int64_t kAlignment = 64;
  struct Release {
    void operator()(float* data) const { ::operator delete(data, std::align_val_t{kAlignment}); }
  };
  std::unique_ptr<float, Release> data_;
  int64_t size_ = 0;
};

thread_local Buffer scratch_buffer, workspace_buffer;

// States laid out one after another, each for max_rows rows.
AttentionState state_at(float* memory, int64_t idx, int64_t max_rows, int64_t out_stride) {
  float* out = memory + idx * num_state_floats(max_rows, out_stride);
  float* max = out + max_rows * out_stride;
  return {.max = max, .sum = max + max_rows, .out = out};
}

void run(const PagedAttentionParams& p, const Plan& plan) {
  const auto attend = KVLINK_SIMD_PICK(attend_splits);
  const auto fold = KVLINK_SIMD_PICK(fold_states);
  const auto finish = KVLINK_SIMD_PICK(finish_tile);
  const int64_t rows = plan.max_rows;
  const int64_t out_stride = padded_row(p.kv.layout.head_dim_v);
  const int64_t state_floats = num_state_floats(rows, out_stride);
  const int64_t scratch_floats = round_up(attention_scratch_floats(p.kv.layout, rows), 16);
  float* workspace = workspace_buffer.reserve(plan.num_states * state_floats);

  parallel_for(static_cast<int64_t>(plan.tasks.size()), [&](int64_t idx) {
    const Task& task = plan.tasks[idx];
    const Unit& unit = plan.units[task.unit];
    float* scratch = scratch_buffer.reserve(scratch_floats + 2 * state_floats);
    const AttentionState first = state_at(scratch + scratch_floats, 0, rows, out_stride);
    const AttentionState other = state_at(scratch + scratch_floats, 1, rows, out_stride);
    if (task.split >= 0) {
      const int64_t state = unit.first_state + task.split - unit.first_split;
      attend(unit.tile, task.split, task.split + 1, scratch,
             state_at(workspace, state, rows, out_stride), other);
      return;
    }
    if (unit.num_splits() == 0) {
      std::fill_n(first.max, rows, -std::numeric_limits<float>::infinity());
      std::fill_n(first.out, rows * out_stride, 0.0f);
    }
    attend(unit.tile, unit.first_split, unit.last_split, scratch, first, other);
    finish(unit.tile, first);
  });

  parallel_for(static_cast<int64_t>(plan.folded_later.size()), [&](int64_t idx) {
    const Unit& unit = plan.units[plan.folded_later[idx]];
    const int64_t group = p.num_q_heads / p.kv.layout.num_kv_heads;
    const AttentionState first = state_at(workspace, unit.first_state, rows, out_stride);
    for (int64_t i = 1; i < unit.num_splits(); ++i) {
      fold(first, state_at(workspace, unit.first_state + i, rows, out_stride),
           unit.num_rows() * group, out_stride);
    }
    finish(unit.tile, first);
  });
}

}  // namespace

void paged_attention(const PagedAttentionParams& params) {
  check_shapes(params);
  if (params.q_indptr) {
    check_indptr(params.q_indptr, params.num_seqs, params.num_tokens, "q_indptr");
  } else {
    KVLINK_CHECK(params.num_tokens == params.num_seqs, "q: expected one row for each of the ",
                 params.num_seqs, " sequences, or q_indptr; got ", params.num_tokens);
  }
  if (params.page_indptr) {
    check_indptr(params.page_indptr, params.num_seqs, params.num_entries, "page_indptr");
  }
  for (int64_t seq = 0; seq < params.num_seqs; ++seq) {
    check_sequence(params, seq, sequence_at(params, seq));
  }
  const Plan plan = make_plan(params);
  wait_ready(params.ready);
  run(params, plan);
}

}  // namespace kvlink::cpu
