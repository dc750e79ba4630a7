// Marks functions that compile for the host and, under nvcc, for the device too. Always inlined:
// code shared by the SIMD levels must not leave a copy built for one of them behind.
#pragma once

#if defined(__CUDACC__)
#define KVLINK_HD __host__ __device__ __forceinline__
#else
#define KVLINK_HD inline __attribute__((always_inline))
#endif
