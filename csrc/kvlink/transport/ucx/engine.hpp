// One UCX context and the thread that alone calls into it. Links have a port each (port.hpp): a
// worker of their own, so that destroying it ends whatever a peer could still do to us.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "kvlink/transport/ucx/api.hpp"

namespace kvlink::transport::ucx {

// Bytes of a chunk that passes through UCX's own receive buffers (port.hpp).
inline constexpr size_t kPassingChunkBytes = size_t{512} << 10;
// Most pieces that one is sent from.
inline constexpr size_t kMaxPieces = 40;

class Port;
class Engine;

// Memory that UCX knows. Unmapped, on the engine's thread, when the last owner drops it.
class Mapping {
 public:
  Mapping(std::shared_ptr<Engine> engine, ucp_mem_h memh, void* address, size_t size)
      : engine_(std::move(engine)), memh_(memh), address_(address), size_(size) {}
  Mapping(const Mapping&) = delete;
  ~Mapping();

  ucp_mem_h memh() const { return memh_; }
  std::byte* data() const { return static_cast<std::byte*>(address_); }
  size_t size() const { return size_; }
  const std::string& rkey();  // what a peer needs to reach it

 private:
  std::shared_ptr<Engine> engine_;
  ucp_mem_h memh_;
  void* address_;
  size_t size_;
  std::once_flag packed_;
  std::string rkey_;
};

class Engine : public std::enable_shared_from_this<Engine> {
 public:
  // Throws std::runtime_error when UCX cannot start.
  static std::shared_ptr<Engine> create();
  ~Engine();

  // Runs `command` on the engine's thread, soon. False when the engine has stopped.
  bool post(std::function<void()> command);
  // The same, and waits for it; rethrows what it throws. On the engine's thread: runs it at once.
  void call(const std::function<void()>& command);
  bool on_thread() const { return std::this_thread::get_id() == thread_.get_id(); }

  // Makes memory reachable for UCX; address null: allocates it, where peers on this host could map
  // it if UCX has a way. Pages are not touched.
  std::shared_ptr<Mapping> map(void* address, size_t size);
  void unmap(ucp_mem_h memh);
  // Throws std::runtime_error where another worker might not fit into shared memory.
  void check_room() const;
  // Ends the thread; every port was closed before.
  void stop();

  ucp_context_h context() const { return context_; }

  // On the engine's thread.
  void add(Port* port);
  void remove(Port* port);

 private:
  explicit Engine(ucp_context_h context);
  void loop();
  bool run_commands();
  bool arm();  // false: something came meanwhile

  ucp_context_h context_;
  bool uses_shm_ = false;  // /dev/shm, as far as we know
  int epoll_fd_ = -1, wake_fd_ = -1;
  std::mutex stop_mutex_;
  std::mutex mutex_;
  std::vector<std::function<void()>> commands_;
  bool stopped_ = false;
  std::atomic<bool> asleep_{false};
  std::vector<Port*> ports_;  // of the thread
  std::thread thread_;
};

}  // namespace kvlink::transport::ucx
