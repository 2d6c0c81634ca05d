// What each of clang's sanitizers must be told of fibers; nothing in a plain build.
#pragma once

#include <cstddef>

#if __has_feature(address_sanitizer)
#define SIMT_ASAN 1
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if __has_feature(thread_sanitizer)
#define SIMT_TSAN 1
#include <sanitizer/tsan_interface.h>
#endif
#if __has_feature(memory_sanitizer)
#define SIMT_MSAN 1
#include <sanitizer/msan_interface.h>
#endif

// ThreadSanitizer counts a function's entry to one fiber and its exit to another if the switch lies
// in between.
#define SIMT_INLINE inline __attribute__((always_inline))

namespace simt::sanitizers {

// A stack that code runs on: a fiber's, or the scheduler's.
struct Context {
  const void* stack = nullptr;  // its lowest address
  size_t size = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's; a stopped fiber's is lost
  void* thread = nullptr;      // ThreadSanitizer's
};

// Puts a fiber at its beginning, also where it was stopped before.
inline void create(Context* fiber) {
#ifdef SIMT_TSAN
  if (fiber->thread != nullptr) __tsan_destroy_fiber(fiber->thread);
  fiber->thread = __tsan_create_fiber(0);
#endif
  fiber->fake_stack = nullptr;
  (void)fiber;
}

SIMT_INLINE void before_switch(Context* from, const Context& to) {
#ifdef SIMT_ASAN
  __sanitizer_start_switch_fiber(&from->fake_stack, to.stack, to.size);
#endif
#ifdef SIMT_TSAN
  __tsan_switch_to_fiber(to.thread, __tsan_switch_to_fiber_no_sync);
#endif
  (void)from, (void)to;
}

// Called on the stack that was switched to; `from` is given its extent where that was not known.
SIMT_INLINE void after_switch(Context* to, Context* from) {
#ifdef SIMT_ASAN
  __sanitizer_finish_switch_fiber(to->fake_stack, &from->stack, &from->size);
#endif
  (void)to, (void)from;
}

// Order between fibers, as barriers and fences give it, identified by an address.
inline void release(void* object) {
#ifdef SIMT_TSAN
  __tsan_release(object);
#endif
  (void)object;
}

inline void acquire(void* object) {
#ifdef SIMT_TSAN
  __tsan_acquire(object);
#endif
  (void)object;
}

inline void mark_unwritten(void* begin, size_t bytes) {
#ifdef SIMT_MSAN
  __msan_poison(begin, bytes);
#endif
  (void)begin, (void)bytes;
}

inline void allow(void* begin, size_t bytes) {
#ifdef SIMT_ASAN
  __asan_unpoison_memory_region(begin, bytes);
#endif
  (void)begin, (void)bytes;
}

}  // namespace simt::sanitizers
