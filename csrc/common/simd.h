// Dtypes and vectors, written once for every instruction set.
//
// Vectors are the compiler's own (vector_size of GCC and Clang): sixteen floats are one register of
// AVX-512, two of AVX2, four of SSE or NEON (common/lanes.h). The same number of lanes everywhere
// means that a sum is added up in the same order on every machine. Everything lives in the
// namespace of the instruction set that it is compiled for. Nothing but fma(), of lanes.h,
// contracts a * b + c.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#include "common/tensor.h"

#ifndef KSAM_ISA
#error "KSAM_ISA names the instruction set: simd.h belongs in the <room>_cpu.cpp files"
#endif

#define KSAM_INLINE inline __attribute__((always_inline))
#define KSAM_INLINE_LAMBDA __attribute__((always_inline))  // goes after the parameters

namespace ksam::KSAM_ISA {

constexpr int kLanes = 16;

using f32x8 = float __attribute__((vector_size(32)));
using u16x8 = uint16_t __attribute__((vector_size(16)));
using f32x16 = float __attribute__((vector_size(64)));
using u16x16 = uint16_t __attribute__((vector_size(32)));

// Storage types; all arithmetic is float, or double on double.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class To, class From>
KSAM_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

template <class V, class T>
KSAM_INLINE V broadcast(T value) {
  return value - V{};  // value + V{} would turn -0 into 0
}

template <class T>
KSAM_INLINE T load_raw(const void* p) {
  T value;
  std::memcpy(&value, p, sizeof(T));
  return value;
}

// Vectors of as many lanes as the vector V has.
template <class V>
struct LikeOf {
  static constexpr int kCount = sizeof(V) / sizeof(V{}[0]);
  typedef float f32 __attribute__((vector_size(4 * kCount)));
  typedef int32_t i32 __attribute__((vector_size(4 * kCount)));
  typedef uint32_t u32 __attribute__((vector_size(4 * kCount)));
  typedef uint16_t u16 __attribute__((vector_size(2 * kCount)));
};

// Converts halves, in any number of lanes, to floats and back.
template <class Half>
KSAM_INLINE typename LikeOf<Half>::f32 to_float(Half h, bf16) {
  using Like = LikeOf<Half>;
  return bit_cast<typename Like::f32>(__builtin_convertvector(h, typename Like::u32) << 16);
}

#if defined(__AVX2__)
// Written out, as GCC would convert the two halves of the vector one after the other.
KSAM_INLINE f32x8 to_float(u16x8 h, bf16) {
  return bit_cast<f32x8>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bit_cast<__m128i>(h)), 16));
}
#endif

#if defined(__AVX512F__)
// The masks here and below leave nothing out: GCC 12 warns about the intrinsics that have none.
KSAM_INLINE f32x16 to_float(u16x16 h, bf16) {
  const __m512i wide = _mm512_maskz_cvtepu16_epi32(0xffff, bit_cast<__m256i>(h));
  return bit_cast<f32x16>(_mm512_maskz_slli_epi32(0xffff, wide, 16));
}
#endif

// The bits of the nearest bfloat16, as 32-bit integers. Ties to even; NaN becomes the quiet NaN.
template <class V>
KSAM_INLINE typename LikeOf<V>::u32 rounded_to_bf16(V x) {
  using u32 = typename LikeOf<V>::u32;
  const u32 b = bit_cast<u32>(x);
  const u32 rounded = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
  return x != x ? u32{} + 0x7fc0 : rounded;
}

template <class V>
KSAM_INLINE typename LikeOf<V>::u16 from_float(V x, bf16) {
  return __builtin_convertvector(rounded_to_bf16(x), typename LikeOf<V>::u16);
}

#if defined(__F16C__)
KSAM_INLINE f32x8 to_float(u16x8 h, f16) {
  return bit_cast<f32x8>(_mm256_cvtph_ps(bit_cast<__m128i>(h)));
}

KSAM_INLINE u16x8 from_float(f32x8 x, f16) {
  return bit_cast<u16x8>(_mm256_cvtps_ph(bit_cast<__m256>(x), _MM_FROUND_TO_NEAREST_INT));
}

