// What an owner tells a peer that begins (kBegun), and a puller the owner (kBegin).
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "kvlink/transport/transport.hpp"
#include "kvlink/transport/ucx/engine.hpp"

namespace kvlink::transport::ucx {

// Memory that a peer may reach with puts and gets.
struct RemoteBlock {
  uint64_t address = 0, size = 0;
  std::string key;
};

struct Terms {
  std::vector<int32_t> pages;       // direct only
  std::vector<float> scales;        // that the pool shares (staging.hpp)
  std::vector<uint64_t> planes;     // direct only: k and v of each stored layer
  std::vector<RemoteBlock> blocks;  // direct only

  std::string bytes() const;
  // False when they are not well formed.
  static bool parse(std::string_view bytes, Terms* terms);
};

// Where a chunk lies, for a peer on this host that reads it there.
struct Reference {
  uint64_t address = 0, size = 0;
  std::string key;

  std::string bytes() const;
  static bool parse(std::string_view bytes, Reference* reference);
};

// What a puller wants the chunks to be: the layout of its pool, and the scales that it shares.
struct Target {
  KVLayout layout;
  uint32_t num_layers = 0;
  std::vector<float> scales;

  std::string bytes() const;
  static bool parse(std::string_view bytes, Target* target);
};

}  // namespace kvlink::transport::ucx
