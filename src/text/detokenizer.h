// Detokenizer: decodes tokens as they are generated.
//
// Push returns the text that is now certain: whole characters that no later token can change. Bytes
// of an unfinished character wait, and so does a run of <0xNN> tokens, whose meaning depends on all
// of it. All of Push's results and then Flush's, put together, equal Tokenizer::Decode of the same
// ids. One text at a time, one thread at a time; the tokenizer must outlive it.
#pragma once

#include <cstdint>
#include <string>

#include "text/decoder.h"
#include "text/tokenizer.h"

namespace octavo {

class Detokenizer {
 public:
  explicit Detokenizer(const Tokenizer& tokenizer, bool skip_special_tokens = false);

  std::string Push(int32_t id);
  // Appends instead.
  void Push(int32_t id, std::string* out);
  // The rest of the text; an unfinished character becomes U+FFFD. The next Push begins a new text.
  std::string Flush();

 private:
  const Tokenizer* tokenizer_;
  bool skip_special_tokens_;
  DecoderStream stream_;
};

}  // namespace octavo
