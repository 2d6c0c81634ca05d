// What threads wait for each other at: barriers of blocks and of the grid, operations of warps.
#include <algorithm>
#include <iterator>
#include <vector>

#include "machine.h"

namespace simt {
namespace {

// Fibers that wait together are ordered by that: all have arrived before any of them goes on. If a
// barrier and its next use had one address, a fiber that goes on late would also be ordered after
// what an early one did between the two, and a race there would go unseen.
class Meeting {
 public:
  Meeting() : last_(machine.current) {}
  void has(Fiber* fiber) {
    sanitizers::acquire(&fiber->arrival);
    fibers_.push_back(fiber);
  }
  ~Meeting() {
    if (fibers_.empty()) return;
    char* object = &last_->meetings[last_->meeting++ % std::size(last_->meetings)];
    sanitizers::release(object);
    for (Fiber* fiber : fibers_) {
      fiber->joined = object;
      make_ready(fiber);
    }
  }

 private:
  Fiber* last_;
  std::vector<Fiber*> fibers_;
};

void wait_for_others() {
  to_scheduler();
  sanitizers::acquire(machine.current->joined);
}

}  // namespace

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
  Meeting meeting;
  for (Fiber* f : block->fibers) {
    if (f->state != State::at_block_barrier) continue;
    f->out = f->vote == Vote::count ? count : f->vote == Vote::any ? count > 0 : count == live;
    meeting.has(f);
  }
}

void open_grid_barrier() {
  if (machine.grid_waiting == 0 || machine.grid_waiting != machine.grid_live) return;
  machine.grid_waiting = 0;
  Meeting meeting;
  for (const auto& block : machine.resident) {
    for (Fiber* f : block->fibers) {
      if (f->state == State::at_grid_barrier) meeting.has(f);
    }
  }
}

namespace {

// The lanes of the mask that exist: the last warp of a block may have fewer than kWarp.
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

// Lets them go on, once all lanes that `f` names have come to its operation.
void finish_warp_operation(const Fiber& f) {
  bool all = true;
  for_each_lane(f, [&](int lane, const Fiber* other) {
    if (other->state == State::done) {
      note_fault("lane " + std::to_string(lane) +
                 ", named in a mask, has returned: " + place_of(f));
    }
    const bool here = other->state == State::at_warp_operation && other->op == f.op;
    if (here && other->mask != f.mask && other->site.line == f.site.line) {
      note_fault("masks differ: " + place_of(f) + " and " + place_of(*other));
    }
    all = all && here && other->mask == f.mask;
  });
  if (!all) return;
  for_each_lane(f, [&](int, Fiber* other) { other->out = result_of(*other); });
  Meeting meeting;
  for_each_lane(f, [&](int, Fiber* other) { meeting.has(other); });
}

}  // namespace

int block_barrier(Vote vote, bool predicate, Site site) {
  Fiber* self = machine.current;
  self->site = site;
  self->vote = vote;
  self->in = predicate;
  self->state = State::at_block_barrier;
  sanitizers::release(&self->arrival);
  ++self->block->waiting;
  open_block_barrier(self->block);
  wait_for_others();
  return static_cast<int>(self->out);
}

void grid_barrier(Site site) {
  Fiber* self = machine.current;
  self->site = site;
  self->state = State::at_grid_barrier;
  sanitizers::release(&self->arrival);
  ++machine.grid_waiting;
  open_grid_barrier();
  wait_for_others();
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
  sanitizers::release(&self->arrival);
  finish_warp_operation(*self);
  wait_for_others();
  return self->out;
}

}  // namespace simt
