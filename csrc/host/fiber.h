// Fibers: stacks that take turns on one thread. A switch saves six registers and the stack pointer.
#pragma once

#include <stddef.h>
#include <stdlib.h>

#include <memory>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef GPU_HOST_TSAN  // the engine itself is built without -fsanitize=thread
#include <sanitizer/tsan_interface.h>
#endif

#ifdef GPU_HOST_TSAN
extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

extern "C" void gpu_host_switch(void** save_stack_pointer, void* load_stack_pointer);

namespace gpu_host {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 256 << 10;
#else
constexpr size_t kStackBytes = 64 << 10;
#endif

// While it lives, ThreadSanitizer looks away: the engine's own memory, which it sees through libc.
struct Unseen {
#ifdef GPU_HOST_TSAN
  Unseen() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Unseen() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
#else
  Unseen() {}
  ~Unseen() {}
#endif
  Unseen(const Unseen&) = delete;
  Unseen& operator=(const Unseen&) = delete;
};

class Fiber {
 public:
  Fiber() = default;
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber() {
    retire();
    free(stack_);
  }

  // The fiber that runs now, on the stack it already has.
  void adopt_current() {
#ifdef GPU_HOST_TSAN
    tsan_ = __tsan_get_current_fiber();
    owns_tsan_ = false;
#endif
  }

  // A fresh start at `entry`, which never returns.
  void prepare(void (*entry)()) {
    retire();
#ifdef GPU_HOST_TSAN
    // New memory, since threads that used the old one did not synchronise with this one.
    free(stack_);
    stack_ = nullptr;
#endif
    if (stack_ == nullptr) stack_ = static_cast<char*>(aligned_alloc(64, kStackBytes));
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stack_, kStackBytes);
    fake_stack_ = nullptr;
#endif
#ifdef GPU_HOST_TSAN
    tsan_ = __tsan_create_fiber(0);
    owns_tsan_ = true;
#endif
    // What gpu_host_switch pops: six registers, then the entry's address, 16-aligned as after a call.
    void** slot = reinterpret_cast<void**>(stack_ + kStackBytes - 16);
    *slot = reinterpret_cast<void*>(entry);
    for (int i = 1; i <= 6; ++i) slot[-i] = nullptr;
    stack_pointer_ = slot - 6;
  }

  // Stops this fiber, the one that runs, and goes on with `other`.
  void switch_to(Fiber& other) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&fake_stack_, other.stack_ ? other.stack_ : other.bottom_,
                                   other.stack_ ? kStackBytes : other.size_);
    came_from() = this;
#endif
#ifdef GPU_HOST_TSAN
    __tsan_switch_to_fiber(other.tsan_, __tsan_switch_to_fiber_no_sync);
#endif
    gpu_host_switch(&stack_pointer_, other.stack_pointer_);
    arrived();
  }

  // Called where a fiber goes on, and first of all in its entry.
  void arrived() {
#if defined(__SANITIZE_ADDRESS__)
    Fiber* from = came_from();
    __sanitizer_finish_switch_fiber(fake_stack_, &from->bottom_, &from->size_);
#endif
  }

 private:
  void retire() {
#ifdef GPU_HOST_TSAN
    if (owns_tsan_) __tsan_destroy_fiber(tsan_);
    owns_tsan_ = false;
#endif
  }

  void* stack_pointer_ = nullptr;
  char* stack_ = nullptr;
#if defined(__SANITIZE_ADDRESS__)
  static Fiber*& came_from() {
    static Fiber* fiber = nullptr;
    return fiber;
  }
  void* fake_stack_ = nullptr;
  const void* bottom_ = nullptr;
  size_t size_ = 0;
#endif
#ifdef GPU_HOST_TSAN
  void* tsan_ = nullptr;
  bool owns_tsan_ = false;
#endif
};

}  // namespace gpu_host
