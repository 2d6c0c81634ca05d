// torch's own thread pool, so that torch.set_num_threads is obeyed and no second pool competes.
#pragma once

#include <cstdint>

namespace ksam {

using RangeFunction = void (*)(int64_t begin, int64_t end, void* context);

// Finds the pool of the torch that is loaded; throws where none is.
void load_thread_pool();

// body(begin, end) over a partition of [0, n) into at most one range per thread, and at most
// ceil(n / grain) ranges. The calling thread works alone where n <= grain, or where it is in a
// parallel region already.
void parallel_for(int64_t n, int64_t grain, RangeFunction body, void* context);

template <class Body>
void parallel_for(int64_t n, int64_t grain, const Body& body) {
  parallel_for(
      n, grain,
      [](int64_t begin, int64_t end, void* context) {
        (*static_cast<const Body*>(context))(begin, end);
      },
      const_cast<Body*>(&body));
}

}  // namespace ksam
