#include "kv/policy.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/error.h"

namespace octavo {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

// Windows of a model: 0 is full attention.
KvModelFacts Model(const std::vector<int>& windows, DType dtype = DType::kBF16) {
  KvModelFacts model{.layers = {}, .dtype = dtype, .checkpoint_format = {}};
  for (const int window : windows) {
    model.layers.push_back({.window = window, .kv_heads = 2, .head_dim = 64});
  }
  return model;
}

KvModelFacts Alternating() { return Model({128, 0, 128, 0, 128, 0}); }
KvModelFacts Full(int layers) { return Model(std::vector<int>(layers, 0)); }

// "bf16 fp8_e4m3/bf16 ...": one word per layer.
std::string Formats(const KvPolicy& policy) {
  std::string text;
  for (const LayerFormat& format : policy.layers) {
    if (!text.empty()) text += ' ';
    text += Name(format.k);
    if (format.k != format.v) text += std::string("/") + Name(format.v);
  }
  return text;
}

TEST(KvPolicy, FormatWords) {
  struct Case {
    const char* word;
    DType dtype;
    const char* formats;
  };
  for (const Case& c : std::vector<Case>{
           {"auto", DType::kBF16, "bf16"},
           {"auto", DType::kF16, "fp16"},
           {"auto", DType::kF32, "bf16"},
           {"fp8", DType::kBF16, "fp8_e4m3"},
           {"fp8_e4m3", DType::kBF16, "fp8_e4m3"},
           {"fp8_e5m2", DType::kBF16, "fp8_e5m2"},
           {"fp8_per_token_head", DType::kBF16, "fp8_per_token_head"},
           {"int8_per_token_head", DType::kBF16, "int8_per_token_head"},
           {"bfloat16", DType::kF16, "bf16"},
           {"float16", DType::kBF16, "fp16"},
           {"fp32", DType::kBF16, "fp32"},
       }) {
    KvPolicyOptions options;
    options.kv_cache_dtype = c.word;
    EXPECT_EQ(Formats(ResolveKvPolicy(options, Model({0}, c.dtype))), c.formats) << c.word;
  }
}

TEST(KvPolicy, ExplicitBeatsCheckpointBeatsModel) {
  KvModelFacts model = Full(32);
  model.checkpoint_format = "fp8_e4m3";
  KvPolicy policy = ResolveKvPolicy({}, model);
  EXPECT_EQ(policy.layers[31], (LayerFormat{KvFormat::kFp8E4M3, KvFormat::kFp8E4M3}));
  EXPECT_THAT(policy.lines,
              ElementsAre("layers 0-31: fp8_e4m3 (auto: the checkpoint's kv_cache_scheme)"));
  EXPECT_THAT(policy.warnings, ElementsAre());

  KvPolicyOptions options;
  options.kv_cache_dtype = "bf16";
  policy = ResolveKvPolicy(options, model);
  EXPECT_THAT(policy.lines,
              ElementsAre("layers 0-31: bf16 (asked for)",
                          "the checkpoint's kv_cache_scheme (fp8_e4m3) is overruled"));

  options.kv_cache_dtype = "fp8_e5m2";
  policy = ResolveKvPolicy(options, model);
  EXPECT_THAT(policy.warnings, ElementsAre(HasSubstr("scales were made for fp8_e4m3")));

  model.checkpoint_format = "nvfp4";  // matters only where it decides
  options.kv_cache_dtype = "fp8";
  EXPECT_EQ(ResolveKvPolicy(options, model).layers[0].k, KvFormat::kFp8E4M3);
  EXPECT_THAT([&] { ResolveKvPolicy({}, model); },
              testing::Throws<Error>(testing::Property(&Error::message, HasSubstr("'nvfp4'"))));
}

TEST(KvPolicy, KeysAndValuesMayDiffer) {
  KvPolicyOptions options;
  options.kv_cache_dtype_k = "fp8";
  const KvPolicy policy = ResolveKvPolicy(options, Full(2));
  EXPECT_EQ(Formats(policy), "fp8_e4m3/bf16 fp8_e4m3/bf16");
  EXPECT_THAT(policy.lines,
              ElementsAre("layers 0-1: K fp8_e4m3 (asked for), V bf16 (auto: the model's dtype)"));
  options.kv_cache_dtype = "fp8";
  options.kv_cache_dtype_k = {};
  options.kv_cache_dtype_v = "auto";
  EXPECT_EQ(Formats(ResolveKvPolicy(options, Full(1))), "fp8_e4m3/bf16");
}

TEST(KvPolicy, SkipWords) {
  struct Case {
    std::vector<std::string> skip;
    const char* skipped;  // one character per layer: x is skipped
  };
  for (const Case& c : std::vector<Case>{
           {{"sliding_window"}, "x.x.x."},
           {{"full_attention"}, ".x.x.x"},
           {{"0"}, "x....."},
           {{"5"}, ".....x"},
           {{"1-3"}, ".xxx.."},
           {{"2-2"}, "..x..."},
           {{"first:2"}, "xx...."},
           {{"last:1"}, ".....x"},
           {{"first:6"}, "xxxxxx"},
           {{"0,5"}, "x....x"},
           {{" 0 , 5 "}, "x....x"},
           {{"0", "last:2,0"}, "x...xx"},
           {{"sliding_window,1"}, "xxx.x."},
       }) {
    KvPolicyOptions options{.kv_cache_dtype = "fp8",
                            .kv_cache_dtype_k = {},
                            .kv_cache_dtype_v = {},
                            .skip_layers = c.skip};
    const KvPolicy policy = ResolveKvPolicy(options, Alternating());
    std::string skipped;
    for (const LayerFormat& format : policy.layers) {
      EXPECT_EQ(format.k, format.v);
      skipped += format.k == KvFormat::kBF16 ? 'x' : '.';
    }
    EXPECT_EQ(skipped, c.skipped) << c.skip[0];
  }
}

TEST(KvPolicy, SkippedLayersSayWhy) {
  KvPolicyOptions options;
  options.kv_cache_dtype = "fp8";
  options.skip_layers = {"sliding_window", "0,last:1"};
  const KvPolicy policy = ResolveKvPolicy(options, Alternating());
  EXPECT_THAT(policy.lines,
              ElementsAre("layers 0,2,4: bf16 (skipped: sliding_window)",
                          "layers 1,3: fp8_e4m3 (asked for)", "layer 5: bf16 (skipped: last:1)"));
  EXPECT_THAT(policy.warnings, ElementsAre());
}

TEST(KvPolicy, ShortWindowsAreAdvisedAgainst) {
  KvPolicyOptions options;
  options.kv_cache_dtype = "fp8";
  EXPECT_THAT(ResolveKvPolicy(options, Alternating()).lines,
              ElementsAre("layers 0-5: fp8_e4m3 (asked for)",
                          HasSubstr("layers 0,2,4: a window of less than 512 tokens")));
  EXPECT_THAT(ResolveKvPolicy(options, Model({512, 0})).lines,
              ElementsAre("layers 0-1: fp8_e4m3 (asked for)"));
}

TEST(KvPolicy, Warnings) {
  KvPolicyOptions options;
  options.kv_cache_dtype = "fp8";
  options.skip_layers = {"sliding_window"};
  EXPECT_THAT(ResolveKvPolicy(options, Full(4)).warnings,
              ElementsAre(HasSubstr("this model has no sliding-window layers")));
  options.skip_layers = {"sliding_window", "sliding_window"};
  EXPECT_EQ(ResolveKvPolicy(options, Full(4)).warnings.size(), 1u);
  options.skip_layers = {"full_attention"};
  EXPECT_THAT(ResolveKvPolicy(options, Full(4)).warnings, ElementsAre(HasSubstr("every layer")));
  options.kv_cache_dtype = "bf16";
  options.skip_layers = {"0"};
  EXPECT_THAT(ResolveKvPolicy(options, Full(4)).warnings, ElementsAre(HasSubstr("has no effect")));
  options.kv_cache_dtype = "fp32";
  EXPECT_EQ(Formats(ResolveKvPolicy(options, Full(1))), "fp32");
}

TEST(KvPolicy, Errors) {
  struct Case {
    const char* dtype;
    const char* skip;
    ErrorCode code;
    const char* message;
  };
  const char* valid = "a layer 0 to 5, a range A-B of layers, first:N, last:N (N from 1 to 6)";
  for (const Case& c : std::vector<Case>{
           {"fp9", nullptr, ErrorCode::kInvalidArgument,
            "unknown KV format 'fp9'; valid: auto, bf16"},
           {"", nullptr, ErrorCode::kInvalidArgument, "unknown KV format ''"},
           {"int8", nullptr, ErrorCode::kInvalidArgument, "unknown KV format 'int8'"},
           {"nvfp4", nullptr, ErrorCode::kUnsupported, "no KV format 'nvfp4'"},
           {"turboquant_k8v4", nullptr, ErrorCode::kUnsupported, "no KV format 'turboquant_k8v4'"},
           {"fp8", "sliding", ErrorCode::kInvalidArgument, "'sliding' is not a word it knows"},
           {"fp8", "sliding", ErrorCode::kInvalidArgument, valid},
           {"fp8", "", ErrorCode::kInvalidArgument, "'' is not a word it knows"},
           {"fp8", "0,,1", ErrorCode::kInvalidArgument, "'' is not a word it knows"},
           {"fp8", "6", ErrorCode::kInvalidArgument, "'6' lies past the last layer"},
           {"fp8", "6", ErrorCode::kInvalidArgument, valid},
           {"fp8", "4-6", ErrorCode::kInvalidArgument, "'4-6' lies past the last layer"},
           {"fp8", "3-1", ErrorCode::kInvalidArgument, "'3-1' is a malformed range"},
           {"fp8", "1-", ErrorCode::kInvalidArgument, "'1-' is a malformed range"},
           {"fp8", "-1", ErrorCode::kInvalidArgument, "'-1' is a malformed range"},
           {"fp8", "1--3", ErrorCode::kInvalidArgument, "'1--3' is a malformed range"},
           {"fp8", "1-2-3", ErrorCode::kInvalidArgument, "'1-2-3' is a malformed range"},
           {"fp8", "99999999999", ErrorCode::kInvalidArgument, "malformed"},
           {"fp8", "first:0", ErrorCode::kInvalidArgument, "counts no layers or too many"},
           {"fp8", "last:7", ErrorCode::kInvalidArgument, "counts no layers or too many"},
           {"fp8", "first:", ErrorCode::kInvalidArgument, "no number behind the colon"},
           {"fp8", "first:two", ErrorCode::kInvalidArgument, "no number behind the colon"},
           {"bf16", "9", ErrorCode::kInvalidArgument, "'9' lies past the last layer"},
       }) {
    KvPolicyOptions options;
    options.kv_cache_dtype = c.dtype;
    if (c.skip != nullptr) options.skip_layers = {c.skip};
    try {
      ResolveKvPolicy(options, Alternating());
      ADD_FAILURE() << c.dtype << ' ' << (c.skip ? c.skip : "") << " is accepted";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), c.code) << error.message();
      EXPECT_THAT(error.message(), HasSubstr(c.message));
      EXPECT_THAT(error.message(), HasSubstr(c.skip ? "skip-layers" : "--kv-cache-dtype"));
    }
  }
  KvPolicyOptions options;
  options.kv_cache_dtype_v = "fp7";
  for (const KvFormat format : kOfferedFormats) {  // all are named where a word is not known
    EXPECT_THAT([&] { ResolveKvPolicy(options, Alternating()); },
                testing::Throws<Error>(
                    testing::Property(&Error::message, HasSubstr(std::string(Name(format))))));
  }
  EXPECT_THAT([&] { ResolveKvPolicy(options, Alternating()); },
              testing::Throws<Error>(testing::Property(&Error::message, HasSubstr("-dtype-v: "))));
}

}  // namespace
}  // namespace octavo
