// Maths: k_pages[slot / N, :, slot % N] = k[token], and v alike, for 0 <= slot < P * N; of tokens
// with one slot the last stays.
// Memory: k, v and what is written cross once, in accesses of 16 bytes where the layout allows.
// To find the last token of a slot a block reads the slots after its own: T^2 / 2 comparisons.
// Grid: a block a token; its threads take the access-wide pieces of all heads.
#pragma once

#include "device/error_flag.cuh"
#include "device/vec.cuh"
#include "paged_write.h"

namespace paged_write {

constexpr int kThreads = 128;

// Piece: the type of one access (uint4, uint32_t or uint16_t).
template <typename Piece>
GPU_KERNEL(kThreads) paged_write_kernel(GPU_CONSTANT PagedWriteArgs a) {
  const int64_t token = blockIdx.x;
  const IndexArray slots{a.slots, a.slots_stride, a.wide_slots};

  // 1. Its slot. The same in every thread, so the block ends together.
  const int64_t slot = load_index(slots, token);
  if (slot < 0) return;
  if (slot >= a.pages * a.page_size) {
    if (threadIdx.x == 0) raise_flag(a.error_flag, kSlotOutOfRange);
    return;
  }

  // 2. Whether a later token has the same.
  bool replaced = false;
  for (int64_t later = token + 1 + threadIdx.x; later < a.tokens; later += kThreads) {
    replaced = replaced || load_index(slots, later) == slot;
  }
  if (__syncthreads_or(replaced)) return;

  // 3. The rows of every head, piece by piece.
  const int64_t page = static_cast<unsigned>(slot) / static_cast<unsigned>(a.page_size);
  const int64_t place = slot - page * a.page_size;
  const char* k = static_cast<const char*>(a.k) + token * a.k_token_stride;
  const char* v = static_cast<const char*>(a.v) + token * a.v_token_stride;
  char* k_to = static_cast<char*>(a.k_pages) + page * a.k_page_stride + place * a.k_page_slot_stride;
  char* v_to = static_cast<char*>(a.v_pages) + page * a.v_page_stride + place * a.v_page_slot_stride;
  const int pieces = a.row_bytes / static_cast<int>(sizeof(Piece));
#pragma unroll 1  // a thread has one or two: unrolling would spill
  for (int i = threadIdx.x; i < a.kv_heads * pieces; i += kThreads) {
    const int64_t head = i / pieces;
    const int64_t at = static_cast<int64_t>(i % pieces) * sizeof(Piece);
    const Piece k_piece = *reinterpret_cast<const Piece*>(k + head * a.k_head_stride + at);
    const Piece v_piece = *reinterpret_cast<const Piece*>(v + head * a.v_head_stride + at);
    *reinterpret_cast<Piece*>(k_to + head * a.k_page_head_stride + at) = k_piece;
    *reinterpret_cast<Piece*>(v_to + head * a.v_page_head_stride + at) = v_piece;
  }
}

}  // namespace paged_write
