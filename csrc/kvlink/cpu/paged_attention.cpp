#include "kvlink/cpu/paged_attention.hpp"

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <vector>

#include "kvlink/base/check.hpp"
#include "kvlink/base/math.hpp"
#include "kvlink/base/threads.hpp"
#include "kvlink/cpu/paged_attention_tile.hpp"

namespace kvlink::cpu {

namespace {

// --- checks --------------------------------------------------------------------------------------

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
  KVLINK_CHECK(p.window >= 0, "window: expected >= 0 (0: everything); got ", p.window);
  KVLINK_CHECK(p.softcap >= 0.0f, "softcap: expected >= 0 (0: none); got ", p.softcap);
}

// Of the sequence's query row `row`, counted from its first.
int64_t position_of(const PagedAttentionParams& p, const SequenceView& s, int64_t row) {
  return p.q_positions ? p.q_positions[s.first_row + row] : s.seq_len - s.num_rows + row;
}

int64_t mask_start(const PagedAttentionParams& p, const SequenceView& s, int64_t seq) {
  return p.mask_starts ? p.mask_starts[seq] : s.seq_len - s.num_rows;
}

// The sequence has query rows, and its positions and mask are right. A sequence of length 0 is an
// idle place in the batch, whatever rows it has.
void check_rows(const PagedAttentionParams& p, int64_t seq, const SequenceView& s) {
  if (s.seq_len == 0) return;
  if (p.q_positions) {
    for (int64_t row = 0; row < s.num_rows; ++row) {
      const int64_t idx = s.first_row + row, least = row ? p.q_positions[idx - 1] : 0;
      KVLINK_CHECK(p.q_positions[idx] >= least && p.q_positions[idx] < s.seq_len, "q_positions[",
                   idx, "]: expected ", least, " to ", s.seq_len - 1,
                   ", not before the row above; got ", p.q_positions[idx]);
    }
  } else {
    KVLINK_CHECK(s.num_rows <= s.seq_len, "seq_lens[", seq, "]: expected at least ", s.num_rows,
                 ", the sequence's query rows (new tokens count); got ", s.seq_len);
  }
  if (!p.mask || s.num_rows == 0) return;
  const int64_t start = mask_start(p, s, seq);
  KVLINK_CHECK(start >= 0 && start <= s.seq_len, "mask_starts[", seq, "]: expected 0 to ",
               s.seq_len, "; got ", start);
  KVLINK_CHECK(s.seq_len - start <= 8 * p.mask_bytes, "mask: sequence ", seq,
               " needs a bit for each of its positions from ", start, " to ", s.seq_len - 1,
               "; got ", p.mask_bytes, " bytes a row");
}

void check_page(const PagedAttentionParams& p, int64_t seq, const SequenceView& s, int64_t idx) {
  const int32_t page = s.pages[idx];
  if (page < 0 || page >= p.kv.num_pages) {
    throw PageTableError(concat("page_table: sequence ", seq, ", index ", idx, ": ",
                                page == -1 ? "page is unmapped (-1)" : "no such page: ",
                                page == -1 ? "" : std::to_string(page), "; the pool has ",
                                p.kv.num_pages, " pages"));
  }
  if (s.expected_generations && p.generations[page] != s.expected_generations[idx]) {
    throw PageTableError(concat("page_table: sequence ", seq, ", index ", idx, ": page ", page,
                                " is of generation ", p.generations[page], "; expected ",
                                s.expected_generations[idx]));
  }
}

void check_sequence(const PagedAttentionParams& p, int64_t seq, const SequenceView& s) {
  check_rows(p, seq, s);
  if (s.num_rows == 0) return;
  const int64_t page_size = p.kv.layout.page_size;
  // Positions that any row reads.
  VisibleRange range{0, 0};
  if (s.seq_len > 0) {
    range = {visible_range(p, position_of(p, s, 0), s.seq_len).begin,
             visible_range(p, position_of(p, s, s.num_rows - 1), s.seq_len).end};
  }
  const int64_t end = ceil_div(range.end, page_size);
  KVLINK_CHECK(end <= s.num_pages, "page_table: sequence ", seq, " of length ", s.seq_len,
               " needs ", end, " pages of ", page_size, "; got ", s.num_pages, " entries");
  for (int64_t i = range.begin / page_size; i < end; ++i) check_page(p, seq, s, i);
}

// --- a call --------------------------------------------------------------------------------------

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

// A plan at work on one layer.
class Call {
 public:
  Call(const PagedAttentionParams& p, const AttentionPlan& plan)
      : p_(p),
        plan_(plan),
        group_(p.num_q_heads / p.kv.layout.num_kv_heads),
        out_stride_(padded_row(p.kv.layout.head_dim_v)),
        state_floats_(num_state_floats(plan.max_rows, out_stride_)),
        scratch_floats_(
            round_up(attention_scratch_floats(p.kv.layout, plan.max_rows), kRowAlignment)),
        workspace_(workspace_buffer.reserve(plan.num_states * state_floats_)) {
    find_rows();
    find_splits();
  }

