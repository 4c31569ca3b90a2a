// The CUDA ops but attention and append against the reference in double precision: random input,
// rows with gaps between them, outputs that start as a pattern, everything outside of them
// untouched.
#include <cmath>
#include <cstring>
#include <functional>
#include <random>

#include "base/float_bits.h"
#include "cuda_memory.h"
#include "kernels/cuda/ops.h"
#include "kernels/mxfp4_testing.h"
#include "kernels/reference/attention.h"
#include "kernels/reference/ops.h"

namespace octavo::conformance {
namespace {

constexpr unsigned char kPattern = 0xA5;
constexpr DType kF32 = DType::kF32, kBF16 = DType::kBF16, kI32 = DType::kI32;

// A matrix on the host and its double on the device, rows `gap` elements apart.
class Matrix {
 public:
  Matrix() = default;
  Matrix(DType dtype, int64_t rows, int64_t columns, int64_t gap = 0)
      : host_(rows * (columns + gap) * SizeOf(dtype), kPattern) {
    tensor_ = Tensor(nullptr, dtype, {rows, columns});
    tensor_.row_stride = columns + gap;
  }
  Matrix& Fill(std::mt19937& random, double deviation) {
    std::normal_distribution<double> normal(0, deviation);
    for (int64_t r = 0; r < tensor_.rows(); ++r) {
      for (int64_t c = 0; c < tensor_.columns(); ++c) Put(r, c, normal(random));
    }
    return *this;
  }
  void Put(int64_t r, int64_t c, double value) {
    const Tensor t = Host();
    if (t.dtype == kF32)
      t.Row<float>(r)[c] = static_cast<float>(value);
    else if (t.dtype == kBF16)
      t.Row<uint16_t>(r)[c] = FloatToBF16(static_cast<float>(value));
    else
      t.Row<int32_t>(r)[c] = static_cast<int32_t>(value);
  }
  double Get(int64_t r, int64_t c) const {
    const Tensor t = Host();
    if (t.dtype == kF32) return t.Row<float>(r)[c];
    if (t.dtype == kBF16) return BF16ToFloat(t.Row<uint16_t>(r)[c]);
    return t.Row<int32_t>(r)[c];
  }
  Tensor Host() const {
    Tensor t = tensor_;
    t.data = const_cast<unsigned char*>(host_.data());
    return t;
  }
  Tensor Device() {
    if (device_.size() == 0) device_ = DeviceBuffer(host_.data(), host_.size());
    Tensor t = tensor_;
    t.data = device_.as<std::byte>();
    return t;
  }
  // What the device holds now; the gaps must be as they were. Empty, or what is wrong.
  std::string Fetch(Matrix& to) const {
    to.tensor_ = tensor_;
    to.host_ = device_.Download<unsigned char>();
    if (!device_.intact()) return "wrote outside";
    const size_t element = SizeOf(tensor_.dtype);
    for (int64_t r = 0; r < tensor_.rows(); ++r) {
      const unsigned char* row = to.host_.data() + r * tensor_.row_stride * element;
      for (size_t i = tensor_.columns() * element; i < tensor_.row_stride * element; ++i) {
        if (row[i] != host_[row - to.host_.data() + i]) return "wrote between rows";
      }
    }
    return "";
  }

 private:
  Tensor tensor_;
  std::vector<unsigned char> host_;
  DeviceBuffer device_;
};

// Relative to the root mean square of what is wanted. The step of a bfloat16 in [2^e, 2^(e+1)) is
// 2^(e-7), its rounding error 1 / sqrt(12) of that in the mean, and 2^e beside a value 0.74 in the
// mean over mantissas: 1.7e-3. Half as much again for small outputs.
double Limit(DType out) { return out == kBF16 ? 1.5 * 0.74 * 0x1p-7 / std::sqrt(12.0) : 3e-6; }

// Of rows [begin, end); end -1: all.
std::string Differ(const Matrix& got, const Matrix& want, double limit, int64_t begin = 0,
                   int64_t end = -1) {
  double error = 0, norm = 0;
  const Tensor t = want.Host();
  for (int64_t r = begin; r < (end < 0 ? t.rows() : end); ++r) {
    for (int64_t c = 0; c < t.columns(); ++c) {
      error += std::pow(got.Get(r, c) - want.Get(r, c), 2);
      norm += std::pow(want.Get(r, c), 2);
    }
  }
  const double relative = std::sqrt(error / std::max(norm, 1e-30));
  if (relative <= limit) return "";  // NaN is not
  return "relative L2 " + std::to_string(relative) + ", limit " + std::to_string(limit);
}

class Ops {
 public:
  Ops(bool quick, Tally& tally) : quick_(quick), tally_(tally) {}

