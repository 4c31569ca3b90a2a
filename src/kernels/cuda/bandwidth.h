// What the device reads, the limit that decode is held against.
#pragma once

namespace octavo::cuda {

// Bytes per second: the median of plain loops over 4 GiB, which must be free.
double ReadBandwidth();

}  // namespace octavo::cuda
