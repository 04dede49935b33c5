#include "host/engine.h"

#include <string.h>

#include <algorithm>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "host/controls.h"
#include "host/threads.h"

#ifndef __x86_64__
#error "the host engine switches stacks in x86-64 assembly"
#endif
asm(R"(
.text
.globl gpu_host_switch
.type gpu_host_switch, @function
gpu_host_switch:
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
.size gpu_host_switch, . - gpu_host_switch
)");

namespace gpu_host {

Engine engine;

std::string text(Where where) {
  const char* slash = strrchr(where.file, '/');
  return std::string(slash ? slash + 1 : where.file) + ":" + std::to_string(where.line);
}

void yield() { engine.current->fiber.switch_to(engine.scheduler); }

void queue_up(std::vector<Thread*>& waiting, Where where) {
  const Unseen unseen;
  Thread* self = engine.current;
  self->state = State::kWaiting;
  self->waits_at = where;
  waiting.push_back(self);
}

void wake(std::vector<Thread*>& waiting) {
  for (Thread* thread : waiting) thread->state = State::kReady;
  waiting.clear();
}

namespace {

constexpr size_t kResidentBlocks = 3;  // this many take turns; the others wait for a place
constexpr int kDemoteOneIn = 64;       // scheduling steps after which a warp loses its priority

void entry() {
  Thread* self = engine.current;
  self->fiber.arrived();
  tsan_acquire(&engine.tsan_launch);
  try {
    (*engine.body)();
  } catch (...) {
    if (!engine.error) engine.error = std::current_exception();
  }
  tsan_release(&engine.tsan_done);
  self->state = State::kDone;
  ++self->block->done;
  for (;;) yield();
}

// Waits until `expected` threads have come to this meeting; returns the phase they met in.
int meet(Meeting& meeting, size_t expected, Where where) {
  const int phase = meeting.phase;
  tsan_release(&meeting.tsan_tag[phase]);
  queue_up(meeting.waiting, where);
  if (meeting.waiting.size() == expected) {
    meeting.phase = 1 - phase;
    wake(meeting.waiting);
  }
  yield();
  tsan_acquire(&meeting.tsan_tag[phase]);
  return phase;
}

// Likewise, all of them on one line.
int meet_at_one_line(Meeting& meeting, size_t expected, Where where) {
  if (meeting.waiting.empty()) {
    meeting.where = where;
  } else if (meeting.where.line != where.line || strcmp(meeting.where.file, where.file) != 0) {
    throw std::logic_error("divergent barriers: threads of one group wait at " +
                           text(meeting.where) + " and at " + text(where));
  }
  return meet(meeting, expected, where);
}

int meet_block(Where where) {
  Block* block = engine.current->block;
  return meet_at_one_line(block->barrier, block->threads.size(), where);
}

std::unique_ptr<Block> start_block(int64_t index) {
  const int threads = engine.shape.threads;
  std::unique_ptr<Block> block;
  if (!engine.spare.empty()) {
    block = std::move(engine.spare.back());
    engine.spare.pop_back();
  } else {
    block = std::make_unique<Block>();
  }
  block->barrier = Meeting{};
  block->named.clear();
  block->done = 0;
  block->shared.clear();
  block->dynamic = poisoned_memory(static_cast<size_t>(engine.shape.shared_bytes));
  block->mbarriers.clear();
  block->bulk_bytes.clear();
  block->threads.resize(threads);
  block->warps.assign(threads / kWarpSize, Warp{});
  for (Warp& warp : block->warps) warp.priority = engine.random() | (uint64_t{1} << 63);
  for (int i = 0; i < threads; ++i) {
    auto& thread = block->threads[i];
    if (!thread) thread = std::make_unique<Thread>();
    thread->block = block.get();
    thread->warp = &block->warps[i / kWarpSize];
    thread->lane = i % kWarpSize;
    thread->warp->lanes[thread->lane] = thread.get();
    thread->indices = {{static_cast<unsigned>(i), 0, 0},
                       {static_cast<unsigned>(index), 0, 0},
                       {static_cast<unsigned>(threads), 1, 1},
                       {static_cast<unsigned>(engine.shape.blocks), 1, 1}};
    thread->state = State::kReady;
    thread->waits_for = nullptr;
    thread->commits = 0;
    thread->copies.clear();
    thread->fiber.prepare(entry);
  }
  return block;
}

bool has_ready(const Warp& warp) {
  return std::any_of(std::begin(warp.lanes), std::end(warp.lanes),
                     [](const Thread* thread) { return thread->state == State::kReady; });
}

Warp* pick_warp() {
  Warp* best = nullptr;
  for (auto& block : engine.resident) {
    for (Warp& warp : block->warps) {
      if ((best == nullptr || warp.priority > best->priority) && has_ready(warp)) best = &warp;
    }
  }
  return best;
}

void run_warp(Warp& warp) {
  if (engine.random() % kDemoteOneIn == 0) warp.priority = --engine.lowest;
  const bool backwards = engine.random() % 2 != 0;
  for (int i = 0; i < kWarpSize && !engine.error; ++i) {
    Thread* thread = warp.lanes[backwards ? kWarpSize - 1 - i : i];
    if (thread->state != State::kReady) continue;
    engine.current = thread;
    engine.scheduler.switch_to(thread->fiber);
  }
}

// Nothing can run, and not all has ended: where threads wait, and for what.
std::string describe_deadlock() {
  std::vector<std::string> places;
  bool returned = engine.ended && !engine.grid.waiting.empty();
  bool by_mbarrier = false;
  for (auto& block : engine.resident) {
    for (auto& thread : block->threads) {
      returned = returned || thread->state == State::kDone;
      if (thread->state != State::kWaiting) continue;
      std::string place = text(thread->waits_at);
      if (const Mbarrier* barrier = thread->waits_for) {
        by_mbarrier = true;
        place += " for an mbarrier that lacks " + std::to_string(barrier->pending) +
                 " arrivals and " + std::to_string(barrier->missing) + " bytes, expected at " +
                 text(barrier->expected_at);
      }
      if (std::find(places.begin(), places.end(), place) == places.end()) places.push_back(place);
    }
  }
  std::string all = by_mbarrier ? "threads wait at " : "divergent barriers: threads wait at ";
  for (size_t i = 0; i < places.size(); ++i) all += (i > 0 ? " and at " : "") + places[i];
  return all + (returned && !by_mbarrier ? " for threads that have returned" : "");
}

void end_block(size_t place) {
  auto& block = engine.resident[place];
  check_finished(*block);
  block->shared.clear();
  engine.spare.push_back(std::move(block));
  engine.resident.erase(engine.resident.begin() + static_cast<std::ptrdiff_t>(place));
  engine.ended = true;
}

void run_all() {
  const Unseen unseen;
  std::vector<int64_t> order(static_cast<size_t>(engine.shape.blocks));
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int64_t>(i);
  std::shuffle(order.begin(), order.end(), engine.random);
  const size_t room = engine.shape.cooperative ? order.size() : kResidentBlocks;
  size_t next = 0;
  while (!engine.error) {
    while (engine.resident.size() < room && next < order.size()) {
      engine.resident.push_back(start_block(order[next++]));
    }
    if (engine.resident.empty()) return;
    Warp* warp = pick_warp();
    if (warp == nullptr) throw std::logic_error(describe_deadlock());
    run_warp(*warp);
    for (size_t i = engine.resident.size(); i-- > 0 && !engine.error;) {
      if (engine.resident[i]->done == engine.shape.threads) end_block(i);
    }
  }
}

}  // namespace

void launch(const Shape& shape, const std::function<void()>& body) {
  if (shape.threads % kWarpSize != 0) throw std::logic_error("a block must be whole warps");
  engine.body = &body;
  engine.shape = shape;
  engine.grid = Meeting{};
  engine.error = nullptr;
  engine.ended = false;
  engine.lowest = uint64_t{1} << 62;
  engine.scheduler.adopt_current();
  tsan_release(&engine.tsan_launch);
  try {
    run_all();
  } catch (...) {
    engine.error = std::current_exception();
  }
  tsan_acquire(&engine.tsan_done);
  // After an error, threads that had not ended are abandoned with their stacks.
  for (auto& block : engine.resident) engine.spare.push_back(std::move(block));
  engine.resident.clear();
  engine.current = nullptr;
  if (engine.error) std::rethrow_exception(engine.error);
}

void set_schedule(uint64_t seed) { engine.random.seed(seed); }

const Indices& indices() { return engine.current->indices; }

int lane() { return engine.current->lane; }

void block_barrier(Where where) { meet_block(where); }

void named_barrier(int id, int threads, Where where) {
  if (id < 1 || id > 15 || threads < 1 || threads % kWarpSize != 0) {
    throw std::logic_error(text(where) + ": a named barrier is one of 1 to 15, of whole warps");
  }
  Meeting* meeting;
  {
    const Unseen unseen;
    meeting = &engine.current->block->named[id];
  }
  if (meeting->waiting.empty()) {
    meeting->expected = threads;
    meeting->where = where;
  } else if (meeting->expected != threads) {
    throw std::logic_error("named barrier " + std::to_string(id) + " is of " +
                           std::to_string(meeting->expected) + " threads at " +
                           text(meeting->where) + " and of " + std::to_string(threads) + " at " +
                           text(where));
  }
  meet(*meeting, static_cast<size_t>(threads), where);
}

void grid_barrier(Where where) {
  if (!engine.shape.cooperative) {
    throw std::logic_error(text(where) + ": a grid sync in a launch that is not cooperative");
  }
  meet_at_one_line(engine.grid,
                   static_cast<size_t>(engine.shape.blocks * engine.shape.threads), where);
}

bool block_or(bool vote, Where where) {
  Meeting& barrier = engine.current->block->barrier;
  if (barrier.waiting.empty()) barrier.any[barrier.phase] = false;
  barrier.any[barrier.phase] = barrier.any[barrier.phase] || vote;
  return barrier.any[meet_block(where)];
}

const uint64_t* warp_exchange(unsigned mask, uint64_t value, Where where) {
  if (mask != 0xffffffffu) throw std::logic_error(text(where) + ": the mask is not a whole warp");
  Meeting& meeting = engine.current->warp->meeting;
  meeting.values[meeting.phase][engine.current->lane] = value;
  return meeting.values[meet_at_one_line(meeting, kWarpSize, where)];
}

void pause() {
  if (engine.random() % 4 != 0) return;
  engine.current->warp->priority = --engine.lowest;
  yield();
}

void thread_fence() {
  tsan_release(&engine.tsan_fence);
  pause();
  tsan_acquire(&engine.tsan_fence);
}

}  // namespace gpu_host
