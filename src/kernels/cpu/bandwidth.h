// What the machine's memory gives, the limit that decode is held against.
#pragma once

#include "base/thread_pool.h"

namespace octavo::cpu {

// Bytes that no cache holds: four times the last level.
int64_t ColdBytes();

// Bytes per second that all threads of the pool read together; the median over `seconds`.
double ReadBandwidth(ThreadPool& pool, double seconds);

}  // namespace octavo::cpu
