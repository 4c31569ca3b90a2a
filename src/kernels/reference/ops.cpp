#include "kernels/reference/ops.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "base/error.h"
#include "base/float_bits.h"
#include "kernels/mxfp4.h"
#include "kernels/sampling.h"

namespace octavo::reference {
namespace {

double Get(const Tensor& tensor, int64_t row, int64_t column) {
  switch (tensor.dtype) {
    case DType::kF32:
      return tensor.Row<float>(row)[column];
    case DType::kBF16:
      return BF16ToFloat(tensor.Row<uint16_t>(row)[column]);
    case DType::kF16:
      return Float16::Decode(tensor.Row<uint16_t>(row)[column]);
    case DType::kMxfp4: {
      const auto* tile = static_cast<const uint8_t*>(tensor.data) +
                         mxfp4::TileOffset(tensor.columns(), row, column);
      uint32_t word;
      std::memcpy(&word, tile + mxfp4::WordOffset(row, column), sizeof(word));
      const double value = mxfp4::kValues[mxfp4::CodeOfWord(word, column)];
      return std::ldexp(value, tile[mxfp4::ScaleOffset(row, column)] - 127);
    }
    default:
      OCTAVO_CHECK(false, ShapeString(tensor));
      return 0;
  }
}

void Put(const Tensor& tensor, int64_t row, int64_t column, double value, bool accumulate = false) {
  if (accumulate) value += Get(tensor, row, column);
  const float rounded = static_cast<float>(value);
  switch (tensor.dtype) {
    case DType::kF32:
      tensor.Row<float>(row)[column] = rounded;
      return;
    case DType::kBF16:
      tensor.Row<uint16_t>(row)[column] = FloatToBF16(rounded);
      return;
    default:
      OCTAVO_CHECK(false, ShapeString(tensor));
  }
}

double Sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

double Activate(Activation activation, double limit, double gate, double up) {
  switch (activation) {
    case Activation::kSilu:
      return gate / (1 + std::exp(-gate)) * up;
    case Activation::kGeluTanh:
      return 0.5 * gate *
             (1 + std::tanh(std::sqrt(2 / M_PI) * (gate + 0.044715 * gate * gate * gate))) * up;
    case Activation::kSwigluOai:
      break;
  }
  const double g = gate > limit ? limit : gate;
  const double u = up > limit ? limit : up < -limit ? -limit : up;
  return (u + 1) * g * Sigmoid(1.702 * g);
}

// weight[out] . x + bias[out]
double Project(const Tensor& weight, const Tensor& bias, int64_t out,
               const std::vector<double>& x) {
  double sum = 0;
  for (size_t i = 0; i < x.size(); ++i) sum += Get(weight, out, i) * x[i];
  return bias ? sum + Get(bias, 0, out) : sum;
}

std::vector<double> RowOf(const Tensor& tensor, int64_t row) {
  std::vector<double> values(tensor.columns());
  for (int64_t i = 0; i < tensor.columns(); ++i) values[i] = Get(tensor, row, i);
  return values;
}

// NaN above everything, as torch.topk orders it.
bool RanksAbove(double a, double b) { return std::isnan(a) ? !std::isnan(b) : a > b; }

std::vector<double> Softmax(const std::vector<double>& logits) {
  const double max = *std::max_element(logits.begin(), logits.end());
  std::vector<double> p(logits.size());
  for (size_t i = 0; i < p.size(); ++i) p[i] = std::exp(logits[i] - max);
  const double sum = std::accumulate(p.begin(), p.end(), 0.0);
  for (double& x : p) x /= sum;
  return p;
}

}  // namespace

void Gather(const GatherArgs& args) {
  for (int64_t r = 0; r < args.ids.size(); ++r) {
    for (int64_t i = 0; i < args.table.columns(); ++i)
      Put(args.out, r, i, Get(args.table, args.ids.Row<int32_t>(0)[r], i) * args.scale);
  }
}

void Norm(const NormArgs& args) {
  const int64_t columns = args.x.columns();
  for (int64_t r = 0; r < args.x.rows(); ++r) {
    double squares = 0;
    for (int64_t i = 0; i < columns; ++i) squares += Get(args.x, r, i) * Get(args.x, r, i);
    const double scale = 1 / std::sqrt(squares / columns + args.eps);
    for (int64_t i = 0; i < columns; ++i) {
      const double value = Get(args.x, r, i) * scale * (Get(args.weight, 0, i) + args.offset);
      Put(args.out, r, i, value, args.accumulate);
      if (args.rounded) Put(args.rounded, r, i, value);
    }
  }
}

void MatMul(const MatMulArgs& args) {
  for (int64_t r = 0; r < args.x.rows(); ++r) {
    const std::vector<double> x = RowOf(args.x, r);
    for (int64_t o = 0; o < args.weight.rows(); ++o)
      Put(args.out, r, o, Project(args.weight, args.bias, o, x), args.accumulate);
  }
}

void GatedActivation(const GatedActivationArgs& args) {
  for (int64_t r = 0; r < args.gate.rows(); ++r) {
    for (int64_t i = 0; i < args.gate.columns(); ++i) {
      Put(args.out, r, i,
          Activate(args.activation, args.limit, Get(args.gate, r, i), Get(args.up, r, i)));
    }
  }
}

void Route(const RouteArgs& args) {
  for (int64_t r = 0; r < args.logits.rows(); ++r) {
    const std::vector<double> logits = RowOf(args.logits, r);
    std::vector<int32_t> order(logits.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int32_t a, int32_t b) { return RanksAbove(logits[a], logits[b]); });
    order.resize(args.top_k);
    std::sort(order.begin(), order.end());
    std::vector<double> chosen;
    for (int32_t e : order) chosen.push_back(logits[e]);
    std::vector<double> weights;
    if (args.softmax_first && !args.normalize) {
      const std::vector<double> p = Softmax(logits);
      for (int32_t e : order) weights.push_back(p[e]);
    } else {
      weights = Softmax(chosen);  // softmax over all, top-k, divided by its sum, is this too
    }
    for (int k = 0; k < args.top_k; ++k) {
      args.ids.Row<int32_t>(r)[k] = order[k];
      args.weights.Row<float>(r)[k] = static_cast<float>(weights[k]);
    }
  }
}

