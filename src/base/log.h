// One log, four levels. Backends and tests install their own sink; without one, lines go to stderr.
#pragma once

#include <string_view>

namespace octavo {

enum class LogLevel { kDebug, kInfo, kWarning, kError };

using LogSink = void (*)(LogLevel, std::string_view);

// Not thread-safe: call once, at start-up.
void SetLogSink(LogSink sink);
void SetLogLevel(LogLevel least);

// Thread-safe; one line per call, without a newline.
void Log(LogLevel level, std::string_view line);

}  // namespace octavo
