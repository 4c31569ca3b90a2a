// tokenizer.json, read and checked: the one place that knows the file's format.
//
// Everything is checked here, so that the parts can be used without further questions. What Octavo
// cannot do exactly as Hugging Face's library is refused by its name (kUnsupported), never ignored;
// `truncation` and `padding` are the exception, as they are for transformers: they are about
// batches for training.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "text/added_tokens.h"
#include "text/bpe.h"
#include "text/decoder.h"
#include "text/normalizer.h"
#include "text/pre_tokenizer.h"

namespace octavo {

struct TokenizerParts {
  std::vector<NormalizerStep> normalizer;
  std::vector<PreTokenizerStep> pre_tokenizer;
  BpeModel model;
  std::vector<AddedToken> added_tokens;
  // What the post-processor puts around a text.
  std::vector<int32_t> prefix_ids, suffix_ids;
  std::vector<DecoderStep> decoder;
  bool join_with_spaces = false;  // no decoder at all
};

// `name` begins every error. Throws Error.
TokenizerParts ReadTokenizerJson(std::string_view json, const std::string& name);

}  // namespace octavo
