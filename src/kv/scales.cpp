#include "kv/scales.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
#include <limits>
#include <utility>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "base/error.h"
#include "base/float_bits.h"
#include "kv/scale_files.h"
#include "kv/scale_names.h"

namespace octavo {
namespace {

// "a", "a and 3 more".
std::string Examples(const std::vector<std::string>& names) {
  if (names.size() == 1) return names[0];
  return fmt::format("{} and {} more", names[0], names.size() - 1);
}

float ReadFloat(const Tensor& tensor, int64_t i) {
  const std::byte* at = static_cast<const std::byte*>(tensor.data) + i * SizeOf(tensor.dtype);
  if (tensor.dtype == DType::kF32) {
    float value;
    std::memcpy(&value, at, sizeof(value));
    return value;
  }
  uint16_t bits;
  std::memcpy(&bits, at, sizeof(bits));
  return tensor.dtype == DType::kBF16 ? BF16ToFloat(bits) : Float16::Decode(bits);
}

bool AllBytesZero(const Tensor& tensor) {
  const std::byte* bytes = static_cast<const std::byte*>(tensor.data);
  return std::all_of(bytes, bytes + tensor.size() * SizeOf(tensor.dtype),
                     [](std::byte b) { return b == std::byte{0}; });
}

KvScale ReadTensorScale(const std::string& where, const std::string& name, const Tensor& tensor,
                        int kv_heads) {
  const std::string what = fmt::format("{}: tensor {}", where, name);
  if (tensor.dtype != DType::kF32 && tensor.dtype != DType::kF16 && tensor.dtype != DType::kBF16) {
    throw Error(ErrorCode::kUnsupported,
                fmt::format("{}: expected float32, float16 or bfloat16, found {}", what,
                            ShapeString(tensor)));
  }
  const bool per_head = tensor.size() != 1;
  if (per_head && (tensor.size() != kv_heads || tensor.shape[0] != kv_heads)) {
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("{}: expected [1], [{}] or [{}, 1, 1], found {}", what, kv_heads,
                            kv_heads, ShapeString(tensor)));
  }
  KvScale scale = {.values = {}, .per_head = per_head, .source = "checkpoint " + name};
  for (int h = 0; h < kv_heads; ++h) {
    scale.values.push_back(CheckedScale(ReadFloat(tensor, per_head ? h : 0), what));
  }
  return scale;
}

// The tensors that were recognised and not used, by reason.
struct Unused {
  std::vector<std::string> other_parts, past_the_end, queries, zero_points, affine, unknown;
};

void ReportUnused(const Unused& unused, size_t layers, const std::string& where, KvScales* scales) {
  const auto add = [&](const std::vector<std::string>& names, std::vector<std::string>* to,
                       std::string_view reason) {
    if (!names.empty()) to->push_back(fmt::format("{}: {} {}", where, Examples(names), reason));
  };
  add(unused.queries, &scales->lines, "not used: queries and probabilities need no static scale");
  add(unused.zero_points, &scales->lines, "not used: zero points of zero change nothing");
  add(unused.other_parts, &scales->lines, "not used: not of the decoder's layers");
  add(unused.past_the_end, &scales->warnings,
      fmt::format("not used: the model has layers 0 to {}", layers - 1));
  add(unused.affine, &scales->warnings,
      "not used: zero points are not supported, and the scales beside them may be too small");
  add(unused.unknown, &scales->warnings,
      "not used: it is named like a scale of the KV cache, but in no way that Octavo knows");
}

void Place(const KvScale& scale, const std::string& where, KvScale* slot) {
  if (slot->values.empty()) {
    *slot = scale;
  } else if (slot->values != scale.values) {
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("{}: {} and {} are scales of the same thing and differ ({} and {})",
                            where, slot->source, scale.source, slot->values[0], scale.values[0]));
  }
}

// Every scale that the checkpoint has, whatever the policy needs.
KvScales ReadCheckpoint(const Checkpoint& checkpoint, std::span<const KvLayerFacts> layers) {
  KvScales scales;
  scales.layers.resize(layers.size());
  const std::string where = checkpoint.path().string();
  Unused unused;
  for (const auto& [name, tensor] : checkpoint.tensors()) {
    const ScaleName parsed = ParseScaleName(name);
    if (parsed.role == ScaleRole::kNone) continue;
    if (parsed.other_part) {
      unused.other_parts.push_back(name);
    } else if (parsed.layer >= static_cast<int>(layers.size())) {
      unused.past_the_end.push_back(name);
    } else if (parsed.role == ScaleRole::kUnused) {
      unused.queries.push_back(name);
    } else if (parsed.role == ScaleRole::kZeroPoint) {
      (AllBytesZero(tensor) ? unused.zero_points : unused.affine).push_back(name);
    } else if (parsed.role == ScaleRole::kUnknown) {
      unused.unknown.push_back(name);
    } else {
      const int kv_heads = layers[parsed.layer].kv_heads;
      const KvScale scale =
          ReadTensorScale(checkpoint.FileOf(name).string(), name, tensor, kv_heads);
      LayerScales& layer = scales.layers[parsed.layer];
      if (parsed.role != ScaleRole::kV) Place(scale, where, &layer.k);
      if (parsed.role != ScaleRole::kK) Place(scale, where, &layer.v);
    }
  }
  ReportUnused(unused, layers.size(), where, &scales);
  return scales;
}

bool HasAny(const std::vector<LayerScales>& layers) {
  return std::any_of(layers.begin(), layers.end(), [](const LayerScales& layer) {
    return !layer.k.values.empty() || !layer.v.values.empty();
  });
}

