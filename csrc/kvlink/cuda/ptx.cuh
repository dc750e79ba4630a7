// The instructions that C++ has no words for, by name. Kernels use no other assembly;
// csrc/emulation has the same functions for the host.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kvlink/base/dtype.hpp"
#include "kvlink/cuda/tensor_map.cuh"

namespace kvlink::cuda {

// The block's dynamic shared memory, aligned to 16 bytes.
__device__ inline char* shared_memory() {
  extern __shared__ __align__(16) char kvlink_shared_memory[];
  return kvlink_shared_memory;
}

// The same, aligned to 1024 bytes.
__device__ inline char* swizzled_shared_memory() {
  extern __shared__ __align__(1024) char kvlink_swizzled_shared_memory[];
  return kvlink_swizzled_shared_memory;
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

// What is computed from it is computed here, not before a loop around it.
__device__ inline void keep_in_place(uint32_t& value) { asm volatile("" : "+r"(value)); }

// --- waiting for others
// ---------------------------------------------------------------------------

// What the host or another device has stored; what they stored before it is seen after it.
__device__ inline uint64_t load_of_system(const uint64_t* at) {
  uint64_t value;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];\n" : "=l"(value) : "l"(at) : "memory");
  return value;
}

// Who then sees the sum sees what was stored before, too.
__device__ inline void add_of_system(uint64_t* at, uint64_t value) {
  asm volatile("red.release.sys.global.add.u64 [%0], %1;\n" ::"l"(at), "l"(value) : "memory");
}

// Adds 1 to a counter of the device, but goes back to 0 from `last` or more, and returns what it
// was. What a thread's block has stored (with a __syncthreads in between) is seen by every block
// whose number is greater.
__device__ inline uint32_t take_number(uint32_t* counter, uint32_t last) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;\n"
               : "=r"(before)
               : "l"(counter), "r"(last)
               : "memory");
  return before;
}

// What other blocks have stored, past L1. Aligned to its size.
__device__ inline float2 load_pair_of_blocks(const void* from) {
  float2 pair;
  asm volatile("ld.global.cg.v2.f32 {%0, %1}, [%2];\n"
               : "=f"(pair.x), "=f"(pair.y)
               : "l"(from)
               : "memory");
  return pair;
}
__device__ inline float4 load_four_of_blocks(const void* from) {
  float4 four;
  asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];\n"
               : "=f"(four.x), "=f"(four.y), "=f"(four.z), "=f"(four.w)
               : "l"(from)
               : "memory");
  return four;
}

__device__ inline uint64_t global_time_ns() {
  uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;\n" : "=l"(now));
  return now;
}

__device__ inline void sleep_ns(unsigned duration) {
  asm volatile("nanosleep.u32 %0;\n" ::"r"(duration));
}

// 1 / x, to 1 unit in the last place; 0 for inf.
__device__ inline float reciprocal_fast(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;\n" : "=f"(result) : "f"(x));
  return result;
}

// --- sm_90a: barriers
// -----------------------------------------------------------------------------

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define KVLINK_HAS_WGMMA  // the functions below may be called
#endif

// Barriers of 8 bytes in shared memory. A phase ends when `count` threads have arrived and all
// bytes that they announced have been copied. Its parity is 0, 1, 0, ...
__device__ inline void init_barrier(uint64_t* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(shared_address(barrier)),
               "r"(count)
               : "memory");
}

// Between init_barrier and the __syncthreads before their first use.
__device__ inline void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
}

__device__ inline void arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(shared_address(barrier))
               : "memory");
}

// Arrives, and announces what copies that name the barrier bring.
__device__ inline void arrive_expecting(uint64_t* barrier, int num_bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(shared_address(barrier)),
      "r"(num_bytes)
      : "memory");
}

// Until the phase of this parity has ended; returns at once for the one before the first, 1.
__device__ inline void wait_phase(uint64_t* barrier, int parity) {
  uint32_t ended;
  do {
    asm volatile(
        "{\n.reg .pred ended;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 ended, [%1], %2;\n"
        "selp.u32 %0, 1, 0, ended;\n}\n"
        : "=r"(ended)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (ended == 0);
}

// The block's barriers 1 to 15, for the `num_threads` (whole warps) that come to one of them.
__device__ inline void sync_named(int id, int num_threads) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(id), "r"(num_threads) : "memory");
}

// Comes to it without waiting.
__device__ inline void arrive_named(int id, int num_threads) {
  asm volatile("bar.arrive %0, %1;\n" ::"r"(id), "r"(num_threads) : "memory");
}

