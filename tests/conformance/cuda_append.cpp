// cuda::Append against reference::Append. Where nothing is computed before the rounding (V always;
// Q and K without norm and rotation) every byte of the pool and every query must be the same.
//
// With norm or rotation, float32 on the device stands against double. The rule: an element whose
// exact value is x must be stored as something between the roundings of x - tolerance and x +
// tolerance, with tolerance = 2^-20 of the largest of its head (16 float32 roundings of a head's
// largest element); a dynamic scale and amax may differ by 2^-20 of themselves.
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <thread>
#include <utility>

#include "attention_cases.h"
#include "cuda_memory.h"
#include "kernels/reference/attention.h"
#include "octavo/attention.h"

namespace octavo::conformance {
namespace {

constexpr double kTolerance = 0x1p-20;

struct Variant {
  AttentionCase c;
  bool norm = false;
  int rotary_dim = 0;   // 0: none
  int chunk = 1 << 20;  // tokens of a sequence per call, behind its cached ones
  bool fp8_queries = false;
  bool outliers = false;  // elements that saturate, infinities and NaN

  bool exact() const { return !norm && rotary_dim == 0; }
  std::string Name() const {
    return "append " + c.Name() + (norm ? " norm" : "") + " rotary " + std::to_string(rotary_dim) +
           " chunk " + std::to_string(chunk) + (fp8_queries ? " fp8 queries" : "") +
           (outliers ? " outliers" : "");
  }
};

double Decode(KvFormat format, const std::byte* p) {
  uint16_t code = 0;
  std::memcpy(&code, p, ElementSize(format));
  switch (format) {
    case KvFormat::kF16:
      return Float16::Decode(code);
    case KvFormat::kBF16:
      return BF16ToFloat(code);
    case KvFormat::kFp8E5M2:
      return Fp8E5M2::Decode(code);
    case KvFormat::kInt8PerTokenHead:
      return static_cast<int8_t>(code);
    default:
      return Fp8E4M3::Decode(code);
  }
}

double Round(KvFormat format, double x) {
  const auto value = static_cast<float>(x);
  switch (format) {
    case KvFormat::kF16:
      return Float16::Decode(Float16::Encode(value));
    case KvFormat::kBF16:
      return BF16ToFloat(FloatToBF16(value));
    case KvFormat::kFp8E5M2:
      return Fp8E5M2::Decode(Fp8E5M2::Encode(value));
    case KvFormat::kInt8PerTokenHead:
      return std::nearbyint(value);
    default:
      return Fp8E4M3::Decode(Fp8E4M3::Encode(value));
  }
}

bool Near(double actual, double expected) {
  return std::abs(actual - expected) <= kTolerance * std::abs(expected);
}

// Whether `codes` may stand for the exact row `x` divided by `scale`.
std::string CheckRow(KvFormat format, const std::byte* codes, const float* x, int head_dim,
                     double scale) {
  double largest = 0;
  for (int d = 0; d < head_dim; ++d) largest = std::max(largest, std::abs(double{x[d]}));
  for (int d = 0; d < head_dim; ++d) {
    const double tolerance = kTolerance * largest;
    const double low = Round(format, (x[d] - tolerance) / scale);
    const double high = Round(format, (x[d] + tolerance) / scale);
    const double actual = Decode(format, codes + d * ElementSize(format));
    if (!(actual >= low && actual <= high)) {
      return "element " + std::to_string(d) + " is " + std::to_string(actual) + ", not " +
             std::to_string(low) + " ... " + std::to_string(high);
    }
  }
  return "";
}

// The same inputs for three sides: the device, the reference in the case's formats, and the
// reference in float32 throughout, which shows the exact values.
class AppendCheck {
 public:
  explicit AppendCheck(const Variant& variant)
      : variant_(variant),
        exact_case_(variant.c),
        pool_(variant.c, Lengths(variant.c)),
        exact_pool_((exact_case_.k_format = exact_case_.v_format = KvFormat::kF32,
                     exact_case_.dtype = DType::kF32, exact_case_),
                    Lengths(variant.c)),
        arena_(pool_.arena().data(), pool_.arena().size()),
        k_scale_(pool_.Layer().k_scale, sizeof(float) * variant.c.kv_heads),
        v_scale_(pool_.Layer().v_scale, sizeof(float) * variant.c.kv_heads),
        saturated_(std::vector<uint64_t>(2)),
        amax_(std::vector<float>(2)) {
    for (int i = 0; i < variant.c.head_dim; ++i)
      norm_.push_back(FloatToBF16(1 + 0.1f * Normal(variant.c.seed, 99, i)));
  }

