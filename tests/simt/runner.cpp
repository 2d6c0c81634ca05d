#include "runner.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <vector>

#include "sanitizers.h"

// The linker's names for the section that holds static shared memory, where a kernel has some.
extern "C" {
extern char __start_simt_shared[] __attribute__((weak, visibility("hidden")));
extern char __stop_simt_shared[] __attribute__((weak, visibility("hidden")));
void simt_switch_stack(void** save, void* to);
}

// Saves what the x86-64 calling convention preserves, and goes on where `to` was saved.
asm(R"(
.text
.hidden simt_switch_stack
.globl simt_switch_stack
.type simt_switch_stack,@function
simt_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch_stack,.-simt_switch_stack
)");

namespace simt {
namespace {

constexpr size_t kStackBytes = 256 << 10;
constexpr int kWarp = 32;
constexpr double kYieldChance = 0.05;
constexpr uint64_t kTurn = 512;  // switches that a block's turn lasts, on average

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

  int warp() const { return linear / kWarp; }
  int lane() const { return linear % kWarp; }
};

struct Block {
  uint3 index{};
  std::vector<Fiber*> fibers;
  std::vector<Fiber*> ready;
  int live = 0, waiting = 0;
  std::unique_ptr<char, decltype(&std::free)> dynamic{nullptr, &std::free};
  size_t dynamic_room = 0;
  std::vector<char> image;      // its static shared memory, while another block's is in place
  char order[kWarp + 1] = {};   // addresses that stand for the barriers of the block and its warps
};

struct Machine {
  uint64_t seed = 0, random = 1;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<std::unique_ptr<Block>> resident;
  Block* in_place = nullptr;  // the block whose static shared memory lies in the section
  Fiber* current = nullptr;
  void* scheduler = nullptr;
  sanitizers::Context scheduler_context;
  dim3 grid, block;
  int grid_live = 0, grid_waiting = 0;
  const std::function<void()>* body = nullptr;
  std::string fault;
  char launch_order = 0, end_order = 0, fence_order = 0;
};

Machine machine;

uint64_t next_random() {
  machine.random ^= machine.random << 13;
  machine.random ^= machine.random >> 7;
  machine.random ^= machine.random << 17;
  return machine.random;
}

std::string place_of(const Fiber& f) {
  const char* file = f.site.file == nullptr ? "?" : f.site.file;
  const char* slash = std::strrchr(file, '/');
  return "block (" + std::to_string(f.block->index.x) + ", " + std::to_string(f.block->index.y) +
         ") thread " + std::to_string(f.linear) + " at " + (slash == nullptr ? file : slash + 1) +
         ":" + std::to_string(f.site.line);
}

void note_fault(const std::string& what) {
  if (machine.fault.empty()) machine.fault = what;
}

// Bytes that no sanitizer may see: what fibers of other blocks did to them is no race.
__attribute__((no_sanitize("address", "thread", "memory"), noinline)) void copy_unseen(
    void* to, const void* from, size_t bytes) {
  asm volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(bytes) : : "memory");
}

__attribute__((no_sanitize("address", "thread", "memory"), noinline)) void fill_unseen(
    void* to, size_t bytes) {
  asm volatile("rep stosb" : "+D"(to), "+c"(bytes) : "a"(0xff) : "memory");  // NaN, and -1
}

size_t static_shared_bytes() { return __stop_simt_shared - __start_simt_shared; }

void put_in_place(Block* block) {
  if (machine.in_place == block) return;
  const size_t bytes = static_shared_bytes();
  if (machine.in_place != nullptr) {
    machine.in_place->image.resize(bytes);
    copy_unseen(machine.in_place->image.data(), __start_simt_shared, bytes);
  }
  if (!block->image.empty()) copy_unseen(__start_simt_shared, block->image.data(), bytes);
  machine.in_place = block;
}

void to_scheduler() {
  Fiber* self = machine.current;
  sanitizers::before_switch(&self->context, machine.scheduler_context);
  simt_switch_stack(&self->stack_pointer, machine.scheduler);
  sanitizers::after_switch(&self->context, &machine.scheduler_context);
}

void to_fiber(Fiber* fiber) {
  machine.current = fiber;
  put_in_place(fiber->block);
  sanitizers::before_switch(&machine.scheduler_context, fiber->context);
  simt_switch_stack(&machine.scheduler, fiber->stack_pointer);
  sanitizers::Context unused;
  sanitizers::after_switch(&machine.scheduler_context, &unused);
}

