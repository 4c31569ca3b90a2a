// The bodies of POST requests in the engine's terms: parsed, rendered by the chat template,
// encoded, checked against the length that the engine serves. No sockets; any thread may call it.
#pragma once

#include <atomic>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "octavo/engine.h"
#include "server/generation.h"
#include "server/http_server.h"
#include "server/openai.h"
#include "text/chat_template.h"

namespace octavo {

class Intake {
 public:
  // Throws Error if the chat template or generation_config.json is broken. `engine` must outlive
  // it.
  Intake(const Engine& engine, const ServerOptions& options);

  // `abandoned`: set by another thread when nobody waits for the answer any more, whatever it is.
  Generation::Prepared Completion(openai::Api api, std::string_view body,
                                  const std::atomic<bool>& abandoned) const;
  // The answers' bodies.
  std::string Tokenize(std::string_view body, const std::atomic<bool>& abandoned) const;
  std::string Detokenize(std::string_view body) const;

 private:
  void CheckModel(const std::string& asked) const;
  std::vector<int32_t> EncodeChat(const openai::Conversation& chat, bool add_special_tokens,
                                  const std::atomic<bool>& abandoned) const;

  const Engine& engine_;
  const std::string model_name_;
  const bool trust_request_chat_template_;
  std::optional<ChatTemplate> chat_template_;
  std::string no_chat_template_;  // why
  SamplingParams sampling_defaults_;
};

}  // namespace octavo
