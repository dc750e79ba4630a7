// Small kernels of sm_90a's instructions with known outcomes, for the tests of the emulation.
#include <map>
#include <string>

#include "kvlink/cuda/launch.cuh"
#include "kvlink/cuda/ptx.cuh"

namespace kvlink::cuda {

namespace {

constexpr int kSize = 64;
constexpr int kTileBytes = kSize * kSize * 2;

enum class Misuse { kNone, kNoWait, kNoBegin, kReusesShared, kTouchesRows, kNoBarrier };

struct MatrixArgs {
  TensorMap a_map, b_map;  // [64, 64] of bfloat16; of b less may be there
  float* out;              // [64, 64]
};

// out = a b^T (both by descriptors) or a b (a in registers), by one warp group.
template <bool kColumns, Misuse kMisuse>
__global__ void product(const __grid_constant__ MatrixArgs args) {
  char* a = swizzled_shared_memory();
  char* b = a + kTileBytes;
  auto* barrier = reinterpret_cast<uint64_t*>(b + kTileBytes);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  if (thread == 0) {
    init_barrier(barrier, 1);
    publish_barriers();
    arrive_expecting(barrier, 2 * kTileBytes);
    copy_box(a, &args.a_map, {0, 0, 0, 0}, barrier);
    copy_box(b, &args.b_map, {0, 0, 0, 0}, barrier);
  }
  __syncthreads();
  if (kMisuse != Misuse::kNoBarrier) wait_phase(barrier, 0);
  float sums[kSize / 2] = {};
  uint32_t rows[kSize / 16][4];
  for (int step = 0; step < kSize / 16; ++step) {
    for (int part = 0; part < 4; ++part) {
      const int row = warp * 16 + lane / 4 + part % 2 * 8, column = step * 16 + part / 2 * 8;
      std::memcpy(&rows[step][part], a + row * 128 + (column / 8 ^ row % 8) * 16 + lane % 4 * 4, 4);
    }
  }
  if (kMisuse != Misuse::kNoBegin) begin_products();
  for (int step = 0; step < kSize / 16; ++step) {
    if constexpr (kColumns) {
      multiply_columns<DType::kBFloat16>(sums, rows[step],
                                         columns_descriptor(b + step * 16 * 128, kTileBytes));
    } else {
      multiply_rows<DType::kBFloat16>(sums, rows_descriptor(a + step * 32),
                                      rows_descriptor(b + step * 32), step > 0);
    }
  }
  commit_products();
  if (kMisuse == Misuse::kReusesShared) std::memset(b + thread * 64, 0, 64);
  if (kMisuse == Misuse::kTouchesRows) rows[0][0] = 0;
  if (kMisuse != Misuse::kNoWait) wait_products<0>(sums);
  for (int i = 0; i < kSize / 2; ++i) {
    const int row = warp * 16 + lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
    args.out[row * kSize + column] = sums[i];
  }
  if (kMisuse == Misuse::kNoWait) wait_products<0>(sums);
}

constexpr int kRounds = 12, kStages = 2, kRowsEach = 8;

// One warp copies rows of `a` into a ring of two stages, another adds them up.
template <bool kWaits>
__global__ void ring(const __grid_constant__ MatrixArgs args) {
  char* stages = swizzled_shared_memory();
  auto* full = reinterpret_cast<uint64_t*>(stages + 2 * kTileBytes);
  uint64_t* free = full + kStages;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      init_barrier(full + stage, 1);
      init_barrier(free + stage, 32);
    }
    publish_barriers();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 0; i < kRounds; ++i) {
      const int stage = i % kStages;
      if (kWaits) wait_phase(free + stage, i / kStages % 2 ^ 1);
      arrive_expecting(full + stage, kRowsEach * 128);
      copy_box(stages + stage * 1024, &args.b_map, {0, i % 7 * kRowsEach, 0, 0}, full + stage);
    }
  } else if (threadIdx.x >= 32 && threadIdx.x < 64) {
    float sum = 0.0f;
    for (int i = 0; i < kRounds; ++i) {
      const int stage = i % kStages;
      wait_phase(full + stage, i / kStages % 2);
      for (int row = 0; row < kRowsEach; ++row) {
        uint16_t bits;
        std::memcpy(&bits, stages + stage * 1024 + row * 128 + (lane / 8 ^ row) * 16 + lane % 8 * 2,
                    2);
        sum += load_half<DType::kBFloat16>(bits);
      }
      arrive(free + stage);
    }
    args.out[lane] = sum;
  }
}

