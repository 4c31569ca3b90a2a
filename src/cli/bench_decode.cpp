#include <fmt/core.h>

#include "cli/commands.h"
#include "cli/output_file.h"

namespace octavo::cli {

int BenchDecode(const BenchDecodeOptions& options) {
  OutputFile json(options.json);
  const DecodeBenchReport report = octavo::BenchDecode(options.bench);
  fmt::print("{}", DecodeBenchTable(report));
  if (json) json.Write(DecodeBenchJson(report));
  return 0;
}

}  // namespace octavo::cli
