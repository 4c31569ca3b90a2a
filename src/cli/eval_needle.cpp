#include <unistd.h>

#include <fmt/core.h>

#include "cli/commands.h"
#include "cli/output_file.h"

namespace octavo::cli {
namespace {

void ShowProgress(int done, int all) {
  constexpr int kWidth = 40;
  const int filled = kWidth * done / all;
  fmt::print(stderr, "\r[{:#>{}}{:.>{}}] {}/{} questions{}", "", filled, "", kWidth - filled, done,
             all, done == all ? "\n" : "");
}

}  // namespace

int EvalNeedle(const EvalNeedleOptions& options) {
  const OutputFile json(options.json), html(options.html);
  const NeedleReport report =
      octavo::EvalNeedle(options.eval, isatty(STDERR_FILENO) ? ShowProgress : NeedleProgress());
  fmt::print("{}", NeedleTable(report));
  if (json) json.Write(NeedleJson(report));
  if (html) {
    html.Write(NeedleHtml(report));
    fmt::print("\nreport: {}\n", html.path());
  }
  return 0;
}

}  // namespace octavo::cli
