// What a block of paged_decode.cuh works on, and what each warp does with its part: asynchronous
// copies several steps ahead, scores, softmax.
#pragma once

#include "device/error_flag.cuh"
#include "device/softmax_state.cuh"
#include "device/vec.cuh"
#include "paged_decode.h"

namespace paged_decode {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kStages = 4;  // steps whose copies are under way, one of them being used
constexpr int kUnroll = 2;  // keys a lane takes in a step
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

constexpr int blocks_per_multiprocessor(int heads) { return heads == 8 ? 2 : 4; }

// A stretch of keys for a tile of rows. Row r is query head kv_head * G + r % G of sequence
// seq + r / G: a sequence's own rows are G, those of a shared prefix B * G.
struct Piece {
  int seq;
  int kv_head;
  int first_row;
  int rows;     // rows from first_row on that are there
  int lo, hi;   // keys
  int new_key;  // the key that comes from new_k and new_v; -1: none
  int slot;     // where the partial result goes; -1: straight to out
};

// Keys that a sequence attends to by itself, and their splits.
struct Span {
  int lo, hi, splits;
};
GPU_DEVICE Span span_of(const PagedDecodeArgs& a, int seq) {
  const IndexArray lengths{a.lengths, a.lengths_stride, a.wide_lengths};
  const int64_t room = static_cast<int64_t>(a.max_pages) * a.page_size;
  const int64_t length = load_index(lengths, seq);
  const bool wrong = length < a.prefix_keys || length > room;
  if (wrong) raise_flag(a.error_flag, kLengthOutOfRange);
  const int hi = static_cast<int>(length < 0 ? 0 : length > room ? room : length);
  int lo = a.prefix_keys;
  if (a.window_left >= 0 && hi - 1 - a.window_left > lo) lo = hi - 1 - a.window_left;
  const int keys = hi > lo ? hi - lo : 0;
  const int splits = count_splits(keys);
  return {lo, hi, splits > 0 ? splits : 1};
}

GPU_DEVICE int64_t head_of(const PagedDecodeArgs& a, const Piece& piece, int row) {
  const int group = a.heads / a.kv_heads;
  return static_cast<int64_t>(piece.kv_head) * group + row % group;
}
GPU_DEVICE int64_t seq_of(const PagedDecodeArgs& a, const Piece& piece, int row) {
  return piece.seq + row / (a.heads / a.kv_heads);
}

// From a key to its page's place in the table: a product where a division would cost 20
// instructions. Exact for offsets below 2^24 and pages of 2 to 256 keys.
struct PageMap {
  int first_entry, origin;
  unsigned reciprocal;
  GPU_DEVICE PageMap(int lo, int page_size)
      : first_entry(lo / page_size),
        origin(first_entry * page_size),
        reciprocal(0xffffffffu / page_size + 1) {}
  GPU_DEVICE int entry(int key) const {
    return first_entry + static_cast<int>(__umulhi(key - origin, reciprocal));
  }
};

// One piece, a warp's part of it: state over keys lo + warp * kRowsAtOnce + ..., each row of keys
// held by kLanes lanes.
template <typename T, int kLanes, int kHeads>
struct Worker {
  static constexpr int kPer = kPerChunk<T>;
  static constexpr int kRowsAtOnce = 32 / kLanes;
  static constexpr int kStepKeys = kWarps * kRowsAtOnce * kUnroll;
  static constexpr int kRing = kStages * kUnroll * 2 * 32;  // 16-byte places of a warp

  const PagedDecodeArgs& a;
  const Piece& piece;
  uint4* ring;  // this lane's places, 32 apart
  const IndexArray table;
  const PageMap map;
  const int first_key, chunk;
  const bool active;       // some lanes have no part of a row: D = 80 and 96
  int64_t pages[kUnroll];  // of the step to be copied next
  unsigned live = 0;       // a bit for each key under way: whether it counts
  float q[kHeads][kPer];
  SoftmaxState<kHeads, kPer> state;

  GPU_DEVICE Worker(const PagedDecodeArgs& args, const Piece& its_piece, uint4* rings)
      : a(args),
        piece(its_piece),
        ring(rings + threadIdx.x / 32 * kRing + threadIdx.x % 32),
        table{static_cast<const char*>(args.page_table) +
                  its_piece.seq * args.table_seq_stride * (args.wide_table ? 8 : 4),
              args.table_page_stride, args.wide_table},
        map(its_piece.lo, args.page_size),
        first_key(its_piece.lo + (threadIdx.x / 32) * kRowsAtOnce + threadIdx.x % 32 / kLanes),
        chunk(threadIdx.x % kLanes),
        active(chunk * kPer < args.head_dim) {}

