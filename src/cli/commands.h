// One function per subcommand, in the file of its name; cli/main.cpp owns the flags. Each prints to
// stdout and returns the exit code; what the user got wrong is thrown as Error.
#pragma once

#include <string>
#include <vector>

#include "eval/bench_decode.h"
#include "eval/bench_latency.h"
#include "eval/bench_throughput.h"
#include "eval/calibrate.h"
#include "eval/needle.h"
#include "eval/verify.h"
#include "octavo/engine.h"
#include "server/bench_serve.h"
#include "server/http_server.h"

namespace octavo::cli {

struct GenerateOptions {
  EngineOptions engine;
  SamplingParams sampling;
  std::string prompt;
  std::string prompt_file;
  bool stats = false;
};
int Generate(const GenerateOptions& options);

struct ServeOptions {
  EngineOptions engine;
  ServerOptions server;  // folders and version: filled in from what is known here
};
int Serve(const ServeOptions& options);

struct InspectOptions {
  std::string model;
  int64_t memory_bytes = int64_t{16} << 30;
  int64_t length = 0;  // tokens; 0: 32k, or the most the model takes
};
int Inspect(const InspectOptions& options);

struct CalibrateCommandOptions {
  CalibrateOptions calibrate;
  std::string json;
};
int CalibrateModel(const CalibrateCommandOptions& options);

int VerifyModel(const VerifyOptions& options);

struct EvalNeedleOptions {
  NeedleEvalOptions eval;
  std::string json, html;  // files to write; empty: none
};
int EvalNeedle(const EvalNeedleOptions& options);

struct BenchDecodeOptions {
  DecodeBenchOptions bench;
  std::string json;
};
int BenchDecode(const BenchDecodeOptions& options);

struct BenchLatencyOptions {
  LatencyBenchOptions bench;
  std::string json, html;
};
int BenchLatency(const BenchLatencyOptions& options);

struct BenchThroughputOptions {
  ThroughputBenchOptions bench;
  std::string json;
};
int BenchThroughput(const BenchThroughputOptions& options);

struct BenchServeOptions {
  ServeBenchOptions bench;  // base_url empty: of host and port
  std::string host = "127.0.0.1";
  int port = 8000;
  bool save_result = false, save_detailed = false;
  std::string result_dir, result_filename;  // empty: here; named after load and time
};
int BenchServe(const BenchServeOptions& options);

}  // namespace octavo::cli
