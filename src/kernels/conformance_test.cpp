// One list of cases per op, each run by a backend and by the double-precision reference on fresh
// random input. The CPU backend runs it on every SIMD target of this machine and with 1, 2 and 3
// threads.
#include <gtest/gtest.h>

#include <memory>

#include "kernels/backend.h"
#include "kernels/mxfp4_testing.h"
#include "kernels/simd_targets.h"
#include "kernels/test_tensors.h"

namespace octavo {
namespace {

class Conformance {
 public:
  explicit Conformance(Backend& subject) : subject_(subject) {}

  void Run() {
    Gathers();
    Norms();
    MatMuls();
    Activations();
    Routes();
    ExpertMixtures();
  }

 private:
  using Op = void (*)(Backend&);

  TestTensor Random(DType dtype, int64_t rows, int64_t columns, double scale = 1,
                    int64_t padding = 0) {
    return TestTensor(dtype, rows, columns, padding).Fill(random_, scale);
  }

  // f(backend, out) on both; the outputs must agree.
  template <class F>
  void Compare(const TestTensor& blank, const std::string& what, const F& f) {
    TestTensor got = blank, want = blank;
    f(subject_, got);
    f(*oracle_, want);
    ExpectMatches(got, want, what);
  }

  void Gathers() {
    for (DType table_type : {DType::kF32, DType::kBF16, DType::kF16}) {
      for (DType t : {DType::kF32, DType::kBF16}) {
        for (int64_t columns : {1, 15, 64, 259}) {
          const TestTensor table = Random(table_type, 50, columns, 1, 3);
          const std::vector<int32_t> rows = {49, 0, 7, 7, 21};
          const Tensor ids(rows.data(), DType::kI32, {5});
          Compare(TestTensor(t, 5, columns, 2), "gather",
                  [&](Backend& backend, const TestTensor& out) {
                    backend.Gather({.table = table, .ids = ids, .scale = 59.75f, .out = out});
                  });
        }
      }
    }
  }

  void Norms() {
    for (DType t : {DType::kF32, DType::kBF16}) {
      for (DType weight_type : {DType::kF32, DType::kBF16, DType::kF16}) {
        for (int64_t columns : {1, 16, 63, 64, 200, 2049}) {
          for (const bool in_place : {false, true})
            NormCase(t, t, weight_type, columns, in_place, false);
          if (t == DType::kF32) {
            NormCase(t, DType::kBF16, weight_type, columns, false, false);
            NormCase(t, t, weight_type, columns, false, true);
          }
        }
      }
    }
  }

  void NormCase(DType t, DType out_type, DType weight_type, int64_t columns, bool in_place,
                bool accumulate) {
    const TestTensor weight = Random(weight_type, 1, columns), x = Random(t, 9, columns, 3, 5);
    const std::string what =
        "norm of " + ShapeString(x) + (in_place ? " in place" : "") + (accumulate ? ", added" : "");
    Compare(in_place ? x : Random(out_type, 9, columns, 2, 7), what,
            [&](Backend& backend, const TestTensor& out) {
              backend.Norm({.x = in_place ? out : x,
                            .weight = weight,
                            .eps = 1e-5f,
                            .offset = columns % 2 ? 1.0f : 0.0f,
                            .out = out,
                            .accumulate = accumulate});
            });
  }

  void MatMuls() {
    const DType f32 = DType::kF32, bf16 = DType::kBF16, f16 = DType::kF16;
    for (int64_t rows : {1, 2, 3, 4, 5, 6, 7, 13}) {
      for (int64_t columns : {1, 7, 16, 100}) {
        for (int64_t outs : {1, 5, 16, 33}) MatMulCase(rows, outs, columns, bf16, bf16, bf16);
      }
    }
    for (DType x : {f32, bf16}) {
      for (DType weight : {f32, bf16, f16}) {
        for (DType out : {f32, bf16}) {
          MatMulCase(1, 130, 1025, x, weight, out);
          MatMulCase(6, 17, 2051, x, weight, out);
          MatMulCase(25, 70, 1039, x, weight, out);
          MatMulCase(1, 130, 2050, x, weight, out);  // even: pairs, where x and weight are bfloat16
          MatMulCase(13, 66, 4110, x, weight, out);
        }
      }
    }
    MatMulCase(1, 400, 3000, f32, bf16, f32);
    MatMulCase(200, 300, 64, f32, bf16, f32);
    MatMulCase(233, 20, 1000, f32, bf16, f32);   // few outputs: threads share the rows
    MatMulCase(1000, 40, 33, bf16, bf16, bf16);  // more rows than one pass
  }

