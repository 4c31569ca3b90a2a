// octavo calibrate: the scales that a static FP8 cache should have, and whether the model needs
// them.
//
// The first half of a text is run with a bf16 cache, and the largest magnitude of K and V per layer
// and kv head becomes a scale: margin * amax / 448, rounded up to a power of two. Amax and not a
// percentile, since what clipping saves in rounding it loses many times over in outliers; a power
// of two, since e4m3 rounds by the exponent: such a scale moves its range and changes no rounding,
// so that a model which scale 1.0 suits is not made different.
//
// The second half, which the scales have not seen, is then read under each format, every one given
// the same tokens. What counts is the KL divergence of its next-token distributions from bf16's:
// log-probabilities of the text may rise by chance, or because the text is not the model's.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "kv/scales.h"
#include "octavo/engine.h"

namespace octavo {

struct CalibrateOptions {
  EngineOptions engine;
  std::string text_file;    // UTF-8; empty: generated sentences
  int tokens = 8192;        // of each half, at most; whole pages are used
  double margin = 1.5;      // above what was seen
  double tolerance = 0.01;  // of KL, nats per token
  std::string output;       // the side-car file
};

struct FormatScore {
  std::string name;             // for people
  std::string flags;            // that choose it
  double kl = 0, kl_error = 0;  // from bf16, nats per token: mean, and two standard errors of it
  double top1 = 0;              // share of positions with bf16's likeliest token
  double log_prob = 0;          // of the text, nats per token, mean
  uint64_t saturated = 0;       // elements of K and V
  double bytes_per_token = 0;
};

struct LayerAmax {
  std::vector<float> k, v;  // [kv_heads]
};

struct CalibrationReport {
  int tokens = 0;  // of each half
  std::vector<LayerAmax> amax;
  std::vector<LayerScales> scales;
  std::vector<FormatScore> scores;  // bf16's first; then by preference
  std::string advice;               // one line
};

// The power of two at or above max(margin * amax / 448, 1e-6).
float ScaleFor(float amax, double margin);

// The first behind scores[0] that saturates nowhere and whose KL is at most `tolerance`, two
// standard errors included; null: none.
const FormatScore* Cheapest(const std::vector<FormatScore>& scores, double tolerance);

// Writes the side-car file. `progress`, unless empty: chunks done, of how many.
CalibrationReport Calibrate(const CalibrateOptions& options,
                            const std::function<void(int done, int all)>& progress);
std::string CalibrationTable(const CalibrationReport& report);
std::string CalibrationJson(const CalibrationReport& report);

}  // namespace octavo
