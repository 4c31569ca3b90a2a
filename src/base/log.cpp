#include "base/log.h"

#include <cstdio>
#include <string>

namespace octavo {
namespace {

void ToStderr(LogLevel level, std::string_view line) {
  static constexpr const char* kNames[] = {"debug", "info", "warning", "error"};
  // One write, so that lines of several threads do not mix.
  std::string text = std::string(kNames[static_cast<int>(level)]) + ": " + std::string(line) + "\n";
  std::fwrite(text.data(), 1, text.size(), stderr);
}

LogSink g_sink = ToStderr;
LogLevel g_least = LogLevel::kInfo;

}  // namespace

void SetLogSink(LogSink sink) { g_sink = sink ? sink : ToStderr; }
void SetLogLevel(LogLevel least) { g_least = least; }

void Log(LogLevel level, std::string_view line) {
  if (level >= g_least) g_sink(level, line);
}

}  // namespace octavo
