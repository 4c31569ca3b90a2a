#include "text/normalizer.h"

namespace octavo {
namespace {

std::string ReplaceAll(const Pattern& pattern, const std::string& content, std::string_view text) {
  std::vector<Match> matches;
  pattern.FindAll(text, &matches);
  std::string out;
  out.reserve(text.size() + matches.size() * content.size());
  size_t copied = 0;
  for (const Match& match : matches) {
    out += text.substr(copied, match.begin - copied);
    out += content;
    copied = match.end;
  }
  out += text.substr(copied);
  return out;
}

std::string_view StripSpace(std::string_view text, bool left, bool right) {
  size_t begin = 0;
  while (left && begin < text.size()) {
    size_t next = begin;
    if (!IsWhiteSpace(NextCodePoint(text, &next))) break;
    begin = next;
  }
  size_t end = text.size();
  while (right && end > begin) {
    const size_t last = PreviousCodePoint(text, end);
    size_t at = last;
    if (!IsWhiteSpace(NextCodePoint(text, &at))) break;
    end = last;
  }
  return text.substr(begin, end - begin);
}

}  // namespace

std::string ApplyNormalizer(const std::vector<NormalizerStep>& steps, std::string_view text) {
  std::string out(text);
  for (const NormalizerStep& step : steps) {
    switch (step.kind) {
      case NormalizerStep::Kind::kUnicode:
        out = Normalize(out, step.form);
        break;
      case NormalizerStep::Kind::kLowercase:
        out = Lowercase(out);
        break;
      case NormalizerStep::Kind::kPrepend:
        if (!out.empty()) out.insert(0, step.content);
        break;
      case NormalizerStep::Kind::kReplace:
        out = ReplaceAll(*step.pattern, step.content, out);
        break;
      case NormalizerStep::Kind::kStrip:
        out = std::string(StripSpace(out, step.left, step.right));
        break;
    }
  }
  return out;
}

}  // namespace octavo
