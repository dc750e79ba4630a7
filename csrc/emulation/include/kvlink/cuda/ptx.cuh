// kvlink/cuda/ptx.cuh for emulation. The fragments are those of the PTX ISA's tables for
// mma.m16n8k16 and ldmatrix; python_tests/test_emulation.py multiplies matrices through them.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>

#include "emulation/products.hpp"
#include "kvlink/base/convert.hpp"
#include "kvlink/cuda/tensor_map.cuh"

namespace kvlink::cuda {

inline char* shared_memory() { return emulation::shared_memory(); }
inline char* swizzled_shared_memory() { return emulation::shared_memory(); }

// --- asynchronous copies
// --------------------------------------------------------------------------

inline void copy_async(void* shared, const void* source, bool valid) {
  if (valid && reinterpret_cast<uintptr_t>(source) % 16 != 0) {
    throw std::runtime_error("emulation: the source of cp.async is not aligned to 16 bytes");
  }
  emulation::copy_later(shared, valid ? source : nullptr, 16);
}

inline void copy_async_word(void* shared, const void* source, bool valid) {
  if (valid && reinterpret_cast<uintptr_t>(source) % 4 != 0) {
    throw std::runtime_error("emulation: the source of cp.async is not aligned to 4 bytes");
  }
  emulation::copy_later(shared, valid ? source : nullptr, 4);
}

inline void commit_copies() { emulation::commit_copies(); }

template <int kGroupsLeft>
void wait_copies() {
  emulation::wait_copies(kGroupsLeft);
}

// --- matrices
// -------------------------------------------------------------------------------------

struct MatrixLoad {
  const char* row;
  uint32_t* parts;

  template <bool kTransposed>
  static void meet(void* const lanes[32]) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int part = 0; part < 4; ++part) {
        uint16_t pair[2];
        for (int i = 0; i < 2; ++i) {
          const int row = kTransposed ? lane % 4 * 2 + i : lane / 4;
          const int column = kTransposed ? lane / 4 : lane % 4 * 2 + i;
          const auto* from = static_cast<const MatrixLoad*>(lanes[part * 8 + row])->row;
          std::memcpy(&pair[i], from + column * 2, 2);
        }
        std::memcpy(&static_cast<MatrixLoad*>(lanes[lane])->parts[part], pair, 4);
      }
    }
  }
};

inline void load_matrices(uint32_t (&parts)[4], const void* row) {
  emulation::check_shared(row, 16, 16, "a row of ldmatrix");
  MatrixLoad mine{static_cast<const char*>(row), parts};
  emulation::meet_lanes(0xffffffffu, "ldmatrix", &mine, &MatrixLoad::meet<false>);
}

inline void load_matrices_transposed(uint32_t (&parts)[4], const void* row) {
  emulation::check_shared(row, 16, 16, "a row of ldmatrix");
  MatrixLoad mine{static_cast<const char*>(row), parts};
  emulation::meet_lanes(0xffffffffu, "ldmatrix.trans", &mine, &MatrixLoad::meet<true>);
}

template <DType kDType>
uint32_t pack_halves(float low, float high) {
  return Storage<kDType>::store(low) | static_cast<uint32_t>(Storage<kDType>::store(high)) << 16;
}

template <DType kDType, int i>
float half_of(uint32_t pair) {
  return Storage<kDType>::load(static_cast<uint16_t>(pair >> (16 * i)));
}

template <DType kDType>
struct Product {
  float* c;
  const uint32_t* a;
  uint32_t b[2];

  static void meet(void* const lanes[32]) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const auto* mine = static_cast<const Product*>(lanes[lane]);
      const int g = lane / 4, t = lane % 4;
      for (int part = 0; part < 4; ++part) {
        float* row = &a[g + part % 2 * 8][2 * t + part / 2 * 8];
        row[0] = half_of<kDType, 0>(mine->a[part]);
        row[1] = half_of<kDType, 1>(mine->a[part]);
      }
      for (int part = 0; part < 2; ++part) {
        b[2 * t + part * 8][g] = half_of<kDType, 0>(mine->b[part]);
        b[2 * t + 1 + part * 8][g] = half_of<kDType, 1>(mine->b[part]);
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      const auto* mine = static_cast<const Product*>(lanes[lane]);
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        float sum = mine->c[i];
        for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
        mine->c[i] = sum;
      }
    }
  }
};

template <DType kDType>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Product<kDType> mine{c, a, {b0, b1}};
  emulation::meet_lanes(0xffffffffu, "mma.sync", &mine, &Product<kDType>::meet);
}

// --- arithmetic
// -----------------------------------------------------------------------------------

inline uint32_t multiply_pair(uint32_t a, uint32_t b) {
  constexpr DType kType = DType::kBFloat16;
  return pack_halves<kType>(half_of<kType, 0>(a) * half_of<kType, 0>(b),
                            half_of<kType, 1>(a) * half_of<kType, 1>(b));
}

inline float exp2_fast(float x) { return std::exp2(x); }
inline float reciprocal_fast(float x) { return 1.0f / x; }
inline void keep_in_place(uint32_t&) {}

// --- sm_90a
// ---------------------------------------------------------------------------------------

#define KVLINK_HAS_WGMMA

