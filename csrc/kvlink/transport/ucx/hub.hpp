// What the links of an endpoint share: the context, the thread that moves, registered memory.
#pragma once

#include <map>

#include "kvlink/transport/control.hpp"
#include "kvlink/transport/ucx/staging.hpp"

namespace kvlink::transport::ucx {

class Link;

// Chunks of one transfer that may be under way, and the most bytes of a staged one.
inline constexpr int kWindow = 4;
inline constexpr size_t kChunkBytes = size_t{1} << 20;
// Runs from this length on are not packed, where both sides' bytes are the same.
inline constexpr int64_t kDirectBytes = int64_t{32} << 10;

class Hub : public std::enable_shared_from_this<Hub> {
 public:
  // Throws std::runtime_error when UCX cannot start.
  static std::shared_ptr<Hub> create(std::shared_ptr<Control> control, const Executor& executor);
  Hub(std::shared_ptr<Control> control, const Executor& executor, std::shared_ptr<Engine> engine);
  ~Hub();

  void add(const std::shared_ptr<Link>& link);
  // Registered memory that covers the planes of these layers; mapped when it is first asked for.
  std::vector<std::shared_ptr<Mapping>> map_layers(const OwnPages& own);
  // Unmaps it: peers reach it no more.
  void forget_layers(const std::vector<LayerView>& layers);
  void close();

  const std::shared_ptr<Control> control;
  const Executor executor;
  const std::shared_ptr<Engine> engine;
  Mover mover;
  const bool puts_over_tcp;  // KVLINK_UCX_PUT_OVER_TCP=1, for tests of direct access without RDMA

 private:
  void on_closed(SlotKey key, Status status);

  std::mutex mutex_;
  std::vector<std::weak_ptr<Link>> links_;
  struct Mapped {
    std::vector<std::shared_ptr<Mapping>> blocks;
    std::shared_ptr<void> keep_alive;
  };
  std::map<std::vector<const void*>, Mapped> mapped_;
};

}  // namespace kvlink::transport::ucx