  void run() {
    const auto each = [](const auto& items, const auto& body) {
      if (items.empty()) return;
      parallel_for(static_cast<int64_t>(items.size()), [&](int64_t idx) { body(items[idx]); });
    };
    each(plan_.tasks, [&](const AttentionPlan::Task& task) { run_task(task); });
    each(plan_.to_fold, [&](int32_t unit) { fold_parts(unit, state(unit, 0), 1); });
    each(plan_.to_finish, [&](int32_t unit) { finish_unit(unit); });
  }

 private:
  struct Splits {
    int64_t first, last;
    int64_t count() const { return last - first; }
  };

  void find_rows() {
    rows_.resize(p_.num_tokens);
    for (int64_t seq = 0; seq < p_.num_seqs; ++seq) {
      const SequenceView s = sequence_at(p_, seq);
      for (int64_t i = 0; i < s.num_rows; ++i) {
        const int64_t row = s.first_row + i, position = position_of(p_, s, i);
        const bool idle = s.seq_len == 0;
        rows_[row] = {.row = row,
                      .position = position,
                      .range = idle ? VisibleRange{0, 0} : visible_range(p_, position, s.seq_len),
                      .mask = p_.mask && !idle ? p_.mask + row * p_.mask_stride : nullptr,
                      .mask_begin = p_.mask && !idle ? mask_start(p_, s, seq) : 0};
      }
    }
    // What every row of a group sees, of the same pages, whatever the plan was made for.
    for (const AttentionPlan::Group& group : plan_.groups) {
      const SequenceView leader = sequence_at(p_, group.seqs[0]);
      int64_t num_splits = group.num_splits;
      for (const int32_t seq : group.seqs) {
        num_splits = std::min(num_splits, num_shared_splits(p_, leader, sequence_at(p_, seq)));
      }
      shared_first_.push_back(static_cast<int64_t>(shared_rows_.size()));
      for (const int32_t row : group.rows) {
        const TokenRow& token = rows_[row];
        int64_t end = token.range.begin > 0 ? 0 : token.range.end;
        if (token.mask) end = std::min(end, token.mask_begin);
        num_splits = std::min(num_splits, end / kSplitTokens);
        shared_rows_.push_back(token);
      }
      num_shared_.push_back(num_splits);
      for (size_t i = shared_first_.back(); i < shared_rows_.size(); ++i) {
        shared_rows_[i].range = {0, num_splits * kSplitTokens};
        shared_rows_[i].mask = nullptr;
      }
    }
  }

  void find_splits() {
    for (const AttentionPlan::Unit& unit : plan_.units) {
      const int64_t shared = unit.group >= 0 ? num_shared_[unit.group] : 0;
      if (unit.shared) {
        splits_.push_back({0, shared});
        continue;
      }
      const TokenRow* tokens = tokens_of(unit);
      const int64_t end = tokens[unit.num_tokens - 1].range.end;
      const int64_t first = std::max(shared, tokens[0].range.begin / kSplitTokens);
      splits_.push_back({first, std::max(first, ceil_div(end, kSplitTokens))});
    }
  }

  const TokenRow* tokens_of(const AttentionPlan::Unit& unit) const {
    const TokenRow* rows =
        unit.shared ? shared_rows_.data() + shared_first_[unit.group] : rows_.data();
    return rows + unit.first_token;
  }

  AttentionTile tile_of(const AttentionPlan::Unit& unit) const {
    return {.params = &p_,
            .pages = sequence_at(p_, unit.seq).pages,
            .tokens = tokens_of(unit),
            .num_tokens = unit.num_tokens,
            .first_kv_head = unit.first_kv_head,
            .num_kv_heads = unit.num_kv_heads};
  }

  int64_t num_rows(const AttentionPlan::Unit& unit) const {
    return int64_t{unit.num_tokens} * unit.num_kv_heads * group_;
  }

  // States laid out one after another, each for max_rows rows.
  AttentionState state_in(float* memory, int64_t idx) const {
    float* out = memory + idx * state_floats_;
    float* max = out + plan_.max_rows * out_stride_;
    return {.max = max, .sum = max + plan_.max_rows, .out = out};
  }
  AttentionState state(int32_t unit, int64_t part) const {
    return state_in(workspace_, plan_.units[unit].first_state + part);
  }

  // The parts in which the splits of a unit are attended. More splits than the plan has parts for
  // (it was made for something else) are one.
  int64_t num_parts(int32_t unit) const {
    const int64_t count = splits_[unit].count();
    return count <= plan_.units[unit].num_parts ? std::max<int64_t>(1, count) : 1;
  }

  // The unit goes on from what its group shares, and no task begins with it.
  bool waits(int32_t idx) const {
    const AttentionPlan::Unit& unit = plan_.units[idx];
    if (unit.shared || unit.group < 0) return false;
    return unit.first_state < 0 || splits_[idx].count() > unit.num_parts;
  }

