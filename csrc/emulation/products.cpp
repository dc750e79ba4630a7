#include "emulation/products.hpp"

#include <cstring>
#include <deque>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "emulation/grid.hpp"

namespace kvlink::emulation {

namespace {

constexpr int kLanes = 32;
constexpr int kSteps = 16;  // terms of a sum
constexpr uint32_t kEverySlot = 0x3ffff;

[[noreturn]] void fail(const std::string& what) { throw std::runtime_error("emulation: " + what); }

// Sums of one matrix of a warp while products on it are under way.
struct Sums {
  float* lanes[kLanes];
  int count;
  int under_way = 0;
  std::vector<float> values;  // [kLanes][count]
};

struct Product {
  ProductArgs args;
  const uint32_t* rows[kLanes];
  Sums* sums;
  bool done = false;
};

struct Products : WarpState {
  std::vector<std::unique_ptr<Sums>> sums;
  std::vector<Product> open;
  std::deque<std::vector<Product>> groups;
  bool begun = false;

  void check_end() const override {
    if (!open.empty() || !groups.empty()) fail("a warp ends before its products");
  }
};

Products& mine() {
  return static_cast<Products&>(
      warp_state([]() -> std::unique_ptr<WarpState> { return std::make_unique<Products>(); }));
}

uint16_t at(uint64_t descriptor, uint32_t group, uint32_t row, uint32_t column, uint32_t next) {
  if (descriptor >> 62 != 1) fail("a descriptor without the swizzle of 128 bytes");
  const auto field = [&](int bit) {
    return static_cast<uint32_t>(descriptor >> bit & 0x3fff) << 4;
  };
  const uint32_t address = field(0) + group * field(32) + row * 128 + next * field(16) + column * 2;
  const char* found = shared_memory() + swizzle(address & kEverySlot);
  check_shared(found, 2, 2, "an operand of a product");
  uint16_t bits;
  std::memcpy(&bits, found, 2);
  return bits;
}

void run(Product& product, int warp) {
  const ProductArgs& args = product.args;
  const int num_columns = 2 * args.num_sums;
  std::vector<float> columns(static_cast<size_t>(num_columns) * kSteps);  // [num_columns][kSteps]
  for (int j = 0; j < num_columns; ++j) {
    for (int k = 0; k < kSteps; ++k) {
      const uint16_t bits = args.columns_across
                                ? at(args.columns_descriptor, k / 8, k % 8, j % 64, j / 64)
                                : at(args.columns_descriptor, j / 8, j % 8, k, 0);
      columns[static_cast<size_t>(j) * kSteps + k] = args.load(bits);
    }
  }
  float rows[16][kSteps];
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < kSteps; ++k) {
      uint16_t bits;
      if (args.rows) {
        const uint32_t* parts = product.rows[row % 8 * 4 + k % 8 / 2];
        bits = static_cast<uint16_t>(parts[row / 8 + k / 8 * 2] >> (k % 2 * 16));
      } else {
        bits = at(args.rows_descriptor, warp * 2 + row / 8, row % 8, k, 0);
      }
      rows[row][k] = args.load(bits);
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    float* sums = &product.sums->values[static_cast<size_t>(lane) * args.num_sums];
    for (int i = 0; i < args.num_sums; ++i) {
      const float* row = rows[lane / 4 + i / 2 % 2 * 8];
      const float* column = &columns[(i / 4 * 8 + lane % 4 * 2 + i % 2) * size_t{kSteps}];
      float sum = args.adds ? sums[i] : 0.0f;
      for (int k = 0; k < kSteps; ++k) sum += row[k] * column[k];
      sums[i] = sum;
    }
  }
  product.done = true;
}

int warp_of_group() { return static_cast<int>(place().thread_idx.x) / kLanes % 4; }

void run_group(std::vector<Product>& group) {
  for (Product& product : group) {
    if (!product.done) run(product, warp_of_group());
  }
}

struct Call {
  ProductArgs args;

  static void meet(void* const lanes[kLanes]) {
    Products& products = mine();
    const ProductArgs& first = static_cast<const Call*>(lanes[0])->args;
    Sums* sums = nullptr;
    for (const auto& each : products.sums) {
      if (each->lanes[0] == first.sums) sums = each.get();
    }
    if (!sums) {
      if (!products.begun) fail("products without begin_products since their sums were touched");
      sums = products.sums.emplace_back(std::make_unique<Sums>()).get();
      sums->count = first.num_sums;
      for (int lane = 0; lane < kLanes; ++lane) {
        sums->lanes[lane] = static_cast<const Call*>(lanes[lane])->args.sums;
        sums->values.insert(sums->values.end(), sums->lanes[lane],
                            sums->lanes[lane] + first.num_sums);
        for (int i = 0; i < first.num_sums; ++i) {
          sums->lanes[lane][i] = std::numeric_limits<float>::quiet_NaN();
        }
      }
    }
    Product product{first, {}, sums};
    for (int lane = 0; lane < kLanes; ++lane) {
      product.rows[lane] = static_cast<const Call*>(lanes[lane])->args.rows;
    }
    ++sums->under_way;
    products.open.push_back(product);
  }
};

}  // namespace

void multiply(const ProductArgs& args) {
  Call call{args};
  meet_lanes(0xffffffffu, "wgmma", &call, &Call::meet);
}

void begin_products() {
  meet_lanes(0xffffffffu, "wgmma.fence", nullptr, [](void* const*) { mine().begun = true; });
}

void commit_products() {
  meet_lanes(0xffffffffu, "wgmma.commit_group", nullptr, [](void* const*) {
    Products& products = mine();
    products.groups.push_back(std::move(products.open));
    products.open.clear();
    if (!draw(2)) return;
    for (auto& group : products.groups) run_group(group);
  });
}

void wait_products(int groups_left) {
  meet_lanes(0xffffffffu, "wgmma.wait_group", &groups_left, [](void* const lanes[kLanes]) {
    Products& products = mine();
    while (static_cast<int>(products.groups.size()) > *static_cast<const int*>(lanes[0])) {
      run_group(products.groups.front());
      for (const Product& product : products.groups.front()) --product.sums->under_way;
      products.groups.pop_front();
    }
    for (auto& sums : products.sums) {
      if (sums->under_way > 0) continue;
      for (int lane = 0; lane < kLanes; ++lane) {
        std::memcpy(sums->lanes[lane], &sums->values[static_cast<size_t>(lane) * sums->count],
                    static_cast<size_t>(sums->count) * sizeof(float));
      }
      sums.reset();
    }
    std::erase(products.sums, nullptr);
    products.begun = false;
  });
}

}  // namespace kvlink::emulation