  void Run() {
    Gathers();
    Norms();
    Activations();
    RopeTables();
    Routes();
    RouteOrder();
    MatMuls();
    GatedProjects();
    Mixtures();
    Samples();
  }

 private:
  Matrix Random(DType dtype, int64_t rows, int64_t columns, double deviation = 1, int64_t gap = 0) {
    Matrix m(dtype, rows, columns, gap);
    m.Fill(random_, deviation);
    return m;
  }
  Matrix Ids(const std::vector<int32_t>& ids) {
    Matrix m(kI32, 1, std::ssize(ids));
    for (size_t i = 0; i < ids.size(); ++i) m.Put(0, static_cast<int64_t>(i), ids[i]);
    return m;
  }
  static Tensor Flat(Tensor t) { return Tensor(t.data, t.dtype, {t.columns()}); }

  // Compares what the device left in `out` with what the reference leaves in its host copy.
  void Compare(const std::string& name, Matrix& out, const std::function<void()>& device,
               const std::function<void()>& reference, double limit) {
    Matrix got;
    out.Device();
    device();
    OCTAVO_CUDA(cudaDeviceSynchronize());
    std::string failure = out.Fetch(got);
    reference();
    if (failure.empty()) failure = Differ(got, out, limit);
    tally_.Count(name, failure);
  }
  // The same of another output of the same ops.
  void Same(const std::string& name, Matrix& out, double limit) {
    Matrix got;
    std::string failure = out.Fetch(got);
    if (failure.empty()) failure = Differ(got, out, limit);
    tally_.Count(name, failure);
  }
  static std::string Shape(const Matrix& m) { return ShapeString(m.Host()); }

  void Gathers() {
    for (DType from : {kF32, kBF16}) {
      for (DType to : {kF32, kBF16}) {
        for (int64_t columns : {64, 2880, 4096}) {
          Matrix table = Random(from, 50, columns, 1, 8), ids = Ids({49, 0, 7, 7, 21});
          Matrix out(to, 5, columns, 16);
          Compare(
              "gather " + Shape(table) + " to " + Name(to), out,
              [&] {
                cuda::Gather({table.Device(), Flat(ids.Device()), 59.75f, out.Device()}, nullptr);
              },
              [&] {
                reference::Gather({table.Host(), Flat(ids.Host()), 59.75f, out.Host()});
              },
              Limit(to));
        }
      }
    }
  }

  void Norms() {
    for (int64_t columns : {64, 256, 2880, 4096, 12288}) {
      for (int64_t rows : {1, 37}) {
        for (DType to : {kF32, kBF16}) NormCase(rows, columns, to, false);
        NormCase(rows, columns, kF32, true);
        for (int owed : {1, 4, 6}) NormCase(rows, columns, kBF16, false, owed);
      }
    }
  }
  // Each row of x is owed so many terms.
  void NormCase(int64_t rows, int64_t columns, DType to, bool accumulate, int owed = 0) {
    Matrix x = Random(kF32, rows, columns, 3, 8), weight = Random(kBF16, 1, columns);
    Matrix terms = Random(kF32, rows * owed, columns);
    Matrix out = Random(to, rows, columns, 2, 8), rounded(kBF16, rows, columns, 8);
    const auto args = [&](auto side) {
      return NormArgs{.x = side(x),
                      .weight = Flat(side(weight)),
                      .eps = 1e-5f,
                      .offset = rows == 1 ? 1.0f : 0.0f,
                      .out = side(out),
                      .rounded = to == kF32 && !accumulate ? side(rounded) : Tensor(),
                      .accumulate = accumulate};
    };
    const std::string name = "norm " + Shape(x) + " to " + Name(to) +
                             (accumulate ? ", added" : "") +
                             (owed > 0 ? ", owed " + std::to_string(owed) : "");
    Compare(
        name, out,
        [&] {
          cuda::Owed some;
          if (owed > 0) some = {terms.Device().Row<float>(0), owed, x.Device(), true};
          cuda::Norm(args([](Matrix& m) { return m.Device(); }), nullptr, some);
        },
        [&] {
          for (int64_t r = 0; r < rows * owed; ++r) {
            for (int64_t c = 0; c < columns; ++c)
              x.Put(r / owed, c, x.Get(r / owed, c) + terms.Get(r, c));
          }
          reference::Norm(args([](Matrix& m) { return m.Host(); }));
        },
        Limit(to));
    if (owed > 0) Same(name + ", paid", x, Limit(kF32));
    if (!args([](Matrix& m) { return m.Host(); }).rounded) return;
    Same(name + ", rounded", rounded, Limit(kBF16));
  }

