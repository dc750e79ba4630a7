#include "kvlink/cpu/merge_states.hpp"
#include "kvlink/cpu/simd/math.hpp"
#include "kvlink/cpu/simd/rows.hpp"

namespace kvlink::cpu::KVLINK_SIMD_LEVEL {

namespace {

constexpr float kNegInf = -__builtin_inff();

// kLanes (or, at the end of a row, `count`) elements of the result.
template <DType kDType>
void merge_elements(const MergeStatesParams& p, int64_t row, int64_t dim, int64_t count, float max,
                    float sum) {
  const int64_t offset = (row * p.head_dim + dim) * Row<kDType>::kBytes;
  Vec total{};
  for (int64_t i = 0; i < p.num_states; ++i) {
    const float lse = p.lses[i][row];
    if (lse == kNegInf) continue;
    const char* source = static_cast<const char*>(p.outs[i]) + offset;
    const Vec part = count == kLanes ? Row<kDType>::load(source) : load_some<kDType>(source, count);
    total += part * (exp(splat(lse - max))[0] / sum);
  }
  char* target = static_cast<char*>(p.out) + offset;
  if (count == kLanes) {
    Row<kDType>::store(target, total);
  } else {
    store_some<kDType>(target, total, count);
  }
}

template <DType kDType>
void merge_typed(const MergeStatesParams& p, int64_t first_row, int64_t last_row) {
  for (int64_t row = first_row; row < last_row; ++row) {
    float max = kNegInf, sum = 0.0f;
    for (int64_t i = 0; i < p.num_states; ++i) {
      if (p.lses[i][row] > max) max = p.lses[i][row];
    }
    for (int64_t i = 0; i < p.num_states; ++i) {
      if (p.lses[i][row] != kNegInf) sum += exp(splat(p.lses[i][row] - max))[0];
    }
    for (int64_t dim = 0; dim < p.head_dim; dim += kLanes) {
      const int64_t rest = p.head_dim - dim;
      merge_elements<kDType>(p, row, dim, rest < kLanes ? rest : kLanes, max, sum);
    }
    p.lse[row] = sum > 0.0f || sum != sum ? max + __builtin_logf(sum) : kNegInf;
  }
}

}  // namespace

void merge_rows(const MergeStatesParams& p, int64_t first_row, int64_t last_row) {
  switch (p.dtype) {
    case DType::kFloat16:
      return merge_typed<DType::kFloat16>(p, first_row, last_row);
    case DType::kBFloat16:
      return merge_typed<DType::kBFloat16>(p, first_row, last_row);
    default:
      return merge_typed<DType::kFloat32>(p, first_row, last_row);
  }
}

}  // namespace kvlink::cpu::KVLINK_SIMD_LEVEL
