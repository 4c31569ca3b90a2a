#include <fmt/core.h>

#include "cli/commands.h"

namespace octavo::cli {

int VerifyModel(const VerifyOptions& options) {
  const VerifyReport report = Verify(options);
  fmt::print("{}", FormatReport(report));
  return report.passed ? 0 : 1;
}

}  // namespace octavo::cli
