#include "octavo/kv_layout.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

namespace octavo {
namespace {

constexpr KvFormat kFormats[] = {KvFormat::kF32,
                                 KvFormat::kF16,
                                 KvFormat::kBF16,
                                 KvFormat::kFp8E4M3,
                                 KvFormat::kFp8E5M2,
                                 KvFormat::kFp8PerTokenHead,
                                 KvFormat::kInt8PerTokenHead};

TEST(KvLayout, VTokenIsTheInverseOfVPosition) {
  for (KvFormat format : kFormats) {
    for (int token = 0; token < kPageSize; ++token) {
      EXPECT_EQ(VToken(format, VPosition(format, token)), token) << Name(format);
      EXPECT_EQ(VPosition(format, VToken(format, token)), token) << Name(format);
      EXPECT_EQ(VPosition(format, token) / 16, token / 16) << Name(format);
      if (ElementSize(format) > 1) {
        EXPECT_EQ(VPosition(format, token), token);
      }
    }
  }
}

// PTX ISA, "Register Fragments for wgmma.mma_async.m64nNk32": which element of A (64 x 32, 8 bits)
// byte `i` (0..15, four to a register) of a thread's fragment is.
struct Element {
  int row, column;
  bool operator==(const Element&) const = default;
};
Element FragmentA(int thread, int i) {
  const int warp = thread / 32, group = thread % 32 / 4, in_group = thread % 4;
  const bool lower = i < 4 || (i >= 8 && i < 12);
  return {16 * warp + group + (lower ? 0 : 8), 4 * in_group + i % 4 + (i < 8 ? 0 : 16)};
}

// The same for register i of the float accumulator D (64 x N).
Element FragmentD(int thread, int i) {
  const int warp = thread / 32, group = thread % 32 / 4, in_group = thread % 4;
  return {16 * warp + group + (i % 4 < 2 ? 0 : 8), 8 * (i / 4) + 2 * in_group + i % 2};
}

// S = Q K^T leaves a thread with accumulators of 32 keys (registers 0..15). Packed to bytes in the
// order below they are the A operand of P V without an exchange between threads, if V's rows hold
// the keys in VPosition's order.
TEST(KvLayout, AccumulatorsOfSAreTheOperandOfPV) {
  constexpr int kPacked[16] = {0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15};
  for (int thread = 0; thread < 128; ++thread) {
    for (int i = 0; i < 16; ++i) {
      const Element probability = FragmentD(thread, kPacked[i]);  // row, key
      const Element operand = FragmentA(thread, i);  // row, place along the contraction
      EXPECT_EQ(operand.row, probability.row);
      EXPECT_EQ(operand.column, VPosition(KvFormat::kFp8E4M3, probability.column))
          << thread << " " << i;
    }
  }
}

// Widened to 16 bits, a 32-bit word of V holds two token pairs: tokens 2t, 2t + 1 and 2t + 8, 2t +
// 9, which are the two registers of one thread's B fragment of mma.m16n8k16 (PTX ISA: rows 2t, 2t +
// 1 and the same + 8).
TEST(KvLayout, AWordOfVIsAFragmentOfMma) {
  for (int word = 0; word < kPageSize / 4; ++word) {
    const int base = word / 4 * 16, t = word % 4;
    for (int byte = 0; byte < 4; ++byte) {
      EXPECT_EQ(VToken(KvFormat::kFp8E4M3, 4 * word + byte),
                base + 2 * t + byte % 2 + 8 * (byte / 2));
    }
  }
}

TEST(KvLayout, AClaimHoldsEverythingOnce) {
  for (KvFormat k : kFormats) {
    for (KvFormat v : kFormats) {
      for (int kv_heads : {1, 2, 3, 8}) {
        for (int head_dim : {8, 64, 80, 128, 256}) {
          const KvLayout layout{k, v, kv_heads, head_dim};
          std::vector<std::pair<int64_t, int64_t>> parts;  // begin, end
          for (int head = 0; head < kv_heads; ++head) {
            parts.emplace_back(layout.KOffset(head), layout.KOffset(head) + layout.KBytes());
            parts.emplace_back(layout.VOffset(head), layout.VOffset(head) + layout.VBytes());
            constexpr int64_t kScales = kPageSize * sizeof(float);
            if (HasTokenScales(k))
              parts.emplace_back(layout.KScaleOffset(head), layout.KScaleOffset(head) + kScales);
            if (HasTokenScales(v))
              parts.emplace_back(layout.VScaleOffset(head), layout.VScaleOffset(head) + kScales);
          }
          std::sort(parts.begin(), parts.end());
          int64_t end = 0;
          for (const auto& part : parts) {
            EXPECT_EQ(part.first, end);
            end = part.second;
          }
          EXPECT_EQ(end, layout.UsedBytes());
          EXPECT_GE(layout.ClaimBytes(), end);
          EXPECT_LT(layout.ClaimBytes(), end + kPageUnit);
          EXPECT_EQ(layout.ClaimBytes() % kPageUnit, 0);
        }
      }
    }
  }
}

TEST(KvLayout, NamesAreTheirOwnInverse) {
  for (KvFormat format : kFormats) EXPECT_EQ(KvFormatFromName(Name(format)), format);
  EXPECT_EQ(KvFormatFromName("fp8"), KvFormat::kFp8E4M3);
  EXPECT_EQ(KvFormatFromName("bfloat16"), KvFormat::kBF16);
  EXPECT_EQ(KvFormatFromName("int4"), std::nullopt);
}

}  // namespace
}  // namespace octavo
