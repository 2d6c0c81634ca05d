// The toolkit's vector types, for a compiler that is not nvcc.
#pragma once

#define __CUDA_INCLUDE_COMPILER_INTERNAL_HEADERS__
#include <crt/host_defines.h>
// Outside nvcc the toolkit leaves float4 aligned to 4 bytes, and no sanitizer would see a
// misaligned access.
#undef __builtin_align__
#define __builtin_align__(bytes) __attribute__((aligned(bytes)))
#include <vector_functions.h>
#include <vector_types.h>

static_assert(alignof(float4) == 16);
