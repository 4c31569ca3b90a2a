#include <fmt/core.h>

#include "cli/commands.h"
#include "io/checkpoint.h"

namespace octavo::cli {

int Serve(const ServeOptions& options) {
  ServerOptions server_options = options.server;
  server_options.model_folder = options.engine.model;
  server_options.tokenizer_folder =
      options.engine.tokenizer.empty() ? options.engine.model : options.engine.tokenizer;
  server_options.version = OCTAVO_VERSION;
  if (server_options.model_name.empty())
    server_options.model_name = FolderName(options.engine.model);
  std::unique_ptr<Engine> engine = Engine::Create(options.engine);
  const std::vector<std::string> report = engine->StartupReport();
  HttpServer server(std::move(engine), server_options);
  for (const std::string& line : report) fmt::print(stderr, "{}\n", line);
  fmt::print(stderr, "serving {} at {}\n", server_options.model_name, server.url());
  server.Run();
  return 0;
}

}  // namespace octavo::cli
