// The engine's memory: what is shared, poisoned, misaligned, or on its way to shared memory.
#include <string.h>

#include <new>
#include <stdexcept>
#include <string>
#include <utility>

#include "host/controls.h"
#include "host/threads.h"

namespace gpu_host {
namespace {

void require_aligned(uintptr_t number, Where where) {
  if (number % 16 != 0) throw std::logic_error("misaligned 16-byte access at " + text(where));
}

Mbarrier& find(const void* barrier, Where where) {
  auto& known = engine.current->block->mbarriers;
  const auto found = known.find(barrier);
  if (found == known.end()) throw std::logic_error(text(where) + ": an mbarrier before its init");
  return found->second;
}

// Ends the phase where nothing is missing.
void advance(Mbarrier& barrier) {
  if (barrier.pending > 0 || barrier.missing > 0) return;
  if (barrier.missing < 0) {
    throw std::logic_error("the bulk copies up to " + text(barrier.issued.back().where) +
                           " bring " + std::to_string(-barrier.missing) +
                           " bytes more than were expected at " + text(barrier.expected_at));
  }
  barrier.due.insert(barrier.due.end(), barrier.issued.begin(), barrier.issued.end());
  barrier.issued.clear();
  barrier.pending = barrier.arrivals;
  ++barrier.phase;
  wake(barrier.waiting);
}

// A bulk copy may not overtake stores to the same place: they must be fenced off.
void check_fenced(char* to, const BulkCopy& copy) {
  auto& written = engine.current->block->bulk_bytes;
  auto range = written.begin();
  while (range != written.end()) {
    auto& [start, bytes] = *range;
    if (start >= to + copy.bytes || start + bytes.size() <= to) {
      ++range;
      continue;
    }
    if (memcmp(start, bytes.data(), bytes.size()) != 0) {
      throw std::logic_error("the bulk copy at " + text(copy.where) +
                             " goes where threads stored without gpu_fence_bulk_copies()");
    }
    range = written.erase(range);
  }
}

}  // namespace

void poison([[maybe_unused]] uintptr_t address, [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(reinterpret_cast<void*>(address), bytes);
#endif
}
void unpoison([[maybe_unused]] uintptr_t address, [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(reinterpret_cast<void*>(address), bytes);
#endif
}

Memory poisoned_memory(size_t bytes) {
  if (bytes == 0) return {nullptr, &free};
  // As long as was asked for and no longer: AddressSanitizer sees what lies past it.
  void* memory = nullptr;
  if (posix_memalign(&memory, 16, bytes) != 0) throw std::bad_alloc();
  memset(memory, 0xff, bytes);  // NaN in each floating type
  return {static_cast<char*>(memory), &free};
}

void* shared_memory(size_t bytes, Where where) {
  const Unseen unseen;
  auto& shared = engine.current->block->shared;
  const auto key = std::make_pair(std::string(where.file), where.line);
  auto found = shared.find(key);
  if (found == shared.end()) found = shared.emplace(key, poisoned_memory(bytes)).first;
  return found->second.get();
}

void* dynamic_shared_memory() { return engine.current->block->dynamic.get(); }

void check_aligned(const void* address, Where where) {
  require_aligned(reinterpret_cast<uintptr_t>(address), where);
}

void copy_async(void* to, const void* from) {
  const Unseen unseen;
  memset(to, 0xff, sizeof(uint4));  // whatever was there is not to be read any more
  engine.current->copies.emplace_back(engine.current->commits, Copy{to, from});
}

void copies_commit() { ++engine.current->commits; }

Copy* copy_due(int pending) {
  const Unseen unseen;
  Thread* self = engine.current;
  if (self->copies.empty() || self->copies.front().first >= self->commits - pending) return nullptr;
  self->due = self->copies.front().second;
  self->copies.pop_front();
  return &self->due;
}

void mbarrier_init(const void* barrier, int arrivals, Where where) {
  const Unseen unseen;
  if (arrivals < 1) throw std::logic_error(text(where) + ": an mbarrier of no arrivals");
  Mbarrier& made = engine.current->block->mbarriers[barrier] = Mbarrier{};
  made.arrivals = made.pending = arrivals;
  made.expected_at = where;
}

void mbarrier_arrive(const void* barrier, int expected_bytes, Where where) {
  pause();
  Mbarrier& mine = find(barrier, where);
  tsan_release(&mine.tsan_tag[mine.phase % 2]);
  const Unseen unseen;
  if (mine.pending == 0) {
    throw std::logic_error("an arrival too many at " + text(where) + ": the phase still lacks " +
                           std::to_string(mine.missing) + " bytes, expected at " +
                           text(mine.expected_at));
  }
  --mine.pending;
  mine.missing += expected_bytes;
  if (expected_bytes > 0) mine.expected_at = where;
  advance(mine);
}

void copy_bulk(const BulkCopy& copy, const void* barrier) {
  pause();
  Mbarrier& mine = find(barrier, copy.where);
  check_aligned(copy.to, copy.where);
  check_aligned(copy.from, copy.where);
  require_aligned(static_cast<uintptr_t>(copy.bytes), copy.where);
  tsan_release(&mine.tsan_tag[mine.phase % 2]);
  const Unseen unseen;
  check_fenced(static_cast<char*>(copy.to), copy);
  memset(copy.to, 0xff, static_cast<size_t>(copy.bytes));
  mine.issued.push_back(copy);
  mine.missing -= copy.bytes;
  advance(mine);
}

void mbarrier_wait(const void* barrier, unsigned phase, Where where) {
  Mbarrier& mine = find(barrier, where);
  while ((mine.phase & 1) == (phase & 1)) {
    queue_up(mine.waiting, where);
    engine.current->waits_for = &mine;
    yield();
    engine.current->waits_for = nullptr;
  }
  tsan_acquire(&mine.tsan_tag[phase & 1]);
}

BulkCopy* bulk_copy_due(const void* barrier) {
  const Unseen unseen;
  Thread* self = engine.current;
  auto& due = self->block->mbarriers[barrier].due;
  if (due.empty()) return nullptr;
  self->bulk_due = due.front();
  due.pop_front();
  return &self->bulk_due;
}

void bulk_copy_done(const void* barrier, const BulkCopy& copy) {
  Block* block = engine.current->block;
  Mbarrier& mine = block->mbarriers[barrier];
  tsan_release(&mine.tsan_tag[(mine.phase - 1) % 2]);
  const Unseen unseen;
  char* to = static_cast<char*>(copy.to);
  block->bulk_bytes[to] = std::string(to, static_cast<size_t>(copy.bytes));
}

void fence_bulk_copies() {
  const Unseen unseen;
  engine.current->block->bulk_bytes.clear();
}

void check_finished(const Block& block) {
  for (const auto& [address, barrier] : block.mbarriers) {
    if (barrier.issued.empty() && barrier.due.empty()) continue;
    const Where where = barrier.due.empty() ? barrier.issued[0].where : barrier.due[0].where;
    throw std::logic_error("a block ended before anyone waited for the bulk copy at " +
                           text(where));
  }
}

}  // namespace gpu_host