  // Empty, or what is wrong.
  std::string Run() {
    const AttentionCase& c = variant_.c;
    int longest = 0;
    std::vector<TokenRange> cached;
    for (int s = 0; s < static_cast<int>(c.sequences.size()); ++s) {
      longest = std::max(longest, c.sequences[s].tokens);
      if (c.sequences[s].cached > 0) cached.push_back({s, 0, c.sequences[s].cached});
    }
    if (!cached.empty()) Append(cached);
    for (int begin = 0; begin < longest && failure_.empty(); begin += variant_.chunk) {
      std::vector<TokenRange> ranges;
      for (int s = 0; s < static_cast<int>(c.sequences.size()); ++s) {
        const SequenceCase& sequence = c.sequences[s];
        const int end = std::min(begin + variant_.chunk, sequence.tokens);
        if (begin < end) ranges.push_back({s, sequence.cached + begin, sequence.cached + end});
      }
      Append(ranges);
    }
    if (failure_.empty()) ComparePools();
    return failure_;
  }

 private:
  void Fail(const std::string& what) {
    if (failure_.empty()) failure_ = what;
  }

  void Append(const std::vector<TokenRange>& ranges) {
    const AttentionCase& c = variant_.c;
    const Step step(c, pool_, ranges), exact(exact_case_, exact_pool_, ranges);
    const int tokens = step.view.tokens;
    if (variant_.outliers) {
      const float outliers[] = {464 * 0.01f, 1e3f, -3e38f, INFINITY, -INFINITY,
                                NAN,         0.0f, -0.0f,  -1e-42f,  61440 * 0.008f};
      for (int i = 0; i < 10 && i < tokens; ++i) {
        SetElement(step.k, i * 7 % tokens, 5 * i + 1, outliers[i]);
        SetElement(step.v, i * 5 % tokens, 7 * i + 2, outliers[i]);
      }
    }
    for (int t = 0; t < tokens; ++t) {
      for (auto [from, to] :
           {std::pair{&step.q, &exact.q}, {&step.k, &exact.k}, {&step.v, &exact.v}})
        for (int64_t i = 0; i < from->columns(); ++i) SetElement(*to, t, i, Element(*from, t, i));
    }
    std::vector<float> table(static_cast<size_t>(tokens) * variant_.rotary_dim);
    auto complete = [&](AppendArgs args) {
      if (variant_.norm) {
        args.q_norm = args.k_norm = Tensor(norm_.data(), DType::kBF16, {c.head_dim});
        args.norm_eps = 1e-6f;
        args.norm_offset = 0.5f;
      }
      if (variant_.rotary_dim > 0)
        args.cos_sin = Tensor(table.data(), DType::kF32, {tokens, variant_.rotary_dim});
      return args;
    };
    if (variant_.rotary_dim > 0) {
      std::vector<int32_t> positions(tokens);
      for (int t = 0; t < tokens; ++t) positions[t] = 1000 * t + 7;
      std::vector<float> inv_freq;
      for (int i = 0; i < variant_.rotary_dim; i += 2)
        inv_freq.push_back(std::pow(10000.0f, -static_cast<float>(i) / variant_.rotary_dim));
      reference::RopeTable(
          {.positions = Tensor(positions.data(), DType::kI32, {tokens}),
           .inv_freq = Tensor(inv_freq.data(), DType::kF32, {variant_.rotary_dim / 2}),
           .cos_sin = Tensor(table.data(), DType::kF32, {tokens, variant_.rotary_dim})});
    }
    RunOnDevice(complete(step.Append(pool_)));  // before the reference rotates q in place
    reference::Append(complete(step.Append(pool_)));
    reference::Append(complete(exact.Append(exact_pool_)));
    CompareQueries(step, exact);
    if (!step.intact() || !exact.intact()) Fail("the reference wrote outside its tensors");
  }

