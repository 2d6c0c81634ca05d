// Chooses the instruction set that the CPU kernels run with.
//
// Every <room>_cpu.cpp is compiled once per instruction set into a namespace of that name, and a
// call picks one of them by the processor it runs on. Those files must use no std container or
// algorithm, nor any other inline function from outside of that namespace, unless it is always
// inlined: the linker keeps a single copy of such a function, perhaps the one compiled for AVX-512,
// and a processor without AVX-512 would run it.
#pragma once

#include "common/gpu.h"

namespace ksam {

enum class Isa { baseline, avx2, avx512 };

// The best that the processor has and KSAM_CPU_ISA (baseline, avx2 or avx512) allows.
// Throws where KSAM_CPU_ISA names anything else, or what the processor does not have.
Isa current_isa();
const char* isa_name(Isa isa);

}  // namespace ksam

// KSAM_DECLARE_PER_ISA(declarations): declares functions in the namespace of every instruction set.
// KSAM_ON_ISA(function, arguments...): calls the copy for the chosen instruction set.
#if defined(KSAM_SIMT)  // tests/simt builds GPU kernels only
#define KSAM_DECLARE_PER_ISA(...)
#define KSAM_ON_ISA(function, ...) ::ksam::NotBuilt::call(__VA_ARGS__)
#elif defined(__x86_64__)
#define KSAM_DECLARE_PER_ISA(...) \
  namespace baseline {            \
  __VA_ARGS__                     \
  }                               \
  namespace avx2 {                \
  __VA_ARGS__                     \
  }                               \
  namespace avx512 {              \
  __VA_ARGS__                     \
  }
#define KSAM_ON_ISA(function, ...)                                              \
  (::ksam::current_isa() == ::ksam::Isa::avx512 ? avx512::function(__VA_ARGS__) \
   : ::ksam::current_isa() == ::ksam::Isa::avx2 ? avx2::function(__VA_ARGS__)   \
                                                : baseline::function(__VA_ARGS__))
#else
#define KSAM_DECLARE_PER_ISA(...) \
  namespace baseline {            \
  __VA_ARGS__                     \
  }
#define KSAM_ON_ISA(function, ...) baseline::function(__VA_ARGS__)
#endif