void make_ready(Fiber* fiber) {
  fiber->state = State::ready;
  fiber->block->ready.push_back(fiber);
}

void open_block_barrier(Block* block) {
  if (block->waiting == 0 || block->waiting != block->live) return;
  const Fiber* first = nullptr;
  int count = 0;
  for (const Fiber* f : block->fibers) {
    if (f->state != State::at_block_barrier) continue;
    if (first == nullptr) first = f;
    if (f->site.line != first->site.line || f->vote != first->vote) {
      note_fault("__syncthreads of one block in two places: " + place_of(*first) + " and " +
                 place_of(*f));
    }
    count += f->in != 0;
  }
  if (block->live != static_cast<int>(block->fibers.size())) {
    note_fault("__syncthreads that threads have left out by returning: " + place_of(*first));
  }
  const int live = block->live;
  block->waiting = 0;
  for (Fiber* f : block->fibers) {
    if (f->state != State::at_block_barrier) continue;
    f->out = f->vote == Vote::count ? count : f->vote == Vote::any ? count > 0 : count == live;
    make_ready(f);
  }
}

void open_grid_barrier() {
  if (machine.grid_waiting == 0 || machine.grid_waiting != machine.grid_live) return;
  machine.grid_waiting = 0;
  for (const auto& block : machine.resident) {
    for (Fiber* f : block->fibers) {
      if (f->state == State::at_grid_barrier) make_ready(f);
    }
  }
}

// The lanes of a mask that the last warp of a block has.
unsigned existing(const Fiber& f) {
  const int lanes = static_cast<int>(f.block->fibers.size()) - f.warp() * kWarp;
  return lanes < kWarp ? f.mask & ((1u << lanes) - 1) : f.mask;
}

template <class Function>
void for_each_lane(const Fiber& f, const Function& function) {
  const unsigned mask = existing(f);
  for (int lane = 0; lane < kWarp; ++lane) {
    if (mask >> lane & 1) function(lane, f.block->fibers[f.warp() * kWarp + lane]);
  }
}

uint64_t reduced(const Fiber& f) {
  bool first = true;
  int32_t result = 0;
  for_each_lane(f, [&](int, const Fiber* other) {
    const int32_t value = static_cast<int32_t>(other->in);
    if (first) {
      result = value;
    } else if (f.op == WarpOp::add) {
      result = static_cast<int32_t>(static_cast<uint32_t>(result) + static_cast<uint32_t>(value));
    } else {
      result = f.op == WarpOp::min ? std::min(result, value) : std::max(result, value);
    }
    first = false;
  });
  return static_cast<uint32_t>(result);
}

uint64_t result_of(const Fiber& f) {
  uint64_t lanes = 0;
  switch (f.op) {
    case WarpOp::sync:
      return 0;
    case WarpOp::shuffle:
      if ((existing(f) >> f.source & 1) == 0) return 0xfff7fff7fff7fff7ull;  // undefined in CUDA
      return f.block->fibers[f.warp() * kWarp + f.source]->in;
    case WarpOp::ballot:
      for_each_lane(f, [&](int lane, const Fiber* o) { lanes |= uint64_t{o->in != 0} << lane; });
      return lanes;
    case WarpOp::match:
      for_each_lane(f, [&](int lane, const Fiber* o) { lanes |= uint64_t{o->in == f.in} << lane; });
      return lanes;
    default:
      return reduced(f);
  }
}

// Once all lanes that `f` names have come to its operation.
void finish_warp_operation(const Fiber& f) {
  bool all = true;
  for_each_lane(f, [&](int lane, const Fiber* other) {
    if (other->state == State::done) {
      note_fault("lane " + std::to_string(lane) + ", named in a mask, has returned: " +
                 place_of(f));
    }
    const bool here = other->state == State::at_warp_operation && other->op == f.op;
    if (here && other->mask != f.mask && other->site.line == f.site.line) {
      note_fault("masks differ: " + place_of(f) + " and " + place_of(*other));
    }
    all = all && here && other->mask == f.mask;
  });
  if (!all) return;
  for_each_lane(f, [&](int, Fiber* other) { other->out = result_of(*other); });
  for_each_lane(f, [&](int, Fiber* other) { make_ready(other); });
}

