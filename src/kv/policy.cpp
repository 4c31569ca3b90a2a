#include "kv/policy.h"

#include <algorithm>
#include <charconv>
#include <iterator>
#include <string_view>
#include <utility>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "base/error.h"

namespace octavo {
namespace {

constexpr std::string_view kFormatWords =
    "auto, bf16 (bfloat16), fp16 (float16), fp32 (float32), fp8 (fp8_e4m3), fp8_e5m2, "
    "fp8_per_token_head, int8_per_token_head";
static_assert(std::size(kOfferedFormats) == static_cast<size_t>(KvFormat::kInt8PerTokenHead) + 1);
constexpr std::string_view kSkipFlag = "--kv-cache-dtype-skip-layers";

// Windows shorter than this hold so little that 8 bits do not pay for the conversion (vLLM's
// measurements on H100: 128 does not, 512 does).
constexpr int kShortWindow = 512;

// A format and why it was chosen.
struct Choice {
  KvFormat format;
  std::string why;
};

bool IsEightBit(LayerFormat format) {
  return ElementSize(format.k) == 1 || ElementSize(format.v) == 1;
}

// Words of vLLM that name a format Octavo does not have.
bool IsForeignFormat(std::string_view word) {
  constexpr std::string_view kWords[] = {"fp8_inc", "fp8_ds_mla",   "nvfp4_ds_mla",
                                         "nvfp4",   "nvfp4_4over6", "int4_per_token_head"};
  return std::find(std::begin(kWords), std::end(kWords), word) != std::end(kWords) ||
         word.starts_with("turboquant_");
}

Choice Choose(std::string_view flag, const std::string& word, const KvModelFacts& model) {
  if (word == "auto") {
    if (model.checkpoint_format) {
      const std::optional<KvFormat> format = KvFormatFromName(*model.checkpoint_format);
      if (!format) {
        throw Error(
            ErrorCode::kUnsupported,
            fmt::format("{} auto: the checkpoint's kv_cache_scheme asks for '{}', which Octavo "
                        "does not have; choose one of: {}",
                        flag, *model.checkpoint_format, kFormatWords));
      }
      return {*format, "auto: the checkpoint's kv_cache_scheme"};
    }
    return {SixteenBit(model.dtype), "auto: the model's dtype"};
  }
  if (const std::optional<KvFormat> format = KvFormatFromName(word)) return {*format, "asked for"};
  if (IsForeignFormat(word)) {
    throw Error(ErrorCode::kUnsupported, fmt::format("{}: Octavo has no KV format '{}'; valid: {}",
                                                     flag, word, kFormatWords));
  }
  throw Error(ErrorCode::kInvalidArgument,
              fmt::format("{}: unknown KV format '{}'; valid: {}", flag, word, kFormatWords));
}

std::string_view Trim(std::string_view text) {
  const size_t begin = text.find_first_not_of(" \t");
  if (begin == std::string_view::npos) return {};
  return text.substr(begin, text.find_last_not_of(" \t") - begin + 1);
}

std::vector<std::string> SplitWords(const std::vector<std::string>& values) {
  std::vector<std::string> words;
  for (const std::string_view value : values) {
    for (size_t begin = 0; begin <= value.size();) {
      const size_t end = std::min(value.find(',', begin), value.size());
      words.emplace_back(Trim(value.substr(begin, end - begin)));
      begin = end + 1;
    }
  }
  return words;
}

[[noreturn]] void BadSkipWord(std::string_view word, std::string_view problem, int layers) {
  throw Error(ErrorCode::kInvalidArgument,
              fmt::format("{}: '{}' {}; valid: sliding_window, full_attention, a layer 0 to {}, a "
                          "range A-B of layers, first:N, last:N (N from 1 to {})",
                          kSkipFlag, word, problem, layers - 1, layers));
}

std::optional<int> ParseIndex(std::string_view digits) {
  int value = 0;
  const char* end = digits.data() + digits.size();
  const auto [stop, error] = std::from_chars(digits.data(), end, value);
  if (digits.empty() || digits[0] == '-' || error != std::errc() || stop != end) return {};
  return value;
}

// The layers [first, second) of a word that names layers by number.
std::pair<int, int> ParseRange(std::string_view word, int layers) {
  for (const bool first : {true, false}) {
    const std::string_view head = first ? "first:" : "last:";
    if (!word.starts_with(head)) continue;
    const std::optional<int> count = ParseIndex(word.substr(head.size()));
    if (!count) BadSkipWord(word, "has no number behind the colon", layers);
    if (*count < 1 || *count > layers) BadSkipWord(word, "counts no layers or too many", layers);
    return first ? std::pair(0, *count) : std::pair(layers - *count, layers);
  }
  const size_t dash = word.find('-');
  const std::optional<int> begin = ParseIndex(word.substr(0, dash));
  const std::optional<int> last =
      dash == std::string_view::npos ? begin : ParseIndex(word.substr(dash + 1));
  const bool numeric = word.find_first_not_of("0123456789-") == std::string_view::npos;
  if (word.empty() || !numeric) BadSkipWord(word, "is not a word it knows", layers);
  if (!begin || !last || *begin > *last) BadSkipWord(word, "is a malformed range", layers);
  if (*last >= layers) BadSkipWord(word, "lies past the last layer", layers);
  return {*begin, *last + 1};
}

// Per layer, the first word that skips it; empty: not skipped.
std::vector<std::string> SkipWords(const KvPolicyOptions& options, const KvModelFacts& model,
                                   std::vector<std::string>* warnings) {
  const int layers = static_cast<int>(model.layers.size());
  std::vector<std::string> skipped_by(layers);
  std::vector<std::string> seen;
  for (const std::string& word : SplitWords(options.skip_layers)) {
    if (std::find(seen.begin(), seen.end(), word) != seen.end()) continue;
    seen.push_back(word);
    const bool windows = word == "sliding_window";
    const bool by_kind = windows || word == "full_attention";
    const auto [begin, end] = by_kind ? std::pair(0, layers) : ParseRange(word, layers);
    bool any = false;
    for (int i = begin; i < end; ++i) {
      if (by_kind && (model.layers[i].window > 0) != windows) continue;
      any = true;
      if (skipped_by[i].empty()) skipped_by[i] = word;
    }
    if (!any) {
      warnings->push_back(fmt::format("{}: '{}' skips nothing: this model has no {} layers",
                                      kSkipFlag, word,
                                      windows ? "sliding-window" : "full-attention"));
    }
  }
  return skipped_by;
}

void AddAdvice(const KvPolicyOptions& options, const KvModelFacts& model, LayerFormat base,
               KvPolicy* policy) {
  std::vector<int> short_windows;
  bool quantised = false;
  for (size_t i = 0; i < policy->layers.size(); ++i) {
    if (!IsEightBit(policy->layers[i])) continue;
    quantised = true;
    const int window = model.layers[i].window;
    if (window > 0 && window < kShortWindow) short_windows.push_back(static_cast<int>(i));
  }
  if (!short_windows.empty()) {
    policy->lines.push_back(fmt::format(
        "{}: a window of less than {} tokens bounds their cache, and 8 bits save little "
        "there: consider {} sliding_window",
        LayersText(short_windows), kShortWindow, kSkipFlag));
  }
  if (!options.skip_layers.empty() && !IsEightBit(base)) {
    policy->warnings.push_back(
        fmt::format("{} has no effect: {} is not quantised", kSkipFlag, FormatText(base)));
  } else if (IsEightBit(base) && !quantised) {
    policy->warnings.push_back(
        fmt::format("{} skips every layer: nothing is quantised", kSkipFlag));
  }
  if (base.k == KvFormat::kFp8E5M2 || base.v == KvFormat::kFp8E5M2) {
    policy->warnings.push_back(fmt::format(
        "fp8_e5m2 rounds a value by up to 1/8 of it, fp8_e4m3 by up to 1/16{}",
        model.checkpoint_format == Name(KvFormat::kFp8E4M3)
            ? "; the checkpoint's scales were made for fp8_e4m3 and are applied as they are"
            : ""));
  }
}

}  // namespace

KvFormat SixteenBit(DType dtype) { return dtype == DType::kF16 ? KvFormat::kF16 : KvFormat::kBF16; }

bool HasStaticScale(KvFormat format) {
  return format == KvFormat::kFp8E4M3 || format == KvFormat::kFp8E5M2;
}

std::string FormatText(LayerFormat format) {
  if (format.k == format.v) return Name(format.k);
  return fmt::format("K {}, V {}", Name(format.k), Name(format.v));
}

std::string LayersText(std::span<const int> layers) {
  std::vector<std::string> parts;
  for (size_t begin = 0; begin < layers.size();) {
    size_t end = begin + 1;
    while (end < layers.size() && layers[end] == layers[end - 1] + 1) ++end;
    const int first = layers[begin], last = layers[end - 1];
    if (end - begin > 1) {
      parts.push_back(fmt::format("{}-{}", first, last));
    } else {
      parts.push_back(fmt::format("{}", first));
    }
    begin = end;
  }
  return fmt::format("layer{} {}", layers.size() == 1 ? "" : "s", fmt::join(parts, ","));
}

std::vector<std::string> LinesByLayer(std::span<const std::string> texts) {
  std::vector<std::pair<std::string, std::vector<int>>> groups;
  for (size_t i = 0; i < texts.size(); ++i) {
    if (texts[i].empty()) continue;
    auto group = std::find_if(groups.begin(), groups.end(),
                              [&](const auto& g) { return g.first == texts[i]; });
    if (group == groups.end()) group = groups.insert(groups.end(), {texts[i], {}});
    group->second.push_back(static_cast<int>(i));
  }
  std::vector<std::string> lines;
  for (const auto& [text, layers] : groups) {
    lines.push_back(fmt::format("{}: {}", LayersText(layers), text));
  }
  return lines;
}

KvPolicy ResolveKvPolicy(const KvPolicyOptions& options, const KvModelFacts& model) {
  OCTAVO_CHECK(!model.layers.empty());
  const auto choose = [&](const std::optional<std::string>& own, std::string_view own_flag) {
    return own ? Choose(own_flag, *own, model)
               : Choose("--kv-cache-dtype", options.kv_cache_dtype, model);
  };
  const Choice k = choose(options.kv_cache_dtype_k, "--kv-cache-dtype-k");
  const Choice v = choose(options.kv_cache_dtype_v, "--kv-cache-dtype-v");
  const LayerFormat base = {.k = k.format, .v = v.format};
  const std::string base_text = k.why == v.why ? fmt::format("{} ({})", FormatText(base), k.why)
                                               : fmt::format("K {} ({}), V {} ({})", Name(k.format),
                                                             k.why, Name(v.format), v.why);

  KvPolicy policy;
  const std::vector<std::string> skipped_by = SkipWords(options, model, &policy.warnings);
  std::vector<std::string> texts;
  for (const std::string& word : skipped_by) {
    const bool skipped = !word.empty() && IsEightBit(base);
    const KvFormat plain = SixteenBit(model.dtype);
    policy.layers.push_back(skipped ? LayerFormat{plain, plain} : base);
    texts.push_back(skipped ? fmt::format("{} (skipped: {})", Name(plain), word) : base_text);
  }
  policy.lines = LinesByLayer(texts);
  if (model.checkpoint_format && k.why == "asked for" && v.why == "asked for" &&
      (k.format != v.format || Name(k.format) != *model.checkpoint_format)) {
    policy.lines.push_back(fmt::format("the checkpoint's kv_cache_scheme ({}) is overruled",
                                       *model.checkpoint_format));
  }
  AddAdvice(options, model, base, &policy);
  return policy;
}

}  // namespace octavo
