// Any bytes as a safetensors file: an Error of one line, or tensors that lie within the bytes.
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "base/error.h"
#include "io/checkpoint.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view bytes(reinterpret_cast<const char*>(data), size);
  unsigned sum = 0;
  try {
    for (const octavo::SafetensorsEntry& entry : octavo::ParseSafetensors(bytes, "fuzz")) {
      const octavo::Tensor& tensor = entry.tensor;
      const auto* from = static_cast<const uint8_t*>(tensor.data);
      const size_t count = static_cast<size_t>(tensor.size()) * octavo::SizeOf(tensor.dtype);
      for (size_t i = 0; i < count; ++i) sum += from[i];  // the address sanitiser checks the range
    }
  } catch (const octavo::Error& error) {
    if (error.message().empty() || error.message().find('\n') != std::string::npos) std::abort();
  }
  volatile unsigned kept = sum;  // so that the reads are not optimised away
  (void)kept;
  return 0;
}
