// What happens to a block's rows before and after the pages: reading queries, merging splits,
// writing the output.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numbers>

#include "base/error.h"
#include "base/float_bits.h"
#include "kernels/cpu/attention_kernels.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/attention_rows.cpp"
#include "hwy/foreach_target.h"

#include "hwy/highway.h"
#include "kernels/cpu/attention_common-inl.h"

HWY_BEFORE_NAMESPACE();
namespace octavo::cpu::HWY_NAMESPACE {

// The first element of the block's row r in q or out.
template <class T>
T* RowOf(const AttentionBlock& block, const Tensor& tensor, int r) {
  const int head = block.kv_head * block.group + r % block.group;
  return tensor.Row<T>(block.first_token + r / block.group) + int64_t{head} * block.head_dim;
}

void LoadQ(const AttentionBlock& block, float* q) {
  const Tensor& from = block.args->q;
  for (int r = 0; r < block.rows; ++r, q += block.row_stride) {
    std::fill_n(q, block.row_stride, 0.0f);
    if (block.pairs == 1) {
      std::memcpy(q, RowOf<uint16_t>(block, from, r), block.head_dim * sizeof(uint16_t));
      continue;
    }
    auto* first = reinterpret_cast<uint16_t*>(q);
    auto* second = reinterpret_cast<uint16_t*>(q + block.row_stride / 2);
    for (int i = 0; i < block.head_dim; ++i) {
      if (block.pairs == 2) {
        const float x = RowOf<float>(block, from, r)[i];
        first[i] = FloatToBF16(x);
        second[i] = FloatToBF16(x - BF16ToFloat(first[i]));
      } else {
        q[i] = from.dtype == DType::kF32 ? RowOf<float>(block, from, r)[i]
                                         : BF16ToFloat(RowOf<uint16_t>(block, from, r)[i]);
      }
    }
  }
}

// to = to + from for every row.
void MergeStates(const AttentionBlock& block, const AttentionState& to,
                 const AttentionState& from) {
  const DF d;
  for (int r = 0; r < block.rows; ++r) {
    const VF m_to = hn::Set(d, to.m[r]), m_from = hn::Set(d, from.m[r]);
    const VF m = hn::Max(m_to, m_from);
    const VF base = Subtrahend(m);
    const VF c_to = Exp2(hn::Sub(m_to, base)), c_from = Exp2(hn::Sub(m_from, base));
    auto merge = [&](VF x_to, VF x_from)
                     HWY_ATTR { return hn::MulAdd(x_from, c_from, hn::Mul(x_to, c_to)); };
    to.m[r] = hn::GetLane(m);
    to.l[r] = hn::GetLane(merge(hn::Set(d, to.l[r]), hn::Set(d, from.l[r])));
    float* o_to = to.o + r * block.row_stride;
    const float* o_from = from.o + r * block.row_stride;
    for (int i = 0; i < block.row_stride; i += static_cast<int>(kLanes)) {
      hn::Store(merge(hn::Load(d, o_to + i), hn::Load(d, o_from + i)), d, o_to + i);
    }
  }
}

// What a row's sums are multiplied with.
float FinalFactor(const AttentionBlock& block, int r, float m, float l) {
  const DF d;
  VF base = Subtrahend(hn::Set(d, m)), sink = hn::Zero(d);
  const Tensor& sinks = block.args->sinks;
  if (sinks) {
    const int head = block.kv_head * block.group + r % block.group;
    const float logit = sinks.dtype == DType::kF32   ? sinks.Row<float>(0)[head]
                        : sinks.dtype == DType::kF16 ? Float16::Decode(sinks.Row<uint16_t>(0)[head])
                                                     : BF16ToFloat(sinks.Row<uint16_t>(0)[head]);
    const VF scaled = hn::Set(d, logit * std::numbers::log2e_v<float>);
    base = Subtrahend(hn::Max(hn::Set(d, m), scaled));
    sink = Exp2(hn::Sub(scaled, base));
  }
  const VF c = Exp2(hn::Sub(hn::Set(d, m), base));
  const VF denominator = hn::MulAdd(hn::Set(d, l), c, sink);
  return hn::GetLane(hn::Div(hn::Mul(c, hn::Set(d, block.value_factor)), denominator));
}

void FinishRows(const AttentionBlock& block, const AttentionState& state) {
  const Tensor& out = block.args->out;
  for (int r = 0; r < block.rows; ++r) {
    const bool sees_nothing = block.position(r) < 0;
    const float factor = FinalFactor(block, r, state.m[r], state.l[r]);
    const float* o = state.o + r * block.row_stride;
    for (int i = 0; i < block.head_dim; ++i) {
      // The two kernels may differ in the sign of a zero and in which NaN they make: here there is
      // one of each.
      float x = sees_nothing ? 0.0f : o[i] * factor + 0.0f;
      if (x != x) x = std::numeric_limits<float>::quiet_NaN();
      if (out.dtype == DType::kF32) {
        RowOf<float>(block, out, r)[i] = x;
      } else {
        RowOf<uint16_t>(block, out, r)[i] = FloatToBF16(x);
      }
    }
  }
}

}  // namespace octavo::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace octavo::cpu {

HWY_EXPORT(LoadQ);
HWY_EXPORT(MergeStates);
HWY_EXPORT(FinishRows);

void LoadQueries(const AttentionBlock& block, float* q) { HWY_DYNAMIC_DISPATCH(LoadQ)(block, q); }

void Merge(const AttentionBlock& block, const AttentionState& to, const AttentionState& from) {
  HWY_DYNAMIC_DISPATCH(MergeStates)(block, to, from);
}

void Finish(const AttentionBlock& block, const AttentionState& state) {
  HWY_DYNAMIC_DISPATCH(FinishRows)(block, state);
}

}  // namespace octavo::cpu
#endif  // HWY_ONCE