// Drops what the policy has no use for and fills in what it lacks.
class PolicyFit {
 public:
  PolicyFit(KvScales* scales, std::span<const KvLayerFacts> layers)
      : scales_(scales), layers_(layers), has_any_(HasAny(scales->layers)) {}

  void Fit(bool is_k, std::span<const LayerFormat> formats) {
    std::vector<std::string> dropped(layers_.size());
    std::vector<int> missing, saturating;
    for (size_t i = 0; i < layers_.size(); ++i) {
      KvScale& scale = is_k ? scales_->layers[i].k : scales_->layers[i].v;
      const KvFormat format = is_k ? formats[i].k : formats[i].v;
      if (!HasStaticScale(format)) {
        if (!scale.values.empty()) {
          dropped[i] = fmt::format("{} scales not used, {} is stored as {}", is_k ? "K" : "V",
                                   is_k ? "K" : "V", Name(format));
        }
        scale = {};
      } else if (scale.values.empty()) {
        missing.push_back(static_cast<int>(i));
        if (format == KvFormat::kFp8E4M3) saturating.push_back(static_cast<int>(i));
        scale.values.assign(layers_[i].kv_heads, 1.0f);
        scale.source = "default 1.0";
      }
    }
    for (std::string& line : LinesByLayer(dropped)) scales_->lines.push_back(std::move(line));
    (is_k ? missing_k_ : missing_v_) = std::move(missing);
    (is_k ? saturating_k_ : saturating_v_) = std::move(saturating);
  }

  void CheckMissing(const std::string& where) {
    if (has_any_ && (!missing_k_.empty() || !missing_v_.empty())) {
      std::vector<std::string> parts;
      if (!missing_k_.empty()) parts.push_back("K scales of " + LayersText(missing_k_));
      if (!missing_v_.empty()) parts.push_back("V scales of " + LayersText(missing_v_));
      throw Error(
          ErrorCode::kInvalidArgument,
          fmt::format("{}: {} missing, though others are there; give a side-car file with all "
                      "scales, or keep these layers in 16 bits with "
                      "--kv-cache-dtype-skip-layers",
                      where, fmt::join(parts, " and ")));
    }
    std::vector<int> both;
    std::set_union(saturating_k_.begin(), saturating_k_.end(), saturating_v_.begin(),
                   saturating_v_.end(), std::back_inserter(both));
    if (!both.empty()) {
      scales_->warnings.push_back(
          fmt::format("{}: no KV scales: {} use scale 1.0, and keys or values beyond +-448 "
                      "saturate (octavo calibrate finds out)",
                      where, LayersText(both)));
    }
  }

 private:
  KvScales* scales_;
  std::span<const KvLayerFacts> layers_;
  bool has_any_;
  std::vector<int> missing_k_, missing_v_, saturating_k_, saturating_v_;
};

// The source without the layer's number, so that layers of one origin share a line.
std::string SourcePattern(const std::string& source, size_t layer) {
  const std::string number = fmt::format("layers.{}.", layer);
  const size_t at = source.find(number);
  return at == std::string::npos
             ? source
             : source.substr(0, at) + "layers.N." + source.substr(at + number.size());
}

void DescribeUsed(KvScales* scales) {
  std::vector<std::string> texts;
  for (size_t i = 0; i < scales->layers.size(); ++i) {
    std::vector<std::string> parts;
    const auto add = [&](const char* what, const KvScale& scale) {
      if (scale.values.empty()) return;
      parts.push_back(fmt::format("{} {} from {}", what,
                                  scale.per_head ? "per kv head" : "per tensor",
                                  SourcePattern(scale.source, i)));
    };
    add("K", scales->layers[i].k);
    add("V", scales->layers[i].v);
    texts.push_back(fmt::format("{}", fmt::join(parts, ", ")));
  }
  const std::vector<std::string> lines = LinesByLayer(texts);
  scales->lines.insert(scales->lines.begin(), lines.begin(), lines.end());

  std::vector<std::string> ranges;
  const auto add_range = [&](const char* what, KvScale LayerScales::*part) {
    float low = std::numeric_limits<float>::infinity(), high = 0;
    for (const LayerScales& layer : scales->layers) {
      for (const float value : (layer.*part).values) {
        low = std::min(low, value);
        high = std::max(high, value);
      }
    }
    if (high > 0) ranges.push_back(fmt::format("{} {} to {}", what, low, high));
  };
  add_range("K", &LayerScales::k);
  add_range("V", &LayerScales::v);
  if (!ranges.empty()) {
    scales->lines.insert(scales->lines.begin() + static_cast<int64_t>(lines.size()),
                         fmt::format("KV scales: {}", fmt::join(ranges, ", ")));
  }
}

}  // namespace

KvScales LoadKvScales(const Checkpoint& checkpoint,
                      const std::optional<std::filesystem::path>& side_car,
                      std::span<const KvLayerFacts> layers, std::span<const LayerFormat> formats) {
  OCTAVO_CHECK(layers.size() == formats.size(), layers.size(), formats.size());
  KvScales scales = ReadCheckpoint(checkpoint, layers);
  if (side_car) {
    const bool overruled = HasAny(scales.layers);
    scales.layers = ReadScaleFile(*side_car, layers);
    if (overruled) {
      scales.lines.push_back(fmt::format("{}: its KV scales are overruled by {}",
                                         checkpoint.path().string(), side_car->string()));
    }
  }
  PolicyFit fit(&scales, layers);
  fit.Fit(true, formats);
  fit.Fit(false, formats);
  fit.CheckMissing((side_car ? *side_car : checkpoint.path()).string());
  DescribeUsed(&scales);
  return scales;
}

}  // namespace octavo
