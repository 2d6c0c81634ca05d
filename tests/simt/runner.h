// Runs CUDA kernels on the CPU, for tests: one fiber per CUDA thread, all on one OS thread.
//
// A fiber runs until it waits for others (a barrier, a warp operation) or ends; then the scheduler
// picks the next one, in an order that a seed decides. What a kernel does wrong shows as a wrong
// result in some order, as a fault that the scheduler reports (threads that wait for ever,
// barriers that not all threads reach), or as a finding of the compiler's sanitizers, which see
// shared memory, bounds and races of these fibers as they would of threads. Blocks run one after
// the other, except in cooperative launches: the order of memory between blocks is not checked.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>

#include "dim3.h"

namespace simt {

// A fault of the kernel: a deadlock, a barrier that not all threads reach, a failed assertion.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

uint64_t faults();  // how many launches have ended with one

// Orders of execution: 0 takes fibers and blocks in their own order.
void set_seed(uint64_t seed);

// Runs `body` once per thread. Cooperative launches have all blocks at once, and grid barriers.
void run(dim3 grid, dim3 block, bool cooperative, const std::function<void()>& body);

// Where in the kernel a thread waits.
struct Site {
  const char* file;
  int line;
};

// What the running thread sees.
uint3 thread_index();
uint3 block_index();
dim3 block_size();
dim3 grid_size();
int lane();

enum class Vote { count, any, all };

int block_barrier(Vote vote, bool predicate, Site site);
void grid_barrier(Site site);
void yield();  // lets others run: in waiting loops and, by chance, at atomics
void chance_of_yield();

enum class WarpOp { sync, shuffle, ballot, match, add, min, max };

// Waits for all lanes in `mask` to come with the same operation; `source` is the lane to read.
uint64_t warp_operation(WarpOp op, unsigned mask, uint64_t value, int source, Site site);

[[noreturn]] void fail(const std::string& what, Site site);

// The order that fences and atomics give: everything before the one to everything after the next.
void fence();

}  // namespace simt
