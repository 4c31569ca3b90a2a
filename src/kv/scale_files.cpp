#include "kv/scale_files.h"

#include <algorithm>
#include <charconv>
#include <fstream>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "base/error.h"
#include "io/json.h"

namespace octavo {
namespace {

constexpr float kSmallestScale = 1e-6f;
constexpr float kLargestScale = 1e4f;
constexpr int kVersion = 1;

[[noreturn]] void Fail(const std::string& where, const std::string& expected, const Json& found) {
  throw Error(ErrorCode::kInvalidArgument,
              fmt::format("{}: expected {}, found {}", where, expected, Describe(found)));
}

const Json& Member(const Json& object, const char* key, const std::string& where) {
  const auto found = object.find(key);
  if (found == object.end()) {
    throw Error(ErrorCode::kInvalidArgument, fmt::format("{}: {} is missing", where, key));
  }
  return *found;
}

const Json& Object(const Json& parent, const char* key, const std::string& where) {
  const Json& value = Member(parent, key, where);
  if (!value.is_object()) Fail(fmt::format("{}: {}", where, key), "an object", value);
  return value;
}

// An index below `limit`, as a JSON key.
int Index(const std::string& key, int limit, const std::string& where) {
  int index = -1;
  const char* end = key.data() + key.size();
  const auto [stop, error] = std::from_chars(key.data(), end, index);
  if (error != std::errc() || stop != end || index < 0 || index >= limit ||
      key != std::to_string(index)) {
    throw Error(
        ErrorCode::kInvalidArgument,
        fmt::format("{}: expected a key from 0 to {}, found {}", where, limit - 1, Quote(key)));
  }
  return index;
}

float Number(const Json& value, const std::string& where) {
  if (!value.is_number()) Fail(where, "a number", value);
  return CheckedScale(value.get<double>(), where);
}

// {"kv_cache": {"dtype", "scaling_factor": {rank: {layer: scale}}}}: rank r has kv heads [r, r + 1)
// * kv_heads / ranks.
std::vector<LayerScales> ReadRanks(const Json& json, const std::string& file,
                                   std::span<const KvLayerFacts> facts) {
  const std::string where = file + ": kv_cache";
  const Json& cache = Object(json, "kv_cache", file);
  const Json& dtype = Member(cache, "dtype", where);
  if (dtype != Json("float8_e4m3fn")) Fail(where + ".dtype", "\"float8_e4m3fn\"", dtype);
  const Json& ranks = Object(cache, "scaling_factor", where);
  if (ranks.empty()) Fail(where + ".scaling_factor", "a rank at least", ranks);
  const int count = static_cast<int>(ranks.size());
  std::vector<LayerScales> layers(facts.size());
  std::vector<int> seen(facts.size());  // by layer: ranks that have it
  std::vector<bool> ranks_seen(count);
  for (const auto& [rank_key, by_layer] : ranks.items()) {
    const std::string number = rank_key.starts_with("rank") ? rank_key.substr(4) : rank_key;
    const int rank = Index(number, count, where + ".scaling_factor");
    if (ranks_seen[rank]) {
      throw Error(ErrorCode::kInvalidArgument,
                  fmt::format("{}.scaling_factor: rank {} is there twice", where, rank));
    }
    ranks_seen[rank] = true;
    const std::string at_rank = fmt::format("{}.scaling_factor.{}", where, rank);
    if (!by_layer.is_object()) Fail(at_rank, "an object", by_layer);
    for (const auto& [layer_key, value] : by_layer.items()) {
      const int layer = Index(layer_key, static_cast<int>(facts.size()), at_rank);
      const std::string at_layer = fmt::format("{}.{}", at_rank, layer);
      const int kv_heads = facts[layer].kv_heads;
      if (kv_heads % count != 0) {
        throw Error(
            ErrorCode::kUnsupported,
            fmt::format("{}: {} ranks do not share {} kv heads evenly", at_layer, count, kv_heads));
      }
      KvScale& k = layers[layer].k;
      k.values.resize(kv_heads);
      k.per_head = count > 1;
      k.source = "side-car " + file;
      const int share = kv_heads / count;
      std::fill_n(k.values.begin() + rank * share, share, Number(value, at_layer));
      ++seen[layer];
    }
  }
  for (size_t i = 0; i < facts.size(); ++i) {
    if (seen[i] != 0 && seen[i] != count) {
      throw Error(
          ErrorCode::kInvalidArgument,
          fmt::format("{}.scaling_factor: {} of {} ranks have layer {}", where, seen[i], count, i));
    }
    layers[i].v = layers[i].k;
  }
  return layers;
}

KvScale ReadOwnScale(const Json& value, int kv_heads, const std::string& file,
                     const std::string& where) {
  KvScale scale = {.values = {}, .per_head = value.is_array(), .source = "side-car " + file};
  if (!value.is_array()) {
    scale.values.assign(kv_heads, Number(value, where));
    return scale;
  }
  if (value.size() != static_cast<size_t>(kv_heads)) {
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("{}: expected {} numbers, one per kv head, found {}", where, kv_heads,
                            value.size()));
  }
  for (size_t h = 0; h < value.size(); ++h) {
    scale.values.push_back(Number(value[h], fmt::format("{}[{}]", where, h)));
  }
  return scale;
}

std::vector<LayerScales> ReadOwn(const Json& json, const std::string& file,
                                 std::span<const KvLayerFacts> facts) {
  const Json& version = json["octavo_kv_scales"];
  if (version != Json(kVersion)) {
    throw Error(ErrorCode::kUnsupported,
                fmt::format("{}: octavo_kv_scales: expected version {}, found {}", file, kVersion,
                            Describe(version)));
  }
  for (const auto& [key, value] : json.items()) {
    if (key == "octavo_kv_scales" || key == "layers") continue;
    if (key != "model") Fail(file, "octavo_kv_scales, model, layers", Json(key));
    if (!value.is_string()) Fail(file + ": model", "a string", value);
  }
  std::vector<LayerScales> layers(facts.size());
  const Json& entries = Object(json, "layers", file);
  if (entries.empty()) Fail(file + ": layers", "a layer at least", entries);
  for (const auto& [key, entry] : entries.items()) {
    const int layer = Index(key, static_cast<int>(facts.size()), file + ": layers");
    const std::string where = fmt::format("{}: layers.{}", file, layer);
    if (!entry.is_object()) Fail(where, "an object", entry);
    for (const auto& [part, value] : entry.items()) {
      if (part != "k" && part != "v") Fail(where, "k and v", Json(part));
      KvScale& slot = part == "k" ? layers[layer].k : layers[layer].v;
      slot = ReadOwnScale(value, facts[layer].kv_heads, file, fmt::format("{}.{}", where, part));
    }
  }
  return layers;
}

// Shortest text that reads back as the same float.
std::string ScaleText(const KvScale& scale) {
  if (!scale.per_head) return fmt::format("{}", scale.values[0]);
  return fmt::format("[{}]", fmt::join(scale.values, ", "));
}

}  // namespace

