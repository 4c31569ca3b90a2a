#include <ctime>
#include <filesystem>

#include <fmt/chrono.h>
#include <fmt/core.h>

#include "cli/commands.h"
#include "cli/output_file.h"
#include "cli/progress.h"

namespace octavo::cli {
namespace {

std::string ResultPath(const BenchServeOptions& options, const std::string& date) {
  if (!options.save_result) return "";
  std::string name = options.result_filename;
  if (name.empty()) {
    const std::string concurrency =
        options.bench.max_concurrency > 0
            ? fmt::format("-concurrency{}", options.bench.max_concurrency)
            : "";
    name = fmt::format("openai-{}qps{}-{}.json", options.bench.request_rate, concurrency, date);
  }
  return (std::filesystem::path(options.result_dir) / name).string();
}

}  // namespace

int BenchServe(const BenchServeOptions& options) {
  const std::string date = fmt::format("{:%Y%m%d-%H%M%S}", fmt::localtime(std::time(nullptr)));
  OutputFile json(ResultPath(options, date));
  ServeBenchOptions bench = options.bench;
  if (bench.base_url.empty())
    bench.base_url = fmt::format("http://{}:{}", options.host, options.port);
  const ServeReport report = octavo::BenchServe(bench, ProgressBar("requests"));
  fmt::print("{}", ServeTable(report));
  if (json) {
    json.Write(ServeJson(report, date, options.save_detailed));
    fmt::print("result: {}\n", json.path());
  }
  const size_t failed = report.requests.size() - static_cast<size_t>(report.completed());
  for (const ServedRequest& request : report.requests) {
    if (request.error.empty()) continue;
    fmt::print(stderr, "octavo: {} of {} requests failed, the first with: {}\n", failed,
               report.requests.size(), request.error);
    break;
  }
  return report.completed() > 0 ? 0 : 1;
}

}  // namespace octavo::cli