// Where every fiber starts; it is used again for thread after thread.
void fiber_main() {
  sanitizers::after_switch(&machine.current->context, &machine.scheduler_context);
  for (;;) {
    sanitizers::acquire(&machine.launch_order);
    (*machine.body)();
    sanitizers::release(&machine.end_order);
    Fiber* self = machine.current;
    self->state = State::done;
    --self->block->live;
    --machine.grid_live;
    open_block_barrier(self->block);
    open_grid_barrier();
    to_scheduler();
  }
}

// Its stack as after a call: the return address at the top, below it the six saved registers. What
// a fault left on it in mid-kernel is gone.
void start(Fiber* fiber) {
  char* stack = static_cast<char*>(const_cast<void*>(fiber->context.stack));
  sanitizers::allow(stack, kStackBytes);
  sanitizers::create(&fiber->context);
  void** top = reinterpret_cast<void**>(stack + kStackBytes) - 1;
  *--top = reinterpret_cast<void*>(&fiber_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber->stack_pointer = top;
}

std::unique_ptr<Fiber> new_fiber() {
  constexpr size_t kGuard = 4096;
  void* memory = mmap(nullptr, kStackBytes + kGuard, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory, kGuard, PROT_NONE);
  auto fiber = std::make_unique<Fiber>();
  fiber->context.stack = static_cast<char*>(memory) + kGuard;
  fiber->context.size = kStackBytes;
  start(fiber.get());
  return fiber;
}

constexpr size_t kAlignment = 128;

void start_block(unsigned linear, size_t shared_bytes) {
  const dim3 grid = machine.grid, size = machine.block;
  const unsigned threads = size.x * size.y * size.z;
  machine.resident.push_back(std::make_unique<Block>());
  Block* block = machine.resident.back().get();
  block->index = {linear % grid.x, linear / grid.x % grid.y, linear / grid.x / grid.y};
  block->live = static_cast<int>(threads);
  const size_t room = (std::max<size_t>(shared_bytes, 1) + kAlignment - 1) / kAlignment * kAlignment;
  block->dynamic.reset(static_cast<char*>(std::aligned_alloc(kAlignment, room)));
  block->dynamic_room = room;
  put_in_place(block);
  fill_unseen(__start_simt_shared, static_shared_bytes());
  fill_unseen(block->dynamic.get(), room);
  sanitizers::mark_unwritten(__start_simt_shared, static_shared_bytes());
  sanitizers::mark_unwritten(block->dynamic.get(), room);
  sanitizers::forbid(block->dynamic.get() + shared_bytes, room - shared_bytes);
  const size_t first = (machine.resident.size() - 1) * threads;
  while (machine.fibers.size() < first + threads) machine.fibers.push_back(new_fiber());
  for (unsigned t = 0; t < threads; ++t) {
    Fiber* fiber = machine.fibers[first + t].get();
    fiber->block = block;
    fiber->linear = static_cast<int>(t);
    fiber->index = {t % size.x, t / size.x % size.y, t / size.x / size.y};
    fiber->site = {};
    block->fibers.push_back(fiber);
    make_ready(fiber);
  }
}

Fiber* take_ready(Block* block) {
  std::vector<Fiber*>& ready = block->ready;
  // Without a seed the last comes first: barriers make threads ready in their order.
  const size_t i = machine.seed == 0 ? ready.size() - 1 : next_random() % ready.size();
  std::swap(ready[i], ready.back());
  Fiber* fiber = ready.back();
  ready.pop_back();
  return fiber;
}

Block* any_ready_block() {
  const size_t count = machine.resident.size(), first = next_random() % count;
  for (size_t i = 0; i < count; ++i) {
    Block* block = machine.resident[(first + i) % count].get();
    if (!block->ready.empty()) return block;
  }
  return nullptr;
}

// A block's threads run on for a while before another block's turn: bringing shared memory into
// place takes longer than a switch of fibers.
void run_ready_fibers() {
  while (Block* block = any_ready_block()) {
    do {
      to_fiber(take_ready(block));
      if (!machine.fault.empty()) return;
    } while (!block->ready.empty() && next_random() % kTurn != 0);
  }
}

void note_deadlock() {
  std::string what = std::to_string(machine.grid_live) + " threads wait for ever:";
  int shown = 0;
  for (const auto& block : machine.resident) {
    for (const Fiber* f : block->fibers) {
      if (f->state == State::done || ++shown > 4) continue;
      what += "\n  " + place_of(*f);
    }
  }
  note_fault(what);
}

void end_blocks() {
  for (const auto& block : machine.resident) {
    sanitizers::allow(block->dynamic.get(), block->dynamic_room);
  }
  machine.resident.clear();
  machine.in_place = nullptr;
}

void wait(State state) {
  machine.current->state = state;
  to_scheduler();
}

}  // namespace

