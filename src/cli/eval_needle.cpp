#include <fmt/core.h>

#include "cli/commands.h"
#include "cli/output_file.h"
#include "cli/progress.h"

namespace octavo::cli {
int EvalNeedle(const EvalNeedleOptions& options) {
  OutputFile json(options.json), html(options.html);
  const NeedleReport report = octavo::EvalNeedle(options.eval, ProgressBar("prompts"));
  fmt::print("{}", NeedleTable(report));
  if (json) json.Write(NeedleJson(report));
  if (html) {
    html.Write(NeedleHtml(report));
    fmt::print("\nreport: {}\n", html.path());
  }
  return 0;
}

}  // namespace octavo::cli
