// Conformance of the CUDA kernels on the machine's GPU: scripts/build-cuda-tests builds it with
// nvcc and a C++ compiler alone.
//
// cuda_conformance [--quick] [append] [attention] [accuracy] [accumulator] [ops]: everything, or
// the named parts; --quick is a short list for compute-sanitizer. One line per failure, a summary
// last, exit code 1 if any failed, 77 where there is no GPU.
#include <chrono>
#include <cstring>
#include <set>

#include "cuda_memory.h"

int main(int argc, char** argv) {
  using namespace octavo::conformance;
  bool quick = false;
  std::set<std::string> parts;
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--quick") == 0)
      quick = true;
    else
      parts.insert(argv[i]);
  }
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("SKIPPED: no CUDA device\n");
    return 77;
  }
  Tally all;
  const struct {
    const char* name;
    void (*check)(bool, Tally&);
  } checks[] = {{"append", CheckAppend},
                {"attention", CheckAttention},
                {"accuracy", CheckAccuracy},
                {"accumulator", CheckAccumulator},
                {"ops", CheckOps}};
  for (const auto& [name, check] : checks) {
    if (!parts.empty() && !parts.contains(name)) continue;
    const auto start = std::chrono::steady_clock::now();
    const int run = all.run(), failed = all.failed();
    check(quick, all);
    std::printf("%s: %d cases, %d failed, %.1f s\n", name, all.run() - run, all.failed() - failed,
                std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  std::printf("%s: %d cases, %d failed\n", all.failed() == 0 && all.run() > 0 ? "PASSED" : "FAILED",
              all.run(), all.failed());
  return all.failed() == 0 && all.run() > 0 ? 0 : 1;
}
