// Memory operations of the device, compiled so that the sanitizers see them.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "runner.h"

namespace simt {

template <class T>
using Bits = std::conditional_t<sizeof(T) == 8, uint64_t,
                                std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>>;

template <class To, class From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// *p <- f(*p) at once; returns what was there. Relaxed, as on the device.
template <class T, class F>
T modify(T* p, const F& f) {
  chance_of_yield();
  auto* word = reinterpret_cast<Bits<T>*>(p);
  Bits<T> old = __atomic_load_n(word, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(word, &old, bit_cast<Bits<T>>(T(f(bit_cast<T>(old)))), false,
                                      __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return bit_cast<T>(old);
}

template <class T>
struct Same {
  using type = T;
};
template <class T>
using SameT = typename Same<T>::type;  // an argument that decides no template parameter

}  // namespace simt

template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
void __stcg(T* p, simt::SameT<T> value) {
  *p = value;
}
template <class T>
void __stcs(T* p, simt::SameT<T> value) {
  *p = value;
}

template <class T>
T atomicAdd(T* p, simt::SameT<T> value) {
  return simt::modify(p, [&](T old) { return old + value; });
}
template <class T>
T atomicMin(T* p, simt::SameT<T> value) {
  return simt::modify(p, [&](T old) { return old < value ? old : value; });
}
template <class T>
T atomicMax(T* p, simt::SameT<T> value) {
  return simt::modify(p, [&](T old) { return old > value ? old : value; });
}
template <class T>
T atomicExch(T* p, simt::SameT<T> value) {
  return simt::modify(p, [&](T) { return value; });
}
template <class T>
T atomicCAS(T* p, simt::SameT<T> compare, simt::SameT<T> value) {
  return simt::modify(p, [&](T old) { return old == compare ? value : old; });
}
inline unsigned atomicInc(unsigned* p, unsigned last) {
  return simt::modify(p, [&](unsigned old) { return old >= last ? 0u : old + 1; });
}