  void MatMulCase(int64_t rows, int64_t outs, int64_t columns, DType x_type, DType weight_type,
                  DType out_type) {
    const TestTensor x = Random(x_type, rows, columns, 1, 3),
                     weight = Random(weight_type, outs, columns, 1, outs % 2 == 0 ? 2 : 1);
    const TestTensor bias = Random(weight_type, 1, outs);
    for (const bool with_bias : {false, true}) {
      for (const bool accumulate : {false, true}) {
        if (accumulate && out_type != DType::kF32) continue;
        const std::string what = "matmul " + ShapeString(x) + " x " + ShapeString(weight) + " -> " +
                                 Name(out_type) + (accumulate ? ", added" : "");
        Compare(Random(out_type, rows, outs, 2, 5), what,
                [&](Backend& backend, const TestTensor& out) {
                  backend.MatMul({.x = x,
                                  .weight = weight,
                                  .bias = with_bias ? bias.tensor() : Tensor(),
                                  .out = out,
                                  .accumulate = accumulate});
                });
      }
    }
  }

  void Activations() {
    for (DType t : {DType::kF32, DType::kBF16}) {
      for (Activation activation :
           {Activation::kSilu, Activation::kGeluTanh, Activation::kSwigluOai}) {
        for (int64_t columns : {1, 16, 77, 3000}) {
          for (const bool in_place : {false, true}) {
            const TestTensor gate = Random(t, 11, columns, 4, 3), up = Random(t, 11, columns, 4, 1);
            const TestTensor blank = in_place ? gate : TestTensor(t, 11, columns, 2);
            Compare(blank, "activation", [&](Backend& backend, const TestTensor& out) {
              backend.GatedActivation({.activation = activation,
                                       .limit = 7,
                                       .gate = in_place ? out : gate,
                                       .up = up,
                                       .out = out});
            });
          }
        }
      }
    }
  }

  void Routes() {
    for (const auto& [experts, top_k] : {std::pair{4, 2}, {8, 8}, {128, 8}, {33, 4}, {1, 1}}) {
      for (const bool softmax_first : {false, true}) {
        for (const bool normalize : {false, true}) {
          for (const bool ties : {false, true}) {
            TestTensor logits = Random(DType::kF32, 40, experts, 3, 2);
            for (int64_t r = 0; ties && r < 40; ++r) {
              for (int64_t e = 0; e < experts; ++e) logits.Put(r, e, std::round(logits.Get(r, e)));
            }
            RouteCase(logits, top_k, softmax_first, normalize);
          }
        }
      }
    }
  }

  void RouteCase(const TestTensor& logits, int top_k, bool softmax_first, bool normalize) {
    const int64_t rows = logits.tensor().rows();
    TestTensor ids[2] = {TestTensor(DType::kI32, rows, top_k, 1),
                         TestTensor(DType::kI32, rows, top_k, 1)};
    TestTensor weights[2] = {TestTensor(DType::kF32, rows, top_k, 1),
                             TestTensor(DType::kF32, rows, top_k, 1)};
    Backend* backends[2] = {&subject_, oracle_.get()};
    for (int i = 0; i < 2; ++i) {
      backends[i]->Route({.logits = logits,
                          .top_k = top_k,
                          .softmax_first = softmax_first,
                          .normalize = normalize,
                          .ids = ids[i],
                          .weights = weights[i]});
    }
    for (int64_t r = 0; r < rows; ++r) EXPECT_TRUE(ids[0].SameRow(r, ids[1], r)) << "route ids";
    EXPECT_TRUE(ids[0].GuardsIntact());
    ExpectMatches(weights[0], weights[1], "route weights");
  }