  void Activations() {
    for (Activation activation :
         {Activation::kSilu, Activation::kGeluTanh, Activation::kSwigluOai}) {
      for (DType t : {kF32, kBF16}) {
        for (int64_t columns : {48, 14336}) {
          Matrix both = Random(t, 9, 2 * columns, 4), out(t, 9, columns, 8);
          const auto args = [&](auto side) {
            return GatedActivationArgs{.activation = activation,
                                       .limit = 7,
                                       .gate = side(both).Columns(0, columns),
                                       .up = side(both).Columns(columns, 2 * columns),
                                       .out = side(out)};
          };
          Compare(
              "activation " + std::to_string(int(activation)) + " " + Shape(out), out,
              [&] { cuda::GatedActivation(args([](Matrix& m) { return m.Device(); }), nullptr); },
              [&] { reference::GatedActivation(args([](Matrix& m) { return m.Host(); })); },
              Limit(t));
        }
      }
    }
  }

  void RopeTables() {
    for (int pairs : {32, 64, 128}) {
      Matrix positions = Ids({0, 1, 1000, 131071, 1000003}), inv_freq(kF32, 1, pairs),
             out(kF32, 5, 2 * pairs);
      for (int i = 0; i < pairs; ++i) inv_freq.Put(0, i, std::pow(5e5, -double(i) / pairs));
      Compare(
          "rope table " + Shape(out), out,
          [&] {
            cuda::RopeTable({Flat(positions.Device()), Flat(inv_freq.Device()), 1.3f, out.Device()},
                            nullptr);
          },
          [&] {
            reference::RopeTable({Flat(positions.Host()), Flat(inv_freq.Host()), 1.3f, out.Host()});
          },
          2e-7);
    }
  }

  void Routes() {
    for (const auto& [experts, top_k] : {std::pair{4, 2}, {32, 4}, {128, 8}, {60, 6}, {200, 7}}) {
      for (const bool softmax_first : {true, false}) {
        for (const bool normalize : {true, false}) {
          Matrix logits = Random(kF32, 131, experts, 2, 4);
          for (int r = 0; r < 20; ++r) logits.Put(r, r % experts, logits.Get(r, 0));  // ties
          Matrix ids(kI32, 131, top_k), weights(kF32, 131, top_k);
          const auto args = [&](auto side) {
            return RouteArgs{.logits = side(logits),
                             .top_k = top_k,
                             .softmax_first = softmax_first,
                             .normalize = normalize,
                             .ids = side(ids),
                             .weights = side(weights)};
          };
          ids.Device();
          const std::string name = "route " + Shape(logits) + " top " + std::to_string(top_k);
          Compare(
              name, weights,
              [&] { cuda::Route(args([](Matrix& m) { return m.Device(); }), nullptr); },
              [&] { reference::Route(args([](Matrix& m) { return m.Host(); })); }, 1e-6);
          Same(name + ", ids", ids, 0);
        }
      }
    }
  }

  // NaN ranks above everything, the two zeros as equals.
  void RouteOrder() {
    Matrix logits = Random(kF32, 3, 60, 2, 4), ids(kI32, 3, 4), weights(kF32, 3, 4);
    for (int column : {50, 3}) logits.Put(0, column, NAN);
    logits.Put(1, 7, INFINITY);
    for (int column = 0; column < 60; ++column) logits.Put(2, column, column % 2 ? 0.0 : -0.0);
    cuda::Route(
        {.logits = logits.Device(), .top_k = 4, .ids = ids.Device(), .weights = weights.Device()},
        nullptr);
    OCTAVO_CUDA(cudaDeviceSynchronize());
    reference::Route(
        {.logits = logits.Host(), .top_k = 4, .ids = ids.Host(), .weights = weights.Host()});
    Same("route of NaN, infinity and zeros, ids", ids, 0);
  }

