// The moving side of a transfer whose pages belong to a peer elsewhere.
//   staged:  chunks are packed and converted into buffers, and sent (push) or asked for (pull)
//   gathered: the same, but a push of long runs over TCP sends them from where they lie
//   direct:  the peer pins its pages, and puts or gets move the runs that both layouts share
#pragma once

#include "kvlink/transport/posting.hpp"
#include "kvlink/transport/ucx/link.hpp"
#include "kvlink/transport/ucx/terms.hpp"

namespace kvlink::transport::ucx {

// Whether runs are long enough, and bytes the same on both sides, for direct access to be worth
// asking for.
bool direct_pays(const TransferSpec& spec, int64_t least_bytes);
// Fills in where the peer's pages are; false when that does not fit its pool.
bool use_direct_terms(TransferSpec* spec, const Terms& terms);

class UcxTransfer final : public PostedTransfer {
 public:
  // `reply`, `terms`: the owner's answer. Null, and *status, when they cannot be used.
  static std::shared_ptr<UcxTransfer> create(std::shared_ptr<Link> link, uint64_t number,
                                             TransferSpec spec, const Header& reply, Terms terms,
                                             Status* status);
  UcxTransfer(std::shared_ptr<Link> link, uint64_t number, TransferSpec spec, const Header& reply,
              std::shared_ptr<Terms> terms, std::vector<uint32_t> block_numbers);
  ~UcxTransfer() override;

  Status wait_arrived(int64_t deadline_ns) override;

  // --- for the link ---
  void on_answer(const Header& header);
  void on_outcome(Status status);
  // A pulled chunk; on the mover's thread.
  void land(const Header& header, const Payload& payload);
  // Until the owner knows that this side gave up, if it did.
  void wait_cancelled(int64_t deadline_ns);
  void on_link_closed();
  SlotKey key() const { return spec_.key; }

  // --- for fault tests ---
  // From now on it is about to move a chunk, for which it asks with *enter; false when it ended.
  bool hold(Header* enter);
  // Moves it if it can (`inside`: the pages are pinned), and leaves.
  void let_go(bool inside);

 protected:
  bool move_chunk(int32_t part, int64_t first, int64_t count) override;
  Status finish_moves(std::string* message) override;
  void on_ended(Status status) override;
  void on_failed_meanwhile() override;

 private:
  enum class Step : uint8_t {
    kAsked = 0,   // the owner has it, or is to pin
    kMoving = 1,  // it lands, or puts or gets are under way
    kLeft = 2,    // direct: the owner is to unpin
  };
  struct Chunk {
    int32_t part = 0;
    int64_t first = 0, count = 0;
    RelayoutResult moved;
    int64_t started_ns = 0;
    Step step = Step::kAsked;
    std::shared_ptr<Mapping> buffer;  // staged: its bytes
  };

  Header message(Type type) const;
  Header chunk_message(Type type, uint64_t seq, const Chunk& chunk) const;
  // Room in the window; 0 after the transfer ended.
  uint64_t open_chunk(const Chunk& chunk);
  // From one step to the next; false for a duplicate, or one that nobody waits for any more.
  bool claim(uint64_t seq, Step from, Step to, Chunk* chunk);
  void close_chunk(uint64_t seq, const Chunk& chunk, Status status);
  void close_answered();
  bool stage(uint64_t seq, Chunk chunk);
  // Empty where a chunk has to be packed.
  std::vector<ucp_dt_iov_t> pieces_of(const Chunk& chunk) const;
  bool gather(uint64_t seq, Chunk chunk, std::vector<ucp_dt_iov_t> pieces);
  bool digest_source(Chunk* chunk);
  bool begin_direct(Chunk chunk);
  void on_entered(const Header& header);
  void leave(uint64_t seq, const Chunk& chunk, Status status);
  void finish_if_over();
  Status consume();
  // After some silence, whether the slot has ended.
  void ask_now_and_then();

  const std::shared_ptr<Link> link_;
  const uint64_t number_;
  const bool direct_;
  bool gathers_ = false;
  const std::shared_ptr<Terms> terms_;         // what spec_'s views of the peer point into
  const std::vector<uint32_t> block_numbers_;  // of terms_->blocks, at the port

  mutable std::mutex reply_mutex_;
  std::condition_variable replied_;
  std::unordered_map<uint64_t, Chunk> chunks_;  // under way, by seq
  uint64_t next_seq_ = 1;
  bool draining_ = false;  // everything was posted; the last answer ends it
  bool told_end_ = false;  // kFinish was sent
  bool ended_here_ = false;
  bool failed_here_ = false;            // while the owner was asked for the outcome
  Status outcome_ = Status::kPending;   // of the slot, as its owner told it
  Status consumed_ = Status::kPending;  // pulls
  int64_t heard_ns_ = now_ns(), asked_ns_ = 0;
};

}  // namespace kvlink::transport::ucx