  void RunOnDevice(const AppendArgs& args) {
    const AttentionCase& c = variant_.c;
    const int tokens = args.batch->tokens;
    auto upload = [](const Tensor& t) {
      return DeviceBuffer(t.data, static_cast<size_t>(t.rows() * t.row_stride) * SizeOf(t.dtype));
    };
    const DeviceBuffer q = upload(args.q), k = upload(args.k), v = upload(args.v);
    const DeviceBuffer norm(norm_),
        slots(args.batch->slots.data, args.batch->slots.size() * sizeof(int64_t));
    DeviceBuffer cos_sin;
    if (args.cos_sin) cos_sin = upload(args.cos_sin);
    const size_t elements = static_cast<size_t>(tokens) * c.heads() * c.head_dim;
    q_out_ = DeviceBuffer(2 * elements);
    q_fp8_ = DeviceBuffer(elements);
    q_scale_ = DeviceBuffer(sizeof(float) * tokens * c.heads());
    std::vector<uint8_t> fp8_queries(tokens);
    for (int t = 0; t < tokens; ++t) fp8_queries[t] = t % 3 != 0;
    const DeviceBuffer fp8(fp8_queries);
    KvLayer cache = pool_.Layer();
    cache.arena = arena_.as<std::byte>();
    cache.k_scale = k_scale_.as<float>();
    cache.v_scale = v_scale_.as<float>();
    cache.saturated = saturated_.as<uint64_t>();
    cache.amax = amax_.as<float>();
    cuda::AppendCall call{
        .tokens = tokens,
        .heads = c.heads(),
        .input =
            c.dtype == DType::kF32 ? cuda::AppendCall::Input::kF32 : cuda::AppendCall::Input::kBF16,
        .q = q.as<void>(),
        .k = k.as<void>(),
        .v = v.as<void>(),
        .q_stride = args.q.row_stride,
        .k_stride = args.k.row_stride,
        .v_stride = args.v.row_stride,
        .norm_eps = args.norm_eps,
        .norm_offset = args.norm_offset,
        .cos_sin = args.cos_sin ? cos_sin.as<float>() : nullptr,
        .rotary_dim = variant_.rotary_dim,
        .slots = slots.as<int64_t>(),
        .cache = cache,
        .q_out = q_out_.as<void>(),
    };
    if (variant_.norm) call.q_norm = call.k_norm = norm.as<void>();
    if (variant_.fp8_queries) {
      call.fp8_queries = fp8.as<uint8_t>();
      call.q_fp8 = q_fp8_.as<void>();
      call.q_scale = q_scale_.as<float>();
    }
    cuda::Append(call, nullptr);
    OCTAVO_CUDA(cudaDeviceSynchronize());
    for (const DeviceBuffer* buffer : {&q_out_, &q_fp8_, &q_scale_, &arena_, &saturated_, &amax_})
      if (!buffer->intact()) Fail("wrote outside an output");
  }

