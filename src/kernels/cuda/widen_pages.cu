#include "kernels/cuda/widen_pages.h"

#include "base/dtype.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/ptx.cuh"

namespace octavo::cuda {
namespace {

constexpr int kBlocksPerMultiprocessor = 8;

// K or V of the cache: addresses in page 0, of kv head 0.
struct Source {
  DType stored;
  bool wide;  // kWide already
  const std::byte* data;
  const float* scales;  // null: none
};
struct KernelParams {
  Source k, v;
  int64_t head_bytes;  // from head to head
  BlockTable block_table;
  const WidenItem* items;
  const PrefillRound* round;
  std::byte* out;
};

// Two elements of a word of four, as float16.
template <DType kStored>
__device__ __forceinline__ uint32_t WidenTwo(uint32_t word, int half) {
  const auto two = static_cast<uint16_t>(word >> (16 * half));
  if constexpr (kStored == DType::kF8E4M3) return WidenE4M3(two);
  if constexpr (kStored == DType::kF8E5M2) return WidenE5M2(two);
  // x + 128 as the low byte of the float16 1024 + ..., less 1152.
  return SubtractF16(__byte_perm(word ^ 0x80808080u, 0x64646464u, half ? 0x4342 : 0x4140),
                     0x64806480u);
}

// A thread's share of a head's K or V of a page: eight elements at a time, so that a warp writes
// 512 bytes in a row.
template <KvFormat kWide, bool kValues, int kHeadDim>
struct Share {
  static constexpr int kEights = 4, kThreads = 64 * kHeadDim / 8 / kEights;
  uint4 stored[kEights];

  static __device__ __forceinline__ int Element(int i) {
    return 8 * (i * kThreads + static_cast<int>(threadIdx.x));
  }

  __device__ __forceinline__ void Load(const Source& source, int64_t offset, bool present) {
    const std::byte* from = source.data + offset;
#pragma unroll
    for (int i = 0; i < kEights; ++i) {
      stored[i] = {};
      if (!present) continue;
      if (source.wide) {
        stored[i] = *reinterpret_cast<const uint4*>(from + 2 * Element(i));
      } else if (kValues) {  // eights that share sixteen bytes: see Pair
        stored[i] = *reinterpret_cast<const uint4*>(from + Element(i) / 16 * 16);
      } else {
        const uint2 eight = *reinterpret_cast<const uint2*>(from + Element(i));
        stored[i] = {eight.x, eight.y, 0, 0};
      }
    }
  }

  // scales: of the page's tokens, or null. A page that is not there is zeros in any format.
  __device__ __forceinline__ void Store(const Source& source, const float* scales, bool present,
                                        std::byte* out) const {
    switch (present ? source.stored : DType::kF16) {
      case DType::kF8E4M3:
        return scales ? Store<DType::kF8E4M3, true>(scales, out)
                      : Store<DType::kF8E4M3, false>(scales, out);
      case DType::kF8E5M2:
        return Store<DType::kF8E5M2, false>(scales, out);
      case DType::kI8:
        return Store<DType::kI8, true>(scales, out);
      default:
#pragma unroll
        for (int i = 0; i < kEights; ++i)
          *reinterpret_cast<uint4*>(out + 2 * Element(i)) = stored[i];
    }
  }

 private:
  // The j-th two of eight elements, as float16. 8-bit V has an order of its own
  // (octavo/kv_layout.h): of sixteen, each word holds two of the first and two of the second eight.
  template <DType kStored>
  __device__ __forceinline__ uint32_t Pair(int i, int j) const {
    const uint32_t words[4] = {stored[i].x, stored[i].y, stored[i].z, stored[i].w};
    return kValues ? WidenTwo<kStored>(words[j], static_cast<int>(threadIdx.x) % 2)
                   : WidenTwo<kStored>(words[j / 2], j % 2);
  }

