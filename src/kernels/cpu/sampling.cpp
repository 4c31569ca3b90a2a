#include "kernels/cpu/sampling.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "base/error.h"
#include "kernels/sampling.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/sampling.cpp"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/cpu/vector_math-inl.h"

#ifndef OCTAVO_KERNELS_CPU_SAMPLING_ONCE
#define OCTAVO_KERNELS_CPU_SAMPLING_ONCE
namespace octavo::cpu {
struct LogitSummary {
  float max = 0;
  bool finite = true;
};
}  // namespace octavo::cpu
#endif

HWY_BEFORE_NAMESPACE();
namespace octavo::cpu {
namespace HWY_NAMESPACE {
namespace {

constexpr size_t kStep = kLanes;

// The lanes of a partial vector are `fill` from n on.
HWY_INLINE V LoadPart(const float* p, size_t n, float fill) {
  return Select(hn::FirstN(FloatTag(), n), LoadN(p, n), Set(fill));
}

// The largest logit that is not NaN, and whether all are finite.
void SummarizeLogits(const float* x, size_t n, LogitSummary* out) {
  V max = Set(-HUGE_VALF), doubt = Zero();  // x - x is 0, or NaN for infinities and NaN
  for (size_t i = 0; i < n; i += kStep) {
    const V v = i + kStep <= n ? Load(x + i) : LoadPart(x + i, n - i, x[0]);
    max = Select(hn::Gt(v, max), v, max);
    doubt = hn::Add(doubt, hn::Sub(v, v));
  }
  out->max = hn::GetLane(hn::MaxOfLanes(FloatTag(), max));
  out->finite = hn::AllTrue(FloatTag(), hn::Eq(doubt, Zero()));
}

// The first index of `value`, or n.
size_t FindValue(const float* x, size_t n, float value) {
  const V wanted = Set(value);
  size_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    if (!hn::AllFalse(FloatTag(), hn::Eq(Load(x + i), wanted))) break;
  }
  while (i < n && !(x[i] == value)) ++i;
  return i;
}

void SoftCapLogits(float* x, size_t n, float cap) {
  const V c = Set(cap);
  for (size_t i = 0; i < n; i += kStep) {
    const bool whole = i + kStep <= n;
    const V v = whole ? Load(x + i) : LoadN(x + i, n - i);
    const V capped = hn::Mul(c, Tanh(hn::Div(v, c)));
    if (whole) {
      Store(capped, x + i);
    } else {
      StoreN(capped, x + i, n - i);
    }
  }
}

void DivideLogits(const float* x, size_t n, float divisor, float* out) {
  const V d = Set(divisor);
  size_t i = 0;
  for (; i + kStep <= n; i += kStep) Store(hn::Div(Load(x + i), d), out + i);
  if (i < n) StoreN(hn::Div(LoadN(x + i, n - i), d), out + i, n - i);
}

// The first index >= i with x[index] >= least, or n.
size_t FindAtLeast(const float* x, size_t i, size_t n, float least) {
  const V l = Set(least);
  for (; i + kStep <= n; i += kStep) {
    if (!hn::AllFalse(FloatTag(), hn::Ge(Load(x + i), l))) break;
  }
  while (i < n && !(x[i] >= least)) ++i;
  return i;
}

// Sum of exp(x - max) over x >= least, added in double; if p, p[i] = exp(x[i] - max), or 0 for x <
// least.
double SumExp(const float* x, size_t n, float max, float least, float* p) {
  const hn::Repartition<double, FloatTag> dd;
  const hn::Half<FloatTag> half;
  const V m = Set(max), l = Set(least);
  auto low = hn::Zero(dd), high = hn::Zero(dd);
  for (size_t i = 0; i < n; i += kStep) {
    const bool whole = i + kStep <= n;
    const V v = whole ? Load(x + i) : LoadPart(x + i, n - i, -HUGE_VALF);
    const V e = hn::IfThenElseZero(hn::Ge(v, l), Exp(hn::Sub(v, m)));
    low = hn::Add(low, hn::PromoteTo(dd, hn::LowerHalf(half, e)));
    high = hn::Add(high, hn::PromoteTo(dd, hn::UpperHalf(half, e)));
    if (p == nullptr) continue;
    if (whole) {
      Store(e, p + i);
    } else {
      StoreN(e, p + i, n - i);
    }
  }
  return hn::GetLane(hn::SumOfLanes(dd, hn::Add(low, high)));
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace octavo::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace octavo::cpu {
namespace {

HWY_EXPORT(SummarizeLogits);
HWY_EXPORT(FindValue);
HWY_EXPORT(FindAtLeast);
HWY_EXPORT(SoftCapLogits);
HWY_EXPORT(DivideLogits);
HWY_EXPORT(SumExp);

constexpr float kInfinity = std::numeric_limits<float>::infinity();

bool Better(const Candidate& a, const Candidate& b) {
  return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
}

LogitSummary Summarize(std::span<const float> x) {
  LogitSummary summary;
  HWY_DYNAMIC_DISPATCH(SummarizeLogits)(x.data(), x.size(), &summary);
  return summary;
}

// The first place of the maximum; 0 where all is NaN.
int32_t ArgMax(std::span<const float> x, float max) {
  const size_t at = HWY_DYNAMIC_DISPATCH(FindValue)(x.data(), x.size(), max);
  return at < x.size() ? static_cast<int32_t>(at) : 0;
}

// Penalises each token of the history once, then adds the biases; worker.adjusted holds their
// logits as they were.
void AdjustLogits(std::span<float> x, const SampleRow& row, SampleWorker& worker) {
  worker.adjusted.clear();
  if (worker.seen.size() * 64 < x.size()) worker.seen.resize((x.size() + 63) / 64);
  const auto first_time = [&](int32_t id) {
    uint64_t& word = worker.seen[id / 64];
    const uint64_t bit = uint64_t{1} << (id % 64);
    if (word & bit) return false;
    word |= bit;
    worker.adjusted.push_back({x[id], id});
    return true;
  };
  if (row.repetition_penalty != 1) {
    for (int32_t id : row.history) {
      if (id < 0 || static_cast<size_t>(id) >= x.size() || !first_time(id)) continue;
      x[id] = Penalize(x[id], row.repetition_penalty);
    }
  }
  for (const LogitBias& bias : row.biases) {
    first_time(bias.id);
    x[bias.id] += bias.add;
  }
  for (const Candidate& c : worker.adjusted) worker.seen[c.id / 64] = 0;
}

// The least float x with x - max >= MinPMargin: comparing with it is comparing with the margin in
// double.
float MinPBound(float max, float min_p) {
  if (min_p <= 0) return -kInfinity;
  const double margin = MinPMargin(min_p);
  const auto kept = [&](float x) { return double{x} - max >= margin; };
  float bound = static_cast<float>(max + margin);
  while (!kept(bound)) bound = std::nextafter(bound, kInfinity);
  for (float below = bound; kept(below); below = std::nextafter(below, -kInfinity)) bound = below;
  return bound;
}

// The best `count` tokens with x >= least, best first.
void KeepBest(std::span<const float> x, float least, size_t count, std::vector<Candidate>& best) {
  const auto shrink = [&] {
    if (best.size() > count) {
      std::nth_element(best.begin(), best.begin() + count - 1, best.end(), Better);
      best.resize(count);
      least = std::nextafter(best.back().logit, kInfinity);  // a later equal has a higher id
    }
  };
  best.clear();
  for (size_t i = 0;; ++i) {
    i = HWY_DYNAMIC_DISPATCH(FindAtLeast)(x.data(), i, x.size(), least);
    if (i >= x.size()) break;
    best.push_back({x[i], static_cast<int32_t>(i)});
    if (best.size() >= 2 * count + 64) shrink();
  }
  shrink();
  std::sort(best.begin(), best.end(), Better);
}

// Shortens `best` to the smallest set whose probability reaches top_p of `total` (in units of
// exp(-max)). False, and whole, if even all of it does not.
bool CutTopP(std::vector<Candidate>& best, float max, float top_p, double total) {
  double sum = 0;
  for (size_t i = 0; i < best.size(); ++i) {
    sum += std::exp(double{best[i].logit} - max);
    if (sum >= top_p * total) {
      best.resize(i + 1);
      return true;
    }
  }
  return false;
}

int32_t RaceCandidates(const std::vector<Candidate>& candidates, const SampleRow& row) {
  double best_score = -std::numeric_limits<double>::infinity();
  int32_t best = candidates[0].id;
  for (const Candidate& c : candidates) {
    const uint32_t word = SampleWords(c.id / 4, row.seed, row.choice, row.token_index)[c.id % 4];
    const double score = RaceScore(c.logit, word);
    if (score > best_score || (score == best_score && c.id < best)) {
      best_score = score;
      best = c.id;
    }
  }
  return best;
}

// All tokens with x >= least. As -log(1 - v) >= v, a token can only win if v <= exp(x - best
// score): one multiplication spares nearly all of them the logarithms.
int32_t RaceAll(std::span<const float> x, float max, float least, const SampleRow& row,
                SampleWorker& worker) {
  const size_t quads = (x.size() + 3) / 4;
  std::vector<float>& p = worker.probabilities;
  p.resize(std::max(p.size(), 4 * quads));
  std::fill(p.begin() + 4 * (quads - 1), p.begin() + 4 * quads, 0.0f);
  HWY_DYNAMIC_DISPATCH(SumExp)(x.data(), x.size(), max, least, p.data());
  double best_score = -std::numeric_limits<double>::infinity();
  double bound = std::numeric_limits<double>::infinity();  // exp(max - best score), and a little
                                                           // for p's rounding
  int32_t best = 0;
  for (size_t quad = 0; quad < quads; ++quad) {
    const float* q = p.data() + 4 * quad;
    const float most = std::max(std::max(q[0], q[1]), std::max(q[2], q[3]));
    if (most == 0 || most * bound < 0x1p-34) continue;  // below the least v
    const std::array<uint32_t, 4> words =
        SampleWords(static_cast<uint32_t>(quad), row.seed, row.choice, row.token_index);
    for (size_t i = 0; i < 4; ++i) {
      if (q[i] == 0 || SampleUniform(words[i]) > q[i] * bound) continue;
      const double score = RaceScore(x[4 * quad + i], words[i]);
      if (score > best_score) {
        best_score = score;
        bound = std::exp(max - score) * 1.0001;
        best = static_cast<int32_t>(4 * quad + i);
      }
    }
  }
  return best;
}

// x: logits after penalty and temperature.
int32_t Draw(std::span<const float> x, const SampleRow& row, SampleWorker& worker) {
  const float max = Summarize(x).max;
  if (!std::isfinite(max)) return ArgMax(x, max);
  const float least = MinPBound(max, row.min_p);
  const bool cut_k = row.top_k > 0 && static_cast<size_t>(row.top_k) < x.size();
  if (!cut_k && row.top_p >= 1) return RaceAll(x, max, least, row, worker);
  std::vector<Candidate>& best = worker.candidates;
  if (cut_k) {
    KeepBest(x, least, row.top_k, best);
    double total = 0;
    for (const Candidate& c : best) total += std::exp(double{c.logit} - max);
    if (row.top_p < 1) CutTopP(best, max, row.top_p, total);
  } else {
    const double total = HWY_DYNAMIC_DISPATCH(SumExp)(x.data(), x.size(), max, least, nullptr);
    // Nearly always the first 256 tokens hold top_p.
    for (size_t count = 256;; count *= 16) {
      KeepBest(x, least, count, best);
      if (CutTopP(best, max, row.top_p, total) || best.size() < count) break;
    }
  }
  return RaceCandidates(best, row);
}

// The logit of `id` before penalty and bias.
float RawLogit(std::span<const float> x, int32_t id, bool adjusted, const SampleWorker& worker) {
  if (adjusted) {
    for (const Candidate& c : worker.adjusted) {
      if (c.id == id) return c.logit;
    }
  }
  return x[id];
}

SampledToken SampleOne(std::span<float> x, float soft_cap, const SampleRow& row,
                       SampleWorker& worker) {
  LogitSummary raw = Summarize(x);
  SampledToken out{.top1 = ArgMax(x, raw.max), .finite = raw.finite};
  if (!raw.finite) {
    out.id = out.top1;
    out.logprob = std::numeric_limits<float>::quiet_NaN();
    return out;
  }
  if (soft_cap > 0) {
    HWY_DYNAMIC_DISPATCH(SoftCapLogits)(x.data(), x.size(), soft_cap);
    raw.max = x[out.top1];  // capping keeps the order
  }
  const double log_sum =
      std::log(HWY_DYNAMIC_DISPATCH(SumExp)(x.data(), x.size(), raw.max, -kInfinity, nullptr));
  const bool adjusted =
      (row.repetition_penalty != 1 && !row.history.empty()) || !row.biases.empty();
  if (adjusted) AdjustLogits(x, row, worker);
  if (row.temperature > kGreedyTemperature) {
    if (worker.scaled.size() < x.size()) worker.scaled.resize(x.size());
    HWY_DYNAMIC_DISPATCH(DivideLogits)(x.data(), x.size(), row.temperature, worker.scaled.data());
    out.id = Draw(std::span(worker.scaled).first(x.size()), row, worker);
  } else {
    out.id = adjusted ? ArgMax(x, Summarize(x).max) : out.top1;
  }
  const float logit = RawLogit(x, row.target >= 0 ? row.target : out.id, adjusted, worker);
  out.logprob = static_cast<float>(double{logit} - raw.max - log_sum);
  return out;
}

}  // namespace

void Sample(const SampleArgs& args, ThreadPool& pool, std::vector<SampleWorker>& workers) {
  const int64_t vocab = args.logits.columns();
  OCTAVO_CHECK(args.logits.dtype == DType::kF32 && vocab > 0, ShapeString(args.logits));
  OCTAVO_CHECK(args.rows.size() == static_cast<size_t>(args.logits.rows()) &&
                   args.out.size() == args.rows.size(),
               ShapeString(args.logits), args.rows.size(), args.out.size());
  for (const SampleRow& row : args.rows) {
    OCTAVO_CHECK(row.target < vocab, row.target, vocab);
    for (const LogitBias& bias : row.biases)
      OCTAVO_CHECK(bias.id >= 0 && bias.id < vocab, bias.id, vocab);
  }
  workers.resize(pool.threads());
  const auto sample = [&](int64_t r, int thread) {
    const std::span<float> logits(args.logits.Row<float>(r), static_cast<size_t>(vocab));
    args.out[r] = SampleOne(logits, args.soft_cap, args.rows[r], workers[thread]);
  };
  pool.ForEach(static_cast<int64_t>(args.rows.size()), std::ref(sample));
}

}  // namespace octavo::cpu
#endif  // HWY_ONCE