  void CompareQueries(const Step& step, const Step& exact) {
    const AttentionCase& c = variant_.c;
    const auto out = q_out_.Download(), fp8 = q_fp8_.Download();
    const auto scales = q_scale_.Download<float>();
    for (int t = 0; t < step.view.tokens; ++t) {
      for (int head = 0; head < c.heads(); ++head) {
        const int64_t row = int64_t{t} * c.heads() + head;
        const std::byte* out_row = out.data() + 2 * row * c.head_dim;
        const std::byte* fp8_row = fp8.data() + row * c.head_dim;
        const float* x = exact.q.Row<float>(t) + head * c.head_dim;
        const bool is_fp8 = variant_.fp8_queries && t % 3 != 0;
        double magnitudes = 0;
        for (int d = 0; d < c.head_dim; ++d) magnitudes += std::abs(x[d]);
        std::string wrong;
        if (is_fp8) {
          const float scale = scales[row];
          if (!Near(scale, std::max(magnitudes / 128, 1e-6)))
            wrong =
                "scale " + std::to_string(scale) + " of magnitudes " + std::to_string(magnitudes);
          else
            wrong = CheckRow(KvFormat::kFp8E4M3, fp8_row, x, c.head_dim, scale);
        } else {
          wrong = CheckRow(KvFormat::kBF16, out_row, x, c.head_dim, 1);
          for (int d = 0; variant_.exact() && d < c.head_dim; ++d) {
            uint16_t code;
            std::memcpy(&code, out_row + 2 * d, 2);
            if (code != FloatToBF16(x[d])) wrong = "bfloat16 query is not the nearest";
          }
        }
        const std::byte* untouched = is_fp8 ? out_row : fp8_row;
        for (int i = 0; i < c.head_dim; ++i)
          if (untouched[i] != std::byte{0xFF}) wrong = "wrote a query in the other format";
        if (!wrong.empty())
          return Fail("query, token " + std::to_string(t) + " head " + std::to_string(head) + ": " +
                      wrong);
      }
    }
  }

  // Checks one head's K of one token by the rule above, then lets `actual` be as expected.
  std::string CheckKey(int sequence, int token, int head, std::byte* actual) {
    const KvLayer layer = pool_.Layer();
    const KvLayout& layout = layer.layout;
    const int place = token % kPageSize, size = ElementSize(layout.k_format);
    const int64_t claim = layer.Claim(pool_.page(sequence, token / kPageSize)) - layer.arena;
    const int64_t row = claim + layout.KOffset(head) + int64_t{place} * layout.head_dim * size;
    const int64_t scale_at = claim + layout.KScaleOffset(head) + place * int64_t{sizeof(float)};
    float scale = size > 1 ? 1.0f : layer.k_scale[head];
    if (HasTokenScales(layout.k_format)) {
      float expected;
      std::memcpy(&scale, actual + scale_at, sizeof(float));
      std::memcpy(&expected, layer.arena + scale_at, sizeof(float));
      if (!Near(scale, expected))
        return "scale " + std::to_string(scale) + ", not " + std::to_string(expected);
      std::memcpy(actual + scale_at, layer.arena + scale_at, sizeof(float));
    }
    const KvLayer exact = exact_pool_.Layer();
    const auto* x =
        reinterpret_cast<const float*>(exact.Claim(exact_pool_.page(sequence, token / kPageSize)) +
                                       exact.layout.KOffset(head)) +
        place * layout.head_dim;
    std::string wrong = CheckRow(layout.k_format, actual + row, x, layout.head_dim, scale);
    std::memcpy(actual + row, layer.arena + row, static_cast<size_t>(layout.head_dim) * size);
    return wrong;
  }

