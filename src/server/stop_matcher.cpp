#include "server/stop_matcher.h"

#include <algorithm>
#include <utility>

namespace octavo {

void StopMatcher::Stop::Advance(char c) {
  while (matched > 0 && text[matched] != c) matched = border[matched - 1];
  if (text[matched] == c) ++matched;
}

StopMatcher::StopMatcher(const std::vector<std::string>& stops, bool include) : include_(include) {
  for (const std::string& text : stops) {
    Stop stop{.text = text, .border = {0}};
    for (size_t i = 1; i < text.size(); ++i) {
      stop.Advance(text[i]);
      stop.border.push_back(static_cast<uint32_t>(stop.matched));
    }
    stop.matched = 0;
    stops_.push_back(std::move(stop));
  }
}

std::string StopMatcher::Push(std::string_view text) {
  if (stopped_) return "";
  const size_t before = held_.size();
  held_ += text;
  size_t first = std::string::npos, length = 0, keep = 0;
  for (Stop& stop : stops_) {
    for (size_t i = before; i < held_.size() && stop.matched < stop.text.size(); ++i) {
      stop.Advance(held_[i]);
      const size_t at = i + 1 - stop.matched;
      if (stop.matched == stop.text.size() && at < first) {
        first = at;
        length = stop.text.size();
      }
    }
    keep = std::max(keep, stop.matched);
  }
  if (first != std::string::npos) {
    stopped_ = true;
    return held_.substr(0, first + (include_ ? length : 0));
  }
  // The longest end that some stop string begins with stays.
  std::string out = held_.substr(0, held_.size() - keep);
  held_.erase(0, out.size());
  return out;
}

std::string StopMatcher::Flush() {
  for (Stop& stop : stops_) stop.matched = 0;
  return stopped_ ? "" : std::exchange(held_, {});
}

}  // namespace octavo
