// Sixteen elements at a time, written once for every instruction set.
//
// Vectors are the compiler's own (vector_size of GCC and Clang): sixteen floats are one register of
// AVX-512, two of AVX2, four of SSE or NEON. The same number of lanes everywhere means that a sum
// is added up in the same order on every machine. Everything lives in the namespace of the
// instruction set that it is compiled for. Nothing contracts a * b + c unless it calls fma().
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#ifndef KSAM_ISA
#error "KSAM_ISA names the instruction set: simd.h belongs in the <room>_cpu.cpp files"
#endif

#define KSAM_INLINE inline __attribute__((always_inline))

namespace ksam::KSAM_ISA {

constexpr int kLanes = 16;

using f32x16 = float __attribute__((vector_size(64)));
using f64x16 = double __attribute__((vector_size(128)));
using i32x16 = int32_t __attribute__((vector_size(64)));
using u32x16 = uint32_t __attribute__((vector_size(64)));
using u64x16 = uint64_t __attribute__((vector_size(128)));
using u16x16 = uint16_t __attribute__((vector_size(32)));

// Storage types; all arithmetic is float, or double on double.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class T>
struct OpMath {
  using type = float;
};
template <>
struct OpMath<double> {
  using type = double;
};
template <class T>
using opmath_t = typename OpMath<T>::type;

template <class T>
struct VecOf;
template <>
struct VecOf<float> {
  using type = f32x16;
};
template <>
struct VecOf<double> {
  using type = f64x16;
};
// Sixteen values of the arithmetic on T.
template <class T>
using vec_t = typename VecOf<opmath_t<T>>::type;

template <class To, class From>
KSAM_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

template <class V, class T>
KSAM_INLINE V broadcast(T value) {
  return value - V{};  // 0 would be lost in value + V{} for -0
}

template <class T>
KSAM_INLINE T load_raw(const void* p) {
  T value;
  std::memcpy(&value, p, sizeof(T));
  return value;
}

KSAM_INLINE f32x16 to_float(u16x16 h, bf16) {
  return bit_cast<f32x16>(__builtin_convertvector(h, u32x16) << 16);
}

// Nearest, ties to even; NaN becomes the quiet NaN.
KSAM_INLINE u16x16 from_float(f32x16 x, bf16) {
  const u32x16 b = bit_cast<u32x16>(x);
  const u32x16 rounded = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
  return __builtin_convertvector(x != x ? u32x16{} + 0x7fc0 : rounded, u16x16);
}

#if defined(__F16C__)
KSAM_INLINE f32x16 to_float(u16x16 h, f16) {
  struct {
    __m256 low, high;
  } x;
  x.low = _mm256_cvtph_ps(load_raw<__m128i>(&h));
  x.high = _mm256_cvtph_ps(load_raw<__m128i>(reinterpret_cast<const char*>(&h) + 16));
  return bit_cast<f32x16>(x);
}

KSAM_INLINE u16x16 from_float(f32x16 x, f16) {
  struct {
    __m128i low, high;
  } h;
  h.low = _mm256_cvtps_ph(load_raw<__m256>(&x), _MM_FROUND_TO_NEAREST_INT);
  h.high = _mm256_cvtps_ph(load_raw<__m256>(reinterpret_cast<const char*>(&x) + 32),
                           _MM_FROUND_TO_NEAREST_INT);
  return bit_cast<u16x16>(h);
}
#else
// By integers, so that a flush-to-zero mode does not touch the denormal halves.
KSAM_INLINE f32x16 to_float(u16x16 h, f16) {
  const u32x16 b = __builtin_convertvector(h, u32x16);
  const u32x16 sign = (b & 0x8000) << 16;
  const u32x16 magnitude = b & 0x7fff;
  const u32x16 normal = (magnitude << 13) + (112u << 23);
  const u32x16 special = (magnitude << 13) | 0x7f800000;  // infinity and NaN
  const i32x16 count = bit_cast<i32x16>(magnitude);
  const u32x16 denormal = bit_cast<u32x16>(__builtin_convertvector(count, f32x16) * 0x1p-24f);
  const u32x16 finite = magnitude < 0x0400 ? denormal : normal;
  return bit_cast<f32x16>(sign | (magnitude >= 0x7c00 ? special : finite));
}

KSAM_INLINE u16x16 from_float(f32x16 x, f16) {
  const u32x16 b = bit_cast<u32x16>(x);
  const u32x16 sign = (b >> 16) & 0x8000;
  const u32x16 a = b & 0x7fffffff;
  u32x16 normal = (a + 0xfff + ((a >> 13) & 1) - (112u << 23)) >> 13;
  normal = a >= 0x477ff000 ? u32x16{} + 0x7c00 : normal;  // 65520 and above round to infinity
  // 0.5 + x rounds x to multiples of 2^-24, the spacing of denormal halves.
  const u32x16 denormal = bit_cast<u32x16>(bit_cast<f32x16>(a) + 0.5f) - 0x3f000000;
  u32x16 h = a < 0x38800000 ? denormal : normal;
  h = a > 0x7f800000 ? u32x16{} + 0x7e00 : h;
  return __builtin_convertvector(h | sign, u16x16);
}
#endif

KSAM_INLINE f32x16 load(const float* p) { return load_raw<f32x16>(p); }
KSAM_INLINE f64x16 load(const double* p) { return load_raw<f64x16>(p); }
KSAM_INLINE f32x16 load(const bf16* p) { return to_float(load_raw<u16x16>(p), bf16{}); }
KSAM_INLINE f32x16 load(const f16* p) { return to_float(load_raw<u16x16>(p), f16{}); }

KSAM_INLINE void store(float* p, f32x16 x) { std::memcpy(p, &x, sizeof(x)); }
KSAM_INLINE void store(double* p, f64x16 x) { std::memcpy(p, &x, sizeof(x)); }
template <class Half>
KSAM_INLINE void store(Half* p, f32x16 x) {
  const u16x16 h = from_float(x, Half{});
  std::memcpy(p, &h, sizeof(h));
}

// 64 bytes past the caches to an address aligned to as many; then call stream_fence().
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

KSAM_INLINE bool is_line_aligned(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % 64 == 0;
}

// The first `count` < 16 elements, `fill` behind them.
template <class T>
KSAM_INLINE vec_t<T> load_partial(const T* p, int count, opmath_t<T> fill) {
  T padded[kLanes] = {};
  std::memcpy(padded, p, count * sizeof(T));
  vec_t<T> x = load(padded);
  for (int i = count; i < kLanes; ++i) x[i] = fill;
  return x;
}

template <class T>
KSAM_INLINE void store_partial(T* p, vec_t<T> x, int count) {
  T padded[kLanes];
  store(padded, x);
  std::memcpy(p, padded, count * sizeof(T));
}

template <class T>
KSAM_INLINE opmath_t<T> load_one(const T* p) {
  if constexpr (sizeof(T) == sizeof(opmath_t<T>)) return *reinterpret_cast<const opmath_t<T>*>(p);
  return load_partial(p, 1, 0)[0];
}

#if defined(__FMA__)
// a * b + c, rounded once.
KSAM_INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) {
  f32x16 r;
  for (int i = 0; i < kLanes; ++i) r[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return r;
}
#else
// a * b + c, rounded twice: this machine has no fused multiply-add.
KSAM_INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) { return a * b + c; }
#endif

}  // namespace ksam::KSAM_ISA
