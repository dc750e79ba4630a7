// Chunks between pools that do not share memory: rows in the destination's dtype, dense, K before
// V, each [tokens][heads][dims], and their scales after them where each row has one.
#pragma once

#include <condition_variable>
#include <deque>
#include <mutex>
#include <span>

#include "kvlink/transport/transport.hpp"
#include "kvlink/transport/ucx/engine.hpp"

namespace kvlink::transport::ucx {

// Bytes of a staged chunk in the form of `layout`.
size_t staged_bytes(const KVLayout& layout, int32_t num_heads, int64_t count);

// The chunk as one page of `count` slots at `data`. Scales that the pool shares (one per layer or
// head) are those of `pool`, whose heads from `head` on are staged.
LayerView staged_view(const LayerView& pool, int32_t num_heads, int32_t head, int64_t count,
                      std::byte* data);

// Scales that the pool shares, of every stored layer: K's, then V's. Empty where rows have their
// own, or none.
std::vector<float> shared_scales(const std::vector<LayerView>& layers);
size_t num_shared_scales(const KVLayout& layout, size_t num_layers);

// Layers that have a layout and such scales, but no rows. `scales` must outlive them.
std::vector<LayerView> scale_layers(const KVLayout& layout, size_t num_layers, int64_t num_pages,
                                    float* scales);

// Registered buffers of one size, made as they are needed, up to a number. Thread-safe.
class Buffers : public std::enable_shared_from_this<Buffers> {
 public:
  Buffers(std::shared_ptr<Engine> engine, size_t size, int limit)
      : engine_(std::move(engine)), size_(size), limit_(limit) {}
  size_t size() const { return size_; }
  // Null when all are in use. A buffer comes back when its last owner drops it.
  std::shared_ptr<Mapping> try_take();
  // Waits until one is there or deadline_ns.
  std::shared_ptr<Mapping> take(int64_t deadline_ns);
  // Called on any thread when one came back.
  void set_on_freed(std::function<void()> on_freed);

 private:
  void give(std::shared_ptr<Mapping> buffer);

  const std::shared_ptr<Engine> engine_;
  const size_t size_;
  const int limit_;
  std::mutex mutex_;
  std::condition_variable freed_;
  std::vector<std::shared_ptr<Mapping>> free_;
  int made_ = 0;
  std::function<void()> on_freed_;
};

// The thread of an endpoint that moves between buffers and pages on the receiving side.
class Mover {
 public:
  Mover() = default;
  ~Mover() { stop(); }
  // `owner` names whose job it is.
  void submit(const void* owner, std::function<void()> job);
  // Drops the jobs of `owner` that wait, and waits for the one under way.
  void drain(const void* owner);
  void stop();

 private:
  struct Job {
    const void* owner;
    std::function<void()> run;
  };
  void loop();

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Job> jobs_;
  const void* running_ = nullptr;
  bool stopped_ = false;
  std::thread thread_;
};

}  // namespace kvlink::transport::ucx