#if defined(__AVX512F__)
KSAM_INLINE f32x16 to_float(u16x16 h, f16) {
  return bit_cast<f32x16>(_mm512_maskz_cvtph_ps(0xffff, bit_cast<__m256i>(h)));
}

KSAM_INLINE u16x16 from_float(f32x16 x, f16) {
  return bit_cast<u16x16>(
      _mm512_maskz_cvtps_ph(0xffff, bit_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT));
}
#endif
#else
// In integers, so that denormal halves survive where the processor flushes denormal floats to 0.
template <class Half>
KSAM_INLINE typename LikeOf<Half>::f32 to_float(Half h, f16) {
  using f32 = typename LikeOf<Half>::f32;
  using i32 = typename LikeOf<Half>::i32;
  using u32 = typename LikeOf<Half>::u32;
  const u32 b = __builtin_convertvector(h, u32);
  const u32 sign = (b & 0x8000) << 16;
  const u32 magnitude = b & 0x7fff;
  const u32 normal = (magnitude << 13) + (112u << 23);
  const u32 special = (magnitude << 13) | 0x7f800000;  // infinity and NaN
  const i32 count = bit_cast<i32>(magnitude);
  const u32 denormal = bit_cast<u32>(__builtin_convertvector(count, f32) * 0x1p-24f);
  const u32 finite = magnitude < 0x0400 ? denormal : normal;
  return bit_cast<f32>(sign | (magnitude >= 0x7c00 ? special : finite));
}

template <class V>
KSAM_INLINE typename LikeOf<V>::u16 from_float(V x, f16) {
  using u32 = typename LikeOf<V>::u32;
  const u32 b = bit_cast<u32>(x);
  const u32 sign = (b >> 16) & 0x8000;
  const u32 a = b & 0x7fffffff;
  u32 normal = (a + 0xfff + ((a >> 13) & 1) - (112u << 23)) >> 13;
  normal = a >= 0x477ff000 ? u32{} + 0x7c00 : normal;  // 65520 and above round to infinity
  // 0.5 + x rounds x to multiples of 2^-24, the spacing of denormal halves.
  const u32 denormal = bit_cast<u32>(bit_cast<V>(a) + 0.5f) - 0x3f000000;
  u32 h = a < 0x38800000 ? denormal : normal;
  h = a > 0x7f800000 ? u32{} + 0x7e00 : h;
  return __builtin_convertvector(h | sign, typename LikeOf<V>::u16);
}
#endif

// Writes 64 bytes to an address that is a multiple of 64, bypassing the caches. Call stream_fence()
// after the last such write.
KSAM_INLINE void stream_line(const char* from, char* to) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), load_raw<__m512i>(from));
#elif defined(__AVX__)
  for (int i = 0; i < 64; i += 32) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i), load_raw<__m256i>(from + i));
  }
#elif defined(__SSE2__)
  for (int i = 0; i < 64; i += 16) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), load_raw<__m128i>(from + i));
  }
#else
  std::memcpy(to, from, 64);
#endif
}

KSAM_INLINE void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

KSAM_INLINE bool is_line_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 64 == 0; }

template <class T>
KSAM_INLINE Opmath<T> load_one(const T* p) {
  if constexpr (sizeof(T) == sizeof(Opmath<T>)) {
    return *p;
  } else {
    return to_float(u16x8{p->bits}, T{})[0];
  }
}

template <class T>
KSAM_INLINE void store_one(T* p, Opmath<T> x) {
  if constexpr (sizeof(T) == sizeof(Opmath<T>)) {
    *p = x;
  } else {
    p->bits = from_float(f32x8{x}, T{})[0];
  }
}

KSAM_INLINE float square_root(float x) { return __builtin_sqrtf(x); }
KSAM_INLINE double square_root(double x) { return __builtin_sqrt(x); }
template <class V>
KSAM_INLINE V square_root(V x) {
  for (unsigned i = 0; i < sizeof(V) / sizeof(x[0]); ++i) x[i] = square_root(x[i]);
  return x;
}

}  // namespace ksam::KSAM_ISA