  // Where both sides have a NaN, its bits are the machine's choice.
  void EqualiseNaNs(int sequence, int token, int head, std::byte* actual) {
    const KvLayer layer = pool_.Layer();
    const KvLayout& layout = layer.layout;
    const int place = token % kPageSize;
    const int64_t claim = layer.Claim(pool_.page(sequence, token / kPageSize)) - layer.arena;
    auto equalise = [&](int64_t at, KvFormat format) {
      if (std::isnan(Decode(format, layer.arena + at)) && std::isnan(Decode(format, actual + at)))
        std::memcpy(actual + at, layer.arena + at, ElementSize(format));
    };
    for (int d = 0; d < layout.head_dim; ++d) {
      equalise(claim + layout.KOffset(head) +
                   (int64_t{place} * layout.head_dim + d) * ElementSize(layout.k_format),
               layout.k_format);
      equalise(claim + layout.VOffset(head) +
                   (int64_t{d} * kPageSize + VPosition(layout.v_format, place)) *
                       ElementSize(layout.v_format),
               layout.v_format);
    }
    for (auto [format, offset] : {std::pair{layout.k_format, layout.KScaleOffset(head)},
                                  {layout.v_format, layout.VScaleOffset(head)}}) {
      float a, b;
      if (!HasTokenScales(format)) continue;
      const int64_t at = claim + offset + place * int64_t{sizeof(float)};
      std::memcpy(&a, actual + at, sizeof(float));
      std::memcpy(&b, layer.arena + at, sizeof(float));
      if (std::isnan(a) && std::isnan(b)) std::memcpy(actual + at, layer.arena + at, sizeof(float));
    }
  }

  void ComparePools() {
    const AttentionCase& c = variant_.c;
    const std::byte* expected = pool_.arena().data();
    std::vector<std::byte> actual = arena_.Download();
    const std::vector<int> lengths = Lengths(c);
    for (int s = 0; s < static_cast<int>(lengths.size()); ++s) {
      for (int t = 0; t < lengths[s]; ++t) {
        for (int head = 0; head < c.kv_heads; ++head) {
          if (variant_.outliers) EqualiseNaNs(s, t, head, actual.data());
          if (variant_.exact()) continue;
          const std::string wrong = CheckKey(s, t, head, actual.data());
          if (!wrong.empty())
            return Fail("K of sequence " + std::to_string(s) + " token " + std::to_string(t) +
                        " head " + std::to_string(head) + ": " + wrong);
        }
      }
    }
    const auto difference = std::mismatch(actual.begin(), actual.end(), expected).first;
    if (difference != actual.end()) {
      const int64_t at = difference - actual.begin();
      Fail("byte " + std::to_string(at % pool_.page_bytes()) + " of a page of " +
           std::to_string(pool_.page_bytes()) + " is " + std::to_string(int(*difference)) +
           ", not " + std::to_string(int(expected[at])));
    }
    const auto saturated = saturated_.Download<uint64_t>();
    const auto amax = amax_.Download<float>();
    for (int i = 0; i < 2; ++i) {
      if (saturated[i] != pool_.saturated[i])
        Fail("counted " + std::to_string(saturated[i]) + " saturations, not " +
             std::to_string(pool_.saturated[i]));
      if (i == 1 || variant_.exact() ? amax[i] != pool_.amax[i] : !Near(amax[i], pool_.amax[i]))
        Fail("amax " + std::to_string(amax[i]) + ", not " + std::to_string(pool_.amax[i]));
    }
  }

