#include "kvlink/transport/ucx/terms.hpp"

#include <cstring>

#include "kvlink/base/check.hpp"
#include "kvlink/layout/serialise.hpp"
#include "kvlink/transport/control.hpp"
#include "kvlink/transport/ucx/staging.hpp"

namespace kvlink::transport::ucx {

namespace {

template <typename T>
void append(std::string* bytes, const std::vector<T>& values) {
  const auto count = static_cast<uint32_t>(values.size());
  bytes->append(reinterpret_cast<const char*>(&count), 4);
  bytes->append(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T));
}

struct Reader {
  std::string_view rest;
  bool good = true;

  bool take(void* to, size_t size) {
    if (!good || rest.size() < size) return good = false;
    if (size != 0) std::memcpy(to, rest.data(), size);
    rest.remove_prefix(size);
    return true;
  }
  template <typename T>
  void take(std::vector<T>* values) {
    uint32_t count = 0;
    if (!take(&count, 4) || rest.size() / sizeof(T) < count) {
      good = false;
      return;
    }
    values->resize(count);
    take(values->data(), count * sizeof(T));
  }
};

}  // namespace

std::string Terms::bytes() const {
  std::string bytes;
  append(&bytes, pages);
  append(&bytes, scales);
  append(&bytes, planes);
  std::vector<uint64_t> places;
  for (const RemoteBlock& block : blocks) {
    places.insert(places.end(), {block.address, block.size, block.key.size()});
  }
  append(&bytes, places);
  for (const RemoteBlock& block : blocks) bytes += block.key;
  return bytes;
}

bool Terms::parse(std::string_view bytes, Terms* terms) {
  Reader reader{bytes};
  std::vector<uint64_t> places;
  reader.take(&terms->pages);
  reader.take(&terms->scales);
  reader.take(&terms->planes);
  reader.take(&places);
  if (!reader.good || places.size() % 3 != 0) return false;
  for (size_t i = 0; i < places.size(); i += 3) {
    if (places[i + 2] > reader.rest.size()) return false;
    terms->blocks.push_back(
        {places[i], places[i + 1], std::string(reader.rest.substr(0, places[i + 2]))});
    reader.rest.remove_prefix(places[i + 2]);
  }
  return reader.rest.empty();
}

std::string Reference::bytes() const {
  std::string bytes(reinterpret_cast<const char*>(&address), 8);
  bytes.append(reinterpret_cast<const char*>(&size), 8);
  return bytes + key;
}

bool Reference::parse(std::string_view bytes, Reference* reference) {
  Reader reader{bytes};
  if (!reader.take(&reference->address, 8) || !reader.take(&reference->size, 8)) return false;
  reference->key = reader.rest;
  return !reference->key.empty();
}

std::string Target::bytes() const {
  const auto canonical = layout_to_bytes(layout);
  std::string bytes(canonical.data(), canonical.size());
  bytes.append(reinterpret_cast<const char*>(&num_layers), 4);
  append(&bytes, scales);
  return bytes;
}

bool Target::parse(std::string_view bytes, Target* target) {
  if (bytes.size() < kLayoutBytes) return false;
  try {
    target->layout = layout_from_bytes(bytes.substr(0, kLayoutBytes));
  } catch (const InvalidArgument&) {
    return false;
  }
  Reader reader{bytes.substr(kLayoutBytes)};
  reader.take(&target->num_layers, 4);
  reader.take(&target->scales);
  return reader.good && reader.rest.empty() && target->num_layers >= 1 &&
         target->num_layers <= kMaxLayers &&
         target->scales.size() == num_shared_scales(target->layout, target->num_layers);
}

}  // namespace kvlink::transport::ucx
