// The order of losses as the order of unsigned integers, shared by host and device.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace ksam {

// The key of a float, from its bits. Negative numbers have all bits flipped, others their sign, so
// that larger floats have larger keys. Every NaN has the largest key, and both zeros have one key.
// In integers only, so that denormals count even where the processor flushes them.
KSAM_FORMULA uint32_t float_key(uint32_t bits) {
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t ordered = bits ^ ((0u - (bits >> 31)) | 0x80000000u);
  const uint32_t number = magnitude == 0 ? 0x80000000u : ordered;
  return magnitude > 0x7f800000u ? 0xffffffffu : number;
}

KSAM_FORMULA uint64_t float_key(uint64_t bits) {
  const uint64_t magnitude = bits & 0x7fffffffffffffffull;
  const uint64_t ordered = bits ^ ((0ull - (bits >> 63)) | 0x8000000000000000ull);
  const uint64_t number = magnitude == 0 ? 0x8000000000000000ull : ordered;
  return magnitude > 0x7ff0000000000000ull ? 0xffffffffffffffffull : number;
}

}  // namespace ksam
