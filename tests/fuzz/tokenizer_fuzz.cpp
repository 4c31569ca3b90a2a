// Any bytes as tokenizer.json: FromJson returns a tokenizer or throws Error, and a tokenizer it
// returns can encode and decode. The first byte says how the rest is used: 0 as the file, else as a
// text for a small tokenizer.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <vector>

#include "base/error.h"
#include "text/detokenizer.h"
#include "text/tokenizer.h"

namespace {

using octavo::Detokenizer;
using octavo::Error;
using octavo::SpecialTokens;
using octavo::Tokenizer;

constexpr std::string_view kSmall = R"({
  "normalizer": {"type": "NFKC"},
  "added_tokens": [{"id": 9, "content": "<x>", "special": true, "lstrip": true, "rstrip": true}],
  "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "\\p{L}+|\\s+(?!\\S)|\\s+"},
                    "behavior": "MergedWithPrevious", "invert": false},
  "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"},
              {"type": "Strip", "content": " ", "start": 1, "stop": 2}]},
  "model": {"type": "BPE", "unk_token": "?", "byte_fallback": true,
            "vocab": {"?": 0, "a": 1, "b": 2, "ab": 3, " ": 4, "<0xC3>": 5, "<0x83>": 6, "aab": 7},
            "merges": ["a b", ["a", "ab"]]}})";

void Use(const Tokenizer& tokenizer, std::string_view text) {
  std::vector<int32_t> ids;
  try {
    ids = tokenizer.Encode(text);
    tokenizer.Encode(text, false, SpecialTokens::kPlainText);
  } catch (const Error&) {  // not UTF-8, or a regex that gives up
  }
  for (unsigned char byte : text) ids.push_back(byte);
  try {
    Detokenizer detokenizer(tokenizer);
    std::string streamed;
    for (int32_t id : ids) streamed += detokenizer.Push(id);
    streamed += detokenizer.Flush();
    if (streamed != tokenizer.Decode(ids)) std::abort();
  } catch (const Error&) {
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  const std::string_view bytes(reinterpret_cast<const char*>(data) + 1, size - 1);
  if (data[0] != 0) {
    static const Tokenizer small = Tokenizer::FromJson(kSmall, "small");
    Use(small, bytes);
    return 0;
  }
  try {
    const Tokenizer tokenizer = Tokenizer::FromJson(bytes, "fuzz");
    Use(tokenizer, bytes.substr(0, 64));
    Use(tokenizer, "ab  <x>\u00e9\n1 a");
  } catch (const Error&) {
  }
  return 0;
}
