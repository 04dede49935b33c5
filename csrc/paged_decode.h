// Attention of one new token a sequence to its keys in pages; plain C++ for the bindings.
#pragma once

#include <stdint.h>

#include "dtype.h"

// A long context is cut into at most this many splits.
constexpr int kMaxSplits = 32;
constexpr int kMinSplitKeys = 128;

// q [B, H, D], pages [P, K, N, D], page_table [B, max_pages], lengths [B]. Strides in elements;
// those of q, the pages and the new rows are multiples of 16 bytes, and so are the addresses.
struct PagedDecodeArgs {
  const void* q;
  void* k_pages;  // written only where new_k is given
  void* v_pages;
  const void* page_table;
  const void* lengths;
  void* out;            // [B, H, D], contiguous
  float* lse;           // [H, B], natural logarithm, or null
  float* part;          // [B, H, slots, D] float32, or null where slots is 1
  float* part_lse;      // [B, H, slots], binary logarithm
  const void* new_k;    // [B, K, D]: the row of the last key, stored in its page on the way; or null
  const void* new_v;
  int* error_flag;      // or null
  int64_t q_seq_stride, q_head_stride;
  int64_t k_page_stride, k_head_stride, k_slot_stride;
  int64_t v_page_stride, v_head_stride, v_slot_stride;
  int64_t new_k_seq_stride, new_k_head_stride, new_v_seq_stride, new_v_head_stride;
  int64_t table_seq_stride, table_page_stride, lengths_stride;
  int64_t pages;
  int batch, heads, kv_heads, head_dim, page_size, max_pages;
  int window_left;  // keys before the last one that are seen; -1: all
  int prefix_keys;  // keys at the front that every sequence shares with sequence 0; 0: none
  int slots;        // room for partial results: splits of the prefix and of the longest rest
  float scale;
  bool wide_table, wide_lengths;
  Dtype dtype;
};

// The split that a stretch of `keys` keys is cut into: a function of its own length alone, so that
// a sequence gives the same bits in any batch.
constexpr int split_keys(int keys) {
  int split = kMinSplitKeys;
  while (split * kMaxSplits < keys) split *= 2;
  return split;
}
constexpr int count_splits(int keys) { return (keys + split_keys(keys) - 1) / split_keys(keys); }

// Throws std::runtime_error where the driver or the launch fails.
void launch_paged_decode(const PagedDecodeArgs& args, void* stream);
