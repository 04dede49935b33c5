// Stores new keys and values in their pages; plain C++ for the bindings.
#pragma once

#include <stdint.h>

// k, v [T, K, D], pages [P, K, N, D], slots [T]; strides in bytes, the last dimension contiguous.
struct PagedWriteArgs {
  const void* k;
  const void* v;
  void* k_pages;
  void* v_pages;
  const void* slots;
  int* error_flag;  // or null
  int64_t k_token_stride, k_head_stride, v_token_stride, v_head_stride;
  int64_t k_page_stride, k_page_head_stride, k_page_slot_stride;
  int64_t v_page_stride, v_page_head_stride, v_page_slot_stride;
  int64_t slots_stride;  // in elements
  int64_t tokens, pages;  // pages * page_size < 2^31
  int kv_heads, page_size, row_bytes;
  int access_bytes;  // 16, 4 or 2: divides every stride, address and row_bytes
  bool wide_slots;   // int64 rather than int32
};

// Throws std::runtime_error where the driver or the launch fails.
void launch_paged_write(const PagedWriteArgs& args, void* stream);
