#include "eval/needle.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <span>
#include <sstream>

#include <fmt/format.h>

#include "base/error.h"
#include "eval/haystack.h"
#include "eval/variant.h"
#include "models/config.h"
#include "text/unicode.h"

namespace octavo {
namespace {

constexpr int64_t kShortestPrompt = 256;  // tokens: needles, a question and some hay

using Clock = std::chrono::steady_clock;
double Seconds(Clock::duration d) { return std::chrono::duration<double>(d).count(); }

struct Answer {
  std::vector<int32_t> tokens;
  std::vector<float> prompt_logprobs;
  std::vector<Clock::time_point> times;  // of each token
  std::string error;
};

// Submits requests and waits for all of them.
class Batch {
 public:
  explicit Batch(Engine& engine) : engine_(engine) {}

  void Add(Request request) {
    const size_t index = answers_.size();
    answers_.emplace_back();
    requests_.push_back({index, std::move(request)});
  }

  std::vector<Answer> Run() {
    pending_ = requests_.size();
    std::exception_ptr refused;
    for (auto& [index, request] : requests_) {
      try {
        engine_.Submit(std::move(request),
                       [this, index = index](const Event& event) { Receive(index, event); });
      } catch (const Error&) {  // the accepted ones still report to this object: wait for them
        refused = std::current_exception();
        std::lock_guard lock(mutex_);
        --pending_;
      }
    }
    std::unique_lock lock(mutex_);
    done_.wait(lock, [this] { return pending_ == 0; });
    if (refused) std::rethrow_exception(refused);
    for (const Answer& answer : answers_) {
      if (!answer.error.empty()) throw Error(ErrorCode::kResourceExhausted, answer.error);
    }
    return std::move(answers_);
  }

 private:
  void Receive(size_t index, const Event& event) {
    std::lock_guard lock(mutex_);
    Answer& answer = answers_[index];
    switch (event.kind) {
      case Event::Kind::kToken:
        answer.tokens.push_back(event.token);
        answer.times.push_back(Clock::now());
        break;
      case Event::Kind::kPromptLogprob:
        answer.prompt_logprobs.push_back(event.logprob);
        break;
      case Event::Kind::kFinished:
        answer.error = event.error;
        if (--pending_ == 0) done_.notify_one();
        break;
    }
  }