// By each thread that has written shared memory, before a barrier after which tensor cores or bulk
// copies read it.
__device__ inline void publish_shared() {
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}

// Registers of each thread from here on, by all warps of a warp group.
template <int kCount>
__device__ void shrink_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kCount));
}
template <int kCount>
__device__ void grow_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kCount));
}

// --- sm_90a: bulk copies
// --------------------------------------------------------------------------

// A box of a tensor in global memory (tensor_map.cuh), by one thread: `at` is its first element,
// innermost axis first. Elements outside of the tensor become zeros and count as bytes.
__device__ inline void copy_box(void* shared, const TensorMap* map, const int (&at)[4],
                                uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4, %5}], [%6];\n" ::"r"(shared_address(shared)),
      "l"(map), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(shared_address(barrier))
      : "memory");
}

// The same box into the second cache alone, some time.
__device__ inline void prefetch_box(const TensorMap* map, const int (&at)[4]) {
  asm volatile(
      "cp.async.bulk.prefetch.tensor.4d.L2.global.tile [%0, {%1, %2, %3, %4}];\n" ::"l"(map),
      "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3])
      : "memory");
}

__device__ inline void prefetch_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];\n" ::"l"(map) : "memory");
}

// --- sm_90a: products of warp groups
// ------------------------------------------------------------------
//
// Matrices in shared memory are rows of 64 elements of 16 bits, 128 bytes each, eight rows to an
// atom of 1024 bytes at a multiple of 1024; the 16-byte chunk c of row r lies at c ^ r % 8.

inline constexpr int kRowGroupBytes = 1024;

// Of rows along the sums' axis (element [i][k], k contiguous; `start` may be 32, 64 or 96 bytes
// into an atom): groups of eight follow each other.
__device__ inline uint64_t rows_descriptor(const void* start) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  return kSwizzle128 | static_cast<uint64_t>(kRowGroupBytes >> 4) << 32 | uint64_t{1} << 16 |
         (shared_address(start) & 0x3ffff) >> 4;
}

// Of rows across it (element [k][j], j contiguous): groups of eight k follow each other, the next
// 64 j lie `columns_bytes` further.
__device__ inline uint64_t columns_descriptor(const void* start, int columns_bytes) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  return kSwizzle128 | static_cast<uint64_t>(kRowGroupBytes >> 4) << 32 |
         static_cast<uint64_t>(columns_bytes >> 4) << 16 | (shared_address(start) & 0x3ffff) >> 4;
}

// The same matrix `num_bytes` further, a multiple of 16, within the same shared memory.
__device__ inline uint64_t descriptor_at(uint64_t descriptor, int num_bytes) {
  constexpr uint64_t kLow = 0xffffffff;
  return (descriptor & ~kLow) | static_cast<uint32_t>(descriptor + (num_bytes >> 4));
}

// Before products whose sums or rows in registers have been written since the last wait.
__device__ inline void begin_products() {
  asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
}

// The products since the last commit are one group.
__device__ inline void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}

// Until at most kGroupsLeft groups are under way; `sums` are those of one that has ended. Till
// then neither sums nor rows in registers may be touched.
template <int kGroupsLeft, int kCount>
__device__ void wait_products(float (&sums)[kCount]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kGroupsLeft) : "memory");
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

#define KVLINK_REGISTERS_32                                              \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15" \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define KVLINK_REGISTERS_64                                                          \
  KVLINK_REGISTERS_32                                                                \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define KVLINK_REGISTERS_128                                                                     \
  KVLINK_REGISTERS_64                                                                            \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"             \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"             \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, " \
  "%127"
#define KVLINK_SUMS_8(c, i)                                                                   \
  "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), \
      "+f"(c[i + 6]), "+f"(c[i + 7])
#define KVLINK_SUMS_32(c, i) \
  KVLINK_SUMS_8(c, i), KVLINK_SUMS_8(c, i + 8), KVLINK_SUMS_8(c, i + 16), KVLINK_SUMS_8(c, i + 24)
#define KVLINK_SUMS_64(c, i) KVLINK_SUMS_32(c, i), KVLINK_SUMS_32(c, i + 32)
#define KVLINK_SUMS_128(c, i) KVLINK_SUMS_64(c, i), KVLINK_SUMS_64(c, i + 64)
// Operands count on from the sums.
#define KVLINK_PRODUCT_SHARED(n, type, registers, rows_at, columns_at, add_at, sums)               \
  asm volatile("{\n.reg .pred adds;\nsetp.ne.b32 adds, %" add_at                                   \
               ", 0;\nwgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " {" registers \
               "}, %" rows_at ", %" columns_at ", adds, 1, 1, 0, 0;\n}\n"                          \
               : sums                                                                              \
               : "l"(rows), "l"(columns), "r"(int{adds}))