  void MatMuls() {
    for (int64_t rows : {1, 2, 7, 8, 9, 16, 17, 33, 257}) {
      for (const auto& [k, outs] :
           {std::pair{64, 8}, {256, 100}, {768, 264}, {2880, 513}, {8, 16}}) {
        if (quick_ && (rows > 17 || k > 768)) continue;
        for (DType to : {kF32, kBF16}) {
          // Of odd numbers of outputs only vocabularies have many rows, and those are float32.
          if (rows > 16 && outs % 8 != 0 && to == kBF16) continue;
          MatMulCase(rows, k, {outs}, to, rows % 2 == 1);
        }
      }
      MatMulCase(rows, 2880, {32}, kF32, true, kF32);
      MatMulCase(rows, 200, {5}, kF32, false, kF32);
      MatMulCase(rows, 128, {256, 64, 64}, kF32, true);
      MatMulCase(rows, 256, {512, 512}, kBF16, false);
    }
    // More blocks than two for each multiprocessor, up to 8 rows: a kernel of its own.
    for (int64_t rows : {1, 3, 8}) {
      MatMulCase(rows, 200, {5000}, kBF16, true);
      MatMulCase(rows, 2880, {4096, 512, 512}, kF32, false);
    }
    MatMulCase(1, 14336, {4096}, kF32, false);
    MatMulCase(16, 4096, {4096, 1024, 1024}, kF32, false);
  }
  // Outputs are column slices of one matrix, weights slices of one too.
  void MatMulCase(int64_t rows, int64_t k, const std::vector<int64_t>& outs, DType to, bool bias,
                  DType from = kBF16) {
    int64_t all = 0;
    for (int64_t n : outs) all += n;
    Matrix x = Random(from, rows, k, 1, 8), weight = Random(kBF16, all, k),
           biases = Random(to, 1, all, std::sqrt(static_cast<double>(k))),
           out = Random(to, rows, all, std::sqrt(static_cast<double>(k)), 16 - all % 8);
    const bool accumulate = to == kF32 && random_() % 2 == 0;
    const auto parts = [&](auto side) {
      std::vector<Projection> list;
      int64_t begin = 0;
      for (int64_t n : outs) {
        list.push_back({side(weight).Rows(begin, begin + n),
                        bias ? Flat(side(biases).Columns(begin, begin + n)) : Tensor(),
                        side(out).Columns(begin, begin + n)});
        begin += n;
      }
      return list;
    };
    Compare(
        "matmul " + Shape(x) + " x " + Shape(weight) + (bias ? " + bias" : "") + " to " + Name(to) +
            (accumulate ? ", added" : ""),
        out,
        [&] {
          matmuls_.Project(x.Device(), parts([](Matrix& m) { return m.Device(); }), nullptr,
                           accumulate);
        },
        [&] {
          for (const Projection& p : parts([](Matrix& m) { return m.Host(); }))
            reference::MatMul({x.Host(), p.weight, p.bias, p.out, accumulate});
        },
        // x as two bfloat16 is off by 2^-17. Tensor cores cut each of their sums of 16 products,
        // and cuBLASLt, which has more than 8 rows, does not divide k among warps.
        from == kF32                         ? 2e-5
        : to == kF32 && rows > 8 && k > 2880 ? 3e-6 * static_cast<double>(k) / 2880
                                             : Limit(to));
  }