  Engine& engine_;
  std::vector<std::pair<size_t, Request>> requests_;
  std::mutex mutex_;
  std::condition_variable done_;
  std::vector<Answer> answers_;
  size_t pending_ = 0;
};

// A question about one needle as token ids: where the prompt ends and the right answer begins.
struct Question {
  std::vector<int32_t> prompt, with_answer;
  std::string value;
};

Question Ask(const Engine& engine, const Haystack& haystack, size_t needle) {
  const std::string prompt = haystack.text + haystack.Question(needle);
  Question q{.prompt = engine.Encode(prompt),
             .with_answer = engine.Encode(prompt + haystack.Answer(needle)),
             .value = haystack.needles[needle].value};
  // Tokens may merge across the boundary: the answer begins where the two encodings part.
  const auto [a, b] =
      std::mismatch(q.prompt.begin(), q.prompt.end(), q.with_answer.begin(), q.with_answer.end());
  q.prompt.erase(a, q.prompt.end());
  return q;
}

// A haystack whose longest question and answer make about `length` tokens, at most that.
Haystack MakeHaystack(const Engine& engine, const HaystackGenerator& generator,
                      const NeedleEvalOptions& options, int64_t length, uint64_t seed) {
  size_t bytes = static_cast<size_t>(length);
  for (int round = 0; round < 8; ++round) {
    Haystack haystack = generator.Make(bytes, options.needles, seed);
    int64_t tokens = 0;
    for (size_t i = 0; i < haystack.needles.size(); ++i) {
      const Question question = Ask(engine, haystack, i);
      tokens = std::max(tokens, static_cast<int64_t>(question.with_answer.size()));
    }
    // Within one percent below; byte-level tokenizers are there at once.
    if (tokens <= length && tokens >= length - length / 100 - 8) return haystack;
    const double ratio = static_cast<double>(bytes) / static_cast<double>(tokens);
    bytes = tokens > length
                ? bytes - std::max<size_t>(1, static_cast<size_t>((tokens - length) * ratio))
                : bytes + static_cast<size_t>((length - tokens) * ratio * 0.999);
  }
  throw Error(ErrorCode::kInvalidArgument,
              fmt::format("cannot make a haystack of {} tokens", length));
}

bool IsExact(std::string text, const std::string& value) {
  text.erase(0, std::min(text.size(), text.find_first_not_of(" \n\t\"*")));
  return text.starts_with(value) && (text.size() == value.size() ||
                                     !std::isdigit(static_cast<unsigned char>(text[value.size()])));
}

double Median(std::vector<double> values) {
  if (values.empty()) return 0;
  std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
  return values[values.size() / 2];
}

// One format's engine and, for the length in hand, what it has measured.
struct Contestant {
  std::unique_ptr<Engine> engine;
  NeedleRow row;
  std::vector<double> prefill, decode;
};

void RunSample(Contestant& c, const Haystack& haystack, const std::function<void()>& asked) {
  std::vector<Question> questions;
  for (size_t i = 0; i < haystack.needles.size(); ++i)
    questions.push_back(Ask(*c.engine, haystack, i));
  const auto generate = [&](const Question& q) {
    const int answer = static_cast<int>(q.with_answer.size() - q.prompt.size());
    return Request{.prompt = q.prompt,
                   .sampling = {.max_tokens = answer, .temperature = 0, .ignore_eos = true}};
  };
  const auto run = [&](size_t begin, size_t end) {
    Batch batch(*c.engine);
    for (size_t i = begin; i < end; ++i) batch.Add(generate(questions[i]));
    const Clock::time_point start = Clock::now();
    const std::vector<Answer> answers = batch.Run();
    for (size_t i = begin; i < end; ++i) {
      const Answer& answer = answers[i - begin];
      c.row.depths[i].asked += 1;
      c.row.depths[i].exact += IsExact(c.engine->Decode(answer.tokens), questions[i].value);
      asked();
    }
    if (begin == 0 &&
        !answers[0].times.empty()) {  // alone: its prefill and its decode are one sequence's
      const auto& times = answers[0].times;
      c.prefill.push_back(static_cast<double>(questions[0].prompt.size()) /
                          Seconds(times.front() - start));
      if (times.size() > 1) {
        c.decode.push_back(static_cast<double>(times.size() - 1) /
                           Seconds(times.back() - times.front()));
      }
    }
  };
  run(0, 1);
  run(1, questions.size());

  Batch scores(*c.engine);
  for (const Question& q : questions) {
    scores.Add({.prompt = q.with_answer,
                .sampling = {.max_tokens = 0,
                             .prompt_logprobs_from = static_cast<int64_t>(q.prompt.size())}});
  }
  const std::vector<Answer> answers = scores.Run();
  for (size_t i = 0; i < answers.size(); ++i) {
    double sum = 0;
    for (float logprob : answers[i].prompt_logprobs) sum += logprob;
    c.row.depths[i].logprob_sum += sum / static_cast<double>(answers[i].prompt_logprobs.size());
  }
}

// `count` engines or executors share a device's memory; this is number `index` of them.
EngineOptions OptionsFor(const NeedleEvalOptions& options, const std::string& format, size_t index,
                         size_t count) {
  EngineOptions engine = WithVariant(options.engine, format);
  // Counted against all memory taken so far, so each gets an equal share of a GPU's.
  engine.gpu_memory_utilization *= static_cast<double>(index + 1) / static_cast<double>(count);
  engine.max_model_len = *std::max_element(options.lengths.begin(), options.lengths.end());
  return engine;
}

// Fills in the rows' attention errors; `prompts` are one per length.
void AddAttentionErrors(const NeedleEvalOptions& options,
                        const std::shared_ptr<const LoadedModel>& model,
                        std::span<const std::vector<int32_t>> prompts, std::vector<NeedleRow>& rows,
                        const std::function<void()>& done) {
  std::vector<std::string> formats = {"bf16"};
  formats.insert(formats.end(), options.formats.begin(), options.formats.end());
  std::vector<EngineOptions> variants;
  for (const std::string& format : formats) {
    variants.push_back(OptionsFor(options, format, variants.size(), formats.size()));
    variants.back().max_num_seqs = 1;
  }
  const auto errors = MeasureAttentionErrors(variants, model, prompts, done);
  for (size_t i = 0; i < rows.size(); ++i) {
    const size_t variant = i % options.formats.size();
    rows[i].attention_error = errors[i / options.formats.size()][variant];
  }
}

}  // namespace

NeedleCell NeedleRow::Total() const {
  NeedleCell total;
  for (const NeedleCell& cell : depths) {
    total.asked += cell.asked;
    total.exact += cell.exact;
    total.logprob_sum += cell.logprob_sum;
  }
  return total;
}

NeedleReport EvalNeedle(const NeedleEvalOptions& options, const NeedleProgress& progress) {
  Require(!options.formats.empty(), "--kv-cache-dtypes", "at least one", "none");
  Require(!options.lengths.empty(), "--lengths", "at least one", "none");
  Require(options.needles >= 1 && options.needles <= kMaxNeedles, "--needles",
          fmt::format("1 to {}", kMaxNeedles), options.needles);
  Require(options.samples >= 1, "--samples", "at least 1", options.samples);
  const int64_t most = ReadModelSpec(options.engine.model).max_position_embeddings;
  for (int64_t length : options.lengths) {
    if (length < kShortestPrompt || length > most) {
      throw Error(ErrorCode::kInvalidArgument,
                  fmt::format("--lengths: expected {} to the model's max_position_embeddings, {}, "
                              "found {}",
                              kShortestPrompt, most, length));
    }
  }
  const HaystackGenerator generator({.filler = ReadText(options.haystack_file)});
  NeedleReport report{.model = options.engine.model,
                      .formats = options.formats,
                      .lengths = options.lengths,
                      .needles = options.needles,
                      .samples = options.samples,
                      .seed = options.seed,
                      .rows = {}};

  std::vector<Contestant> contestants;
  for (const std::string& format : options.formats) {
    EngineOptions engine = OptionsFor(options, format, contestants.size(), options.formats.size());
    engine.enable_prefix_caching = true;
    engine.max_num_seqs = options.needles;
    contestants.push_back(
        {.engine = Engine::Create(
             engine, contestants.empty() ? nullptr : contestants.front().engine->model()),
         .row = {},
         .prefill = {},
         .decode = {}});
  }

  const int lengths = static_cast<int>(options.lengths.size());
  const int all =
      static_cast<int>(options.formats.size()) * lengths * options.samples * options.needles +
      (options.attention_error ? lengths : 0);
  int done = 0;
  const auto count = [&] {
    if (progress) progress(++done, all);
  };
  std::vector<std::vector<int32_t>> prompts;
  for (int64_t length : options.lengths) {
    for (size_t i = 0; i < contestants.size(); ++i) {
      Contestant& c = contestants[i];
      c.row = {.format = options.formats[i],
               .length = length,
               .depths = std::vector<NeedleCell>(options.needles),
               .cache_bytes_per_token = c.engine->cache_bytes_per_token()};
      c.prefill.clear();
      c.decode.clear();
    }
    for (int sample = 0; sample < options.samples; ++sample) {
      const uint64_t seed = options.seed * 1'000'003 + static_cast<uint64_t>(sample);
      const Haystack haystack =
          MakeHaystack(*contestants[0].engine, generator, options, length, seed);
      for (Contestant& c : contestants) RunSample(c, haystack, count);
      if (sample == 0)
        prompts.push_back(Ask(*contestants[0].engine, haystack, options.needles / 2).prompt);
    }
    for (Contestant& c : contestants) {
      c.row.prefill_tokens_per_second = Median(c.prefill);
      c.row.decode_tokens_per_second = Median(c.decode);
      report.rows.push_back(c.row);
    }
  }
  if (options.attention_error) {
    const std::shared_ptr<const LoadedModel> model = contestants[0].engine->model();
    contestants.clear();  // and their caches
    AddAttentionErrors(options, model, prompts, report.rows, count);
  }
  return report;
}

}  // namespace octavo
