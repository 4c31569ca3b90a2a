// Stop strings in a text that arrives in pieces: nothing that could be the beginning of one is let
// out before it is known not to be.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace octavo {

class StopMatcher {
 public:
  // `include`: the stop string itself is part of the text.
  explicit StopMatcher(std::vector<std::string> stops, bool include = false)
      : stops_(std::move(stops)), include_(include) {}

  // What is certain now. Once a stop string is found, what is before it, and nothing ever after.
  std::string Push(std::string_view text);
  std::string Flush();  // the rest: the text ends here
  bool stopped() const { return stopped_; }

 private:
  std::vector<std::string> stops_;
  bool include_;
  bool stopped_ = false;
  std::string held_;
};

}  // namespace octavo