  void GatedProjects() {
    for (Activation activation :
         {Activation::kSilu, Activation::kGeluTanh, Activation::kSwigluOai}) {
      for (int64_t rows : {1, 3, 8}) {
        for (const auto& [k, columns] : {std::pair{64, 48}, {200, 72}, {4096, 1000}}) {
          const bool bias = rows == 3;
          Matrix x = Random(kBF16, rows, k, 1, 8), weight = Random(kBF16, 2 * columns, k),
                 biases = Random(kBF16, 1, 2 * columns, std::sqrt(static_cast<double>(k))),
                 exact(kF32, rows, 2 * columns), out(kBF16, rows, columns, 8);
          const auto projection = [&](auto side, int64_t begin, Tensor to) {
            return Projection{side(weight).Rows(begin, begin + columns),
                              bias ? Flat(side(biases).Columns(begin, begin + columns)) : Tensor(),
                              to.Columns(begin, begin + columns)};
          };
          const auto host = [](Matrix& m) { return m.Host(); };
          const auto device = [](Matrix& m) { return m.Device(); };
          const auto args = [&](Tensor to) {
            return GatedActivationArgs{.activation = activation,
                                       .limit = 7,
                                       .gate = exact.Host().Columns(0, columns),
                                       .up = exact.Host().Columns(columns, 2 * columns),
                                       .out = to};
          };
          Compare(
              "gated projection " + std::to_string(int(activation)) + " " + Shape(x) + " x " +
                  Shape(weight),
              out,
              [&] {
                const Tensor to = exact.Device();
                cuda::GatedProject(x.Device(), projection(device, 0, to),
                                   projection(device, columns, to), args(out.Device()), nullptr);
              },
              [&] {
                for (int64_t begin : {int64_t{0}, int64_t{columns}}) {
                  const Projection p = projection(host, begin, exact.Host());
                  reference::MatMul({x.Host(), p.weight, p.bias, p.out});
                }
                reference::GatedActivation(args(out.Host()));
              },
              Limit(kBF16));
        }
      }
    }
  }

