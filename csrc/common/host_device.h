// Marks functions that host code and CUDA kernels share. They are always inlined, because *_cpu.cpp
// files include some of them: common/isa.h says what would go wrong otherwise.
#pragma once

#if defined(__CUDACC__)
#define KSAM_HOST_DEVICE __host__ __device__
#else
#define KSAM_HOST_DEVICE
#endif
#define KSAM_FORMULA KSAM_HOST_DEVICE inline __attribute__((always_inline))
