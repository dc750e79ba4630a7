#include "kvlink/transport/ucx/hub.hpp"

#include <algorithm>
#include <cstdlib>
#include <string_view>

#include "kvlink/layout/rows.hpp"
#include "kvlink/transport/ucx/link.hpp"

namespace kvlink::transport::ucx {

namespace {

// What tells one pool's memory from another's.
std::vector<const void*> planes_of(const std::vector<LayerView>& layers) {
  std::vector<const void*> planes;
  for (const LayerView& layer : layers) {
    planes.push_back(layer.k);
    if (num_planes(layer.layout) > 1) planes.push_back(layer.v);
  }
  return planes;
}

}  // namespace

std::shared_ptr<Hub> Hub::create(std::shared_ptr<Control> control, const Executor& executor) {
  auto hub = std::make_shared<Hub>(std::move(control), executor, Engine::create());
  hub->control->set_on_closed([weak = hub->weak_from_this()](SlotKey key, Status status) {
    if (const auto alive = weak.lock()) alive->on_closed(key, status);
  });
  return hub;
}

Hub::Hub(std::shared_ptr<Control> control, const Executor& executor, std::shared_ptr<Engine> engine)
    : control(std::move(control)), executor(executor), engine(std::move(engine)), puts_over_tcp([] {
        const char* text = std::getenv("KVLINK_UCX_PUT_OVER_TCP");
        return text != nullptr && std::string_view(text) == "1";
      }()) {}

Hub::~Hub() { close(); }

void Hub::close() {
  control->set_on_closed({});
  std::vector<std::shared_ptr<Link>> links;
  {
    std::lock_guard lock(mutex_);
    for (const auto& held : links_) {
      if (auto link = held.lock()) links.push_back(std::move(link));
    }
  }
  for (const auto& link : links) link->close(Status::kCancelled);
  mover.stop();
  {
    std::lock_guard lock(mutex_);
    mapped_.clear();
  }
  engine->stop();
}

void Hub::add(const std::shared_ptr<Link>& link) {
  std::lock_guard lock(mutex_);
  std::erase_if(links_, [](const auto& held) { return held.expired(); });
  links_.push_back(link);
}

void Hub::on_closed(SlotKey key, Status status) {
  std::vector<std::shared_ptr<Link>> links;
  {
    std::lock_guard lock(mutex_);
    for (const auto& held : links_) {
      if (auto link = held.lock()) links.push_back(std::move(link));
    }
  }
  for (const auto& link : links) link->on_closed(key, status);
}

std::vector<std::shared_ptr<Mapping>> Hub::map_layers(const OwnPages& own) {
  // Extents of all planes, those that touch each other as one.
  std::vector<std::pair<uint64_t, uint64_t>> extents;
  const std::vector<const void*> name = planes_of(own.layers);
  for (const LayerView& layer : own.layers) {
    for (int plane = 0; plane < num_planes(layer.layout); ++plane) {
      const Plane& at = plane == 0 ? layer.layout.k : layer.layout.v;
      const int64_t last =
          at.element(layer.num_pages - 1, layer.layout.page_size - 1, layer.layout.num_kv_heads - 1,
                     row_dims(layer.layout, plane) - 1);
      const void* base = plane == 0 ? layer.k : layer.v;
      const auto first = reinterpret_cast<uint64_t>(base);
      extents.emplace_back(
          first, first + static_cast<uint64_t>(last + 1) * dtype_bytes(layer.layout.dtype));
    }
  }
  std::lock_guard lock(mutex_);
  if (const auto found = mapped_.find(name); found != mapped_.end()) return found->second.blocks;
  std::sort(extents.begin(), extents.end());
  std::vector<std::shared_ptr<Mapping>> blocks;
  for (size_t i = 0; i < extents.size();) {
    auto [first, last] = extents[i++];
    while (i < extents.size() && extents[i].first <= last + 4096) {
      last = std::max(last, extents[i++].second);
    }
    blocks.push_back(engine->map(reinterpret_cast<void*>(first), last - first));
  }
  mapped_[name] = {blocks, own.keep_alive};
  return blocks;
}

void Hub::forget_layers(const std::vector<LayerView>& layers) {
  Mapped last;  // dropped after the lock
  std::lock_guard lock(mutex_);
  const auto found = mapped_.find(planes_of(layers));
  if (found == mapped_.end()) return;
  last = std::move(found->second);
  mapped_.erase(found);
}

}  // namespace kvlink::transport::ucx
