// A UCX worker and its one UCX endpoint: what a link sends and receives through. Everything runs on
// the engine's thread, except where it says "any thread".
#pragma once

#include <atomic>
#include <deque>
#include <span>
#include <unordered_map>

#include "kvlink/transport/ucx/engine.hpp"

namespace kvlink::transport::ucx {

// The bytes that came with a message. Some are UCX's and pass: they are there during the call that
// brings them, and no longer. The others stay until the payload is dropped (any thread).
class Payload {
 public:
  Payload() = default;
  Payload(std::span<const std::byte> bytes, std::shared_ptr<void> keep)
      : bytes_(bytes), keep_(std::move(keep)) {}
  static Payload passing(std::span<const std::byte> bytes) {
    Payload payload(bytes, nullptr);
    payload.passes_ = true;
    return payload;
  }
  std::span<const std::byte> bytes() const { return bytes_; }
  bool passes() const { return passes_; }

 private:
  std::span<const std::byte> bytes_;
  std::shared_ptr<void> keep_;
  bool passes_ = false;
};

// Bytes to send and what holds them until they were read.
struct Outgoing {
  std::string header;
  const void* data = nullptr;
  size_t size = 0;
  std::shared_ptr<Mapping> mapping;  // of data, where it has one
  std::shared_ptr<void> keep;
  std::vector<ucp_dt_iov_t> pieces = {};  // instead of data: `size` bytes together
};

// One contiguous piece of a put or get.
struct RemoteRun {
  void* local = nullptr;
  uint64_t remote = 0;
  size_t size = 0;
  uint32_t block = 0;  // of the peer's memory: which key (Port::add_key)
};

using Done = std::function<void(ucs_status_t)>;

class Port : public std::enable_shared_from_this<Port> {
 public:
  // May refuse a message by what its header says: the payload is then not fetched.
  using Accept = std::function<bool(std::string_view header, size_t payload_bytes)>;
  using OnMessage = std::function<void(std::string_view header, Payload payload)>;
  using OnFailure = std::function<void(const std::string& why)>;
  // Room for a payload that waits at the sender; null: later, after room_freed().
  using TakeRoom = std::function<std::shared_ptr<Mapping>(size_t size)>;

  // Any thread. Throws std::runtime_error.
  static std::shared_ptr<Port> open(std::shared_ptr<Engine> engine);
  Port(std::shared_ptr<Engine> engine);
  ~Port();

  // Any thread, once, before connect.
  void set_handlers(Accept accept, OnMessage on_message, OnFailure on_failure, TakeRoom take_room);
  const std::string& address() const { return address_; }
  // Any thread. Throws std::runtime_error.
  // `same_host`: memory may be shared with the peer, which UCX does only where it is not asked to
  // tell when the peer dies.
  void connect(std::string address, bool same_host);
  // Any thread. `done` runs on the engine's thread, once, unless the engine has stopped.
  void send(Outgoing message, Done done = {});
  // Any thread. Keys of the peer's memory, by block number. Throws std::runtime_error.
  void add_key(uint32_t block, const std::string& packed);
  // Where a peer's memory can be read in this process; null when it cannot.
  const std::byte* map_remote(uint64_t address, const std::string& packed);
  // Any thread. All runs, then a flush: done when the peer's memory has them (or ours, for gets).
  void put(std::vector<RemoteRun> runs, std::shared_ptr<void> keep, Done done);
  void get(std::vector<RemoteRun> runs, std::shared_ptr<void> keep, Done done);
  // Whether payloads of any size pass through UCX's receive buffers (TCP alone), after connect.
  bool all_pass() const { return all_pass_; }
  // Any thread: a payload that waited for room can be fetched now.
  void room_freed();
  // Any thread. The transports in use ("tcp/eth0"), after connect.
  std::vector<std::string> transports();
  // Any thread. The peer reaches nothing of ours through this port when it returns, and no handler
  // runs any more. Tries for up to `grace_ns` to send what is under way.
  void close(int64_t grace_ns);

  // For the engine.
  bool progress();
  bool arm();
  int event_fd() const { return event_fd_; }

 private:
  struct Operation;
  struct Arrival;
  static ucs_status_t on_active_message(void* self, const void* header, size_t header_bytes,
                                        void* data, size_t size, const ucp_am_recv_param_t* param);
  ucp_request_param_t begin(Operation* operation);
  void start(Operation* operation, ucs_status_ptr_t request);
  void finish(Operation* operation, ucs_status_t status);
  void do_send(Outgoing message, Done done);
  void move(std::vector<RemoteRun> runs, std::shared_ptr<void> keep, Done done, bool is_put);
  void move_run(const RemoteRun& run, bool is_put, std::shared_ptr<void> keep, Done done);
  void flush(Done done);
  bool fetch(Arrival& arrival);
  void fetch_waiting();
  void fail(const std::string& why);
  void destroy(int64_t grace_ns);

  const std::shared_ptr<Engine> engine_;
  ucp_worker_h worker_ = nullptr;
  ucp_ep_h endpoint_ = nullptr;
  int event_fd_ = -1;
  std::string address_;
  Accept accept_;
  OnMessage on_message_;
  OnFailure on_failure_;
  TakeRoom take_room_;
  std::vector<ucp_rkey_h> keys_;
  std::unordered_map<std::string, ucp_rkey_h> mapped_keys_;  // by packed key
  std::vector<std::pair<Outgoing, Done>> unsent_;            // before connect
  std::deque<Arrival> waiting_;                              // for room
  Operation* operations_ = nullptr;                          // under way: a list
  std::atomic<bool> all_pass_{false};
  bool failed_ = false, closing_ = false, same_host_ = false;
};

}  // namespace kvlink::transport::ucx