inline void init_barrier(uint64_t* barrier, int count) { emulation::init_barrier(barrier, count); }
inline void publish_barriers() {}
inline void arrive(uint64_t* barrier) { emulation::arrive(barrier, 0); }
inline void arrive_expecting(uint64_t* barrier, int num_bytes) {
  emulation::arrive(barrier, num_bytes);
}
inline void wait_phase(uint64_t* barrier, int parity) { emulation::wait_phase(barrier, parity); }
inline void sync_named(int id, int num_threads) { emulation::meet_named(id, num_threads, true); }
inline void arrive_named(int id, int num_threads) { emulation::meet_named(id, num_threads, false); }
inline void publish_shared() {}
template <int kCount>
void shrink_registers() {
  static_assert(kCount % 8 == 0 && kCount >= 24 && kCount <= 256);
}
template <int kCount>
void grow_registers() {
  static_assert(kCount % 8 == 0 && kCount >= 24 && kCount <= 256);
}

inline void prefetch_map(const TensorMap*) {}
inline void prefetch_box(const TensorMap*, const int (&)[4]) {}

inline uint32_t shared_offset(const void* shared) {
  return static_cast<uint32_t>(static_cast<const char*>(shared) - shared_memory());
}

inline void copy_box(void* shared, const TensorMap* map, const int (&at)[4], uint64_t* barrier) {
  const BoxedTensor tensor = map->tensor;
  const uint32_t* box = tensor.box;
  const size_t num_rows = size_t{box[1]} * box[2] * box[3];
  const std::array<int64_t, 4> first{at[0], at[1], at[2], at[3]};
  char* memory = shared_memory();
  const uint32_t begin = shared_offset(shared);
  const auto copy = [=] {
    for (size_t row = 0; row < num_rows; ++row) {
      const int64_t index[4] = {
          first[0], first[1] + static_cast<int64_t>(row % tensor.box[1]),
          first[2] + static_cast<int64_t>(row / tensor.box[1] % tensor.box[2]),
          first[3] + static_cast<int64_t>(row / tensor.box[1] / tensor.box[2])};
      for (uint32_t i = 0; i < tensor.box[0]; ++i) {
        bool inside = index[0] >= 0 && index[0] + i < static_cast<int64_t>(tensor.sizes[0]);
        int64_t offset = (index[0] + i) * 2;
        for (int axis = 1; axis < 4; ++axis) {
          inside &= index[axis] >= 0 && index[axis] < static_cast<int64_t>(tensor.sizes[axis]);
          offset += index[axis] * static_cast<int64_t>(tensor.strides[axis - 1]);
        }
        uint16_t value = 0;
        if (inside) std::memcpy(&value, static_cast<const char*>(tensor.data) + offset, 2);
        const uint32_t to = begin + static_cast<uint32_t>(row) * 128 + i * 2;
        std::memcpy(memory + emulation::swizzle(to), &value, 2);
      }
    }
  };
  emulation::copy_in_bulk(shared, num_rows * box[0] * 2, copy, barrier);
}

inline constexpr int kRowGroupBytes = 1024;

inline uint64_t rows_descriptor(const void* start) {
  return uint64_t{1} << 62 | uint64_t{kRowGroupBytes >> 4} << 32 | uint64_t{1} << 16 |
         shared_offset(start) >> 4;
}
inline uint64_t columns_descriptor(const void* start, int columns_bytes) {
  return uint64_t{1} << 62 | uint64_t{kRowGroupBytes >> 4} << 32 |
         static_cast<uint64_t>(columns_bytes >> 4) << 16 | shared_offset(start) >> 4;
}

inline uint64_t descriptor_at(uint64_t descriptor, int num_bytes) {
  constexpr uint64_t kLow = 0xffffffff;
  return (descriptor & ~kLow) | static_cast<uint32_t>(descriptor + (num_bytes >> 4));
}

inline void begin_products() { emulation::begin_products(); }
inline void commit_products() { emulation::commit_products(); }
template <int kGroupsLeft, int kCount>
void wait_products(float (&)[kCount]) {
  emulation::wait_products(kGroupsLeft);
}

template <DType kDType>
float load_half(uint16_t bits) {
  return Storage<kDType>::load(bits);
}

template <DType kDType, int kCount>
void multiply_rows(float (&sums)[kCount], uint64_t rows, uint64_t columns, bool adds) {
  static_assert(kCount == 32 || kCount == 64);
  emulation::multiply({sums, kCount, nullptr, rows, columns, false, adds, &load_half<kDType>});
}

template <DType kDType, int kCount>
void multiply_columns(float (&sums)[kCount], const uint32_t (&rows)[4], uint64_t columns) {
  static_assert(kCount == 32 || kCount == 64 || kCount == 128);
  emulation::multiply({sums, kCount, rows, 0, columns, true, true, &load_half<kDType>});
}

// --- waiting for others
// ---------------------------------------------------------------------------

inline uint64_t load_of_system(const uint64_t* at) { return __atomic_load_n(at, __ATOMIC_ACQUIRE); }

inline void add_of_system(uint64_t* at, uint64_t value) {
  __atomic_fetch_add(at, value, __ATOMIC_RELEASE);
}

inline uint32_t take_number(uint32_t* counter, uint32_t last) {
  emulation::yield();
  const uint32_t before = *counter;
  *counter = before >= last ? 0 : before + 1;
  return before;
}
inline float2 load_pair_of_blocks(const void* from) { return *static_cast<const float2*>(from); }
inline float4 load_four_of_blocks(const void* from) { return *static_cast<const float4*>(from); }

inline uint64_t global_time_ns() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return static_cast<uint64_t>(std::chrono::nanoseconds(now).count());
}

inline void sleep_ns(unsigned) { emulation::yield(); }

}  // namespace kvlink::cuda
