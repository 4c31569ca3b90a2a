#include <fmt/core.h>

#include "cli/commands.h"
#include "cli/output_file.h"
#include "cli/progress.h"

namespace octavo::cli {

int BenchThroughput(const BenchThroughputOptions& options) {
  OutputFile json(options.json);
  const ThroughputReport report = octavo::BenchThroughput(options.bench, ProgressBar("requests"));
  fmt::print("{}", ThroughputTable(report));
  if (json) json.Write(ThroughputJson(report));
  return 0;
}

}  // namespace octavo::cli
