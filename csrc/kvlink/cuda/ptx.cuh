// The instructions that C++ has no words for, by name. Kernels use no other assembly;
// csrc/emulation has the same functions for the host.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kvlink/base/dtype.hpp"

namespace kvlink::cuda {

// The block's dynamic shared memory, aligned to 16 bytes.
__device__ inline char* shared_memory() {
  extern __shared__ __align__(16) char kvlink_shared_memory[];
  return kvlink_shared_memory;
}

__device__ inline uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// --- asynchronous copies of 16 bytes, past L1
// -----------------------------------------------------

// Both sides aligned to 16 bytes. Not `valid`: zeros are written and `source` is not read.
__device__ inline void copy_async(void* shared, const void* source, bool valid) {
  const int num_bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)),
               "l"(source), "r"(num_bytes)
               : "memory");
}

// The same of 4 bytes, both sides aligned to these.
__device__ inline void copy_async_word(void* shared, const void* source, bool valid) {
  const int num_bytes = valid ? 4 : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(shared_address(shared)),
               "l"(source), "r"(num_bytes)
               : "memory");
}

// What this thread has copied since the last commit is one group.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Until at most kGroupsLeft of this thread's groups are under way.
template <int kGroupsLeft>
__device__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kGroupsLeft) : "memory");
}

// --- matrices
// -------------------------------------------------------------------------------------

// Four 8 x 8 matrices of 16-bit elements: lane l names row l % 8 of matrix l / 8, 16 bytes aligned
// to 16; it gets elements 2 * (l % 4) and the next of row l / 4 of each.
__device__ inline void load_matrices(uint32_t (&parts)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(parts[0]), "=r"(parts[1]), "=r"(parts[2]), "=r"(parts[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same of the transposed matrices.
__device__ inline void load_matrices_transposed(uint32_t (&parts)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(parts[0]), "=r"(parts[1]), "=r"(parts[2]), "=r"(parts[3])
               : "r"(shared_address(row))
               : "memory");
}

// c [16, 8] += a [16, 16] b [16, 8], a warp together; kDType is that of a and b. With g = lane / 4
// and t = lane % 4, a lane has
//   a: rows g, g + 8, g, g + 8; columns 2t, 2t + 1 in parts 0 and 1, 8 more in parts 2 and 3
//   b: rows 2t, 2t + 1 of column g in b0, 8 rows further in b1
//   c: columns 2t, 2t + 1 of row g, then of row g + 8
template <DType kDType>
__device__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  static_assert(kDType == DType::kBFloat16 || kDType == DType::kFloat16);
  if constexpr (kDType == DType::kBFloat16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// --- arithmetic
// -----------------------------------------------------------------------------------

// Two values rounded to nearest even; `low` in the low half.
template <DType kDType>
__device__ uint32_t pack_halves(float low, float high) {
  uint32_t pair;
  if constexpr (kDType == DType::kBFloat16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(pair) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(pair) : "f"(high), "f"(low));
  }
  return pair;
}

// Half i (0: low, 1: high) of a pair.
template <DType kDType, int i>
__device__ float half_of(uint32_t pair) {
  if constexpr (kDType == DType::kBFloat16) {
    return __uint_as_float(i == 0 ? pair << 16 : pair & 0xffff0000u);
  } else {
    float value;
    asm("cvt.f32.f16 %0, %1;\n" : "=f"(value) : "h"(static_cast<uint16_t>(pair >> (16 * i))));
    return value;
  }
}

// Products of two pairs of bfloat16, rounded to nearest even; subnormals count.
__device__ inline uint32_t multiply_pair(uint32_t a, uint32_t b) {
  constexpr uint32_t kMinusZeros = 0x80008000u;
  uint32_t product;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;\n" : "=r"(product) : "r"(a), "r"(b), "r"(kMinusZeros));
  return product;
}

// 2^x, to 2 units in the last place; 0 for -inf.
__device__ inline float exp2_fast(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(result) : "f"(x));
  return result;
}

// --- waiting for others
// ---------------------------------------------------------------------------

// What the host or another device has stored; what they stored before it is seen after it.
__device__ inline uint64_t load_of_system(const uint64_t* at) {
  uint64_t value;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];\n" : "=l"(value) : "l"(at) : "memory");
  return value;
}

__device__ inline uint64_t global_time_ns() {
  uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;\n" : "=l"(now));
  return now;
}

__device__ inline void sleep_ns(unsigned duration) {
  asm volatile("nanosleep.u32 %0;\n" ::"r"(duration));
}

}  // namespace kvlink::cuda
