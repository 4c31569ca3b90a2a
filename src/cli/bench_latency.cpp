#include <fmt/core.h>

#include "cli/commands.h"
#include "cli/output_file.h"
#include "cli/progress.h"

namespace octavo::cli {

int BenchLatency(const BenchLatencyOptions& options) {
  OutputFile json(options.json), html(options.html);
  const LatencyReport report = octavo::BenchLatency(options.bench, ProgressBar("requests"));
  fmt::print("{}", LatencyTable(report));
  if (json) json.Write(LatencyJson(report));
  if (html) {
    html.Write(LatencyHtml(report));
    fmt::print("\nreport: {}\n", html.path());
  }
  return 0;
}

}  // namespace octavo::cli
