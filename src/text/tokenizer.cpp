#include "text/tokenizer.h"

#include <fmt/format.h>

#include <algorithm>
#include <unordered_map>

#include "base/error.h"
#include "io/json.h"
#include "io/mapped_file.h"
#include "text/added_tokens.h"
#include "text/bpe.h"
#include "text/decoder.h"
#include "text/detokenizer.h"
#include "text/normalizer.h"
#include "text/pre_tokenizer.h"
#include "text/tokenizer_config.h"
#include "text/tokenizer_json.h"
#include "text/unicode.h"

namespace octavo {
namespace {

// Offsets inside a piece are 32 bits wide, and byte-level text is up to twice as long as the text.
constexpr size_t kMaxTextBytes = size_t{1} << 30;
void CheckText(std::string_view text) {
  if (text.size() >= kMaxTextBytes) {
    throw Error(
        ErrorCode::kResourceExhausted,
        fmt::format("text: expected less than {} bytes, found {}", kMaxTextBytes, text.size()));
  }
  const size_t valid = ValidUtf8Length(text);
  if (valid < text.size()) {
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("text: expected UTF-8, found byte 0x{:02X} at offset {}",
                            static_cast<uint8_t>(text[valid]), valid));
  }
}

}  // namespace

struct Tokenizer::Impl {
  explicit Impl(TokenizerParts parts, const std::string& name)
      : normalizer(std::move(parts.normalizer)),
        pre_tokenizer(std::move(parts.pre_tokenizer)),
        bpe(std::move(parts.model)),
        prefix_ids(std::move(parts.prefix_ids)),
        suffix_ids(std::move(parts.suffix_ids)),
        decoder(std::move(parts.decoder), parts.join_with_spaces, name + ": decoder"),
        vocab_size(bpe.vocabulary().size()) {
    for (AddedToken& token : parts.added_tokens) AddToken(std::move(token), name);
    for (const std::vector<int32_t>* ids : {&prefix_ids, &suffix_ids}) {
      for (int32_t id : *ids) {
        if (TokenOf(id).empty()) {
          throw Error(
              ErrorCode::kInvalidArgument,
              fmt::format("{}: post_processor.special_tokens: expected ids of tokens, found {}",
                          name, id));
        }
      }
    }
  }

  // A token that the model has too keeps the model's id, whatever the file says, as in HF.
  void AddToken(AddedToken token, const std::string& name) {
    if (token.content.empty() || added_by_content.contains(token.content)) return;
    if (const auto id = bpe.vocabulary().IdOf(token.content)) token.id = *id;
    const std::string_view holder = TokenOf(token.id);
    if (!holder.empty() && holder != token.content) {
      throw Error(
          ErrorCode::kInvalidArgument,
          fmt::format("{}: added_tokens: expected an id of its own for {}, found {}, which is {}",
                      name, Quote(token.content), token.id, Quote(holder)));
    }
    const size_t index = added.size();
    if (token.normalized) {
      normalized_finder.Add(ApplyNormalizer(normalizer, token.content), index);
    } else {
      raw_finder.Add(token.content, index);
    }
    vocab_size = std::max(vocab_size, token.id + 1);
    added_by_id.emplace(token.id, index);
    added_by_content.emplace(token.content, token.id);
    added.push_back(std::move(token));
  }

  std::optional<int32_t> IdOf(std::string_view token) const {
    if (token.empty()) return std::nullopt;
    const auto found = added_by_content.find(std::string(token));
    if (found != added_by_content.end()) return found->second;
    return bpe.vocabulary().IdOf(token);
  }

  std::string_view TokenOf(int32_t id) const {
    const auto found = added_by_id.find(id);
    return found != added_by_id.end() ? added[found->second].content : bpe.vocabulary().TokenOf(id);
  }

  // Text without added tokens of the raw kind.
  void EncodeBetween(std::string_view text, bool at_text_start, bool recognise_special,
                     Bpe::Scratch* scratch, std::vector<int32_t>* ids) const {
    const std::string normalized = ApplyNormalizer(normalizer, text);
    for (const TextSegment& segment :
         normalized_finder.Split(normalized, added, recognise_special)) {
      if (segment.token >= 0) {
        ids->push_back(segment.token);
        continue;
      }
      PieceList list;
      list.text = normalized.substr(segment.begin, segment.end - segment.begin);
      list.pieces.push_back({.begin = 0,
                             .end = list.text.size(),
                             .at_text_start = at_text_start && segment.begin == 0});
      ApplyPreTokenizer(pre_tokenizer, &list);
      for (const Piece& piece : list.pieces) {
        bpe.Encode(std::string_view(list.text).substr(piece.begin, piece.end - piece.begin),
                   scratch, ids);
      }
    }
  }