void Experts(const ExpertsArgs& args) {
  for (int64_t r = 0; r < args.x.rows(); ++r) {
    const std::vector<double> x = RowOf(args.x, r);
    std::vector<double> sum(args.out.columns(), 0.0);
    for (int64_t k = 0; k < args.ids.columns(); ++k) {
      const Expert& expert = args.experts[args.ids.Row<int32_t>(r)[k]];
      std::vector<double> hidden(expert.gate.rows());
      for (int64_t i = 0; i < expert.gate.rows(); ++i) {
        hidden[i] =
            Activate(args.activation, args.limit, Project(expert.gate, expert.gate_bias, i, x),
                     Project(expert.up, expert.up_bias, i, x));
      }
      for (size_t i = 0; i < sum.size(); ++i) {
        sum[i] += args.weights.Row<float>(r)[k] * Project(expert.down, expert.down_bias, i, hidden);
      }
    }
    for (size_t i = 0; i < sum.size(); ++i) Put(args.out, r, i, sum[i], args.accumulate);
  }
}

namespace {

// Lowest id first; NaN never.
int32_t ArgMax(const std::vector<float>& x) {
  int32_t best = -1;
  for (size_t i = 0; i < x.size(); ++i) {
    if (!std::isnan(x[i]) && (best < 0 || x[i] > x[best])) best = static_cast<int32_t>(i);
  }
  return std::max(best, 0);
}

double LogProb(const std::vector<float>& logits, int32_t id) {
  const double max = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (float x : logits) sum += std::exp(x - max);
  return logits[id] - max - std::log(sum);
}

// Token ids that min_p, then top_k, then top_p leave, best first.
std::vector<int32_t> Kept(const std::vector<float>& logits, const SampleRow& row) {
  std::vector<int32_t> ids(logits.size());
  std::iota(ids.begin(), ids.end(), 0);
  std::stable_sort(ids.begin(), ids.end(),
                   [&](int32_t a, int32_t b) { return logits[a] > logits[b]; });
  const double max = logits[ids[0]];
  if (row.min_p > 0) {
    std::erase_if(ids, [&](int32_t id) { return logits[id] - max < MinPMargin(row.min_p); });
  }
  if (row.top_k > 0 && ids.size() > static_cast<size_t>(row.top_k)) ids.resize(row.top_k);
  if (row.top_p < 1) {
    double total = 0, sum = 0;
    for (int32_t id : ids) total += std::exp(logits[id] - max);
    size_t count = 0;
    do {
      sum += std::exp(logits[ids[count++]] - max);
    } while (count < ids.size() && sum < row.top_p * total);
    ids.resize(count);
  }
  return ids;
}

int32_t Choose(std::vector<float> logits, const SampleRow& row) {
  std::vector<bool> seen(logits.size());
  for (int32_t id : row.history) {
    if (id < 0 || id >= static_cast<int32_t>(logits.size()) || seen[id]) continue;
    seen[id] = true;
    logits[id] = Penalize(logits[id], row.repetition_penalty);
  }
  for (const LogitBias& bias : row.biases) logits[bias.id] += bias.add;
  if (row.temperature <= kGreedyTemperature) return ArgMax(logits);
  for (float& x : logits) x /= row.temperature;
  int32_t best = ArgMax(logits);
  if (!std::isfinite(logits[best])) return best;
  double best_score = -std::numeric_limits<double>::infinity();
  for (int32_t id : Kept(logits, row)) {
    const uint32_t word = SampleWords(id / 4, row.seed, row.choice, row.token_index)[id % 4];
    const double score = RaceScore(logits[id], word);
    if (score > best_score || (score == best_score && id < best)) {
      best_score = score;
      best = id;
    }
  }
  return best;
}

}  // namespace

void Sample(const SampleArgs& args) {
  for (size_t r = 0; r < args.rows.size(); ++r) {
    const SampleRow& row = args.rows[r];
    std::vector<float> logits(args.logits.Row<float>(r),
                              args.logits.Row<float>(r) + args.logits.columns());
    SampledToken& out = args.out[r];
    out = {.top1 = ArgMax(logits), .finite = std::all_of(logits.begin(), logits.end(), [](float x) {
                                     return std::isfinite(x);
                                   })};
    if (!out.finite) {
      out.id = out.top1;
      out.logprob = std::numeric_limits<float>::quiet_NaN();
      continue;
    }
    if (args.soft_cap > 0) {
      for (float& x : logits)
        x = static_cast<float>(args.soft_cap * std::tanh(double{x} / args.soft_cap));
    }
    const bool adjusted =
        (row.repetition_penalty != 1 && !row.history.empty()) || !row.biases.empty();
    const bool greedy = row.temperature <= kGreedyTemperature;
    out.id = greedy && !adjusted ? out.top1 : Choose(logits, row);
    out.logprob = static_cast<float>(LogProb(logits, row.target >= 0 ? row.target : out.id));
  }
}

}  // namespace octavo::reference
