// Side-car files of scales, in the two forms that kv/scales.h describes, and the check that every
// scale must pass.
#pragma once

#include <filesystem>
#include <span>
#include <string>
#include <vector>

#include "kv/scales.h"

namespace octavo {

// `what` names the tensor or field in the Error. A scale is amax / 448: below 1e-6 (the floor of
// dynamic scales) all of K or V would have to be smaller than 4.5e-4, above 1e4 it would
// reach 4.5e6, 70 times float16's largest. Neither comes from a working calibration; 0 and 1e-30
// have come from broken ones.
float CheckedScale(double value, const std::string& what);

// One entry per model layer; values are empty where the file has none. Error: a layer that the
// model does not have.
std::vector<LayerScales> ReadScaleFile(const std::filesystem::path& file,
                                       std::span<const KvLayerFacts> layers);

// Octavo's own form. Layers without scales are left out; what is written reads back bit for bit.
void WriteScaleFile(const std::filesystem::path& file, const std::string& model,
                    std::span<const LayerScales> layers);

}  // namespace octavo