float CheckedScale(double value, const std::string& what) {
  const float scale = static_cast<float>(value);
  if (scale >= kSmallestScale && scale <= kLargestScale) return scale;
  throw Error(ErrorCode::kInvalidArgument,
              fmt::format("{}: expected a scale from {} to {}, found {}", what, kSmallestScale,
                          kLargestScale, value));
}

std::vector<LayerScales> ReadScaleFile(const std::filesystem::path& file,
                                       std::span<const KvLayerFacts> layers) {
  const Json json = ReadJsonFile(file);
  if (!json.is_object()) Fail(file.string(), "an object", json);
  if (json.contains("octavo_kv_scales")) return ReadOwn(json, file.string(), layers);
  if (json.contains("kv_cache")) return ReadRanks(json, file.string(), layers);
  throw Error(
      ErrorCode::kInvalidArgument,
      fmt::format("{}: not a file of KV scales: expected a field octavo_kv_scales or kv_cache",
                  file.string()));
}

void WriteScaleFile(const std::filesystem::path& file, const std::string& model,
                    std::span<const LayerScales> layers) {
  std::vector<std::string> entries;
  for (size_t i = 0; i < layers.size(); ++i) {
    std::vector<std::string> parts;
    if (!layers[i].k.values.empty()) parts.push_back("\"k\": " + ScaleText(layers[i].k));
    if (!layers[i].v.values.empty()) parts.push_back("\"v\": " + ScaleText(layers[i].v));
    if (parts.empty()) continue;
    entries.push_back(fmt::format("    \"{}\": {{{}}}", i, fmt::join(parts, ", ")));
  }
  std::ofstream out(file);
  out << fmt::format(
      "{{\n  \"octavo_kv_scales\": {},\n  \"model\": {},\n  \"layers\": {{\n{}\n  }}\n}}\n",
      kVersion, Json(model).dump(-1, ' ', false, Json::error_handler_t::replace),
      fmt::join(entries, ",\n"));
  out.close();
  if (!out) {
    throw Error(ErrorCode::kInvalidArgument, fmt::format("{}: cannot be written", file.string()));
  }
}

}  // namespace octavo
