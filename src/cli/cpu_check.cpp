// Compiled for the oldest x86-64 and run before anything that is not: an old CPU gets one line
// instead of SIGILL.
#include <unistd.h>

#include <cstring>

#if defined(__x86_64__)
__attribute__((constructor(101))) static void RequireX86V3() {
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("aes") &&
      __builtin_cpu_supports("pclmul"))
    return;
  static const char kMessage[] =
      "octavo: this CPU lacks AVX2, FMA, BMI2, AES or PCLMUL, which Octavo needs\n";
  [[maybe_unused]] const ssize_t written = write(STDERR_FILENO, kMessage, sizeof(kMessage) - 1);
  _exit(2);
}
#endif
