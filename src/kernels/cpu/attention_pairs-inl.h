// Attention's loaders of pairs of bfloat16: what is stored in 16 bits needs no widening, and eight
// bits become 16 by a table.

#if defined(OCTAVO_KERNELS_CPU_ATTENTION_PAIRS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef OCTAVO_KERNELS_CPU_ATTENTION_PAIRS_INL_H_
#undef OCTAVO_KERNELS_CPU_ATTENTION_PAIRS_INL_H_
#else
#define OCTAVO_KERNELS_CPU_ATTENTION_PAIRS_INL_H_
#endif

#include <cstdint>

#include "base/float_bits.h"
#include "hwy/highway.h"
#include "kernels/cpu/attention_common-inl.h"
#include "kernels/cpu/pairs-inl.h"

#if OCTAVO_PAIRS
HWY_BEFORE_NAMESPACE();
namespace octavo::cpu::HWY_NAMESPACE {

using D8 = hn::Repartition<uint8_t, DF>;

// Of a format of eight bits, by the low seven: the two bytes of bfloat16.
struct BF16Bytes {
  HWY_ALIGN uint8_t low[128], high[128];

  template <class Decode>
  explicit BF16Bytes(const Decode& decode) {
    for (uint32_t i = 0; i < 128; ++i) {
      const uint16_t bits = FloatToBF16(decode(i));
      low[i] = static_cast<uint8_t>(bits);
      high[i] = static_cast<uint8_t>(bits >> 8);
    }
  }
};

// bytes[code % 128]; `a` and `b` are its halves.
HWY_INLINE hn::Vec<D8> Lookup(hn::Vec<D8> codes, hn::Vec<D8> a, hn::Vec<D8> b) {
  asm("vpermi2b %2, %1, %0" : "+v"(codes.raw) : "v"(a.raw), "v"(b.raw));
  return codes;
}

// Two vectors of float32 to one of bfloat16, rounded to nearest even: `a` in the lower half. All
// ones, a NaN, stay all ones.
HWY_INLINE VF ToBF16(VF a, VF b) {
  VF out;
  asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(out.raw) : "v"(a.raw), "v"(b.raw));
  return out;
}

// What all loaders of pairs share. A q of float32 is the sum of two bfloat16.
template <int kTerms>
struct Pairs {
  static constexpr size_t kElements = 2;
  static constexpr int kTermsOfQ = kTerms;

  static HWY_INLINE VF MulAdd(VF x, VF y, VF sum) { return MulAddPairs(x, y, sum); }

  template <template <class> class Entry>
  static auto ByStorage(DType storage);

  // Neighbours of a row of kPageSize numbers, or of what is kept of them, in place.
  static void Pack(float* row) {
    const DF d;
    for (size_t i = 0; i < kPageSize; i += 2 * kLanes)
      hn::Store(ToBF16(hn::Load(d, row + i), hn::Load(d, row + i + kLanes)), d, row + i / 2);
  }
  // Neighbouring rows of `stride` numbers each, one vector of every row, in place.
  static void PackRows(float* rows, size_t stride) {
    const DF d;
    const hn::Repartition<uint16_t, DF> d16;
    HWY_ALIGN static constexpr uint16_t kInterleaved[] = {
        0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const auto interleaved = hn::Load(d16, kInterleaved);
    for (size_t i = 0; i < kPageSize; i += 2) {
      VF pair = ToBF16(hn::Load(d, rows + i * stride), hn::Load(d, rows + (i + 1) * stride));
      asm("vpermw %0, %1, %0" : "+v"(pair.raw) : "v"(interleaved.raw));
      hn::Store(pair, d, rows + i / 2 * stride);
    }
  }
};

template <int kTerms>
struct LoadPairs : Pairs<kTerms> {
  static constexpr size_t kSize = 4;
  static constexpr size_t kVectors = 1;
  static HWY_INLINE VF Load(const uint8_t* p) {
    return hn::LoadU(DF(), reinterpret_cast<const float*>(p));
  }
};

// Codes of eight bits, by tables that stay in registers.
template <int kTerms, class Format>
class LoadCodePairs : public Pairs<kTerms> {
 public:
  static constexpr size_t kSize = 2;
  static constexpr size_t kVectors = 2;

  LoadCodePairs() {
    static const BF16Bytes bytes(Format::Decode);
    for (size_t i = 0; i < 2; ++i) {
      low_[i] = hn::Load(D8(), bytes.low + 64 * i);
      high_[i] = hn::Load(D8(), bytes.high + 64 * i);
    }
    // Interleaving works within 16 bytes: their lower halves become the first vector.
    HWY_ALIGN static constexpr uint64_t kHalves[] = {0, 4, 1, 5, 2, 6, 3, 7};
    halves_ = hn::Load(D64(), kHalves);
  }

  HWY_INLINE Loaded<LoadCodePairs> Load(const uint8_t* p) const {
    const D8 d;
    const hn::Repartition<int8_t, DF> di;
    const auto stored = hn::LoadU(D64(), reinterpret_cast<const uint64_t*>(p));
    const auto code =
        hn::BitCast(d, hn::TableLookupLanes(stored, hn::IndicesFromVec(D64(), halves_)));
    const auto index =
        Format::kTwosComplement ? hn::BitCast(d, hn::Abs(hn::BitCast(di, code))) : code;
    const auto sign = hn::Set(d, uint8_t{0x80});
    const auto low = Lookup(index, low_[0], low_[1]);
    const auto high = hn::OrAnd(Lookup(index, high_[0], high_[1]), code, sign);
    return {{hn::BitCast(DF(), hn::InterleaveLower(d, low, high)),
             hn::BitCast(DF(), hn::InterleaveUpper(d, low, high))}};
  }

 private:
  using D64 = hn::Repartition<uint64_t, DF>;
  hn::Vec<D8> low_[2], high_[2];
  hn::Vec<D64> halves_;
};

struct CodesF8E4M3 {
  static constexpr bool kTwosComplement = false;
  static float Decode(uint32_t code) { return Fp8E4M3::Decode(code); }
};
struct CodesF8E5M2 {
  static constexpr bool kTwosComplement = false;
  static float Decode(uint32_t code) { return Fp8E5M2::Decode(code); }
};
struct CodesI8 {
  static constexpr bool kTwosComplement = true;  // -128 is no code
  static float Decode(uint32_t code) { return static_cast<float>(code); }
};

template <int kTerms>
template <template <class> class Entry>
auto Pairs<kTerms>::ByStorage(DType storage) {
  switch (storage) {
    case DType::kBF16:
      return Entry<LoadPairs<kTerms>>::kValue;
    case DType::kF8E4M3:
      return Entry<LoadCodePairs<kTerms, CodesF8E4M3>>::kValue;
    case DType::kF8E5M2:
      return Entry<LoadCodePairs<kTerms, CodesF8E5M2>>::kValue;
    default:
      return Entry<LoadCodePairs<kTerms, CodesI8>>::kValue;
  }
}

}  // namespace octavo::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif  // OCTAVO_PAIRS

#endif  // per-target include guard