  // Up to 8 rows and 64 pairs, and more, are different kernels.
  void Mixtures() {
    Mxfp4Mixtures();
    for (int64_t rows : {1, 3, 8, 9, 32, 33, 40, 300}) {
      MixtureCase({.rows = rows, .experts = 4, .top_k = 2, .hidden = 64, .inner = 48});
      if (quick_) continue;
      MixtureCase(
          {.rows = rows, .experts = 32, .top_k = 4, .hidden = 256, .inner = 128, .bias = true});
      MixtureCase({.rows = rows, .experts = 128, .top_k = 8, .hidden = 200, .inner = 72});
    }
    if (quick_) return;
    MixtureCase({.rows = 3, .experts = 160, .top_k = 8, .hidden = 64, .inner = 48});
    for (int64_t rows : {5, 1500}) {
      MixtureCase(
          {.rows = rows, .experts = 5, .top_k = 3, .hidden = 2880, .inner = 2880, .bias = true});
      MixtureCase({.rows = rows, .experts = 16, .top_k = 4, .hidden = 2048, .inner = 768});
    }
  }
  // Of whole and half tiles, small and the largest scales, one expert, all that there are, some
  // that no row chooses, one that every row chooses (several narrow tiles).
  void Mxfp4Mixtures() {
    for (int64_t rows : {1, 2, 3, 4, 5, 6, 7, 8, 9, 33, 64, 65, 129, 300}) {
      const Mixture some{.rows = rows, .experts = 4, .top_k = 2, .hidden = 64, .inner = 32};
      MixtureCase(some, DType::kMxfp4);
      if (quick_) continue;
      MixtureCase({.rows = rows, .experts = 1, .top_k = 1, .hidden = 96, .inner = 288},
                  DType::kMxfp4);
      MixtureCase(
          {.rows = rows, .experts = 32, .top_k = 4, .hidden = 256, .inner = 160, .bias = true},
          DType::kMxfp4);
      MixtureCase({.rows = rows, .experts = 8, .top_k = 8, .hidden = 1056, .inner = 64},
                  DType::kMxfp4);
    }
    MixtureCase({.rows = 70,
                 .experts = 32,
                 .top_k = 4,
                 .hidden = 128,
                 .inner = 96,
                 .bias = true,
                 .popular = true},
                DType::kMxfp4);
    if (quick_) return;
    for (int64_t rows : {4, 70}) {
      for (double deviation : {1e-5, 4.0}) {
        MixtureCase({.rows = rows,
                     .experts = 4,
                     .top_k = 2,
                     .hidden = 128,
                     .inner = 128,
                     .deviation = deviation},
                    DType::kMxfp4);
      }
    }
    MixtureCase({.rows = 1, .experts = 6, .top_k = 4, .hidden = 2880, .inner = 2880, .bias = true},
                DType::kMxfp4);
    MixtureCase(
        {.rows = 1500, .experts = 5, .top_k = 3, .hidden = 2880, .inner = 704, .bias = true},
        DType::kMxfp4);
  }
  struct Mixture {
    int64_t rows;
    int experts, top_k;
    int64_t hidden, inner;
    bool bias = false;
    double deviation = 0;  // of the weights; 0: 1 / sqrt(hidden)
    bool popular = false;  // expert 1
  };
  // Of many rows, the reference does only the first and the last four.
  void MixtureCase(const Mixture& mixture, DType weight_type = kBF16) {
    for (const bool accumulate : {false, true}) MixtureCase(mixture, weight_type, accumulate);
  }
  void MixtureCase(const Mixture& mixture, DType weight_type, bool accumulate) {
    const auto& [rows, experts, top_k, hidden, inner, bias, given_deviation, popular] = mixture;
    Matrix x = Random(kBF16, rows, hidden);
    Matrix ids(kI32, rows, top_k), weights(kF32, rows, top_k);
    Matrix logits = Random(kF32, rows, experts);
    for (int64_t r = 0; popular && r < rows; ++r) logits.Put(r, 1, 9);
    reference::Route({.logits = logits.Host(),
                      .top_k = top_k,
                      .softmax_first = bias,
                      .normalize = rows % 2 == 1,
                      .ids = ids.Host(),
                      .weights = weights.Host()});
    const double deviation =
        given_deviation > 0 ? given_deviation : 1 / std::sqrt(static_cast<double>(hidden));
    Matrix matrices = weight_type == kBF16 ? Random(kBF16, experts * 3, inner * hidden, deviation)
                                           : Mxfp4Matrices(experts, hidden, inner, deviation);
    Matrix biases = Random(kBF16, experts, 2 * inner + hidden, 0.1);
    Matrix out = Random(kF32, rows, hidden, 1, 8);
    const auto list = [&](auto side) {
      std::vector<Expert> all;
      for (int64_t e = 0; e < experts; ++e) {
        const auto matrix = [&](int64_t i, int64_t outs, int64_t in) {
          const Tensor row = side(matrices).Rows(3 * e + i, 3 * e + i + 1);
          return Tensor(row.data, weight_type, {outs, in});
        };
        const auto part = [&](int64_t begin, int64_t size) {
          return bias ? Tensor(side(biases).template Row<uint16_t>(e) + begin, kBF16, {size})
                      : Tensor();
        };
        all.push_back({matrix(0, inner, hidden), matrix(1, inner, hidden), matrix(2, hidden, inner),
                       part(0, inner), part(inner, inner), part(2 * inner, hidden)});
      }
      return all;
    };
    cuda::Experts op({.rows = static_cast<int>(rows),
                      .experts = experts,
                      .top_k = top_k,
                      .hidden = hidden,
                      .intermediate = inner});
    const auto run = [&](auto side, int64_t begin, int64_t end, const auto& f) {
      const std::vector<Expert> all = list(side);
      f(ExpertsArgs{.x = side(x).Rows(begin, end),
                    .ids = side(ids).Rows(begin, end),
                    .weights = side(weights).Rows(begin, end),
                    .experts = all,
                    .activation = bias ? Activation::kSwigluOai : Activation::kSilu,
                    .limit = 7,
                    .out = side(out).Rows(begin, end),
                    .accumulate = accumulate});
    };
    Matrix got;
    const auto device = [](Matrix& m) { return m.Device(); };
    const auto host = [](Matrix& m) { return m.Host(); };
    run(device, 0, rows,
        [&](const ExpertsArgs& args) { cuda::Settle(op.Run(args, nullptr), nullptr); });
    OCTAVO_CUDA(cudaDeviceSynchronize());
    std::string failure = out.Fetch(got);
    const int64_t checked =
        rows * top_k * hidden * inner < 20'000'000 ? rows : std::min<int64_t>(rows, 4);
    for (const int64_t begin : {int64_t{0}, std::max(checked, rows - checked)}) {
      const int64_t end = std::min(begin + checked, rows);
      if (begin == end) break;
      run(host, begin, end, reference::Experts);
      // Values between the two products are bfloat16. Of few, errors do not average out: of 3000
      // random mixtures with 192 such values the worst was 1.5 times the limit of many.
      const double values = static_cast<double>((end - begin) * top_k * inner);
      const double limit = Limit(kBF16) * (1 + 8 / std::sqrt(values));
      if (failure.empty()) failure = Differ(got, out, limit, begin, end);
    }
    tally_.Count("experts " + Shape(x) + " of " + std::to_string(experts) + " top " +
                     std::to_string(top_k) + ", intermediate " + std::to_string(inner) + ", " +
                     Name(weight_type) + (accumulate ? ", added" : ""),
                 failure);
  }

