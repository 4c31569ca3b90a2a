// TokenDecoder: turns token strings back into text, piece by piece.
//
// tokenizer.json defines decoding as passes over the list of all tokens. Here every pass is a
// stream: text leaves as soon as no later token can change it, and what has left plus what Finish
// gives equals the whole-list result. What cannot be streamed (a regex over fused text) is refused
// when the decoder is made.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "text/pattern.h"
#include "text/unicode.h"

namespace octavo {

struct DecoderStep {
  enum class Kind {
    kReplace,       // `pattern` by `content`, in each token
    kByteFallback,  // runs of <0xNN> tokens become bytes; a run that is not UTF-8 becomes one
                    // U+FFFD per token
    kFuse,          // all tokens become one
    kStrip,         // up to `start` leading and `stop` trailing `character`s of each token
    kMetaspace,     // `character` becomes a space; in the first token it vanishes if `drop_first`
    kByteLevel      // characters of the byte-level alphabet become bytes, and all tokens one text
  };

  Kind kind;
  std::optional<Pattern> pattern;
  std::string content;
  char32_t character = 0;
  size_t start = 0, stop = 0;
  bool drop_first = false;
};

class TokenDecoder {
 public:
  // No steps: tokens are joined by spaces. Throws Error naming `where` for an order of steps that
  // is not supported.
  TokenDecoder(std::vector<DecoderStep> steps, bool join_with_spaces, const std::string& where);

 private:
  friend class DecoderStream;

  struct Step {
    DecoderStep step;
    bool fused;  // works on one long text in fragments, not on tokens
  };
  std::vector<Step> steps_;
  bool join_with_spaces_;
};

// One text being decoded. The decoder must outlive it. Fragments are whole characters.
class DecoderStream {
 public:
  explicit DecoderStream(const TokenDecoder& decoder);

  void Push(std::string_view token, std::string* out);
  // The rest; afterwards the stream is ready for another text.
  void Finish(std::string* out);

 private:
  struct State {
    bool started = false;  // kStrip: past the leading characters; kMetaspace: past the first token
    bool broken = false;   // kByteFallback: the run is not UTF-8 whatever follows
    size_t checked = 0;    // kByteFallback: how much of the run is whole characters
    size_t stripped = 0;   // kStrip: leading characters taken off
    size_t held = 0;       // kStrip: trailing characters that go if the text ends here
    std::string
        pending;  // kByteFallback: the run; kReplace over fused text: the beginning of a match
    Utf8Assembler assembler;  // kByteLevel
  };

  void Run(size_t step, std::string_view text, std::string* out);
  void ReplaceFused(size_t step, std::string_view text, std::string* out);
  void ByteFallback(size_t step, std::string_view text, std::string* out);
  void EndByteRun(size_t step, std::string* out);
  void StripFused(size_t step, std::string_view text, std::string* out);
  void Metaspace(size_t step, std::string_view text, std::string* out);
  void ByteLevel(size_t step, std::string_view text, std::string* out);

  const TokenDecoder* decoder_;
  std::vector<State> states_;
  bool started_ = false;
};

}  // namespace octavo
