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
// linear in the length of the text. Decode streams through Detokenizer (detokenizer.h). Bytes that
// are not UTF-8 come out as U+FFFD; ids without a token (padding of the embedding) come out as
// nothing.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace octavo {

class TokenDecoder;

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
  // The same of what ordinary text becomes and Encode adds: without control tokens and the like,
  // which a file may have beyond its model's embedding (gemma-3-1b-it has one for images).
  int32_t text_vocab_size() const;
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
  const TokenDecoder& decoder() const;

  std::unique_ptr<const Impl> impl_;
};

}  // namespace octavo
