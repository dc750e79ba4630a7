#include "kvlink/transport/control.hpp"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <climits>
#include <cstring>

#include "kvlink/base/check.hpp"
#include "kvlink/base/math.hpp"

namespace kvlink::transport {

namespace {

constexpr uint64_t kMagic = 0x324c5254434c564bULL;  // "KVLCTRL2"
constexpr uint64_t kSlotsAt = 4096;
constexpr int64_t kMaxWaitSlice = 100'000'000;  // ns

struct Header {
  uint64_t magic;
  uint32_t slot_bytes, num_slots;
  uint64_t num_page_entries;
};

uint64_t page_list_at(uint32_t num_slots) {
  return static_cast<uint64_t>(round_up(kSlotsAt + uint64_t{num_slots} * sizeof(Slot), 4096));
}

void futex_wait(const std::atomic<uint32_t>& word, uint32_t seen, int64_t timeout_ns) {
  const timespec timeout{timeout_ns / 1'000'000'000, timeout_ns % 1'000'000'000};
  syscall(SYS_futex, &word, FUTEX_WAIT, seen, &timeout, nullptr, 0);
}

// What a closed, reused or still open slot means to somebody who holds `key`.
Status status_of(const Word& word, SlotKey key) {
  if (word.generation != key.generation) return Status::kStale;
  return word.phase == Phase::kClosed ? word.status : Status::kPending;
}

// The same to a peer that wants in: a transfer that has ended well takes no more part in anything.
Status entry_status(const Word& word, SlotKey key) {
  const Status status = status_of(word, key);
  return status == Status::kOk ? Status::kStale : status;
}

}  // namespace

void notify(Slot& slot) {
  slot.changes.fetch_add(1);
  syscall(SYS_futex, &slot.changes, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

Control::Control(Segment segment, uint32_t num_slots, uint64_t num_page_entries)
    : segment_(std::move(segment)),
      num_slots_(num_slots),
      num_page_entries_(num_page_entries),
      slots_(reinterpret_cast<Slot*>(segment_.data() + kSlotsAt)),
      page_list_(reinterpret_cast<int32_t*>(segment_.data() + page_list_at(num_slots))) {}

std::shared_ptr<Control> Control::create(uint32_t num_slots, uint64_t num_page_entries) {
  KVLINK_CHECK(num_slots >= 1 && num_slots <= 65536, "num_slots: expected 1 to 65536; got ",
               num_slots);
  KVLINK_CHECK(num_page_entries >= 1 && num_page_entries <= uint64_t{1} << 30,
               "num_page_entries: expected 1 to 2^30; got ", num_page_entries);
  auto segment = Segment::create(page_list_at(num_slots) + num_page_entries * 4, true);
  *reinterpret_cast<Header*>(segment.data()) = {kMagic, sizeof(Slot), num_slots, num_page_entries};
  return std::make_shared<Control>(std::move(segment), num_slots, num_page_entries);
}

std::shared_ptr<Control> Control::attach(int fd, uint64_t num_bytes) {
  KVLINK_CHECK(num_bytes >= kSlotsAt && num_bytes < uint64_t{1} << 40,
               "control segment: expected 4096 bytes to 1 TiB; got ", num_bytes);
  auto segment = Segment::attach(fd, num_bytes);
  const Header header = *reinterpret_cast<const Header*>(segment.data());
  KVLINK_CHECK(header.magic == kMagic && header.slot_bytes == sizeof(Slot),
               "control segment: not one of this version");
  KVLINK_CHECK(header.num_slots >= 1 && header.num_slots <= 65536 &&
                   header.num_page_entries <= uint64_t{1} << 30 &&
                   page_list_at(header.num_slots) + header.num_page_entries * 4 <= num_bytes,
               "control segment: ", num_bytes, " bytes do not hold ", header.num_slots,
               " slots and ", header.num_page_entries, " page entries");
  return std::make_shared<Control>(std::move(segment), header.num_slots, header.num_page_entries);
}

Slot& Control::slot(uint32_t idx) const {
  KVLINK_CHECK(idx < num_slots_, "slot: expected below ", num_slots_, "; got ", idx);
  return slots_[idx];
}

bool Control::owns(SlotKey key, Word* word) const {
  *word = Word::unpack(slot(key.slot).word.load());
  return word->generation == key.generation;
}

// --- the owner -----------------------------------------------------------------------------------

SlotKey Control::open(uint32_t idx, uint64_t first_page, const SlotTerms& terms,
                      std::shared_ptr<OwnPages> own) {
  Slot& slot = this->slot(idx);
  const Word old = Word::unpack(slot.word.load());
  KVLINK_CHECK(old.phase == Phase::kFree || old.phase == Phase::kClosed, "slot ", idx,
               ": expected a free one");
  KVLINK_CHECK(slot.lessee.load() == 0, "slot ", idx, ": expected one nobody has adopted");
  KVLINK_CHECK(terms.num_layers >= 1 && terms.num_layers <= kMaxLayers,
               "stored layers: expected 1 to ", kMaxLayers, "; got ", terms.num_layers);
  KVLINK_CHECK(own && own->layers.size() == terms.num_layers, "own: expected the pages of ",
               terms.num_layers, " stored layers");
  KVLINK_CHECK(first_page <= num_page_entries_ && terms.num_pages <= num_page_entries_ - first_page,
               "pages: no room in the page list");
  // The generation moves first, so that whoever still holds an old key is told that it is stale.
  const Word next{(old.generation + 1) & ((uint64_t{1} << 48) - 1), Status::kPending, Phase::kFree};
  slot.word.store(next.pack());
  slot.unfinished.store(0);
  slot.torn.store(0);
  slot.rows.store(0);
  for (uint32_t layer = 0; layer < terms.num_layers; ++layer) {
    slot.layer_digest[layer].store(0);
    slot.layer_rows[layer].store(0);
  }
  slot.deadline_ns.store(terms.deadline_ns);
  slot.pulls_left.store(terms.num_pulls);
  slot.with_digest.store(terms.with_digest);
  slot.kind = terms.kind;
  slot.num_layers = terms.num_layers;
  std::copy_n(terms.transfer_id, 2, slot.transfer_id);
  slot.rows_per_layer = terms.rows_per_layer;
  slot.first_page = first_page;
  slot.num_pages = terms.num_pages;
  std::copy_n(terms.pages, terms.num_pages, page_list_ + first_page);
  own->digested.assign(terms.num_layers, false);
  {
    std::lock_guard lock(mutex_);
    own_.resize(num_slots_);
    own_[idx] = std::move(own);
  }
  slot.word.store(Word{next.generation, Status::kPending, Phase::kOpen}.pack());
  return {idx, next.generation};
}

std::span<const int32_t> Control::pages(uint64_t first, uint64_t count) const {
  KVLINK_CHECK(first <= num_page_entries_ && count <= num_page_entries_ - first,
               "pages: expected entries within ", num_page_entries_, "; got ", first, " + ", count);
  return {page_list_ + first, count};
}

bool Control::close(SlotKey key, Status status) {
  Slot& slot = this->slot(key.slot);
  uint64_t bits = slot.word.load();
  while (true) {
    const Word word = Word::unpack(bits);
    if (word.generation != key.generation) return false;
    // A verification under way ends what it verifies, unless the owner takes the pages back.
    const bool open = word.phase == Phase::kOpen || word.phase == Phase::kAdopted;
    if (!open && !(word.phase == Phase::kVerifying && status == Status::kRevoked)) return false;
    const Word closed{key.generation, status, Phase::kClosed};
    if (slot.word.compare_exchange_strong(bits, closed.pack())) break;
  }
  notify(slot);
  tell_closed(key, status);
  return true;
}

std::shared_ptr<OwnPages> Control::own(SlotKey key) const {
  Word word;
  std::lock_guard lock(mutex_);
  return owns(key, &word) && key.slot < own_.size() ? own_[key.slot] : nullptr;
}

void Control::forget(SlotKey key) {
  Word word;
  std::shared_ptr<OwnPages> last;  // dropped after the lock
  std::lock_guard lock(mutex_);
  if (owns(key, &word) && key.slot < own_.size()) last.swap(own_[key.slot]);
}

void Control::set_on_closed(std::function<void(SlotKey, Status)> on_closed) {
  std::lock_guard lock(mutex_);
  on_closed_ = std::move(on_closed);
}

void Control::tell_closed(SlotKey key, Status status) {
  std::function<void(SlotKey, Status)> on_closed;
  {
    std::lock_guard lock(mutex_);
    on_closed = on_closed_;
  }
  if (on_closed) on_closed(key, status);
}

bool Control::extend(SlotKey key, int64_t deadline_ns) {
  if (status(key) != Status::kPending) return false;
  slot(key.slot).deadline_ns.store(deadline_ns);
  return true;
}

bool Control::expire(SlotKey key, int64_t now) {
  return now > slot(key.slot).deadline_ns.load() && close(key, Status::kExpired);
}

bool Control::quiet(SlotKey key) const {
  const Slot& slot = this->slot(key.slot);
  const Word word = Word::unpack(slot.word.load());
  if (word.generation != key.generation) return true;
  return word.phase == Phase::kClosed && slot.writers.load() == 0 && slot.lessee.load() == 0;
}

void Control::drop_link(uint32_t bit) {
  const uint64_t mask = uint64_t{1} << bit;
  for (uint32_t idx = 0; idx < num_slots_; ++idx) {
    Slot& slot = slots_[idx];
    const Word word = Word::unpack(slot.word.load());
    if (word.phase == Phase::kFree) continue;
    const SlotKey key{idx, word.generation};
    uint32_t lessee = bit + 1;
    const bool adopted = slot.lessee.compare_exchange_strong(lessee, 0);
    if (adopted) close(key, Status::kPeerLost);
    const bool inside = slot.writers.load() & mask;
    const bool began = slot.unfinished.fetch_and(~mask) & mask;
    if (slot.kind == SlotKind::kGrant) {
      const bool complete = slot.rows.load() >= slot.rows_per_layer * slot.num_layers;
      if (inside) slot.torn.store(1);  // before the bit goes, which a commit may be waiting for
      if (inside || (began && !complete)) close(key, Status::kPeerLost);
    }
    slot.writers.fetch_and(~mask);
    if (inside || began || adopted) notify(slot);
  }
}

template <typename Done>
Status Control::wait(SlotKey key, int64_t deadline_ns, Done done) const {
  const Slot& slot = this->slot(key.slot);
  while (true) {
    const uint32_t seen = slot.changes.load();
    const Word word = Word::unpack(slot.word.load());
    const Status status = status_of(word, key);
    if (status != Status::kPending) return status;
    if (done(slot, word)) return Status::kOk;
    const int64_t left = deadline_ns - now_ns();
    if (left <= 0) return Status::kPending;
    futex_wait(slot.changes, seen, std::min(left, kMaxWaitSlice));
  }
}

Status Control::wait_layer(SlotKey key, uint32_t layer, int64_t deadline_ns) const {
  KVLINK_CHECK(layer < slot(key.slot).num_layers, "layer: expected below ",
               slot(key.slot).num_layers, "; got ", layer);
  return wait(key, deadline_ns, [layer](const Slot& slot, const Word&) {
    return slot.layer_rows[layer].load() >= slot.rows_per_layer;
  });
}

bool Control::digest_layers(SlotKey key, const Executor& executor, OwnPages& own) {
  Slot& slot = this->slot(key.slot);
  if (!slot.with_digest.load()) return true;
  std::lock_guard lock(own.mutex);
  for (size_t layer = 0; layer < own.layers.size(); ++layer) {
    if (own.digested[layer] || slot.layer_rows[layer].load() != slot.rows_per_layer) continue;
    const uint64_t expected = slot.layer_digest[layer].load();
    const DigestParams params{.layers = &own.layers[layer],
                              .model_layers = &own.model_layers[layer],
                              .num_layers = 1,
                              .num_heads = own.layers[layer].layout.num_kv_heads,
                              .head = 0,
                              .model_head = own.model_head,
                              .run = {own.pages.data(), std::ssize(own.pages), 0},
                              .num_tokens = own.num_tokens,
                              .token_position = 0};
    const int64_t started = now_ns();
    const bool right = executor.digest(params).digest == expected;
    own.verify_ns += now_ns() - started;
    if (!right) return false;
    own.digested[layer] = true;
  }
  return true;
}

Status Control::arrive(SlotKey key, const Executor& executor, int64_t deadline_ns) {
  Slot& slot = this->slot(key.slot);
  const auto own = this->own(key);
  if (!own) return status(key);
  const auto complete = [](const Slot& slot) {
    return slot.rows.load() >= slot.rows_per_layer * slot.num_layers;
  };
  const auto has_new_layer = [&own](const Slot& slot) {
    const std::unique_lock lock(own->mutex, std::try_to_lock);
    if (!lock || !slot.with_digest.load()) return false;  // another thread is at it
    for (uint32_t layer = 0; layer < slot.num_layers; ++layer) {
      if (!own->digested[layer] && slot.layer_rows[layer].load() == slot.rows_per_layer)
        return true;
    }
    return false;
  };
  while (true) {
    const Status ready = wait(key, deadline_ns, [&](const Slot& slot, const Word& word) {
      // While another thread commits, wait for its result.
      return word.phase == Phase::kOpen && (complete(slot) || has_new_layer(slot));
    });
    if (ready != Status::kOk) return ready;
    if (complete(slot)) return commit(key, executor, *own, deadline_ns);
    if (!digest_layers(key, executor, *own)) {
      close(key, Status::kDigestMismatch);
      return status(key);
    }
  }
}

Status Control::commit(SlotKey key, const Executor& executor, OwnPages& own, int64_t deadline_ns) {
  Slot& slot = this->slot(key.slot);
  const Word open{key.generation, Status::kPending, Phase::kOpen};
  const Word verifying{key.generation, Status::kPending, Phase::kVerifying};
  // Leaves the verifying phase, and gives what holds then: a revocation may have come first.
  const auto leave_with = [&](Status status, Phase phase) {
    uint64_t expected = verifying.pack();
    const bool changed =
        slot.word.compare_exchange_strong(expected, Word{key.generation, status, phase}.pack());
    notify(slot);
    if (changed && phase == Phase::kClosed) tell_closed(key, status);
    return changed ? status : status_of(Word::unpack(expected), key);
  };
  uint64_t bits = open.pack();
  if (!slot.word.compare_exchange_strong(bits, verifying.pack())) {
    return wait_closed(key, deadline_ns);
  }
  // Writers are shut out. One may be between its last byte and leave(); no digest before it is out.
  while (slot.writers.load() != 0) {
    const uint32_t seen = slot.changes.load();
    if (slot.writers.load() == 0) break;
    const int64_t now = now_ns();
    if (now > slot.deadline_ns.load()) return leave_with(Status::kExpired, Phase::kClosed);
    if (now >= deadline_ns) return leave_with(Status::kPending, Phase::kOpen);
    futex_wait(slot.changes, seen, std::min(deadline_ns - now, kMaxWaitSlice));
  }
  // Whoever looks first after the deadline: the reaper, or we.
  if (now_ns() > slot.deadline_ns.load()) return leave_with(Status::kExpired, Phase::kClosed);
  Status result = Status::kOk;
  const std::atomic<uint64_t>* rows = slot.layer_rows;
  const bool exact = std::all_of(rows, rows + slot.num_layers, [&](const auto& layer_rows) {
    return layer_rows.load() == slot.rows_per_layer;
  });
  try {
    if (slot.torn.load()) {
      result = Status::kPeerLost;
    } else if (!exact) {
      result = Status::kRowCountMismatch;
    } else if (!digest_layers(key, executor, own)) {
      result = Status::kDigestMismatch;
    }
    for (size_t i = 0; i < own.pages.size() && own.generations; ++i) {
      if (own.generations[own.pages[i]] != own.granted[i]) result = Status::kGenerationMismatch;
    }
  } catch (...) {
    leave_with(Status::kMoveFailed, Phase::kClosed);
    throw;
  }
  return leave_with(result, Phase::kClosed);
}

// --- both ----------------------------------------------------------------------------------------

Status Control::status(SlotKey key) const {
  return status_of(Word::unpack(slot(key.slot).word.load()), key);
}

Status Control::wait_closed(SlotKey key, int64_t deadline_ns) const {
  return wait(key, deadline_ns, [](const Slot&, const Word&) { return false; });
}

// --- a peer --------------------------------------------------------------------------------------

Status Control::enter(SlotKey key, uint32_t bit) {
  Slot& slot = this->slot(key.slot);
  slot.writers.fetch_or(uint64_t{1} << bit);
  const Status status = may_enter(key);
  if (status != Status::kOk) leave(key, bit);
  return status;
}

Status Control::may_enter(SlotKey key) const {
  const Slot& slot = this->slot(key.slot);
  const Word word = Word::unpack(slot.word.load());
  const Status status = entry_status(word, key);
  if (status != Status::kPending) return status;
  if (now_ns() > slot.deadline_ns.load()) return Status::kExpired;
  return word.phase == Phase::kOpen ? Status::kOk : Status::kBusy;
}

void Control::leave(SlotKey key, uint32_t bit) {
  Slot& slot = this->slot(key.slot);
  slot.writers.fetch_and(~(uint64_t{1} << bit));
  notify(slot);
}

void Control::add_rows(SlotKey key, uint32_t layer, const RelayoutResult& moved) {
  Slot& slot = this->slot(key.slot);
  slot.layer_digest[layer].fetch_add(moved.digest);
  const uint64_t all = slot.rows_per_layer * slot.num_layers;
  const auto reaches = [&](std::atomic<uint64_t>& rows, uint64_t target) {
    const uint64_t before = rows.fetch_add(moved.rows);
    return before < target && before + moved.rows >= target;
  };
  const bool layer_is_here = reaches(slot.layer_rows[layer], slot.rows_per_layer);
  if (reaches(slot.rows, all) || layer_is_here) notify(slot);
}

Status Control::begin(SlotKey key, uint32_t bit) {
  Slot& slot = this->slot(key.slot);
  if (const Status status = may_enter(key); status != Status::kOk) return status;
  const uint64_t mask = uint64_t{1} << bit;
  if (slot.unfinished.fetch_or(mask) & mask) return Status::kBusy;
  const Status status = may_enter(key);
  if (status != Status::kOk) slot.unfinished.fetch_and(~mask);
  return status;
}

void Control::finish(SlotKey key, uint32_t bit) {
  Word word;
  if (owns(key, &word)) slot(key.slot).unfinished.fetch_and(~(uint64_t{1} << bit));
}

Status Control::adopt(SlotKey key, uint32_t bit) {
  Slot& slot = this->slot(key.slot);
  const Status before = entry_status(Word::unpack(slot.word.load()), key);
  if (before != Status::kPending) return before;
  if (now_ns() > slot.deadline_ns.load()) return Status::kExpired;
  uint32_t nobody = 0;
  if (!slot.lessee.compare_exchange_strong(nobody, bit + 1)) return Status::kBusy;
  uint64_t bits = Word{key.generation, Status::kPending, Phase::kOpen}.pack();
  const Word adopted{key.generation, Status::kPending, Phase::kAdopted};
  if (slot.word.compare_exchange_strong(bits, adopted.pack())) return Status::kOk;
  slot.lessee.store(0);
  notify(slot);
  const Status status = entry_status(Word::unpack(bits), key);
  return status == Status::kPending ? Status::kBusy : status;
}

bool Control::unadopt(SlotKey key, uint32_t bit) {
  Slot& slot = this->slot(key.slot);
  uint64_t bits = Word{key.generation, Status::kPending, Phase::kAdopted}.pack();
  const Word open{key.generation, Status::kPending, Phase::kOpen};
  const bool opened =
      slot.lessee.load() == bit + 1 && slot.word.compare_exchange_strong(bits, open.pack());
  Word word;
  uint32_t self = bit + 1;
  if (owns(key, &word)) slot.lessee.compare_exchange_strong(self, 0);
  notify(slot);
  return opened;
}

bool Control::release(SlotKey key, uint32_t bit) {
  Slot& slot = this->slot(key.slot);
  // Closed first: the owner takes the pages back when it sees a closed slot without a lessee.
  const bool late = now_ns() > slot.deadline_ns.load();
  const bool ended = close(key, late ? Status::kExpired : Status::kOk);
  Word word;
  uint32_t self = bit + 1;
  if (owns(key, &word)) slot.lessee.compare_exchange_strong(self, 0);
  notify(slot);
  return ended;
}

Status Control::consume(SlotKey key) {
  Slot& slot = this->slot(key.slot);
  const Status status = entry_status(Word::unpack(slot.word.load()), key);
  if (status != Status::kPending) return status;
  if (slot.pulls_left.fetch_sub(1) == 1) close(key, Status::kOk);
  return Status::kOk;
}

}  // namespace kvlink::transport
