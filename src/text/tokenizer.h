// Tokenizer: text to token ids and back, from a Hugging Face tokenizer.json.
//
//   Tokenizer tokenizer = Tokenizer::FromFolder("checkpoints/needle");
//   std::vector<int32_t> ids = tokenizer.Encode("Hello");
//   std::string text = tokenizer.Decode(ids);
//
// Byte-level and SentencePiece-style BPE, with ids and text equal to those of Hugging Face's
// `tokenizers`. A file that needs anything else is refused, by the component's name, when it is
// loaded (see tokenizer_json.h). Immutable: all const functions may be called from any number of
// threads.
//
// Encode: added tokens are cut out, what lies between them is normalised, cut again by the added
// tokens that want normalised text, split by the pre-tokenizer, and merged by BPE; time is near
// linear in the length of the text. Decode streams through Detokenizer. Bytes that are not UTF-8
// come out as U+FFFD; ids without a token (padding of the embedding) come out as nothing.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "text/decoder.h"

namespace octavo {

// What Encode makes of control tokens (`special`) that are spelled out in the text. Text from
// strangers is better read as kPlainText, or <|im_end|> in a document ends the turn.
enum class SpecialTokens { kRecognise, kPlainText };

class Tokenizer {
 public:
  // tokenizer.json and, if present, tokenizer_config.json in `folder`. Throw Error; `name` begins
  // its message.
  static Tokenizer FromFolder(const std::filesystem::path& folder);
  static Tokenizer FromJson(std::string_view json, const std::string& name);

  Tokenizer(Tokenizer&&) noexcept;
  Tokenizer& operator=(Tokenizer&&) noexcept;
  ~Tokenizer();

  // `add_special_tokens`: whether the post-processor adds its own (<bos>). Throws Error if `text`
  // is not UTF-8, is 1 GiB or longer, or defeats the pre-tokenizer's regular expression.
  std::vector<int32_t> Encode(std::string_view text, bool add_special_tokens = true,
                              SpecialTokens in_text = SpecialTokens::kRecognise) const;

  std::string Decode(std::span<const int32_t> ids, bool skip_special_tokens = false) const;

  // One more than the largest id; some ids below may have no token.
  int32_t vocab_size() const;
  std::optional<int32_t> IdOf(std::string_view token) const;
  // As the vocabulary spells it ("Ġhello"); empty if there is no such token.
  std::string_view TokenOf(int32_t id) const;
  bool IsSpecial(int32_t id) const;

  // From tokenizer_config.json; nothing if it does not name them.
  std::optional<int32_t> bos_id() const;
  std::optional<int32_t> eos_id() const;
  std::optional<int32_t> pad_id() const;

 private:
  friend class Detokenizer;
  struct Impl;

  explicit Tokenizer(std::unique_ptr<const Impl> impl);

  std::unique_ptr<const Impl> impl_;
};

// Decodes tokens as they are generated.
//
// Push returns the text that is now certain: whole characters that no later token can change. Bytes
// of an unfinished character wait, and so does a run of <0xNN> tokens, whose meaning depends on all
// of it. All of Push's results and then Flush's, put together, equal Tokenizer::Decode of the same
// ids. One text at a time, one thread at a time; the tokenizer must outlive it.
class Detokenizer {
 public:
  explicit Detokenizer(const Tokenizer& tokenizer, bool skip_special_tokens = false);

  std::string Push(int32_t id);
  // The rest of the text; an unfinished character becomes U+FFFD. The next Push begins a new text.
  std::string Flush();

 private:
  friend class Tokenizer;

  void Push(int32_t id, std::string* out);

  const Tokenizer* tokenizer_;
  bool skip_special_tokens_;
  DecoderStream stream_;
};

}  // namespace octavo