  GPU_DEVICE int key_of(int step, int u) const {
    return first_key + (step * kUnroll + u) * kWarps * kRowsAtOnce;
  }
  GPU_DEVICE uint4* place(int step, int u, int side) const {
    return ring + ((step % kStages * kUnroll + u) * 2 + side) * 32;
  }

  GPU_DEVICE void load_q() {
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      const int row = piece.first_row + h;
      uint4 raw{0, 0, 0, 0};
      if (active && h < piece.rows) {
        raw = gpu_load16(static_cast<const T*>(a.q) + seq_of(a, piece, row) * a.q_seq_stride +
                         head_of(a, piece, row) * a.q_head_stride + chunk * kPer);
      }
      unpack<T>(raw, q[h]);
#pragma unroll
      for (int i = 0; i < kPer; ++i) q[h][i] *= a.scale * kLog2E;
    }
  }

  GPU_DEVICE void load_pages(int step) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int key = key_of(step, u);
      pages[u] = key < piece.hi ? load_index(table, map.entry(key)) : -1;
    }
  }

  // Starts the copies of a step; pages[] belongs to it, and then to the next.
  GPU_DEVICE void copy(int step) {
    unsigned bits = 0;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int key = key_of(step, u);
      const bool fresh = key == piece.new_key;
      const bool known = pages[u] >= 0 && pages[u] < a.pages;
      const bool counts = key < piece.hi && (known || fresh);
      if (key < piece.hi && !known) raise_flag(a.error_flag, kPageOutOfRange);
      const T* k = static_cast<const T*>(a.k_pages);
      const T* v = static_cast<const T*>(a.v_pages);
      if (fresh) {
        k = static_cast<const T*>(a.new_k) + piece.seq * a.new_k_seq_stride +
            piece.kv_head * a.new_k_head_stride + chunk * kPer;
        v = static_cast<const T*>(a.new_v) + piece.seq * a.new_v_seq_stride +
            piece.kv_head * a.new_v_head_stride + chunk * kPer;
      } else if (counts) {
        const int64_t at = key - map.entry(key) * a.page_size;
        k += pages[u] * a.k_page_stride + piece.kv_head * a.k_head_stride + at * a.k_slot_stride +
             chunk * kPer;
        v += pages[u] * a.v_page_stride + piece.kv_head * a.v_head_stride + at * a.v_slot_stride +
             chunk * kPer;
      }
      gpu_copy16_async(place(step, u, 0), k, counts && active);
      gpu_copy16_async(place(step, u, 1), v, counts && active);
      bits |= static_cast<unsigned>(counts) << u;
    }
    live = live << kUnroll | bits;
    gpu_copies_commit();
    load_pages(step + 1);
  }

  // Takes in the oldest step under way.
  GPU_DEVICE void use(int step) {
    const unsigned bits = live >> (kUnroll * (kStages - 1));
    float scores[kHeads][kUnroll];
    float values[kUnroll][kPer];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      float key[kPer];
      unpack<T>(gpu_load16(place(step, u, 0)), key);
      unpack<T>(gpu_load16(place(step, u, 1)), values[u]);
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        float dot = 0.0f;
#pragma unroll
        for (int i = 0; i < kPer; ++i) dot += q[h][i] * key[i];
        dot = sum_lanes<kLanes>(dot);
        scores[h][u] = bits >> u & 1 ? dot : -INFINITY;
      }
    }
#pragma unroll
    for (int h = 0; h < kHeads; ++h) state.add(h, scores[h], values);
  }

  GPU_DEVICE void run() {
    load_q();
    state.reset();
    const int keys = piece.hi - piece.lo;
    const int steps = keys > 0 ? (keys + kStepKeys - 1) / kStepKeys : 0;
    load_pages(0);
    for (int step = 0; step < kStages - 1; ++step) copy(step);
    for (int step = 0; step < steps; ++step) {
      copy(step + kStages - 1);
      gpu_copies_wait<kStages - 1>();
      use(step);
    }
    // The lanes that hold other rows of keys.
#pragma unroll
    for (int offset = kLanes; offset < 32; offset *= 2) state.merge_lanes(offset);
  }
};

}  // namespace paged_decode
