// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC11):
// a random function of a counter and a key with no state. Integers only, so the same on every
// machine; philox_test holds the published vectors.
#pragma once

#include <array>
#include <cstdint>

namespace octavo {

struct PhiloxKey {
  uint32_t word0 = 0, word1 = 0;
};

constexpr std::array<uint32_t, 4> Philox(std::array<uint32_t, 4> counter, PhiloxKey key) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53} * counter[0];
    const uint64_t product1 = uint64_t{0xCD9E8D57} * counter[2];
    counter = {static_cast<uint32_t>(product1 >> 32) ^ counter[1] ^ key.word0,
               static_cast<uint32_t>(product1),
               static_cast<uint32_t>(product0 >> 32) ^ counter[3] ^ key.word1,
               static_cast<uint32_t>(product0)};
    key.word0 += 0x9E3779B9;  // golden ratio
    key.word1 += 0xBB67AE85;  // sqrt(3) - 1
  }
  return counter;
}

}  // namespace octavo