  void ExpertMixtures() {
    struct Case {
      DType t, weights;
      int64_t rows, hidden, intermediate;
      int experts, top_k;
      Activation activation;
      bool bias;
    };
    const Case cases[] = {
        {DType::kF32, DType::kBF16, 1, 64, 48, 8, 2, Activation::kSilu, false},
        {DType::kF32, DType::kF32, 37, 50, 33, 5, 3, Activation::kSwigluOai, true},
        {DType::kBF16, DType::kBF16, 70, 130, 20, 16, 4, Activation::kSilu, false},
        {DType::kBF16, DType::kF16, 9, 17, 150, 3, 3, Activation::kGeluTanh, true},
        {DType::kF32, DType::kBF16, 1100, 16, 8, 4, 1, Activation::kSilu,
         false},  // more rows than one pass
        {DType::kF32, DType::kMxfp4, 1, 96, 64, 5, 3, Activation::kSwigluOai, true},
        {DType::kF32, DType::kMxfp4, 41, 64, 160, 2, 1, Activation::kSwigluOai, true},
        {DType::kBF16, DType::kMxfp4, 9, 224, 2080, 1, 1, Activation::kSilu, false},
    };
    for (const Case& c : cases) {
      std::vector<TestTensor> memory;
      memory.reserve(6 * c.experts);
      const auto keep = [&](TestTensor tensor) {
        return memory.emplace_back(std::move(tensor)).tensor();
      };
      const double scale = 1 / std::sqrt(static_cast<double>(c.hidden));
      const bool mxfp4 = c.weights == DType::kMxfp4;
      std::vector<std::vector<uint8_t>> packed;
      const auto matrix = [&](int64_t outs, int64_t in) {
        if (!mxfp4) return keep(Random(c.weights, outs, in, scale));
        packed.push_back(mxfp4::RandomMatrix(outs, in, scale, random_));
        return Tensor(packed.back().data(), DType::kMxfp4, {outs, in});
      };
      const DType bias_type = mxfp4 ? DType::kBF16 : c.weights;
      std::vector<Expert> experts(c.experts);
      for (Expert& e : experts) {
        e.gate = matrix(c.intermediate, c.hidden);
        e.up = matrix(c.intermediate, c.hidden);
        e.down = matrix(c.hidden, c.intermediate);
        if (!c.bias) continue;
        e.gate_bias = keep(Random(bias_type, 1, c.intermediate));
        e.up_bias = keep(Random(bias_type, 1, c.intermediate));
        e.down_bias = keep(Random(bias_type, 1, c.hidden));
      }
      const TestTensor x = Random(c.t, c.rows, c.hidden, 2, 3);
      const TestTensor logits = Random(DType::kF32, c.rows, c.experts);
      TestTensor ids(DType::kI32, c.rows, c.top_k), weights(DType::kF32, c.rows, c.top_k);
      oracle_->Route({.logits = logits, .top_k = c.top_k, .ids = ids, .weights = weights});
      for (const bool accumulate : {false, true}) {
        Compare(Random(c.t, c.rows, c.hidden, 2, 1), "experts",
                [&](Backend& backend, const TestTensor& out) {
                  backend.Experts({.x = x,
                                   .ids = ids,
                                   .weights = weights,
                                   .experts = experts,
                                   .activation = c.activation,
                                   .limit = 1.5f,
                                   .out = out,
                                   .accumulate = accumulate});
                });
      }
    }
  }

  Backend& subject_;
  std::unique_ptr<Backend> oracle_ = MakeReferenceBackend();
  std::mt19937 random_{20260101};
};

TEST(ConformanceTest, Cpu) {
  for (const SimdTarget& target : SimdTargets()) {
    const UseSimdTarget use(target);
    for (int threads : {1, 2, 3}) {
      SCOPED_TRACE(target.name + ", threads " + std::to_string(threads));
      Conformance(*MakeCpuBackend(threads)).Run();
    }
  }
}

// What a NaN or infinity touches must show it, as in the reference, and nothing else.
TEST(ConformanceTest, NonFinite) {
  std::mt19937 random(3);
  const auto cpu = MakeCpuBackend(1), oracle = MakeReferenceBackend();
  for (const SimdTarget& target : SimdTargets()) {
    const UseSimdTarget use(target);
    for (double poison : {double{NAN}, double{INFINITY}, -double{INFINITY}}) {
      for (DType t : {DType::kF32, DType::kBF16}) {
        TestTensor x = TestTensor(t, 9, 130).Fill(random);
        x.Put(4, 129, poison);
        TestTensor weight = TestTensor(DType::kBF16, 20, 130).Fill(random);
        TestTensor got(t, 9, 20), want(t, 9, 20);
        cpu->MatMul({.x = x, .weight = weight, .bias = {}, .out = got});
        oracle->MatMul({.x = x, .weight = weight, .bias = {}, .out = want});
        ExpectMatches(got, want, "matmul");
        for (Activation activation :
             {Activation::kSilu, Activation::kGeluTanh, Activation::kSwigluOai}) {
          const TestTensor up = TestTensor(t, 9, 130).Fill(random);
          for (const bool poison_up : {false, true}) {
            const GatedActivationArgs args{.activation = activation,
                                           .limit = 7,
                                           .gate = poison_up ? up : x,
                                           .up = poison_up ? x : up,
                                           .out = {}};
            TestTensor a(t, 9, 130), b(t, 9, 130);
            GatedActivationArgs to = args;
            to.out = a;
            cpu->GatedActivation(to);
            to.out = b;
            oracle->GatedActivation(to);
            ExpectMatches(
                a, b,
                "activation " + std::to_string(int(activation)) + " " + std::to_string(poison));
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace octavo