  void attend(int32_t idx, Splits splits, bool continues, float* scratch,
              const AttentionState& state) const {
    if (splits.count() == 0 && !continues) {
      std::fill_n(state.max, num_rows(plan_.units[idx]), -std::numeric_limits<float>::infinity());
      std::fill_n(state.sum, num_rows(plan_.units[idx]), 0.0f);
      std::fill_n(state.out, num_rows(plan_.units[idx]) * out_stride_, 0.0f);
      return;
    }
    attend_(tile_of(plan_.units[idx]), splits.first, splits.last, continues, scratch, state,
            state_in(scratch + scratch_floats_, 1));
  }

  float* scratch() const { return scratch_buffer.reserve(scratch_floats_ + 2 * state_floats_); }

  void run_task(const AttentionPlan::Task& task) const {
    const AttentionPlan::Unit& unit = plan_.units[task.unit];
    const int64_t parts = num_parts(task.unit);
    if (task.part >= parts || waits(task.unit)) return;
    Splits splits = splits_[task.unit];
    if (parts > 1) splits = {splits.first + task.part, splits.first + task.part + 1};
    float* memory = scratch();
    if (unit.first_state >= 0) {
      attend(task.unit, splits, false, memory, state(task.unit, task.part));
      return;
    }
    const AttentionState own = state_in(memory + scratch_floats_, 0);
    attend(task.unit, splits, false, memory, own);
    finish_(tile_of(unit), own);
  }

  void fold_parts(int32_t idx, const AttentionState& into, int64_t first) const {
    for (int64_t part = first; part < num_parts(idx); ++part) {
      fold_(into, state(idx, part), num_rows(plan_.units[idx]), out_stride_);
    }
  }

  // What the group's units have gathered for the rows of one of its sequences.
  void copy_shared(const AttentionPlan::Unit& unit, const AttentionState& into) const {
    const AttentionPlan::Group& group = plan_.groups[unit.group];
    int64_t row = 0;
    for (int64_t h = 0; h < unit.num_kv_heads; ++h) {
      const int64_t head = unit.first_kv_head + h;
      for (int64_t t = 0; t < unit.num_tokens; ++t, row += group_) {
        const int64_t token = unit.group_token + t;
        const auto from_idx = static_cast<int32_t>(
            group.first_unit + token / group.tile_tokens * group.head_chunks + head / group.heads);
        const AttentionState from = state(from_idx, 0);
        const int64_t from_row =
            (head % group.heads * plan_.units[from_idx].num_tokens + token % group.tile_tokens) *
            group_;
        std::copy_n(from.max + from_row, group_, into.max + row);
        std::copy_n(from.sum + from_row, group_, into.sum + row);
        std::copy_n(from.out + from_row * out_stride_, group_ * out_stride_,
                    into.out + row * out_stride_);
      }
    }
  }

  void finish_unit(int32_t idx) const {
    const AttentionPlan::Unit& unit = plan_.units[idx];
    const bool continues = unit.group >= 0 && num_shared_[unit.group] > 0;
    float* memory = scratch();
    AttentionState own = state_in(memory + scratch_floats_, 0);
    if (continues) copy_shared(unit, own);
    if (waits(idx)) {
      if (splits_[idx].count() > 0 || !continues) {
        attend(idx, splits_[idx], continues, memory, own);
      }
    } else if (continues) {
      if (splits_[idx].count() > 0) fold_parts(idx, own, 0);
    } else {
      own = state(idx, 0);
      fold_parts(idx, own, 1);
    }
    finish_(tile_of(unit), own);
  }

  const PagedAttentionParams& p_;
  const AttentionPlan& plan_;
  int64_t group_, out_stride_, state_floats_, scratch_floats_;
  float* workspace_;
  std::vector<TokenRow> rows_, shared_rows_;        // of q; of the groups, one after the other
  std::vector<int64_t> shared_first_, num_shared_;  // by group
  std::vector<Splits> splits_;                      // by unit
  decltype(KVLINK_SIMD_PICK(attend_splits)) attend_ = KVLINK_SIMD_PICK(attend_splits);
  decltype(KVLINK_SIMD_PICK(fold_states)) fold_ = KVLINK_SIMD_PICK(fold_states);
  decltype(KVLINK_SIMD_PICK(finish_tile)) finish_ = KVLINK_SIMD_PICK(finish_tile);
};

}  // namespace

void paged_attention(const PagedAttentionParams& params, const AttentionPlan* plan) {
  check_shapes(params);
  check_batch(params);
  for (int64_t seq = 0; seq < params.num_seqs; ++seq) {
    check_sequence(params, seq, sequence_at(params, seq));
  }
  if (plan) plan->check(params);
  std::optional<AttentionPlan> own;
  if (!plan) own.emplace(params, nullptr);
  Call call(params, plan ? *plan : *own);
  wait_ready(params.ready);
  call.run();
}

}  // namespace kvlink::cpu
