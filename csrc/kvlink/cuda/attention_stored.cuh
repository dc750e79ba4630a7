// K, V and queries in shared memory, and how the tensor cores take them from there.
//
// 16-bit rows are read by ldmatrix. Rows of bytes (float8, int8) are widened to bfloat16 on the
// way, exactly: a lane reads four neighbours of a row at once, so that a product's columns (of q
// and K) and the result's columns (of V) are in another order; kColumnOf and dim_of say which.
#pragma once

#include "kvlink/cuda/attention_args.cuh"
#include "kvlink/cuda/move_rows.cuh"

namespace kvlink::cuda {

// A 4-byte word of stored values as two pairs of bfloat16.
template <DType kDType>
__device__ void widen(uint32_t word, uint32_t (&pairs)[2]) {
  if constexpr (kDType == DType::kInt8) {
    float values[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      // 2^23 + 128 + value.
      const uint32_t bits = __byte_perm(word ^ 0x80808080u, 0x4b000000u, 0x7440 + i);
      values[i] = __uint_as_float(bits) - 8388736.0f;
    }
    pairs[0] = pack_halves<DType::kBFloat16>(values[0], values[1]);
    pairs[1] = pack_halves<DType::kBFloat16>(values[2], values[3]);
  } else {
    constexpr bool kE4M3 = kDType == DType::kFloat8E4M3;
    constexpr int kShift = kE4M3 ? 4 : 3;
    constexpr uint32_t kFactor = kE4M3 ? 0x7b807b80u : 0x77807780u;  // 2^120, 2^112
    constexpr uint32_t kToSpecial = kE4M3 ? 0x01010101u : 0x04040404u;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t spread = __byte_perm(word, 0u, i == 0 ? 0x1404 : 0x3424);
      pairs[i] = multiply_pair((spread & 0x80008000u) | (spread & 0x7f007f00u) >> kShift, kFactor);
    }
    if (((word & 0x7f7f7f7fu) + kToSpecial) & 0x80808080u) {  // NaN, infinities: rare
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        pairs[i] = pack_halves<DType::kBFloat16>(
            Storage<kDType>::load(static_cast<uint8_t>(word >> (16 * i))),
            Storage<kDType>::load(static_cast<uint8_t>(word >> (16 * i + 8))));
      }
    }
  }
}

// Rows of up to kMaxDim values of K or V. Each is 16 bytes longer than it need be, so that the rows
// that a warp reads together lie in different banks.
template <DType kKV, int kMaxDim>
struct StoredRows {
  static constexpr bool kBytes = dtype_bytes(kKV) == 1;
  static constexpr DType kMma = kKV == DType::kFloat16 ? DType::kFloat16 : DType::kBFloat16;
  static constexpr int kSize = static_cast<int>(dtype_bytes(kKV));
  static constexpr int kRowBytes = kMaxDim * kSize + 16;
  static constexpr int kValueColumns = kBytes ? 4 : 2;  // matrices that values() gives at once

  __device__ static int lane() { return static_cast<int>(threadIdx.x) % 32; }
  __device__ static uint32_t word(const char* rows, int row, int byte) {
    return *reinterpret_cast<const uint32_t*>(rows + row * kRowBytes + byte);
  }

  // Dims [16 step, + 16) of tokens [token, + 16): b of two matrices.
  __device__ static void keys(uint32_t (&b)[2][2], const char* rows, int token, int step) {
    if constexpr (kBytes) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        widen<kKV>(word(rows, token + i * 8 + lane() / 4, step * 16 + lane() % 4 * 4), b[i]);
      }
    } else {
      const int in_eight = lane() % 8, column = lane() / 8;
      uint32_t k[4];
      load_matrices(
          k, rows + (token + column / 2 * 8 + in_eight) * kRowBytes + step * 32 + column % 2 * 16);
      b[0][0] = k[0], b[0][1] = k[1], b[1][0] = k[2], b[1][1] = k[3];
    }
  }

  // Dims [32 step, + 32) of tokens [token, + 8): b of two products, one after the other.
  __device__ static void keys_of_eight(uint32_t (&b)[2][2], const char* rows, int token, int step) {
    if constexpr (kBytes) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        widen<kKV>(word(rows, token + lane() / 4, step * 32 + i * 16 + lane() % 4 * 4), b[i]);
      }
    } else {
      uint32_t k[4];
      load_matrices(k, rows + (token + lane() % 8) * kRowBytes + step * 64 + lane() / 8 * 16);
      b[0][0] = k[0], b[0][1] = k[1], b[1][0] = k[2], b[1][1] = k[3];
    }
  }

  // Tokens [token, + 16) of kValueColumns * 8 dims from `dim` on.
  __device__ static void values(uint32_t (&b)[kValueColumns][2], const char* rows, int token,
                                int dim) {
    if constexpr (kBytes) {
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        const int row = token + part * 8 + lane() % 4 * 2;
        const uint32_t even = word(rows, row, dim + lane() / 4 * 4);
        const uint32_t odd = word(rows, row + 1, dim + lane() / 4 * 4);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          uint32_t pairs[2];
          widen<kKV>(__byte_perm(even, odd, i == 0 ? 0x5140 : 0x7362), pairs);
          b[2 * i][part] = pairs[0];
          b[2 * i + 1][part] = pairs[1];
        }
      }
    } else {
      uint32_t v[4];
      load_matrices_transposed(
          v, rows + (token + lane() % 16) * kRowBytes + dim * 2 + lane() / 16 * 16);
      b[0][0] = v[0], b[0][1] = v[1], b[1][0] = v[2], b[1][1] = v[3];
    }
  }

  // The dim of a lane's column `half` of the result's matrix `column`.
  __device__ static int dim_of(int column, int half) {
    if constexpr (kBytes) return column / 4 * 32 + lane() % 4 * 8 + half * 4 + column % 4;
    return column * 8 + lane() % 4 * 2 + half;
  }

  using Element = Storage<kKV>;
  // NOTE: dims past those of the layout are not written, and not used.
  __device__ static const volatile typename Element::Type* row(const char* rows, int row, int dim) {
    return reinterpret_cast<const typename Element::Type*>(rows + row * kRowBytes) + dim;
  }

  // Begins the copy of one row, kLanes threads together: the first `dims`, zeros up to `padded`.
  template <int kLanes>
  __device__ static void copy_row(char* row, const void* from, int dims, int padded, bool valid) {
    constexpr int kChunk = 16 / kSize;
    const auto* source = static_cast<const char*>(from);
    for (int i = static_cast<int>(threadIdx.x) % kLanes; i < padded / kChunk; i += kLanes) {
      const bool real = valid && i < dims / kChunk;
      copy_async(row + i * 16, real ? source + i * 16 : source, real);
    }
  }
};

