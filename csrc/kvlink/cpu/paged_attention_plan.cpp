#include "kvlink/cpu/paged_attention_plan.hpp"

#include <algorithm>
#include <utility>

#include "kvlink/base/check.hpp"
#include "kvlink/base/math.hpp"
#include "kvlink/base/threads.hpp"
#include "kvlink/cpu/paged_attention_tile.hpp"

namespace kvlink::cpu {

namespace {

constexpr int64_t kTileRows = 96;        // query rows that share a pass over K and V
constexpr int64_t kPanelTileRows = 384;  // where K and V are widened first
constexpr int64_t kMaxWorkspaceFloats = int64_t{1} << 24;
constexpr int64_t kUnitsPerThread = 4;  // enough for an even load
constexpr int64_t kSmallTasks = 8;      // that make up a unit of such a size
constexpr int kMaxRounds = 8;           // of looking for prefixes among sequences of one first page

void check_indptr(const int32_t* indptr, int64_t num_seqs, int64_t total, const char* name) {
  KVLINK_CHECK(indptr[0] == 0, name, "[0]: expected 0; got ", indptr[0]);
  for (int64_t seq = 0; seq < num_seqs; ++seq) {
    KVLINK_CHECK(indptr[seq + 1] >= indptr[seq], name, "[", seq + 1, "]: expected at least ",
                 indptr[seq], ", the entry before it; got ", indptr[seq + 1]);
  }
  KVLINK_CHECK(indptr[num_seqs] == total, name, "[", num_seqs, "]: expected ", total,
               ", the rows or entries that it divides; got ", indptr[num_seqs]);
}

int64_t group_size(const PagedAttentionParams& p) {
  return p.num_q_heads / p.kv.layout.num_kv_heads;
}

int64_t max_tile_tokens(const PagedAttentionParams& p) {
  return std::max<int64_t>(1, kPanelTileRows / group_size(p));
}

// KV heads that share a tile of `rows` rows each: several where they read K and V in place, so that
// memory is read in long runs.
int64_t heads_per_tile(const PagedAttentionParams& p, int64_t rows, int64_t max_heads) {
  if (!attends_in_place(p.kv.layout, rows)) return 1;
  return std::max<int64_t>(1, std::min(max_heads, kTileRows / rows));
}

}  // namespace

SequenceView sequence_at(const PagedAttentionParams& p, int64_t seq) {
  SequenceView s{};
  s.seq_len = p.seq_lens[seq];
  s.first_row = p.q_indptr ? p.q_indptr[seq] : seq;
  s.num_rows = (p.q_indptr ? p.q_indptr[seq + 1] : seq + 1) - s.first_row;
  const int64_t begin = p.page_indptr ? p.page_indptr[seq] : seq * p.page_table_stride;
  s.pages = p.page_table + begin;
  s.num_pages = p.page_indptr ? p.page_indptr[seq + 1] - begin : p.num_entries;
  if (p.expected_generations) {
    s.expected_generations =
        p.expected_generations + (p.page_indptr ? begin : seq * p.expected_stride);
  }
  return s;
}

void check_batch(const PagedAttentionParams& p) {
  const int32_t num_kv_heads = p.kv.layout.num_kv_heads;
  KVLINK_CHECK(p.num_q_heads > 0 && p.num_q_heads % num_kv_heads == 0,
               "q: expected a number of query heads that is a multiple of the ", num_kv_heads,
               " KV heads; got ", p.num_q_heads);
  if (p.q_indptr) {
    check_indptr(p.q_indptr, p.num_seqs, p.num_tokens, "q_indptr");
  } else {
    KVLINK_CHECK(p.num_tokens == p.num_seqs, "q: expected one row for each of the ", p.num_seqs,
                 " sequences, or q_indptr; got ", p.num_tokens);
  }
  if (p.page_indptr) check_indptr(p.page_indptr, p.num_seqs, p.num_entries, "page_indptr");
  for (int64_t seq = 0; seq < p.num_seqs; ++seq) {
    KVLINK_CHECK(p.seq_lens[seq] >= 0, "seq_lens[", seq, "]: expected >= 0; got ", p.seq_lens[seq]);
  }
}

int64_t num_shared_splits(const PagedAttentionParams& p, const SequenceView& a,
                          const SequenceView& b) {
  const int64_t page_size = p.kv.layout.page_size;
  const int64_t num_tokens = std::min(a.seq_len, b.seq_len) / kSplitTokens * kSplitTokens;
  const int64_t num_pages = std::min({ceil_div(num_tokens, page_size), a.num_pages, b.num_pages});
  const int64_t shared = std::mismatch(a.pages, a.pages + num_pages, b.pages).first - a.pages;
  return std::min(shared * page_size, num_tokens) / kSplitTokens;
}

AttentionPlan::AttentionPlan(const PagedAttentionParams& p, const int32_t* max_seq_lens)
    : num_tokens_(p.num_tokens),
      num_q_heads_(p.num_q_heads),
      num_kv_heads_(p.kv.layout.num_kv_heads),
      head_dim_(p.kv.layout.head_dim),
      head_dim_v_(p.kv.layout.head_dim_v),
      page_size_(p.kv.layout.page_size) {
  const int32_t* lens = max_seq_lens ? max_seq_lens : p.seq_lens;
  max_seq_lens_.assign(lens, lens + p.num_seqs);
  for (int64_t seq = 0; seq < p.num_seqs; ++seq) {
    KVLINK_CHECK(lens[seq] >= p.seq_lens[seq], "max_seq_lens[", seq, "]: expected at least ",
                 p.seq_lens[seq], ", the length now; got ", lens[seq]);
  }
  if (p.q_indptr) q_indptr_.assign(p.q_indptr, p.q_indptr + p.num_seqs + 1);
  const int threads = num_threads();
  find_groups(p);
  add_units(p, threads);
  const int64_t state_floats = num_state_floats(max_rows, padded_row(head_dim_v_));
  if (!groups.empty() && static_cast<int64_t>(units.size()) * state_floats > kMaxWorkspaceFloats) {
    groups.clear();  // not with so many rows
    units.clear();
    add_units(p, threads);
  }
  add_tasks(p, threads);
}

void AttentionPlan::check(const PagedAttentionParams& p) const {
  const KVLayout& layout = p.kv.layout;
  const int64_t num_seqs = max_seq_lens_.size();
  KVLINK_CHECK(p.num_seqs == num_seqs, "plan: made for ", num_seqs, " sequences; got ", p.num_seqs);
  KVLINK_CHECK(p.num_tokens == num_tokens_, "plan: made for ", num_tokens_, " query rows; got ",
               p.num_tokens);
  KVLINK_CHECK(p.num_q_heads == num_q_heads_ && layout.num_kv_heads == num_kv_heads_,
               "plan: made for ", num_q_heads_, " query heads and ", num_kv_heads_,
               " KV heads; got ", p.num_q_heads, " and ", layout.num_kv_heads);
  KVLINK_CHECK(layout.head_dim == head_dim_ && layout.head_dim_v == head_dim_v_,
               "plan: made for head_dim ", head_dim_, " and head_dim_v ", head_dim_v_, "; got ",
               layout.head_dim, " and ", layout.head_dim_v);
  KVLINK_CHECK(layout.page_size == page_size_, "plan: made for pages of ", page_size_, "; got ",
               layout.page_size);
  KVLINK_CHECK((p.q_indptr != nullptr) == !q_indptr_.empty(), "plan: made ",
               q_indptr_.empty() ? "without" : "with", " q_indptr");
  KVLINK_CHECK(!p.q_indptr || std::equal(q_indptr_.begin(), q_indptr_.end(), p.q_indptr),
               "plan: made for another q_indptr");
  for (int64_t seq = 0; seq < num_seqs; ++seq) {
    KVLINK_CHECK(p.seq_lens[seq] <= max_seq_lens_[seq], "plan: made for sequence ", seq,
                 " up to length ", max_seq_lens_[seq], "; got ", p.seq_lens[seq]);
  }
}

// Sequences with the same first page are candidates. In every round the first of them leads, and as
// many follow it as save the most reads.
void AttentionPlan::find_groups(const PagedAttentionParams& p) {
  std::vector<std::pair<int32_t, int32_t>> candidates;  // first page, sequence
  for (int64_t seq = 0; seq < p.num_seqs; ++seq) {
    const SequenceView s = sequence_at(p, seq);
    const bool few_rows = s.num_rows > 0 && s.num_rows * group_size(p) <= kTileRows / 2;
    if (few_rows && s.seq_len >= kSplitTokens && s.num_pages > 0) {
      candidates.emplace_back(s.pages[0], static_cast<int32_t>(seq));
    }
  }
  std::sort(candidates.begin(), candidates.end());
  for (size_t i = 0, end; i < candidates.size(); i = end) {
    std::vector<int32_t> alike;
    for (end = i; end < candidates.size() && candidates[end].first == candidates[i].first; ++end) {
      alike.push_back(candidates[end].second);
    }
    for (int round = 0; round < kMaxRounds && alike.size() > 1; ++round) {
      const SequenceView leader = sequence_at(p, alike[0]);
      std::vector<std::pair<int64_t, int32_t>> shared;  // splits shared with the leader, sequence
      for (const int32_t seq : alike) {
        shared.emplace_back(num_shared_splits(p, leader, sequence_at(p, seq)), seq);
      }
      std::stable_sort(shared.begin() + 1, shared.end(),
                       [](const auto& a, const auto& b) { return a.first > b.first; });
      size_t best = 1;
      for (size_t n = 2; n <= shared.size(); ++n) {
        const auto saved = [&](size_t count) {
          return count < 2 ? 0 : shared[count - 1].first * static_cast<int64_t>(count - 1);
        };
        if (saved(n) > saved(best)) best = n;
      }
      alike.clear();
      for (size_t n = best > 1 ? best : 1; n < shared.size(); ++n)
        alike.push_back(shared[n].second);
      std::sort(alike.begin(), alike.end());
      if (best < 2) continue;
      Group group{};
      group.num_splits = shared[best - 1].first;
      for (size_t n = 0; n < best; ++n) group.seqs.push_back(shared[n].second);
      std::sort(group.seqs.begin(), group.seqs.end());
      for (const int32_t seq : group.seqs) {
        const SequenceView s = sequence_at(p, seq);
        for (int64_t row = 0; row < s.num_rows; ++row) {
          group.rows.push_back(static_cast<int32_t>(s.first_row + row));
        }
      }
      groups.push_back(std::move(group));
    }
  }
}

void AttentionPlan::add_units(const PagedAttentionParams& p, int threads) {
  const int32_t num_heads = num_kv_heads_;
  const int64_t per_head = group_size(p), tile_tokens = max_tile_tokens(p);
  max_rows = 0;
  // As many KV heads a tile as leave enough tiles for the threads.
  int64_t splits = 0, max_heads = num_heads;
  for (const int32_t length : max_seq_lens_) splits += ceil_div(length, kSplitTokens);
  if (threads > 1) {
    const int64_t tiles = ceil_div(threads * kUnitsPerThread, std::max<int64_t>(1, splits));
    max_heads = std::max<int64_t>(1, num_heads / tiles);
  }
  std::vector<std::pair<int32_t, int32_t>> places(p.num_seqs, {-1, 0});  // group, first token in it
  for (size_t g = 0; g < groups.size(); ++g) {
    Group& group = groups[g];
    int32_t token = 0;
    for (const int32_t seq : group.seqs) {
      places[seq] = {static_cast<int32_t>(g), token};
      token += static_cast<int32_t>(sequence_at(p, seq).num_rows);
    }
    group.tile_tokens = static_cast<int32_t>(std::min<int64_t>(tile_tokens, token));
    group.heads = static_cast<int32_t>(heads_per_tile(p, group.tile_tokens * per_head, max_heads));
    group.head_chunks = static_cast<int32_t>(ceil_div(num_heads, group.heads));
  }
  const auto add = [&](Unit unit, int64_t heads) {
    for (int64_t head = 0; head < num_heads; head += heads) {
      unit.first_kv_head = static_cast<int32_t>(head);
      unit.num_kv_heads = static_cast<int32_t>(std::min(heads, num_heads - head));
      max_rows = std::max(max_rows, unit.num_tokens * unit.num_kv_heads * per_head);
      units.push_back(unit);
    }
  };
  for (size_t g = 0; g < groups.size(); ++g) {
    Group& group = groups[g];
    group.first_unit = static_cast<int32_t>(units.size());
    const auto num_tokens = static_cast<int32_t>(group.rows.size());
    for (int32_t token = 0; token < num_tokens; token += group.tile_tokens) {
      add({.seq = group.seqs[0],
           .group = static_cast<int32_t>(g),
           .shared = true,
           .first_token = token,
           .num_tokens = std::min(group.tile_tokens, num_tokens - token),
           .group_token = token},
          group.heads);
    }
  }
  for (int64_t seq = 0; seq < p.num_seqs; ++seq) {
    const SequenceView s = sequence_at(p, seq);
    for (int64_t token = 0; token < s.num_rows; token += tile_tokens) {
      const int64_t num_tokens = std::min(tile_tokens, s.num_rows - token);
      add({.seq = static_cast<int32_t>(seq),
           .group = places[seq].first,
           .shared = false,
           .first_token = static_cast<int32_t>(s.first_row + token),
           .num_tokens = static_cast<int32_t>(num_tokens),
           .group_token = static_cast<int32_t>(places[seq].second + token)},
          heads_per_tile(p, num_tokens * per_head, max_heads));
    }
  }
}

int64_t AttentionPlan::estimated_splits(const PagedAttentionParams& p, const Unit& unit) const {
  if (unit.shared) return groups[unit.group].num_splits;
  const SequenceView s = sequence_at(p, unit.seq);
  int64_t end = max_seq_lens_[unit.seq];
  if (p.causal && !p.q_positions) {
    end -= std::min(end, s.first_row + s.num_rows - unit.first_token - unit.num_tokens);
  }
  int64_t num_splits = ceil_div(end, kSplitTokens);
  if (unit.group >= 0) num_splits -= std::min(num_splits, groups[unit.group].num_splits);
  if (p.window > 0) {
    const int64_t after = p.causal ? 0 : s.num_rows;  // positions after the last query's own
    num_splits =
        std::min(num_splits, ceil_div(p.window + unit.num_tokens + after, kSplitTokens) + 1);
  }
  return num_splits;
}

// Splits of units that would keep one thread busy while the others wait become tasks of their own;
// so do those of a few more units if there is little small work, of which threads take what is left
// over in the end. Large tasks come first.
void AttentionPlan::add_tasks(const PagedAttentionParams& p, int threads) {
  std::vector<int64_t> num_splits, sizes;
  int64_t total = 0, small = 0;
  for (const Unit& unit : units) {
    num_splits.push_back(estimated_splits(p, unit));
    sizes.push_back(num_splits.back() * unit.num_tokens * unit.num_kv_heads);
    total += sizes.back();
  }
  const int64_t share = std::max<int64_t>(1, total / (threads * kUnitsPerThread));
  const int64_t enough_small = share / 2;
  for (const int64_t size : sizes) small += size <= share / kSmallTasks ? size : 0;
  const int64_t state_floats = num_state_floats(max_rows, padded_row(head_dim_v_));
  std::vector<std::pair<int64_t, Task>> sized;
  for (int32_t i = 0; i < static_cast<int32_t>(units.size()); ++i) {
    Unit& unit = units[i];
    const bool divides =
        sizes[i] > share || (small < enough_small && sizes[i] > share / kSmallTasks);
    const bool follows = !unit.shared && unit.group >= 0;  // what its group shares
    const bool fits = (num_states + num_splits[i]) * state_floats <= kMaxWorkspaceFloats;
    bool waits = follows;  // for its group, and goes on from there
    if (threads > 1 && (divides || follows) && fits) {
      unit.num_parts = static_cast<int32_t>(std::max<int64_t>(1, num_splits[i]));
      if (unit.num_parts > 1) small += sizes[i];
      waits = false;
    }
    if (unit.shared || unit.num_parts > 1 || (follows && !waits)) {
      unit.first_state = static_cast<int32_t>(num_states);
      num_states += unit.num_parts;
    }
    if (unit.shared && unit.num_parts > 1) to_fold.push_back(i);
    if (follows || (!unit.shared && unit.num_parts > 1)) to_finish.push_back(i);
    if (waits) continue;
    for (int32_t part = 0; part < unit.num_parts; ++part) {
      sized.push_back({sizes[i] / unit.num_parts, {i, part}});
    }
  }
  // Of one size, those that read the same positions follow each other, so that the address space is
  // looked up once for all heads.
  std::stable_sort(sized.begin(), sized.end(), [](const auto& a, const auto& b) {
    return a.first != b.first ? a.first > b.first : a.second.part < b.second.part;
  });
  for (const auto& each : sized) tasks.push_back(each.second);
}

int64_t num_state_floats(int64_t num_rows, int64_t out_stride) {
  return round_up(num_rows * (out_stride + 2), kRowAlignment);
}

}  // namespace kvlink::cpu
