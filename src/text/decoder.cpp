#include "text/decoder.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "base/error.h"
#include "text/byte_level.h"

namespace octavo {
namespace {

using Kind = DecoderStep::Kind;

int HexValue(char digit) {
  if (digit >= '0' && digit <= '9') return digit - '0';
  if (digit >= 'A' && digit <= 'F') return digit - 'A' + 10;
  if (digit >= 'a' && digit <= 'f') return digit - 'a' + 10;
  return -1;
}

// The byte that <0xNN> stands for; -1: another token.
int ByteOfToken(std::string_view token) {
  if (token.size() != 6 || !token.starts_with("<0x") || token[5] != '>') return -1;
  const int high = HexValue(token[3]);
  const int low = HexValue(token[4]);
  return high < 0 || low < 0 ? -1 : high * 16 + low;
}

std::string ReplaceIn(const DecoderStep& step, std::string_view token) {
  std::vector<Match> matches;
  step.pattern->FindAll(token, &matches);
  std::string out;
  size_t copied = 0;
  for (const Match& match : matches) {
    out += token.substr(copied, match.begin - copied);
    out += step.content;
    copied = match.end;
  }
  return out += token.substr(copied);
}

std::string_view StripToken(const DecoderStep& step, std::string_view token) {
  size_t begin = 0;
  for (size_t i = 0; i < step.start && begin < token.size(); ++i) {
    size_t next = begin;
    if (NextCodePoint(token, &next) != step.character) break;
    begin = next;
  }
  size_t end = token.size();
  for (size_t i = 0; i < step.stop && end > begin; ++i) {
    const size_t last = PreviousCodePoint(token, end);
    size_t at = last;
    if (NextCodePoint(token, &at) != step.character) break;
    end = last;
  }
  return token.substr(begin, end - begin);
}

// The longest end of `text` with which `pattern` could begin.
size_t LongestOverlap(std::string_view text, std::string_view pattern) {
  for (size_t size = std::min(text.size(), pattern.size() - 1); size > 0; --size) {
    if (pattern.starts_with(text.substr(text.size() - size))) return size;
  }
  return 0;
}

}  // namespace

TokenDecoder::TokenDecoder(std::vector<DecoderStep> steps, bool join_with_spaces,
                           const std::string& where)
    : join_with_spaces_(join_with_spaces) {
  bool fused = false;
  for (DecoderStep& step : steps) {
    const bool regex = step.kind == Kind::kReplace && step.pattern->literal().empty();
    if (fused && (regex || step.kind == Kind::kByteFallback || step.kind == Kind::kByteLevel)) {
      throw Error(
          ErrorCode::kUnsupported,
          fmt::format("{}: expected steps that can be streamed, found {} after Fuse or ByteLevel",
                      where,
                      regex                              ? "Replace with a regex"
                      : step.kind == Kind::kByteFallback ? "ByteFallback"
                                                         : "ByteLevel"));
    }
    const Kind kind = step.kind;
    steps_.push_back({.step = std::move(step), .fused = fused});
    fused = fused || kind == Kind::kFuse || kind == Kind::kByteLevel;
  }
}

DecoderStream::DecoderStream(const TokenDecoder& decoder)
    : decoder_(&decoder), states_(decoder.steps_.size()) {}

void DecoderStream::Push(std::string_view token, std::string* out) {
  if (decoder_->join_with_spaces_ && started_) out->push_back(' ');
  started_ = true;
  Run(0, token, out);
}

void DecoderStream::Run(size_t index, std::string_view text, std::string* out) {
  if (index == states_.size()) {
    *out += text;
    return;
  }
  const TokenDecoder::Step& step = decoder_->steps_[index];
  switch (step.step.kind) {
    case Kind::kReplace:
      if (step.fused) return ReplaceFused(index, text, out);
      return Run(index + 1, ReplaceIn(step.step, text), out);
    case Kind::kByteFallback:
      return ByteFallback(index, text, out);
    case Kind::kFuse:
      return Run(index + 1, text, out);
    case Kind::kStrip:
      if (step.fused) return StripFused(index, text, out);
      return Run(index + 1, StripToken(step.step, text), out);
    case Kind::kMetaspace:
      return Metaspace(index, text, out);
    case Kind::kByteLevel:
      return ByteLevel(index, text, out);
  }
}

void DecoderStream::ReplaceFused(size_t index, std::string_view text, std::string* out) {
  State& state = states_[index];
  const DecoderStep& step = decoder_->steps_[index].step;
  const std::string& pattern = step.pattern->literal();
  state.pending += text;
  std::string done;
  size_t copied = 0;
  for (size_t at = state.pending.find(pattern); at != std::string::npos;
       at = state.pending.find(pattern, copied)) {
    done.append(state.pending, copied, at - copied);
    done += step.content;
    copied = at + pattern.size();
  }
  const std::string_view rest = std::string_view(state.pending).substr(copied);
  const size_t kept = LongestOverlap(rest, pattern);
  done += rest.substr(0, rest.size() - kept);
  state.pending = std::string(rest.substr(rest.size() - kept));
  Run(index + 1, done, out);
}

void DecoderStream::ByteFallback(size_t index, std::string_view text, std::string* out) {
  State& state = states_[index];
  const int byte = ByteOfToken(text);
  if (byte < 0) {
    EndByteRun(index, out);
    return Run(index + 1, text, out);
  }
  if (state.broken) return Run(index + 1, kReplacementCharacter, out);
  state.pending.push_back(static_cast<char>(byte));
  // Complete characters wait too: one bad byte later in the run turns all of it into U+FFFD.
  state.checked += ValidUtf8Length(std::string_view(state.pending).substr(state.checked));
  if (IsUtf8Beginning(std::string_view(state.pending).substr(state.checked))) return;
  state.broken = true;
  for (size_t i = 0; i < state.pending.size(); ++i) Run(index + 1, kReplacementCharacter, out);
  state.pending.clear();
}

void DecoderStream::EndByteRun(size_t index, std::string* out) {
  State& state = states_[index];
  const std::string run = std::exchange(state.pending, {});
  const bool valid = state.checked == run.size();
  state.checked = 0;
  state.broken = false;
  if (run.empty()) return;
  if (valid) return Run(index + 1, run, out);
  for (size_t i = 0; i < run.size(); ++i) Run(index + 1, kReplacementCharacter, out);
}

void DecoderStream::StripFused(size_t index, std::string_view text, std::string* out) {
  State& state = states_[index];
  const DecoderStep& step = decoder_->steps_[index].step;
  std::string done;
  for (size_t at = 0; at < text.size();) {
    const size_t begin = at;
    const bool strippable = NextCodePoint(text, &at) == step.character;
    if (!state.started && strippable && state.stripped < step.start) {
      ++state.stripped;
      continue;
    }
    state.started = true;
    if (strippable && state.held < step.stop) {
      ++state.held;
      continue;
    }
    if (!strippable) {
      for (; state.held > 0; --state.held) AppendUtf8(step.character, &done);
    }
    done += text.substr(begin, at - begin);
  }
  Run(index + 1, done, out);
}

void DecoderStream::Metaspace(size_t index, std::string_view text, std::string* out) {
  State& state = states_[index];
  const TokenDecoder::Step& step = decoder_->steps_[index];
  // Fused text is one token, and all of it the first.
  const bool drop = step.step.drop_first && (step.fused || !state.started);
  state.started = true;
  std::string done;
  for (size_t at = 0; at < text.size();) {
    const size_t begin = at;
    if (NextCodePoint(text, &at) != step.step.character) {
      done += text.substr(begin, at - begin);
    } else if (!drop) {
      done.push_back(' ');
    }
  }
  Run(index + 1, done, out);
}

void DecoderStream::ByteLevel(size_t index, std::string_view text, std::string* out) {
  std::string bytes;
  for (size_t at = 0; at < text.size();) {
    const int byte = kByteAlphabet.ByteOf(NextCodePoint(text, &at));
    if (byte < 0) {  // one foreign character, and the token is plain text: an added token
      bytes = text;
      break;
    }
    bytes.push_back(static_cast<char>(byte));
  }
  std::string done;
  for (char byte : bytes) states_[index].assembler.Push(static_cast<uint8_t>(byte), &done);
  Run(index + 1, done, out);
}

void DecoderStream::Finish(std::string* out) {
  for (size_t index = 0; index < states_.size(); ++index) {
    State& state = states_[index];
    switch (decoder_->steps_[index].step.kind) {
      case Kind::kByteFallback:
        EndByteRun(index, out);
        break;
      case Kind::kReplace:
        if (!state.pending.empty()) Run(index + 1, std::exchange(state.pending, {}), out);
        break;
      case Kind::kByteLevel: {
        std::string done;
        state.assembler.Finish(&done);
        if (!done.empty()) Run(index + 1, done, out);
        break;
      }
      case Kind::kFuse:
      case Kind::kStrip:
      case Kind::kMetaspace:
        break;
    }
    state = {};
  }
  started_ = false;
}

}  // namespace octavo