// Warps 1 and 2 take turns at a number, by two named barriers.
__global__ void turns(const __grid_constant__ MatrixArgs args) {
  auto* number = reinterpret_cast<volatile int*>(swizzled_shared_memory());
  const int warp = static_cast<int>(threadIdx.x) / 32;
  if (threadIdx.x == 0) *number = 0;
  __syncthreads();
  if (warp != 1 && warp != 2) return;
  if (warp == 2) arrive_named(1, 64);
  for (int i = 0; i < 5; ++i) {
    sync_named(warp, 64);
    if (threadIdx.x % 32 == 0) *number = *number * 2 + warp;
    __syncwarp();
    arrive_named(3 - warp, 64);
  }
  if (warp == 1) {
    sync_named(1, 64);
    args.out[threadIdx.x % 32] = static_cast<float>(*number);
  }
}

__global__ void never_full(const __grid_constant__ MatrixArgs) {
  auto* barrier = reinterpret_cast<uint64_t*>(swizzled_shared_memory());
  if (threadIdx.x == 0) init_barrier(barrier, 2);
  __syncthreads();
  if (threadIdx.x == 0) arrive(barrier);
  wait_phase(barrier, 0);
}

__global__ void not_initialised(const __grid_constant__ MatrixArgs) {
  wait_phase(reinterpret_cast<uint64_t*>(swizzled_shared_memory()), 0);
}

// `rows` rows of `columns` elements of [64, 64].
TensorMap part_of(const void* data, uint64_t rows, uint64_t columns, uint32_t box_rows) {
  return make_tensor_map({.data = data,
                          .sizes = {columns, rows, 1, 1},
                          .strides = {kSize * 2, kTileBytes, kTileBytes},
                          .box = {kSize, box_rows, 1, 1}});
}

}  // namespace

}  // namespace kvlink::cuda

// Runs one of the kernels above on [2, 64, 64] of bfloat16, of which the second half's first `rows`
// rows and `columns` columns are there. Null, or what went wrong.
extern "C" __attribute__((visibility("default"))) const char* kvlink_emulation_probe_sm90(
    const char* name, const uint16_t* in, int rows, int columns, float* out) {
  using namespace kvlink::cuda;
  static const std::map<std::string, void (*)(MatrixArgs)> kernels = {
      {"rows", product<false, Misuse::kNone>},
      {"columns", product<true, Misuse::kNone>},
      {"rows, no wait", product<false, Misuse::kNoWait>},
      {"rows, no begin", product<false, Misuse::kNoBegin>},
      {"rows, reuses shared memory", product<false, Misuse::kReusesShared>},
      {"columns, touches rows", product<true, Misuse::kTouchesRows>},
      {"rows, no barrier", product<false, Misuse::kNoBarrier>},
      {"ring", ring<true>},
      {"ring, no wait", ring<false>},
      {"turns", turns},
      {"never full", never_full},
      {"not initialised", not_initialised},
  };
  static std::string error;
  try {
    const uint32_t box_rows = std::string(name).starts_with("ring") ? kRowsEach : kSize;
    const MatrixArgs args{part_of(in, kSize, kSize, kSize),
                          part_of(in + kSize * kSize, rows, columns, box_rows), out};
    launch(name, kernels.at(name), dim3(1), 128, 2 * kTileBytes + 64, nullptr, args);
  } catch (const std::exception& exception) {
    error = exception.what();
    return error.c_str();
  }
  return nullptr;
}
