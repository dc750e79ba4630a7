#include "kvlink/transport/ucx/staging.hpp"

#include <pthread.h>

#include "kvlink/base/math.hpp"
#include "kvlink/layout/rows.hpp"

namespace kvlink::transport::ucx {

namespace {

bool rows_have_scales(const KVLayout& layout) {
  return layout.scale == ScaleGranularity::kTokenHead;
}

bool shares_scales(const KVLayout& layout) {
  return layout.has_scales() && !rows_have_scales(layout);
}

int64_t scales_per_plane(const KVLayout& layout) {
  return layout.scale == ScaleGranularity::kHead ? layout.num_kv_heads : 1;
}

}  // namespace

size_t staged_bytes(const KVLayout& layout, int32_t num_heads, int64_t count) {
  int64_t row = 0;
  for (int plane = 0; plane < num_planes(layout); ++plane) {
    row += row_dims(layout, plane) * dtype_bytes(layout.dtype);
  }
  const int64_t rows = count * num_heads;
  const int64_t scales = rows_have_scales(layout) ? rows * num_planes(layout) * 4 : 0;
  return static_cast<size_t>(round_up(rows * row, 4) + scales);
}

LayerView staged_view(const LayerView& pool, int32_t num_heads, int32_t head, int64_t count,
                      std::byte* data) {
  const KVLayout& from = pool.layout;
  LayerView view{.layout = from,
                 .k = nullptr,
                 .v = nullptr,
                 .k_scale = nullptr,
                 .v_scale = nullptr,
                 .num_pages = 1};
  KVLayout& layout = view.layout;
  if (layout.form == KVForm::kPacked) layout.form = KVForm::kSeparate;
  layout.num_kv_heads = num_heads;
  layout.page_size = static_cast<int32_t>(count);
  std::byte* cursor = data;
  for (int plane = 0; plane < num_planes(layout); ++plane) {
    const int64_t dims = row_dims(layout, plane);
    (plane == 0 ? layout.k : layout.v) = {.offset_bytes = 0,
                                          .stride_page = 0,
                                          .stride_slot = num_heads * dims,
                                          .stride_head = dims,
                                          .stride_dim = 1};
    (plane == 0 ? view.k : view.v) = cursor;
    cursor += count * num_heads * dims * dtype_bytes(layout.dtype);
  }
  cursor = data + round_up(cursor - data, 4);
  if (layout.form == KVForm::kLatent) {
    view.v = view.k;
    layout.v = layout.k;
  }
  if (rows_have_scales(layout)) {
    const Plane dense{.offset_bytes = 0,
                      .stride_page = 0,
                      .stride_slot = num_heads,
                      .stride_head = 1,
                      .stride_dim = 0};
    layout.k_scale = layout.v_scale = dense;
    view.k_scale = reinterpret_cast<float*>(cursor);
    view.v_scale = view.k_scale + (layout.has_v_plane() ? count * num_heads : 0);
  } else if (shares_scales(layout)) {
    view.k_scale = pool.k_scale + head * from.k_scale.stride_head;
    view.v_scale = pool.v_scale + head * from.v_scale.stride_head;
  }
  return view;
}

size_t num_shared_scales(const KVLayout& layout, size_t num_layers) {
  return shares_scales(layout) ? num_layers * 2 * static_cast<size_t>(scales_per_plane(layout)) : 0;
}

std::vector<float> shared_scales(const std::vector<LayerView>& layers) {
  std::vector<float> scales;
  for (const LayerView& layer : layers) {
    const KVLayout& layout = layer.layout;
    if (!shares_scales(layout)) return {};
    for (int64_t i = 0; i < scales_per_plane(layout); ++i) {
      scales.push_back(layer.k_scale[i * layout.k_scale.stride_head]);
    }
    for (int64_t i = 0; i < scales_per_plane(layout); ++i) {
      scales.push_back(layer.v_scale[i * layout.v_scale.stride_head]);
    }
  }
  return scales;
}

std::vector<LayerView> scale_layers(const KVLayout& layout, size_t num_layers, int64_t num_pages,
                                    float* scales) {
  LayerView layer{.layout = layout,
                  .k = nullptr,
                  .v = nullptr,
                  .k_scale = nullptr,
                  .v_scale = nullptr,
                  .num_pages = num_pages};
  std::vector<LayerView> layers(num_layers, layer);
  if (!shares_scales(layout)) return layers;
  const int64_t each = scales_per_plane(layout);
  const Plane plane{.offset_bytes = 0,
                    .stride_page = 0,
                    .stride_slot = 0,
                    .stride_head = each > 1 ? 1 : 0,
                    .stride_dim = 0};
  for (LayerView& view : layers) {
    view.layout.k_scale = view.layout.v_scale = plane;
    view.k_scale = scales;
    view.v_scale = scales + each;
    scales += 2 * each;
  }
  return layers;
}

// --- buffers -------------------------------------------------------------------------------------

std::shared_ptr<Mapping> Buffers::try_take() { return take(0); }

std::shared_ptr<Mapping> Buffers::take(int64_t deadline_ns) {
  std::shared_ptr<Mapping> buffer;
  {
    std::unique_lock lock(mutex_);
    while (free_.empty() && made_ >= limit_) {
      const int64_t left = deadline_ns - now_ns();
      if (left <= 0) return nullptr;
      freed_.wait_for(lock, std::chrono::nanoseconds(left));
    }
    if (!free_.empty()) {
      buffer = std::move(free_.back());
      free_.pop_back();
    } else {
      ++made_;
    }
  }
  if (!buffer) {
    try {
      buffer = engine_->map(nullptr, size_);
    } catch (...) {
      std::lock_guard lock(mutex_);
      --made_;
      throw;
    }
  }
  Mapping* raw = buffer.get();
  return {raw, [pool = weak_from_this(), buffer = std::move(buffer)](Mapping*) mutable {
            if (const auto alive = pool.lock()) alive->give(std::move(buffer));
          }};
}

void Buffers::give(std::shared_ptr<Mapping> buffer) {
  std::function<void()> on_freed;
  {
    std::lock_guard lock(mutex_);
    free_.push_back(std::move(buffer));
    on_freed = on_freed_;
  }
  freed_.notify_one();
  if (on_freed) on_freed();
}

void Buffers::set_on_freed(std::function<void()> on_freed) {
  std::lock_guard lock(mutex_);
  on_freed_ = std::move(on_freed);
}

// --- mover ---------------------------------------------------------------------------------------

void Mover::submit(const void* owner, std::function<void()> job) {
  {
    std::lock_guard lock(mutex_);
    if (stopped_) return;
    jobs_.push_back({owner, std::move(job)});
    if (!thread_.joinable()) {
      thread_ = std::thread([this] { loop(); });
      pthread_setname_np(thread_.native_handle(), "kvlink-mover");
    }
  }
  changed_.notify_all();
}

void Mover::loop() {
  while (true) {
    Job job;
    {
      std::unique_lock lock(mutex_);
      running_ = nullptr;
      changed_.notify_all();
      changed_.wait(lock, [&] { return stopped_ || !jobs_.empty(); });
      if (stopped_) return;
      job = std::move(jobs_.front());
      jobs_.pop_front();
      running_ = job.owner;
    }
    job.run();
    job.run = {};  // what it held goes before others are told that it has ended
  }
}

void Mover::drain(const void* owner) {
  std::deque<Job> dropped;
  std::unique_lock lock(mutex_);
  for (auto job = jobs_.begin(); job != jobs_.end();) {
    if (job->owner == owner) {
      dropped.push_back(std::move(*job));
      job = jobs_.erase(job);
    } else {
      ++job;
    }
  }
  if (thread_.get_id() == std::this_thread::get_id()) return;
  changed_.wait(lock, [&] { return running_ != owner; });
}

void Mover::stop() {
  std::thread thread;
  {
    std::lock_guard lock(mutex_);
    stopped_ = true;
    thread.swap(thread_);
  }
  changed_.notify_all();
  if (!thread.joinable()) return;
  if (thread.get_id() == std::this_thread::get_id()) {
    thread.detach();
  } else {
    thread.join();
  }
}

}  // namespace kvlink::transport::ucx
