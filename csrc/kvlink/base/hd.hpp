// Marks functions that compile for the host and, under nvcc, for the device too.
#pragma once

#if defined(__CUDACC__)
#define KVLINK_HD __host__ __device__ __forceinline__
#else
#define KVLINK_HD inline
#endif
