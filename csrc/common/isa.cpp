#include "common/isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace ksam {
namespace {

Isa best_of_processor() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  // The sets that setup.py compiles for, any of which a virtual machine may leave out. GCC
  // before 11 has no name for F16C.
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid(1, &a, &b, &c, &d) == 0 || (c & bit_F16C) == 0) return Isa::baseline;
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Isa::baseline;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512cd")) {
    return Isa::avx512;
  }
  return Isa::avx2;
#else
  return Isa::baseline;
#endif
}

Isa choose() {
  const Isa best = best_of_processor();
  const char* wanted = std::getenv("KSAM_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return best;
  for (Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512}) {
    if (std::strcmp(wanted, isa_name(isa)) != 0) continue;
    if (isa <= best) return isa;
    throw std::runtime_error(std::string("KSAM_CPU_ISA asks for ") + wanted +
                             ", but this processor supports at most " + isa_name(best));
  }
  throw std::runtime_error(std::string("KSAM_CPU_ISA must be baseline, avx2 or avx512, got ") +
                           wanted);
}

}  // namespace

Isa current_isa() {
  static const Isa chosen = choose();
  return chosen;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::baseline:
      return "baseline";
    case Isa::avx2:
      return "avx2";
    default:
      return "avx512";
  }
}

}  // namespace ksam
