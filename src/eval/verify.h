// octavo verify: runs a file of reference logits (tools/make_golden.py makes one from any model
// with transformers) and says how far Octavo is from it: whole prompts, chunks of 7, and token by
// token, which must agree to the bit on the
// CPU, and elsewhere be as close to the reference as the whole prompt.
#pragma once

#include <string>
#include <vector>

#include "octavo/engine.h"

namespace octavo {

struct VerifyOptions {
  EngineOptions
      engine;  // engine.model: the folder. kv_cache_dtype "auto" follows the dtype: fp32 or bf16
  std::string golden;    // empty: golden.safetensors in the model's folder
  double tolerance = 0;  // relative L2; 0: see VerifyReport::tolerance_source
  // The reference comes from a model cast as a whole (`model.to(torch.bfloat16)`), which also
  // rounds its RoPE frequencies, unlike from_pretrained(dtype=bfloat16): round ours too, for
  // comparison only.
  bool bfloat16_rope = false;
};

struct PromptResult {
  int tokens = 0;  // 0: all prompts together
  int rows = 0;    // logits compared, the last ones of the prompt
  double relative_l2 = 0, max_error = 0, top1_agreement = 0, mean_kl = 0;
  double tolerance = 0;  // 0: not judged
  bool chunks_identical = false;
  double chunked_l2 = 0;  // relative L2 of chunks of 7 and of single tokens: the larger one
  std::string
      greedy;  // "identical", "tie at N" (two tokens within twice max_error), "parts at N", "-"
  bool passed = false;
};

struct VerifyReport {
  std::string reference;         // the tensors compared with: "logits", "logits_fp8kv"
  std::string tolerance_source;  // where the tolerance comes from
  // float32 is judged prompt by prompt. bfloat16 is judged over all prompts together, which is then
  // the last entry: in MoE models its error is mostly a few flipped routing decisions, and which
  // prompt they hit is chance, there as here. On a GPU, top-1 agreement may be 2 points below that
  // of transformers' own bfloat16 at most.
  std::vector<PromptResult> prompts;
  std::vector<double>
      hidden_l2;  // of prompt 0's residual stream entering each layer, and after the final norm
  bool passed = false;
};

VerifyReport Verify(const VerifyOptions& options);
std::string FormatReport(const VerifyReport& report);

}  // namespace octavo
