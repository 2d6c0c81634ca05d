// The runner's state, for its own sources.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "runner.h"
#include "sanitizers.h"

namespace simt {

constexpr int kWarp = 32;

enum class State { ready, at_block_barrier, at_warp_operation, at_grid_barrier, done };

struct Block;

struct Fiber {
  void* stack_pointer = nullptr;
  sanitizers::Context context;
  Block* block = nullptr;
  uint3 index{};
  int linear = 0;
  State state = State::done;
  Site site{};
  // of the barrier or warp operation that it waits at
  WarpOp op{};
  Vote vote{};
  unsigned mask = 0;
  uint64_t in = 0, out = 0;
  int source = 0;
  uint64_t turn = 0;  // of its block, when the fiber last ran
  // Addresses that stand for its arrival where it waits, for the last meetings that it completed as
  // the last to arrive, and for the one that lets it go on.
  char arrival = 0;
  char meetings[4] = {};
  unsigned meeting = 0;
  char* joined = nullptr;

  int warp() const { return linear / kWarp; }
  int lane() const { return linear % kWarp; }
};

struct Block {
  uint3 index{};
  std::vector<Fiber*> fibers;
  std::vector<Fiber*> ready[kWarp];  // of each warp
  int last_warp = 0;                 // that ran
  int live = 0, waiting = 0;
  std::vector<char> image;  // its shared memory, while another block's is in place
};

struct Machine {
  uint64_t seed = 0, random = 1;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<std::unique_ptr<Block>> resident;
  Block* in_place = nullptr;  // the block whose shared memory lies in the section
  Fiber* current = nullptr;
  void* scheduler = nullptr;
  sanitizers::Context scheduler_context;
  dim3 grid, block;
  int grid_live = 0, grid_waiting = 0;
  const std::function<void()>* body = nullptr;
  std::string fault;    // of the launch that runs
  uint64_t faults = 0;  // of all launches
  bool cooperative = false;
  uint64_t turn = 0;  // counts how often another block came to run
  char launch_order = 0, end_order = 0, fence_order = 0, turn_order = 0;
};

extern Machine machine;

uint64_t next_random();
std::string place_of(const Fiber& fiber);
void note_fault(const std::string& what);  // the first one is reported
void make_ready(Fiber* fiber);
void to_scheduler();  // from the running fiber; returns when it is taken again

// Let those that wait go on, if none is missing any more.
void open_block_barrier(Block* block);
void open_grid_barrier();

}  // namespace simt
