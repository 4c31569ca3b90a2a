// The cache policy: in which format every layer keeps its keys and its values.
//
// ResolveKvPolicy turns what the user asked for (vLLM's flag names) and facts about the model into
// one LayerFormat per model layer, the lines that tell the user what was chosen and why, and
// warnings. Nothing is ignored in silence: a word that means nothing for this model is an Error
// that lists what is valid.
//
//   --kv-cache-dtype          auto | fp32 | fp16 | bf16 | fp8 (= fp8_e4m3) | fp8_e5m2 |
//   fp8_per_token_head |
//                             int8_per_token_head; float32, float16 and bfloat16 are spellings of
//                             the first three.
//   --kv-cache-dtype-k, -v    the same words, for K or V alone; they win over --kv-cache-dtype.
//   --kv-cache-dtype-skip-layers   words, repeated or separated by commas: sliding_window |
//   full_attention | N | A-B |
//                             first:N | last:N. N, A and B count model layers from 0; A-B includes
//                             both ends.
//
// `auto` follows the checkpoint's kv_cache_scheme, else the model's 16-bit dtype; an explicit word
// wins over both. A skipped layer is stored in the model's 16-bit dtype. fp8_e5m2 over a checkpoint
// that was calibrated for fp8_e4m3 is allowed with a warning: x / scale stays within 448, which
// e5m2 also holds, so the scales stay correct, but e5m2 has one mantissa bit less and nothing to
// win from them.
//
// Pure functions; any thread.
#pragma once

#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/dtype.h"
#include "octavo/kv_layout.h"

namespace octavo {

// Every format that --kv-cache-dtype offers, in the order in which people read of them.
inline constexpr KvFormat kOfferedFormats[] = {KvFormat::kBF16,
                                               KvFormat::kF16,
                                               KvFormat::kF32,
                                               KvFormat::kFp8E4M3,
                                               KvFormat::kFp8E5M2,
                                               KvFormat::kFp8PerTokenHead,
                                               KvFormat::kInt8PerTokenHead};

// What a skipped layer is stored in.
KvFormat SixteenBit(DType model_dtype);

struct KvPolicyOptions {
  std::string kv_cache_dtype = "auto";
  std::optional<std::string> kv_cache_dtype_k;
  std::optional<std::string> kv_cache_dtype_v;
  std::vector<std::string> skip_layers;
};

struct KvLayerFacts {
  int window = 0;  // tokens that a query sees, itself included; 0: all of them
  int kv_heads = 0;
  int head_dim = 0;
};

struct KvModelFacts {
  std::vector<KvLayerFacts> layers;
  DType dtype = DType::kBF16;  // of the model; float16 stays float16, all others mean bf16 pages
  // What the checkpoint's kv_cache_scheme asks for: "fp8_e4m3", or a word that only `auto` refuses.
  std::optional<std::string> checkpoint_format;
};

struct LayerFormat {
  KvFormat k = KvFormat::kBF16;
  KvFormat v = KvFormat::kBF16;
  bool operator==(const LayerFormat&) const = default;
};

struct KvPolicy {
  std::vector<LayerFormat> layers;  // one per model layer
  std::vector<std::string> lines;   // "layers 0-31: fp8_e4m3 (asked for)"
  std::vector<std::string> warnings;
};

KvPolicy ResolveKvPolicy(const KvPolicyOptions& options, const KvModelFacts& model);

// 8-bit formats whose scale is fixed before the run (per tensor or per kv head).
bool HasStaticScale(KvFormat format);

std::string FormatText(LayerFormat format);           // "fp8_e4m3" or "K fp8_e4m3, V bf16"
std::string LayersText(std::span<const int> layers);  // ascending: "layer 3", "layers 0-3,7"

// texts[i] is said of layer i (empty: nothing). One line per distinct text, "layers 0-3,7: TEXT".
std::vector<std::string> LinesByLayer(std::span<const std::string> texts);

}  // namespace octavo
