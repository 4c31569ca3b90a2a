// attention_bench [--only TEXT] [--json PATH] [--quick]: our attention, append, matmul and other
// kernels on the work of docs/measurements, with bytes, FLOPs and the share of the read bandwidth
// measured in the same run. --only takes the rows whose group and name contain TEXT.
#include <cstring>
#include <exception>
#include <functional>
#include <string>

#include "rows.h"

namespace octavo::bench {
namespace {

struct Options {
  std::string only, json;
  bool quick = false;
};

std::string Thousands(int n) {
  return n % 1024 == 0 ? std::to_string(n / 1024) + "k" : std::to_string(n);
}

std::vector<AttentionSpec> DecodeSpecs(bool quick) {
  std::vector<AttentionSpec> specs;
  auto add = [&](const std::string& name, std::vector<int> lengths, AttentionSpec spec) {
    spec.group = "decode";
    spec.name = "head_dim " + std::to_string(spec.head_dim) + " " + name;
    spec.tokens.assign(lengths.size(), 1);
    spec.lengths = std::move(lengths);
    specs.push_back(std::move(spec));
  };
  const int k = 1024;
  for (int head_dim : {64, 128, 256}) {
    const AttentionSpec base{.head_dim = head_dim};
    add("1 x 128k", {128 * k}, base);
    add("8 x 32k", std::vector(8, 32 * k), base);
    add("64 x 8k", std::vector(64, 8 * k), base);
    std::vector<int> uneven(32, 4 * k);
    uneven[0] = 128 * k;
    add("128k, 31 x 4k", uneven, base);
    if (quick && head_dim != 128) continue;
    AttentionSpec fixed = base;
    fixed.deterministic = true;
    add("1 x 128k, deterministic", {128 * k}, fixed);
    add("64 x 8k, deterministic", std::vector(64, 8 * k), fixed);
    add("128k, 31 x 4k, deterministic", uneven, fixed);
    for (int length : {512, 1 * k, 2 * k})
      add("64 x " + Thousands(length), std::vector(64, length), base);
    add("8 x 1k", std::vector(8, k), base);
    for (int length : {256, 2 * k}) add("1 x " + Thousands(length), {length}, base);
    AttentionSpec few = base;
    few.kv_heads = 4;
    add("1 x 32k, 4 kv heads", {32 * k}, few);
    AttentionSpec window = base;
    window.window = k;
    add("64 x 8k, window 1k", std::vector(64, 8 * k), window);
    for (int group : {1, 8, 16}) {
      AttentionSpec grouped = base;
      grouped.heads = group * kKvHeads;
      add("64 x 8k, group " + std::to_string(group), std::vector(64, 8 * k), grouped);
      add("1 x 128k, group " + std::to_string(group), {128 * k}, grouped);
    }
  }
  return specs;
}

std::vector<AttentionSpec> PrefillSpecs(bool quick) {
  std::vector<AttentionSpec> specs;
  const int k = 1024;
  for (int head_dim : {64, 128, 256}) {
    auto add = [&](const std::string& name, int tokens, int length) {
      specs.push_back({.group = "prefill",
                       .name = "head_dim " + std::to_string(head_dim) + " " + name,
                       .head_dim = head_dim,
                       .tokens = {tokens},
                       .lengths = {length}});
    };
    add("4k", 4 * k, 4 * k);
    add("8k", 8 * k, 8 * k);
    add("16k", 16 * k, 16 * k);
    add("2k of 64k", 2 * k, 64 * k);
    add("256 of 64k", 256, 64 * k);
    if (!quick) add("64k", 64 * k, 64 * k);
  }
  return specs;
}

void Run(const Options& options) {
  cudaDeviceProp device;
  BENCH_CUDA(cudaGetDeviceProperties(&device, 0));
  const Bandwidth bandwidth = MeasureBandwidth();
  std::printf("%s: reads %.0f GB/s, copies %.0f GB/s (read and written)\n", device.name,
              bandwidth.read * 1e-9, bandwidth.copy * 1e-9);
  std::vector<Row> done;
  auto run = [&](const std::string& name, const std::function<std::vector<Row>()>& make) {
    if (name.find(options.only) == std::string::npos) return;
    std::vector<Row> rows = make();
    if (rows[0].seconds == 0) Measure(rows, options.quick ? 0.02 : 0.1);
    for (Row& row : rows) {
      PrintRow(row, bandwidth);
      row.call = nullptr;  // lets go of its memory
      done.push_back(row);
    }
  };
  for (int head_dim : {64, 128, 256}) {
    for (int tokens : {64, 8192}) {
      run("append " + AppendName(tokens, head_dim), [&] { return AppendRows(tokens, head_dim); });
    }
  }
  for (int rows : {1, 8, 16, 32, 64, 2048})
    run("matmul " + std::to_string(rows), [&] { return MatMulRows(rows); });
  for (int rows : {1, 64, 8192})
    run("elementwise " + std::to_string(rows), [&] { return ElementwiseRows(rows); });
  for (int rows : {1, 4, 8, 16, 32, 64, 128, 256, 2048, 8192})
    run("experts " + std::to_string(rows), [&] { return ExpertRows(rows); });
  for (int rows : {1, 64}) run("sample " + std::to_string(rows), [&] { return SampleRows(rows); });
  for (const AttentionSpec& spec : DecodeSpecs(options.quick)) {
    run(spec.group + ' ' + spec.name, [&] {
      return AttentionRows(spec, {{KvFormat::kFp8E4M3, cuda::AttentionMath::k16Bit},
                                  {KvFormat::kBF16, cuda::AttentionMath::k16Bit},
                                  {KvFormat::kInt8PerTokenHead, cuda::AttentionMath::k16Bit}});
    });
  }
  for (const AttentionSpec& spec : PrefillSpecs(options.quick)) {
    run(spec.group + ' ' + spec.name, [&] {
      return AttentionRows(spec, {{KvFormat::kFp8E4M3, cuda::AttentionMath::kFp8},
                                  {KvFormat::kBF16, cuda::AttentionMath::k16Bit},
                                  {KvFormat::kFp8E4M3, cuda::AttentionMath::k16Bit},
                                  {KvFormat::kInt8PerTokenHead, cuda::AttentionMath::k16Bit},
                                  {KvFormat::kFp8E4M3, cuda::AttentionMath::kFp8TensorCore}});
    });
  }
  if (!options.json.empty()) WriteJson(options.json, device.name, bandwidth, done);
}

}  // namespace
}  // namespace octavo::bench

int main(int argc, char** argv) {
  octavo::bench::Options options;
  for (int i = 1; i < argc; ++i) {
    const bool value = i + 1 < argc;
    if (std::strcmp(argv[i], "--quick") == 0) {
      options.quick = true;
    } else if (std::strcmp(argv[i], "--only") == 0 && value) {
      options.only = argv[++i];
    } else if (std::strcmp(argv[i], "--json") == 0 && value) {
      options.json = argv[++i];
    } else {
      std::fprintf(stderr, "usage: attention_bench [--only TEXT] [--json PATH] [--quick]\n");
      return 2;
    }
  }
  try {
    octavo::bench::Run(options);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "attention_bench: %s\n", error.what());
    return 1;
  }
}
