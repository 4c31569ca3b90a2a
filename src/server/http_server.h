// The HTTP server: an engine behind OpenAI's API.
//
//   HttpServer server(octavo::Engine::Create(...), {.port = 8000, .model_folder = ...});
//   server.Run();  // until SIGTERM or SIGINT
//
// GET /health, /version, /v1/models, /metrics and the page at /; POST /tokenize, /detokenize,
// /v1/completions, /v1/chat/completions, whole or as server-sent events (openai.h says what of
// them).
//
// Threads: Run's caller does all I/O; one worker reads JSON, renders templates and encodes; the
// engine's loop runs the model and only posts its events. Nobody waits for a slow reader: events
// queue at his connection, and whoever takes nothing for `write_timeout` is cut off.
//
// Every request has bounds on header, body and time. A client that hangs up before its answer is
// complete cancels its request. The first SIGTERM or SIGINT
// stops accepting and lets running answers end; the second cancels them.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>

#include "octavo/engine.h"

namespace octavo {

struct ServerOptions {
  std::string host = "127.0.0.1";            // a name's first address is listened on
  uint16_t port = 8000;                      // 0: any that is free
  std::string api_key;                       // for every route but /health; empty: none
  std::string model_folder;                  // where the engine's model came from
  std::string tokenizer_folder;              // its tokenizer and chat template
  std::string chat_template;                 // a file, instead of the folder's; empty: that
  bool trust_request_chat_template = false;  // whether a request may bring its own
  // Where the defaults of sampling come from: a folder with generation_config.json, "auto" (the
  // model's, if it has one), or "vllm" (OpenAI's defaults).
  std::string generation_config = "auto";
  std::string model_name;  // as the API calls it
  std::string version;
  uint32_t max_header_bytes = 16 << 10;
  uint64_t max_body_bytes = 8 << 20;
  uint64_t max_unfinished_bytes = 256 << 20;  // of bodies that are being read, together
  int max_connections = 1024;
  // In the engine, waiting ones included, each choice of each prompt; more are answered 503.
  int max_requests = 512;
  std::chrono::seconds read_timeout{30};  // for a header, from the end of the last answer on
  std::chrono::seconds body_timeout{60};
  std::chrono::seconds write_timeout{30};
};

class HttpServer {
 public:
  // Binds. Throws Error if the address cannot be listened on or the chat template is broken.
  HttpServer(std::unique_ptr<Engine> engine, ServerOptions options);
  ~HttpServer();

  std::string url() const;  // with the port that was bound
  void Run();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace octavo