  const Variant variant_;
  AttentionCase exact_case_;
  Pool pool_, exact_pool_;
  DeviceBuffer arena_, k_scale_, v_scale_, saturated_, amax_;
  DeviceBuffer q_out_, q_fp8_, q_scale_;
  std::vector<uint16_t> norm_;
  std::string failure_;
};

std::vector<Variant> Variants(bool quick) {
  using Batch = std::vector<SequenceCase>;
  const Batch starts = {{0, 1}, {0, 64}, {0, 65}, {30, 100}, {63, 2}, {1, 1}, {64, 150}};
  const Batch chunks = {{5, 700}, {63, 40}, {128, 1}, {0, 30}};
  const Batch prompts = {{100, 1}, {0, 1500}, {17, 900}, {63, 1}, {64, 1}};
  constexpr KvFormat kFormats[] = {KvFormat::kF16,
                                   KvFormat::kBF16,
                                   KvFormat::kFp8E4M3,
                                   KvFormat::kFp8E5M2,
                                   KvFormat::kFp8PerTokenHead,
                                   KvFormat::kInt8PerTokenHead};
  std::vector<Variant> variants;
  auto add = [&](Variant v) {
    v.c.seed = 5000 + variants.size();
    variants.push_back(v);
  };
  for (KvFormat k : kFormats) {
    for (KvFormat v : kFormats) {
      if (quick && k != v) continue;
      add({.c = {.k_format = k, .v_format = v, .dtype = DType::kBF16, .sequences = starts},
           .chunk = 64});
    }
    const AttentionCase same{.k_format = k, .v_format = k, .sequences = starts};
    for (int chunk : {1, 7, 1 << 20}) {
      if (!quick || chunk == 7) add({.c = same, .chunk = chunk});
    }
    add({.c = same, .outliers = true});
    for (const Batch& batch : {chunks, prompts}) {
      Variant large{.c = same};
      large.c.sequences = batch;
      large.c.dtype = DType::kBF16;
      if (!quick) add(large);
    }
    for (int head_dim : {64, 128, 256}) {
      for (DType dtype : {DType::kBF16, DType::kF32}) {
        Variant v{.c = same, .fp8_queries = true};
        v.c.head_dim = head_dim;
        v.c.dtype = dtype;
        v.c.group = head_dim == 128 ? 5 : 4;
        v.c.kv_heads = head_dim == 64 ? 3 : 2;
        add(v);
        v.rotary_dim = head_dim;
        if (!quick) add(v);
        v.norm = true;
        add(v);
        v.rotary_dim = head_dim / 4;
        if (!quick) add(v);
      }
    }
  }
  return variants;
}

// Padding rows are not looked at: NaN in them reaches nothing.
std::string CheckPadding() {
  const AttentionCase c{.k_format = KvFormat::kFp8E4M3, .v_format = KvFormat::kFp8PerTokenHead};
  const int tokens = 70;
  const DeviceBuffer x(size_t{4} * tokens * c.heads() * c.head_dim);  // 0xFF: NaN
  const DeviceBuffer slots(std::vector<int64_t>(tokens, -1)), scale(std::vector<float>(2, 1.0f));
  const DeviceBuffer arena(1 << 20), q_out(size_t{2} * tokens * c.heads() * c.head_dim);
  const DeviceBuffer amax(std::vector<float>(2));
  const int64_t stride = int64_t{c.heads()} * c.head_dim;
  cuda::Append({.tokens = tokens,
                .heads = c.heads(),
                .input = cuda::AppendCall::Input::kF32,
                .q = x.as<void>(),
                .k = x.as<void>(),
                .v = x.as<void>(),
                .q_stride = stride,
                .k_stride = stride,
                .v_stride = stride,
                .slots = slots.as<int64_t>(),
                .cache = {.layout = {c.k_format, c.v_format, c.kv_heads, c.head_dim},
                          .arena = arena.as<std::byte>(),
                          .k_scale = scale.as<float>(),
                          .amax = amax.as<float>()},
                .q_out = q_out.as<void>()},
               nullptr);
  OCTAVO_CUDA(cudaDeviceSynchronize());
  for (const DeviceBuffer* buffer : {&arena, &q_out}) {
    for (std::byte b : buffer->Download())
      if (b != std::byte{0xFF}) return "wrote something";
  }
  for (float seen : amax.Download<float>())
    if (seen != 0) return "counted padding";
  return "";
}

}  // namespace

void CheckAppend(bool quick, Tally& tally) {
  // The reference is what takes time, and it has one thread.
  const std::vector<Variant> variants = Variants(quick);
  std::vector<std::string> failures(variants.size());
  std::atomic<size_t> next = 0;
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < std::clamp(std::thread::hardware_concurrency(), 1u, 16u); ++i) {
    threads.emplace_back([&] {
      for (size_t v = next++; v < variants.size(); v = next++)
        failures[v] = AppendCheck(variants[v]).Run();
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (size_t v = 0; v < variants.size(); ++v) tally.Count(variants[v].Name(), failures[v]);
  tally.Count("append of padding", CheckPadding());
}

}  // namespace octavo::conformance
