// Added tokens: whole strings such as <|im_start|> that are recognised in the text before BPE sees
// it.
//
// Leftmost match, longest of those that begin at one place. Read-only after construction.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace octavo {

struct AddedToken {
  int32_t id = 0;
  std::string content;
  bool single_word = false;  // only where no word character touches it
  bool lstrip = false;       // takes the white space on its left along
  bool rstrip = false;       // and on its right
  bool normalized = true;    // looked for after normalising, by its normalised content
  bool special =
      false;  // a control token: may be skipped in decoding, may be read as plain text in encoding
};

// A stretch of text: an added token, or (token < 0) what lies between two.
struct TextSegment {
  size_t begin;
  size_t end;
  int32_t token;
};

class AddedTokenFinder {
 public:
  // `content`: what to look for, by position in the tokens that Split gets. If two are equal the
  // first wins.
  void Add(std::string_view content, size_t token_index);

  // Cuts `text` (valid UTF-8) into segments that cover it. `tokens` is the list the indices mean.
  std::vector<TextSegment> Split(std::string_view text, const std::vector<AddedToken>& tokens,
                                 bool recognise_special) const;

 private:
  struct Found {
    size_t length;
    int32_t token_index;
  };

  Found LongestAt(std::string_view text) const;

  // A trie: the children of node n by key n << 8 | byte; token_at_[n] is the index of the token
  // that ends there, or -1.
  std::unordered_map<uint64_t, uint32_t> children_;
  std::vector<int32_t> token_at_ = {-1};
  bool starts_[256] = {};  // the first bytes of all tokens: most positions need one look
};

}  // namespace octavo
