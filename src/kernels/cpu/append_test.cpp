#include "kernels/cpu/append.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "../tests/conformance/attention_cases.h"
#include "base/float_bits.h"
#include "kernels/cpu/append_kernels.h"
#include "kernels/reference/attention.h"
#include "kernels/simd_targets.h"

namespace octavo {
namespace {

using conformance::AttentionCase;
using conformance::Pool;
using conformance::Step;
using conformance::TokenRange;

// Every test runs on each SIMD target that this machine has.
class AppendTest : public testing::TestWithParam<SimdTarget> {
 protected:
  AppendTest() : use_(GetParam()) {}

 private:
  UseSimdTarget use_;
};
INSTANTIATE_TEST_SUITE_P(Targets, AppendTest, testing::ValuesIn(SimdTargets()),
                         [](const auto& info) { return info.param.name; });

uint32_t Expected(DType storage, float x) {
  switch (storage) {
    case DType::kF32:
      return std::bit_cast<uint32_t>(x);
    case DType::kF16:
      return Float16::Encode(x);
    case DType::kBF16:
      return FloatToBF16(x);
    case DType::kF8E4M3:
      return Fp8E4M3::Encode(x);
    case DType::kF8E5M2:
      return Fp8E5M2::Encode(x);
    default: {
      if (x != x) return 0;
      return static_cast<uint8_t>(
          static_cast<int8_t>(std::nearbyint(std::min(std::max(x, -127.0f), 127.0f))));
    }
  }
}

void ExpectEncodes(KvFormat format, const std::vector<float>& x, float scale) {
  const int size = ElementSize(format);
  std::vector<std::byte> codes(x.size() * size);
  cpu::EncodeElements(format, x.data(), static_cast<int>(x.size()), scale, codes.data());
  int wrong = 0;
  for (size_t i = 0; i < x.size() && wrong < 5; ++i) {
    uint32_t code = 0;
    std::memcpy(&code, codes.data() + i * size, size);
    const float scaled = x[i] / scale;
    if (format == KvFormat::kF32 && scaled != scaled)
      continue;  // which NaN a division makes is the machine's choice
    const uint32_t expected = Expected(StorageDType(format), scaled);
    if (code == expected) continue;
    ++wrong;
    ADD_FAILURE() << Name(format) << ": " << x[i] << " / " << scale << " (bits " << std::hex
                  << std::bit_cast<uint32_t>(scaled) << ") gave " << code << ", not " << expected;
  }
}

TEST_P(AppendTest, EncodesEveryBF16ValueAsTheDefinitionSays) {
  std::vector<float> x;
  for (uint32_t bits = 0; bits <= 0xFFFF; ++bits)
    x.push_back(BF16ToFloat(static_cast<uint16_t>(bits)));
  for (KvFormat format : conformance::kAllFormats) {
    for (float scale : {1.0f, 0.0123f, 3.7f}) ExpectEncodes(format, x, scale);
  }
}

TEST_P(AppendTest, EncodesADenseSampleOfFloatsAsTheDefinitionSays) {
  constexpr uint32_t kStride = 2003;  // prime: every low bit pattern occurs with every exponent
  std::vector<float> x;
  for (uint64_t bits = 0; bits <= 0xFFFFFFFF; bits += kStride)
    x.push_back(std::bit_cast<float>(static_cast<uint32_t>(bits)));
  for (KvFormat format : conformance::kAllFormats) ExpectEncodes(format, x, 1.0f);
}

TEST_P(AppendTest, RoundsTiesAsTheDefinitionSays) {
  std::vector<float> x;
  for (uint32_t code = 0; code < 0x7E; ++code) {
    for (float middle : {(Fp8E4M3::Decode(code) + Fp8E4M3::Decode(code + 1)) / 2,
                         (Fp8E5M2::Decode(code) + Fp8E5M2::Decode(code + 1)) / 2}) {
      for (float tie : {middle, -middle}) {
        x.insert(x.end(), {tie, std::nextafter(tie, 1e9f), std::nextafter(tie, -1e9f)});
      }
    }
  }
  for (float limit :
       {448.0f, 464.0f, 480.0f, 57344.0f, 61440.0f, 65504.0f, 65520.0f, 127.5f, 126.5f}) {
    x.insert(x.end(), {limit, std::nextafter(limit, 0.0f), std::nextafter(limit, 1e9f)});
  }
  for (KvFormat format : conformance::kAllFormats) ExpectEncodes(format, x, 1.0f);
}

// Appends the tokens in chunks; returns the arena's bytes.
struct Appended {
  std::vector<std::byte> arena;
  uint64_t saturated[2];
  float amax[2];
};
Appended AppendInChunks(const AttentionCase& c, int chunk, bool reference, float outlier = 0) {
  ThreadPool threads(2);
  Pool pool(c, Lengths(c));
  for (int s = 0; s < static_cast<int>(c.sequences.size()); ++s) {
    const int length = c.sequences[s].cached + c.sequences[s].tokens;
    for (int begin = 0; begin < length; begin += chunk) {
      const TokenRange range{s, begin, std::min(length, begin + chunk)};
      const Step step(c, pool, std::span(&range, 1));
      if (outlier != 0 && begin == 0) {
        conformance::SetElement(step.k, 0, 3, outlier);
        conformance::SetElement(step.v, 0, 5, -outlier);
      }
      reference ? reference::Append(step.Append(pool)) : cpu::Append(step.Append(pool), threads);
      EXPECT_TRUE(step.intact());
    }
  }
  EXPECT_TRUE(pool.arena().intact());
  Appended result;
  result.arena.assign(pool.arena().data(), pool.arena().data() + pool.arena().size());
  std::copy_n(pool.saturated, 2, result.saturated);
  std::copy_n(pool.amax, 2, result.amax);
  return result;
}

// Without norm and rotation there is no arithmetic before the rounding: the same bytes.
TEST_P(AppendTest, StoresTheReferencesBytesWhateverTheChunk) {
  for (KvFormat k : conformance::kAllFormats) {
    for (KvFormat v : {k, KvFormat::kBF16, KvFormat::kInt8PerTokenHead}) {
      for (int head_dim : {24, 64}) {
        const AttentionCase c{.k_format = k,
                              .v_format = v,
                              .head_dim = head_dim,
                              .sequences = {{0, 1}, {0, 64}, {0, 65}, {0, 150}},
                              .seed = 3};
        const Appended expected = AppendInChunks(c, 1000, true);
        for (int chunk : {1, 7, 64, 1000}) {
          const Appended actual = AppendInChunks(c, chunk, false);
          EXPECT_EQ(std::memcmp(actual.arena.data(), expected.arena.data(), expected.arena.size()),
                    0)
              << c.Name() << " chunk " << chunk;
          for (int i = 0; i < 2; ++i) {
            EXPECT_EQ(actual.saturated[i], expected.saturated[i]) << c.Name();
            EXPECT_EQ(actual.amax[i], expected.amax[i]) << c.Name();
          }
        }
      }
    }
  }
}

TEST_P(AppendTest, CountsSaturations) {
  AttentionCase c{.k_format = KvFormat::kFp8E4M3,
                  .v_format = KvFormat::kFp8E4M3,
                  .sequences = {{0, 3}},
                  .seed = 4};
  // Scales of head 0: 0.01 and 0.008. Everything else is within 448 of them, and the limit itself
  // does not saturate.
  EXPECT_EQ(AppendInChunks(c, 8, false, 1e-3f).saturated[0], 0u);
  for (float outlier : {1e3f, 3e38f, -1e30f}) {
    const Appended actual = AppendInChunks(c, 8, false, outlier),
                   expected = AppendInChunks(c, 8, true, outlier);
    for (int i = 0; i < 2; ++i) {
      EXPECT_EQ(actual.saturated[i], 1u) << outlier;
      EXPECT_EQ(expected.saturated[i], 1u) << outlier;
      EXPECT_EQ(actual.amax[i], expected.amax[i]) << outlier;
    }
  }
  for (float outlier :
       {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
    const Appended actual = AppendInChunks(c, 8, false, outlier);
    EXPECT_EQ(actual.saturated[0], 0u) << "only finite elements count";
    EXPECT_LT(actual.amax[0], 1e4f);
  }
}

TEST_P(AppendTest, NonFiniteElementsShowInDynamicFormatsToo) {
  for (KvFormat format : {KvFormat::kFp8PerTokenHead, KvFormat::kInt8PerTokenHead}) {
    AttentionCase c{.k_format = format, .v_format = format, .sequences = {{0, 3}}, .seed = 4};
    for (float outlier :
         {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
      const Appended actual = AppendInChunks(c, 8, false, outlier),
                     expected = AppendInChunks(c, 8, true, outlier);
      EXPECT_EQ(std::memcmp(actual.arena.data(), expected.arena.data(), expected.arena.size()), 0)
          << Name(format);
    }
  }
}

TEST_P(AppendTest, TheFirstSlotOfAPageClearsItsValuesAndScales) {
  ThreadPool threads(1);
  for (KvFormat format : conformance::kAllFormats) {
    const AttentionCase c{.k_format = format, .v_format = format, .sequences = {{0, 1}}, .seed = 5};
    Pool pool(c, Lengths(c));
    const TokenRange range{0, 0, 1};
    const Step step(c, pool, std::span(&range, 1));
    cpu::Append(step.Append(pool), threads);
    const KvLayer layer = pool.Layer();
    const KvLayout& layout = layer.layout;
    const std::byte* claim = layer.Claim(pool.page(0, 0));
    const int size = ElementSize(format);
    for (int head = 0; head < c.kv_heads; ++head) {
      for (int place = 1; place < kPageSize; ++place) {
        for (int d = 0; d < c.head_dim; ++d) {
          const std::byte* v =
              claim + layout.VOffset(head) + (d * kPageSize + VPosition(format, place)) * size;
          for (int i = 0; i < size; ++i) ASSERT_EQ(v[i], std::byte{0});
        }
        if (!HasTokenScales(format)) continue;
        float scales[2];
        std::memcpy(&scales[0], claim + layout.KScaleOffset(head) + place * 4, 4);
        std::memcpy(&scales[1], claim + layout.VScaleOffset(head) + place * 4, 4);
        ASSERT_EQ(scales[0], 0.0f);
        ASSERT_EQ(scales[1], 0.0f);
      }
    }
    for (int64_t i = layout.UsedBytes(); i < layout.ClaimBytes() + kPageUnit; ++i) {
      ASSERT_EQ(claim[i], std::byte{0xFF}) << "behind the layer's claim";
    }
    for (int64_t i = 1; i <= kPageUnit; ++i)
      ASSERT_EQ(claim[-i], std::byte{0xFF}) << "before the layer's claim";
  }
}

// Norm and rotation of bfloat16 inputs into a float32 cache: were K rounded to bfloat16 on the way,
// it would show.
TEST_P(AppendTest, NormalisesAndRotatesInFloat32) {
  ThreadPool threads(2);
  const std::pair<DType, bool> types[] = {
      {DType::kF32, false}, {DType::kBF16, false}, {DType::kBF16, true}};
  for (const auto& [dtype, to_q_out] : types) {
    for (int head_dim : {16, 64, 120}) {
      for (int rotary : {head_dim, head_dim / 2}) {
        const AttentionCase c{.k_format = KvFormat::kF32,
                              .v_format = KvFormat::kF32,
                              .dtype = dtype,
                              .wide_q = to_q_out,
                              .head_dim = head_dim,
                              .sequences = {{0, 70}},
                              .seed = 6};
        std::vector<int32_t> positions(70);
        for (int i = 0; i < 70; ++i) positions[i] = 100000 + i;
        std::vector<float> inv_freq, weight;
        for (int i = 0; i < rotary / 2; ++i)
          inv_freq.push_back(std::pow(10000.0f, -2.0f * i / rotary));
        for (int i = 0; i < head_dim; ++i)
          weight.push_back(1 + 0.1f * conformance::Normal(6, 99, i));
        const TokenRange range{0, 0, 70};

        std::vector<float> table(70 * rotary), expected_table(70 * rotary);
        RopeTableArgs rope{.positions = Tensor(positions.data(), DType::kI32, {70}),
                           .inv_freq = Tensor(inv_freq.data(), DType::kF32, {rotary / 2}),
                           .scaling = 1.1f,
                           .cos_sin = Tensor(table.data(), DType::kF32, {70, rotary})};
        cpu::RopeTable(rope, threads);
        rope.cos_sin.data = expected_table.data();
        reference::RopeTable(rope);
        for (size_t i = 0; i < table.size(); ++i) ASSERT_NEAR(table[i], expected_table[i], 1.5e-7f);

        Pool pool(c, Lengths(c)), expected_pool(c, Lengths(c));
        const Step step(c, pool, std::span(&range, 1)),
            expected(c, expected_pool, std::span(&range, 1));
        auto run = [&](const Step& s, Pool& p, auto append) {
          AppendArgs args = s.Append(p);
          args.q_norm = args.k_norm = Tensor(weight.data(), DType::kF32, {head_dim});
          args.norm_eps = 1e-6f;
          args.norm_offset = 1.0f;
          args.cos_sin = Tensor(expected_table.data(), DType::kF32, {70, rotary});
          if (to_q_out) args.q_out = s.out;
          append(args);
          return args.q_out ? args.q_out : args.q;
        };
        const Tensor rotated =
            run(step, pool, [&](const AppendArgs& args) { cpu::Append(args, threads); });
        const Tensor expected_rotated = run(expected, expected_pool, reference::Append);
        EXPECT_TRUE(step.intact());
        const conformance::Difference q = conformance::Compare(rotated, expected_rotated, head_dim);
        EXPECT_TRUE(q.finite_alike) << c.Name();
        EXPECT_LE(q.worst_row, dtype == DType::kF32 ? 1e-13 : 1e-6) << c.Name();
        for (int t = 0; t < 70; ++t) {
          const KvLayout& layout = pool.Layer().layout;
          const auto* k = reinterpret_cast<const float*>(
                              pool.Layer().Claim(pool.page(0, t / kPageSize)) + layout.KOffset(1)) +
                          t % kPageSize * head_dim;
          const auto* e = reinterpret_cast<const float*>(
                              expected_pool.Layer().Claim(expected_pool.page(0, t / kPageSize)) +
                              layout.KOffset(1)) +
                          t % kPageSize * head_dim;
          for (int d = 0; d < head_dim; ++d) ASSERT_NEAR(k[d], e[d], 2e-6f) << c.Name();
        }
      }
    }
  }
}

TEST_P(AppendTest, SkipsPadding) {
  ThreadPool threads(2);
  const AttentionCase c{.sequences = {{0, 20}}, .seed = 7};
  Pool pool(c, Lengths(c));
  const TokenRange range{0, 0, 20};
  Step step(c, pool, std::span(&range, 1));
  const std::vector<int64_t> nowhere(20, -1);
  step.view.slots = Tensor(nowhere.data(), DType::kI64, {20});
  cpu::Append(step.Append(pool), threads);
  for (size_t i = 0; i < pool.arena().size(); ++i)
    ASSERT_EQ(pool.arena().data()[i], std::byte{0xFF});
}

}  // namespace
}  // namespace octavo