  template <DType kStored, bool kScaled>
  __device__ __forceinline__ void Store(const float* scales, std::byte* out) const {
#pragma unroll
    for (int i = 0; i < kEights; ++i) {
      const float* scale = scales + (kValues ? Element(i) % kPageSize : Element(i) / kHeadDim);
      float factors[8];
      if constexpr (kScaled && kValues) {
        *reinterpret_cast<float4*>(factors) = *reinterpret_cast<const float4*>(scale);
        *reinterpret_cast<float4*>(factors + 4) = *reinterpret_cast<const float4*>(scale + 4);
      } else {
        const float factor = kScaled ? *scale : 1.0f;
#pragma unroll
        for (float& f : factors) f = factor;
      }
      uint32_t pairs[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t two = Pair<kStored>(i, j);
        if (!kScaled && kWide == KvFormat::kF16) {
          pairs[j] = two;
        } else {
          const float x = LowF16(two) * factors[2 * j], y = HighF16(two) * factors[2 * j + 1];
          pairs[j] = kWide == KvFormat::kBF16 ? PackBF16(x, y) : PackF16(x, y);
        }
      }
      *reinterpret_cast<uint4*>(out + 2 * Element(i)) = {pairs[0], pairs[1], pairs[2], pairs[3]};
    }
  }
};

// A block works on a head of a page at a time.
template <KvFormat kWide, int kHeadDim>
__global__ void __launch_bounds__(2 * kHeadDim)
    widen_kernel(const __grid_constant__ KernelParams p) {
  constexpr int kElements = kPageSize * kHeadDim;
  static_assert(2 * kHeadDim == Share<kWide, false, kHeadDim>::kThreads);
  WaitForInputs();
  const PrefillRound round = *p.round;
  const WidenItem* items = p.items + round.widens.first;
  for (int unit = blockIdx.x; unit < round.widened_pages; unit += gridDim.x) {
    int item = 0;  // the last that begins no later
    for (int end = round.widens.count; end - item > 1;) {
      const int middle = (item + end) / 2;
      (items[middle].to <= unit ? item : end) = middle;
    }
    const WidenItem widen = items[item];
    const int pages = widen.page_end - widen.page_begin;
    const int head = widen.first_kv_head + (unit - widen.to) / pages;
    const int page = widen.page_begin + (unit - widen.to) % pages;
    const uint32_t entry = p.block_table.entries[widen.sequence * p.block_table.stride + page];
    const bool present = entry != kNoPage;
    const int64_t at = int64_t{entry} * kPageUnit + head * p.head_bytes;
    Share<kWide, false, kHeadDim> keys;
    Share<kWide, true, kHeadDim> values;
    keys.Load(p.k, at, present);
    values.Load(p.v, at, present);

    const auto scales = [&](const Source& source) {
      return source.scales ? source.scales + at / 4 : nullptr;
    };
    std::byte* out = p.out + int64_t{unit} * (2 * 2 * kElements);
    keys.Store(p.k, scales(p.k), present, out);
    values.Store(p.v, scales(p.v), present, out + 2 * kElements);
  }
}

template <KvFormat kWide>
auto KernelFor(int head_dim) {
  return head_dim == 64    ? widen_kernel<kWide, 64>
         : head_dim == 128 ? widen_kernel<kWide, 128>
                           : widen_kernel<kWide, 256>;
}

}  // namespace

std::optional<KvFormat> PrefillFormat(KvFormat k, KvFormat v) {
  const bool k_is_wide = ElementSize(k) == 2, v_is_wide = ElementSize(v) == 2;
  if (k_is_wide && v_is_wide && k != v) return std::nullopt;
  return k_is_wide ? k : v_is_wide ? v : KvFormat::kF16;
}

void WidenPages(const WidenParams& params, int multiprocessors, cudaStream_t stream) {
  const KvLayout& layout = params.cache.layout;
  const std::byte* claim = params.cache.Claim(0);
  const auto source = [&](KvFormat format, int64_t offset, int64_t scale_offset) {
    return Source{.stored = StorageDType(format),
                  .wide = ElementSize(format) == 2,
                  .data = claim + offset,
                  .scales = HasTokenScales(format)
                                ? reinterpret_cast<const float*>(claim + scale_offset)
                                : nullptr};
  };
  const KernelParams p{.k = source(layout.k_format, layout.KOffset(0), layout.KScaleOffset(0)),
                       .v = source(layout.v_format, layout.VOffset(0), layout.VScaleOffset(0)),
                       .head_bytes = layout.HeadBytes(),
                       .block_table = params.block_table,
                       .items = params.items,
                       .round = params.round,
                       .out = params.out};
  const auto kernel = params.format == KvFormat::kBF16 ? KernelFor<KvFormat::kBF16>(layout.head_dim)
                                                       : KernelFor<KvFormat::kF16>(layout.head_dim);
  Launch(kernel, dim3(static_cast<unsigned>(kBlocksPerMultiprocessor * multiprocessors)),
         dim3(static_cast<unsigned>(2 * layout.head_dim)), 0, stream, p);
}

}  // namespace octavo::cuda