#define KVLINK_PRODUCT_REGISTERS(n, type, registers, rows_at, columns_at, sums)                    \
  asm volatile(                                                                                    \
      "{\n.reg .pred adds;\nsetp.ne.b32 adds, 1, 0;\n"                                             \
      "wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " {" registers "}, {" rows_at \
      "}, %" columns_at ", adds, 1, 1, 1;\n}\n"                                                    \
      : sums                                                                                       \
      : "r"(rows[0]), "r"(rows[1]), "r"(rows[2]), "r"(rows[3]), "l"(columns))

// sums [64, n] = (sums +) rows [64, 16] columns [16, n] by a warp group, asynchronously; both from
// shared memory, by rows_descriptor. n is twice the number of sums, 64 or 128. Warp w has rows
// 16 w + g and 8 more, with g and t as in multiply_add:
//   sums[4 j + {0, 1}]: columns 8 j + 2t, 2t + 1 of row g; sums[4 j + {2, 3}]: of row g + 8
template <DType kDType, int kCount>
__device__ void multiply_rows(float (&sums)[kCount], uint64_t rows, uint64_t columns, bool adds) {
  static_assert(kCount == 32 || kCount == 64);
  static_assert(kDType == DType::kBFloat16 || kDType == DType::kFloat16);
  if constexpr (kDType == DType::kBFloat16 && kCount == 32) {
    KVLINK_PRODUCT_SHARED("64", "bf16", KVLINK_REGISTERS_32, "32", "33", "34",
                          KVLINK_SUMS_32(sums, 0));
  } else if constexpr (kDType == DType::kBFloat16) {
    KVLINK_PRODUCT_SHARED("128", "bf16", KVLINK_REGISTERS_64, "64", "65", "66",
                          KVLINK_SUMS_64(sums, 0));
  } else if constexpr (kCount == 32) {
    KVLINK_PRODUCT_SHARED("64", "f16", KVLINK_REGISTERS_32, "32", "33", "34",
                          KVLINK_SUMS_32(sums, 0));
  } else {
    KVLINK_PRODUCT_SHARED("128", "f16", KVLINK_REGISTERS_64, "64", "65", "66",
                          KVLINK_SUMS_64(sums, 0));
  }
}

// sums [64, n] += rows [64, 16] columns [16, n]; rows in registers as multiply_add's a, 16 to a
// warp; columns in shared memory, by columns_descriptor. n is 64, 128 or 256.
template <DType kDType, int kCount>
__device__ void multiply_columns(float (&sums)[kCount], const uint32_t (&rows)[4],
                                 uint64_t columns) {
  static_assert(kCount == 32 || kCount == 64 || kCount == 128);
  static_assert(kDType == DType::kBFloat16 || kDType == DType::kFloat16);
  if constexpr (kDType == DType::kBFloat16 && kCount == 32) {
    KVLINK_PRODUCT_REGISTERS("64", "bf16", KVLINK_REGISTERS_32, "%32, %33, %34, %35", "36",
                             KVLINK_SUMS_32(sums, 0));
  } else if constexpr (kDType == DType::kBFloat16 && kCount == 64) {
    KVLINK_PRODUCT_REGISTERS("128", "bf16", KVLINK_REGISTERS_64, "%64, %65, %66, %67", "68",
                             KVLINK_SUMS_64(sums, 0));
  } else if constexpr (kDType == DType::kBFloat16) {
    KVLINK_PRODUCT_REGISTERS("256", "bf16", KVLINK_REGISTERS_128, "%128, %129, %130, %131", "132",
                             KVLINK_SUMS_128(sums, 0));
  } else if constexpr (kCount == 32) {
    KVLINK_PRODUCT_REGISTERS("64", "f16", KVLINK_REGISTERS_32, "%32, %33, %34, %35", "36",
                             KVLINK_SUMS_32(sums, 0));
  } else if constexpr (kCount == 64) {
    KVLINK_PRODUCT_REGISTERS("128", "f16", KVLINK_REGISTERS_64, "%64, %65, %66, %67", "68",
                             KVLINK_SUMS_64(sums, 0));
  } else {
    KVLINK_PRODUCT_REGISTERS("256", "f16", KVLINK_REGISTERS_128, "%128, %129, %130, %131", "132",
                             KVLINK_SUMS_128(sums, 0));
  }
}

#undef KVLINK_PRODUCT_SHARED
#undef KVLINK_PRODUCT_REGISTERS

}  // namespace kvlink::cuda