// Finite halves as they are, others 0; notes in *special that there were some.
template <DType kMma>
__device__ uint32_t finite_pair(uint32_t pair, bool* special) {
  constexpr uint32_t kExponent = kMma == DType::kBFloat16 ? 0x7f80u : 0x7c00u;
  if ((pair & kExponent) == kExponent) pair &= 0xffff0000u, *special = true;
  if ((pair >> 16 & kExponent) == kExponent) pair &= 0xffffu, *special = true;
  return pair;
}

// Rows of queries, in kParts parts that add up to them.
template <DType kKV, int kMaxDim, int kRows, int kParts>
struct QueryRows {
  using Stored = StoredRows<kKV, kMaxDim>;
  static constexpr DType kMma = Stored::kMma;
  static constexpr int kStride = kMaxDim + 8;
  static constexpr int kPartElements = kRows * kStride;
  static constexpr size_t kSharedBytes = size_t{2} * kParts * kPartElements;

  // A query's dims [8 chunk, + 8), of part `part`.
  __device__ static void store(uint16_t* row, int chunk, uint4 pairs) {
    if constexpr (Stored::kBytes) {
      auto* to = row + chunk / 2 * 16 + chunk % 2 * 4;
      *reinterpret_cast<uint2*>(to) = make_uint2(pairs.x, pairs.z);
      *reinterpret_cast<uint2*>(to + 8) = make_uint2(pairs.y, pairs.w);
    } else {
      *reinterpret_cast<uint4*>(row + chunk * 8) = pairs;
    }
  }

  __device__ static void split(DType dtype, const char* from, uint4 (&parts)[kParts]) {
    float values[8];
    if (dtype == DType::kFloat32) {
      load_vector<DType::kFloat32>(from, 1, 8, values);
    } else if (dtype == DType::kBFloat16) {
      load_vector<DType::kBFloat16>(from, 1, 8, values);
    } else {
      load_vector<DType::kFloat16>(from, 1, 8, values);
    }
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      uint32_t pairs[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        pairs[i] = pack_halves<kMma>(values[2 * i], values[2 * i + 1]);
        values[2 * i] -= half_of<kMma, 0>(pairs[i]);
        values[2 * i + 1] -= half_of<kMma, 1>(pairs[i]);
      }
      parts[part] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    }
  }

  // All of a tile's queries, up to `padded` dims.
  template <typename Tile>
  __device__ static void load(const Tile& tile, uint16_t* queries, int num_threads, int padded) {
    const PagedAttentionParams& p = tile.p;
    const int chunks = padded / 8, real_chunks = p.kv.layout.head_dim / 8;
    const int64_t size = dtype_bytes(p.q_dtype);
    for (int i = static_cast<int>(threadIdx.x); i < kRows * chunks; i += num_threads) {
      const int row = tile.first_row + i / chunks, chunk = i % chunks;
      uint4 parts[kParts] = {};
      if (row < tile.num_rows() && chunk < real_chunks) {
        const int64_t token = tile.seq.first_row + tile.token_of(row);
        const auto* from =
            static_cast<const char*>(p.q) +
            (token * p.q_stride_token + tile.head_of(row) * p.q_stride_head + chunk * 8) * size;
        if constexpr (kParts == 1) {
          parts[0] = *reinterpret_cast<const uint4*>(from);
        } else {
          split(p.q_dtype, from, parts);
        }
      }
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        store(queries + part * kPartElements + i / chunks * kStride, chunk, parts[part]);
      }
    }
  }

  // Dims [16 step, + 16) of rows [row, + 16): a of a product.
  __device__ static void take(uint32_t (&a)[4], const uint16_t* queries, int part, int row,
                              int step) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    load_matrices(a, queries + part * kPartElements + (row + lane % 16) * kStride + step * 16 +
                         lane / 16 * 8);
  }
};

}  // namespace kvlink::cuda