  // Gate, up and down of each expert, a row each.
  Matrix Mxfp4Matrices(int experts, int64_t hidden, int64_t inner, double deviation) {
    const int64_t bytes = std::max(mxfp4::Bytes(inner, hidden), mxfp4::Bytes(hidden, inner));
    Matrix matrices(DType::kU8, 3 * experts, bytes);
    for (int i = 0; i < 3 * experts; ++i) {
      const bool down = i % 3 == 2;
      const std::vector<uint8_t> matrix =
          mxfp4::RandomMatrix(down ? hidden : inner, down ? inner : hidden, deviation, random_);
      std::copy(matrix.begin(), matrix.end(), matrices.Host().Row<uint8_t>(i));
    }
    return matrices;
  }

  void Samples() {
    for (const int64_t vocab : {256, 1003, 32000, 262208}) {
      if (quick_ && vocab > 1003) continue;
      SampleCase(vocab, 0);
      SampleCase(vocab, 30);
    }
  }
  void SampleCase(int64_t vocab, float soft_cap) {
    std::vector<int32_t> history;
    for (int i = 0; i < 300; ++i) history.push_back(static_cast<int32_t>(random_() % vocab));
    const std::vector<LogitBias> biases = {{3, 5.0f}, {7, -INFINITY}, {11, 0.5f}};
    std::vector<SampleRow> rows;
    for (const float temperature : {0.0f, 0.7f, 1.5f}) {
      for (const int top_k : {0, 1, 50}) {
        for (const float top_p : {1.0f, 0.9f}) {
          for (const float min_p : {0.0f, 0.05f}) {
            SampleRow row{.temperature = temperature,
                          .top_k = top_k,
                          .top_p = top_p,
                          .min_p = min_p,
                          .seed = random_(),
                          .token_index = static_cast<uint32_t>(rows.size())};
            if (rows.size() % 3 == 1) {
              row.repetition_penalty = 1.3f;
              row.history = history;
              row.biases = biases;
            }
            if (rows.size() % 5 == 2) row.target = static_cast<int32_t>(random_() % vocab);
            rows.push_back(row);
          }
        }
      }
    }
    const int64_t count = std::ssize(rows);
    Matrix logits = Random(kF32, count, vocab, 3, 4);
    for (const int64_t r : {5, 14, 20, 22}) {  // many equals, where top_k and top_p cut
      for (int64_t i = 0; i < vocab; i += 2) logits.Put(r, i, 20.0);
    }
    logits.Put(2, vocab / 2, NAN);
    logits.Put(3, 1, INFINITY);
    std::vector<SampledToken> got(count), want(count);
    cuda::Sampler sampler(static_cast<int>(count), vocab);
    sampler.Run({logits.Device(), soft_cap, rows, got}, nullptr);
    reference::Sample({logits.Host(), soft_cap, rows, want});
    for (int64_t r = 0; r < count; ++r) {
      const SampledToken &g = got[r], &w = want[r];
      const bool same =
          g.id == w.id && g.top1 == w.top1 && g.finite == w.finite &&
          (w.finite ? std::fabs(g.logprob - w.logprob) < 2e-5 : std::isnan(g.logprob));
      tally_.Count("sample row " + std::to_string(r) + " of " + std::to_string(vocab) +
                       ", soft cap " + std::to_string(soft_cap),
                   same ? ""
                        : "found " + std::to_string(g.id) + " " + std::to_string(g.logprob) +
                              ", expected " + std::to_string(w.id) + " " +
                              std::to_string(w.logprob));
    }
  }

  bool quick_;
  Tally& tally_;
  std::mt19937 random_{20261126};
  cuda::MatMuls matmuls_;
};

}  // namespace

void CheckOps(bool quick, Tally& tally) { Ops(quick, tally).Run(); }

}  // namespace octavo::conformance
