// Normalizer: what happens to text before it is cut into pieces. A list of steps, applied in order.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "text/pattern.h"
#include "text/unicode.h"

namespace octavo {

struct NormalizerStep {
  enum class Kind { kUnicode, kLowercase, kPrepend, kReplace, kStrip };

  Kind kind;
  NormalForm form = NormalForm::kNfc;  // kUnicode
  std::string content;                 // kPrepend, kReplace: what is put in
  std::optional<Pattern> pattern;      // kReplace: what is taken out
  bool left = false, right = false;    // kStrip: white space at which ends
};

// `text` must be valid UTF-8. Throws Error only if a pattern gives up (see Pattern::FindAll).
std::string ApplyNormalizer(const std::vector<NormalizerStep>& steps, std::string_view text);

}  // namespace octavo