  const std::vector<NormalizerStep> normalizer;
  const std::vector<PreTokenizerStep> pre_tokenizer;
  const Bpe bpe;
  const std::vector<int32_t> prefix_ids, suffix_ids;
  const TokenDecoder decoder;
  int32_t vocab_size;
  std::vector<AddedToken> added;
  std::unordered_map<int32_t, size_t> added_by_id;  // positions in `added`
  std::unordered_map<std::string, int32_t> added_by_content;
  AddedTokenFinder raw_finder, normalized_finder;
  std::optional<int32_t> bos_id, eos_id, pad_id;
};

Tokenizer::Tokenizer(std::unique_ptr<const Impl> impl) : impl_(std::move(impl)) {}
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;
Tokenizer& Tokenizer::operator=(Tokenizer&&) noexcept = default;
Tokenizer::~Tokenizer() = default;

Tokenizer Tokenizer::FromJson(std::string_view json, const std::string& name) {
  return Tokenizer(std::make_unique<const Impl>(ReadTokenizerJson(json, name), name));
}

Tokenizer Tokenizer::FromFolder(const std::filesystem::path& folder) {
  const std::string path = (folder / "tokenizer.json").string();
  auto impl = std::make_unique<Impl>(ReadTokenizerJson(MappedFile(path).bytes(), path), path);
  const std::string config_path = (folder / "tokenizer_config.json").string();
  if (IsThere(config_path)) {
    TokenizerConfig config = ReadTokenizerConfig(MappedFile(config_path).bytes(), config_path);
    for (AddedToken& token : config.added_tokens) impl->AddToken(std::move(token), config_path);
    impl->bos_id = impl->IdOf(config.bos_token);
    impl->eos_id = impl->IdOf(config.eos_token);
    impl->pad_id = impl->IdOf(config.pad_token);
  }
  return Tokenizer(std::move(impl));
}

std::vector<int32_t> Tokenizer::Encode(std::string_view text, bool add_special_tokens,
                                       SpecialTokens in_text) const {
  CheckText(text);
  const bool recognise_special = in_text == SpecialTokens::kRecognise;
  std::vector<int32_t> ids;
  ids.reserve(text.size() / 3 + impl_->prefix_ids.size() + impl_->suffix_ids.size());
  if (add_special_tokens) ids = impl_->prefix_ids;
  Bpe::Scratch scratch;
  for (const TextSegment& segment :
       impl_->raw_finder.Split(text, impl_->added, recognise_special)) {
    if (segment.token >= 0) {
      ids.push_back(segment.token);
    } else {
      impl_->EncodeBetween(text.substr(segment.begin, segment.end - segment.begin),
                           segment.begin == 0, recognise_special, &scratch, &ids);
    }
  }
  if (add_special_tokens) ids.insert(ids.end(), impl_->suffix_ids.begin(), impl_->suffix_ids.end());
  return ids;
}

std::string Tokenizer::Decode(std::span<const int32_t> ids, bool skip_special_tokens) const {
  Detokenizer detokenizer(*this, skip_special_tokens);
  std::string text;
  for (int32_t id : ids) detokenizer.Push(id, &text);
  return text += detokenizer.Flush();
}

int32_t Tokenizer::vocab_size() const { return impl_->vocab_size; }
int32_t Tokenizer::text_vocab_size() const {
  int32_t size = impl_->bpe.vocabulary().size();
  for (const std::vector<int32_t>* ids : {&impl_->prefix_ids, &impl_->suffix_ids}) {
    for (const int32_t id : *ids) size = std::max(size, id + 1);
  }
  return size;
}
std::optional<int32_t> Tokenizer::IdOf(std::string_view token) const { return impl_->IdOf(token); }
std::string_view Tokenizer::TokenOf(int32_t id) const { return impl_->TokenOf(id); }

bool Tokenizer::IsSpecial(int32_t id) const {
  const auto found = impl_->added_by_id.find(id);
  return found != impl_->added_by_id.end() && impl_->added[found->second].special;
}

std::optional<int32_t> Tokenizer::bos_id() const { return impl_->bos_id; }
std::optional<int32_t> Tokenizer::eos_id() const { return impl_->eos_id; }
std::optional<int32_t> Tokenizer::pad_id() const { return impl_->pad_id; }
const TokenDecoder& Tokenizer::decoder() const { return impl_->decoder; }

}  // namespace octavo
