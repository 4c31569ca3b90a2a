#include "server/stop_matcher.h"

#include <algorithm>
#include <utility>

namespace octavo {

std::string StopMatcher::Push(std::string_view text) {
  if (stopped_) return "";
  held_ += text;
  size_t first = std::string::npos, length = 0;
  for (const std::string& stop : stops_) {
    const size_t at = held_.find(stop);
    if (at < first) {
      first = at;
      length = stop.size();
    }
  }
  if (first != std::string::npos) {
    stopped_ = true;
    return held_.substr(0, first + (include_ ? length : 0));
  }
  // The longest end that some stop string begins with stays.
  size_t keep = 0;
  for (const std::string& stop : stops_) {
    for (size_t n = std::min(stop.size() - 1, held_.size()); n > keep; --n) {
      if (std::string_view(held_).ends_with(std::string_view(stop).substr(0, n))) keep = n;
    }
  }
  std::string out = held_.substr(0, held_.size() - keep);
  held_.erase(0, out.size());
  return out;
}

std::string StopMatcher::Flush() { return stopped_ ? "" : std::exchange(held_, {}); }

}  // namespace octavo
