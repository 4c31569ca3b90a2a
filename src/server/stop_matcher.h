// Stop strings in a text that arrives in pieces: nothing that could be the beginning of one is let
// out before it is known not to be. Its time is the text's length times the number of stop strings,
// however long those are.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace octavo {

class StopMatcher {
 public:
  // None is empty. `include`: the stop string itself is part of the text.
  explicit StopMatcher(const std::vector<std::string>& stops, bool include = false);

  // What is certain now. Once a stop string is found, what is before it, and nothing ever after.
  std::string Push(std::string_view text);
  std::string Flush();  // the rest: no stop string goes on from here
  bool stopped() const { return stopped_; }

 private:
  // Knuth, Morris and Pratt's.
  struct Stop {
    std::string text;
    std::vector<uint32_t> border;  // [i]: of the first i + 1 bytes, the longest end they begin with
    size_t matched = 0;            // bytes of `text` that what came so far ends with

    void Advance(char c);
  };

  std::vector<Stop> stops_;
  bool include_;
  bool stopped_ = false;
  std::string held_;
};

}  // namespace octavo
