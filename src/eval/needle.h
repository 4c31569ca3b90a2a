// octavo eval needle: hides key/value needles in long text, asks for each, and compares cache
// formats by exact answers and by the mean log-probability of the right answer, which shows damage
// before answers break.
//
// One haystack of a length holds `needles` needles at even depths, so one prefill serves all
// depths: the first question pays for it, the others find it in the prefix cache. Formats take
// turns on the same haystack.
//
// On request also what each format does to attention's output (eval/attention_error.h), for the
// question about the middle needle of each length's first haystack.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "eval/attention_error.h"
#include "octavo/engine.h"

namespace octavo {

struct NeedleEvalOptions {
  EngineOptions engine;  // its cache format is replaced by each of `formats`
  // eval/variant.h says what a format may be followed by.
  std::vector<std::string> formats = {"bf16", "fp8", "int8_per_token_head"};
  std::vector<int64_t> lengths = {4096, 16384, 32768};  // tokens of the prompt, question included
  int needles = 8;
  int samples = 1;
  uint64_t seed = 1;
  std::string haystack_file;     // empty: generated text
  bool attention_error = false;  // one more prefill per format and length, and one in bf16
};

struct NeedleCell {  // one format, length and depth
  int asked = 0, exact = 0;
  double logprob_sum = 0;  // mean over the answer's tokens, summed over questions
};

struct NeedleRow {  // one format and length
  std::string format;
  int64_t length = 0;
  std::vector<NeedleCell> depths;  // needle i stands at (i + 0.5) / needles
  double cache_bytes_per_token = 0;
  double prefill_tokens_per_second = 0,
         decode_tokens_per_second = 0;  // one sequence; medians over samples
  HeadErrors attention_error;           // against bf16; empty: not measured

  NeedleCell Total() const;
};

struct NeedleReport {
  std::string model;
  std::vector<std::string> formats;
  std::vector<int64_t> lengths;
  int needles = 0, samples = 0;
  uint64_t seed = 0;
  std::vector<NeedleRow> rows;  // by length, then format
};

// Called with how many are done, of how many: questions, and prompts of the attention error.
using NeedleProgress = std::function<void(int done, int all)>;

NeedleReport EvalNeedle(const NeedleEvalOptions& options, const NeedleProgress& progress = nullptr);

std::string NeedleTable(const NeedleReport& report);
std::string NeedleJson(const NeedleReport& report);
std::string NeedleHtml(
    const NeedleReport& report);  // one self-contained page with heat maps per format

}  // namespace octavo
