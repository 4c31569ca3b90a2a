#include <fmt/core.h>

#include "cli/commands.h"
#include "cli/output_file.h"
#include "cli/progress.h"

namespace octavo::cli {

int CalibrateModel(const CalibrateCommandOptions& options) {
  const OutputFile scales(options.calibrate.output);  // Calibrate writes it halfway
  OutputFile json(options.json);
  const CalibrationReport report = Calibrate(options.calibrate, ProgressBar("chunks"));
  fmt::print("{}\nscales: {}\n", CalibrationTable(report), options.calibrate.output);
  if (json) json.Write(CalibrationJson(report));
  return 0;
}

}  // namespace octavo::cli
