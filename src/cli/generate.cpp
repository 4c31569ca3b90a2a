#include <cstdio>
#include <future>
#include <iostream>
#include <iterator>
#include <string>

#include <fmt/core.h>

#include "base/error.h"
#include "cli/commands.h"
#include "io/mapped_file.h"

namespace octavo::cli {
namespace {

std::string ReadPrompt(const GenerateOptions& options) {
  if (options.prompt_file.empty()) return options.prompt;
  if (options.prompt_file != "-") return std::string(MappedFile(options.prompt_file).bytes());
  std::string text(std::istreambuf_iterator<char>(std::cin), {});
  if (std::cin.bad()) throw Error(ErrorCode::kNotFound, "--prompt-file: cannot read stdin");
  return text;
}

}  // namespace

int Generate(const GenerateOptions& options) {
  const std::string prompt = ReadPrompt(options);
  const std::unique_ptr<Engine> engine = Engine::Create(options.engine);
  if (options.stats) {
    for (const std::string& line : engine->StartupReport()) fmt::print(stderr, "{}\n", line);
  }
  std::promise<Event> finished;
  std::unique_ptr<TextStream> text = engine->MakeTextStream();
  int64_t tokens = 0;
  const auto print = [](const std::string& piece) {
    std::fwrite(piece.data(), 1, piece.size(), stdout);
    std::fflush(stdout);
  };
  engine->Submit({.prompt = engine->Encode(prompt), .sampling = options.sampling},
                 [&](const Event& event) {
                   if (event.kind == Event::Kind::kToken) {
                     ++tokens;
                     print(text->Push(event.token));
                   } else if (event.kind == Event::Kind::kFinished) {
                     finished.set_value(event);
                   }
                 });
  const Event last = finished.get_future().get();
  print(text->Flush() + "\n");
  if (last.finish_reason == FinishReason::kError)
    throw Error(ErrorCode::kResourceExhausted, last.error);
  if (options.stats) {
    const EngineStats stats = engine->stats();
    fmt::print(stderr, "{} prompt tokens, {} generated, {} steps\n", stats.prompt_tokens, tokens,
               stats.steps);
    const std::vector<LayerCacheReport> layers = engine->CacheReport();
    for (size_t i = 0; i < layers.size(); ++i) {
      fmt::print(stderr, "layer {}: K {} amax {:.3g} saturated {}, V {} amax {:.3g} saturated {}\n",
                 i, layers[i].k_format, layers[i].k_amax, layers[i].k_saturated, layers[i].v_format,
                 layers[i].v_amax, layers[i].v_saturated);
    }
  }
  return 0;
}

}  // namespace octavo::cli
