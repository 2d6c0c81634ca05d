#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <numeric>

#include "machine.h"

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

void begin_turn(Fiber* self) {
  if (self->turn != machine.turn) sanitizers::acquire(&machine.turn_order);
  self->turn = machine.turn;
}

// Static shared memory has one address for all blocks. Where blocks take turns, ThreadSanitizer is
// therefore told that all of one turn comes before the next.
void to_scheduler() {
  Fiber* self = machine.current;
  if (machine.cooperative) sanitizers::release(&machine.turn_order);
  sanitizers::before_switch(&self->context, machine.scheduler_context);
  simt_switch_stack(&self->stack_pointer, machine.scheduler);
  sanitizers::after_switch(&self->context, &machine.scheduler_context);
  begin_turn(self);
}

void make_ready(Fiber* fiber) {
  fiber->state = State::ready;
  fiber->block->ready[fiber->warp()].push_back(fiber);
}

namespace {

constexpr size_t kStackBytes = 256 << 10;
constexpr double kYieldChance = 0.05;
constexpr uint64_t kTurn = 512;  // switches that a block's turn lasts, on average
constexpr uint64_t kWarpTurn = 64;

// Copies unseen by any sanitizer: what fibers of other blocks did to these bytes is no race.
__attribute__((no_sanitize("address", "thread", "memory"), noinline)) void copy_unseen(
    void* to, const void* from, size_t bytes) {
  asm volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(bytes) : : "memory");
}

__attribute__((no_sanitize("address", "thread", "memory"), noinline)) void fill_unseen(
    void* to, size_t bytes) {
  asm volatile("rep stosb" : "+D"(to), "+c"(bytes) : "a"(0xff) : "memory");  // NaN, and -1
}

size_t shared_bytes() { return __stop_simt_shared - __start_simt_shared; }

void put_in_place(Block* block) {
  if (machine.in_place == block) return;
  const size_t bytes = shared_bytes();
  if (machine.in_place != nullptr) {
    machine.in_place->image.resize(bytes);
    copy_unseen(machine.in_place->image.data(), __start_simt_shared, bytes);
  }
  if (!block->image.empty()) copy_unseen(__start_simt_shared, block->image.data(), bytes);
  machine.in_place = block;
}

void to_fiber(Fiber* fiber) {
  machine.current = fiber;
  put_in_place(fiber->block);
  sanitizers::before_switch(&machine.scheduler_context, fiber->context);
  simt_switch_stack(&machine.scheduler, fiber->stack_pointer);
  sanitizers::Context unused;
  sanitizers::after_switch(&machine.scheduler_context, &unused);
}

// Where every fiber starts; a fiber is used again, for thread after thread.
void fiber_main() {
  sanitizers::after_switch(&machine.current->context, &machine.scheduler_context);
  for (;;) {
    sanitizers::acquire(&machine.launch_order);
    begin_turn(machine.current);
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

// Makes its stack as after a call: the return address at the top, below it the six saved registers.
// What a fault left on it in mid-kernel is gone.
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

void start_block(unsigned linear) {
  const dim3 grid = machine.grid, size = machine.block;
  const unsigned threads = size.x * size.y * size.z;
  machine.resident.push_back(std::make_unique<Block>());
  Block* block = machine.resident.back().get();
  block->index = {linear % grid.x, linear / grid.x % grid.y, linear / grid.x / grid.y};
  block->live = static_cast<int>(threads);
  put_in_place(block);
  fill_unseen(__start_simt_shared, shared_bytes());
  sanitizers::mark_unwritten(__start_simt_shared, shared_bytes());
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

// A warp with threads that are ready: most often the one that ran last, as a GPU's warps run ahead
// of each other. Null where the block has none.
std::vector<Fiber*>* ready_warp(Block* block) {
  const bool stay = next_random() % kWarpTurn != 0;
  const int first = stay ? block->last_warp : static_cast<int>(next_random() % kWarp);
  for (int i = 0; i < kWarp; ++i) {
    const int warp = (first + i) % kWarp;
    if (block->ready[warp].empty()) continue;
    block->last_warp = warp;
    return &block->ready[warp];
  }
  return nullptr;
}

Fiber* take(std::vector<Fiber*>* ready) {
  if (machine.seed != 0) std::swap((*ready)[next_random() % ready->size()], ready->back());
  Fiber* fiber = ready->back();
  ready->pop_back();
  return fiber;
}

// A block's threads run on for a while before another block's turn: bringing shared memory into
// place takes longer than a switch of fibers.
bool run_turn(Block* block) {
  std::vector<Fiber*>* ready = ready_warp(block);
  if (ready == nullptr) return false;
  ++machine.turn;
  for (; ready != nullptr && machine.fault.empty(); ready = ready_warp(block)) {
    to_fiber(take(ready));
    if (next_random() % kTurn == 0) break;
  }
  return true;
}

void run_ready_fibers() {
  const size_t count = machine.resident.size();
  for (size_t idle = 0, at = 0; idle < count && machine.fault.empty();) {
    at = machine.seed == 0 || idle > 0 ? (at + 1) % count : next_random() % count;
    idle = run_turn(machine.resident[at].get()) ? 0 : idle + 1;
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
  machine.resident.clear();
  machine.in_place = nullptr;
}

}  // namespace

uint64_t faults() { return machine.faults; }

void set_seed(uint64_t seed) { machine.seed = seed; }

void run(dim3 grid, dim3 block, bool cooperative, const std::function<void()>& body) {
  const unsigned blocks = grid.x * grid.y * grid.z, threads = block.x * block.y * block.z;
  if (blocks == 0 || threads == 0 || threads > 1024)
    throw Fault("a launch of this shape is invalid");
  machine.grid = grid;
  machine.block = block;
  machine.cooperative = cooperative;
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
    for (unsigned j = 0; j < at_once; ++j) start_block(order[i + j]);
    sanitizers::release(&machine.launch_order);
    run_ready_fibers();
    sanitizers::acquire(&machine.end_order);
    if (machine.fault.empty() && machine.grid_live > 0) note_deadlock();
    end_blocks();
  }
  if (machine.fault.empty()) return;
  for (auto& fiber : machine.fibers) start(fiber.get());
  ++machine.faults;
  throw Fault(machine.fault);
}

uint3 thread_index() { return machine.current->index; }
uint3 block_index() { return machine.current->block->index; }
dim3 block_size() { return machine.block; }
dim3 grid_size() { return machine.grid; }
int lane() { return machine.current->lane(); }

void yield() {
  make_ready(machine.current);
  to_scheduler();
}

void chance_of_yield() {
  if (machine.seed != 0 && static_cast<double>(next_random() >> 11) * 0x1p-53 < kYieldChance) {
    yield();
  }
}

void fail(const std::string& what, Site site) {
  machine.current->site = site;
  note_fault(what + ": " + place_of(*machine.current));
  for (;;) to_scheduler();  // for ever: the scheduler stops at a fault
}

void fence() {
  sanitizers::acquire(&machine.fence_order);
  sanitizers::release(&machine.fence_order);
  chance_of_yield();
}

}  // namespace simt