void set_seed(uint64_t seed) { machine.seed = seed; }

void run(dim3 grid, dim3 block, size_t dynamic_shared, bool cooperative,
         const std::function<void()>& body) {
  const unsigned blocks = grid.x * grid.y * grid.z, threads = block.x * block.y * block.z;
  if (blocks == 0 || threads == 0 || threads > 1024) throw Fault("a launch of this shape is invalid");
  machine.grid = grid;
  machine.block = block;
  machine.body = &body;
  machine.fault.clear();
  machine.random = machine.seed * 0x9e3779b97f4a7c15ull + 1;
#ifdef SIMT_TSAN
  machine.scheduler_context.thread = __tsan_get_current_fiber();
#endif
  std::vector<unsigned> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  for (unsigned i = blocks; machine.seed != 0 && i-- > 1;) {
    std::swap(order[i], order[next_random() % (i + 1)]);
  }
  const unsigned at_once = cooperative ? blocks : 1;
  for (unsigned i = 0; i < blocks && machine.fault.empty(); i += at_once) {
    machine.grid_live = static_cast<int>(threads * at_once);
    machine.grid_waiting = 0;
    for (unsigned j = 0; j < at_once; ++j) start_block(order[i + j], dynamic_shared);
    sanitizers::release(&machine.launch_order);
    run_ready_fibers();
    sanitizers::acquire(&machine.end_order);
    if (machine.fault.empty() && machine.grid_live > 0) note_deadlock();
    end_blocks();
  }
  if (machine.fault.empty()) return;
  for (auto& fiber : machine.fibers) start(fiber.get());
  throw Fault(machine.fault);
}

uint3 thread_index() { return machine.current->index; }
uint3 block_index() { return machine.current->block->index; }
dim3 block_size() { return machine.block; }
dim3 grid_size() { return machine.grid; }
char* dynamic_shared() { return machine.current->block->dynamic.get(); }
int lane() { return machine.current->lane(); }

int block_barrier(Vote vote, bool predicate, Site site) {
  Fiber* self = machine.current;
  self->site = site;
  self->vote = vote;
  self->in = predicate;
  self->state = State::at_block_barrier;
  sanitizers::release(&self->block->order[kWarp]);
  ++self->block->waiting;
  open_block_barrier(self->block);
  to_scheduler();
  sanitizers::acquire(&self->block->order[kWarp]);
  return static_cast<int>(self->out);
}

void grid_barrier(Site site) {
  machine.current->site = site;
  machine.current->state = State::at_grid_barrier;
  sanitizers::release(&machine.end_order);
  ++machine.grid_waiting;
  open_grid_barrier();
  to_scheduler();
  sanitizers::acquire(&machine.end_order);
}

void yield() {
  make_ready(machine.current);
  to_scheduler();
}

void chance_of_yield() {
  if (machine.seed != 0 && static_cast<double>(next_random() >> 11) * 0x1p-53 < kYieldChance) {
    yield();
  }
}

uint64_t warp_operation(WarpOp op, unsigned mask, uint64_t value, int source, Site site) {
  Fiber* self = machine.current;
  self->site = site;
  self->op = op;
  self->mask = mask;
  self->in = value;
  self->source = source;
  self->state = State::at_warp_operation;
  if ((mask >> self->lane() & 1) == 0) note_fault("a lane not in its own mask: " + place_of(*self));
  sanitizers::release(&self->block->order[self->warp()]);
  finish_warp_operation(*self);
  to_scheduler();
  sanitizers::acquire(&self->block->order[self->warp()]);
  return self->out;
}

void fail(const std::string& what, Site site) {
  machine.current->site = site;
  note_fault(what + ": " + place_of(*machine.current));
  for (;;) wait(State::done);
}

void fence() {
  sanitizers::acquire(&machine.fence_order);
  sanitizers::release(&machine.fence_order);
  chance_of_yield();
}

}  // namespace simt
