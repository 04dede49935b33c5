// What a block of paged_decode.cuh works on, and what each warp does with its part: scores and
// softmax of a stretch of keys while the next ones are on their way.
#pragma once

#include "device/error_flag.cuh"
#include "device/softmax_state.cuh"
#include "paged_ring.cuh"

namespace paged_decode {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

constexpr int blocks_per_multiprocessor(int heads) { return heads == 8 ? 2 : 4; }

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

// One piece, a warp's part of it: state over stretches of keys, kWarps stretches apart, each row of
// keys held by kLanes lanes.
template <typename T, int kLanes, int kHeads>
struct Worker {
  static constexpr int kPer = kPerChunk<T>;
  static constexpr int kRowsAtOnce = 32 / kLanes;
  static constexpr int kStretchKeys = kRowsAtOnce * kUnroll;
  static constexpr int kStepKeys = kWarps * kStretchKeys;

  const PagedDecodeArgs& a;
  const Piece& piece;
  Ring<T, kLanes>& ring;
  const IndexArray table;
  const Rows<T> rows;
  const int chunk;
  const bool active;  // some lanes have no part of a row: D = 80 and 96
  int key;            // lane i sees to key i of the warp's stretch in the step to be copied next
  int page = -1;      // where it is; -1: nowhere
  unsigned live = 0;  // a bit for each key that this lane has under way: whether it counts
  float q[kHeads][kPer];
  SoftmaxState<kHeads, kPer> state;

  GPU_DEVICE Worker(const PagedDecodeArgs& args, const Piece& its_piece, Ring<T, kLanes>& its_ring)
      : a(args),
        piece(its_piece),
        ring(its_ring),
        table{static_cast<const char*>(args.page_table) +
                  its_piece.seq * args.table_seq_stride * (args.wide_table ? 8 : 4),
              args.table_page_stride, args.wide_table},
        rows{args, its_piece, PageMap(its_piece.lo, args.page_size)},
        chunk(threadIdx.x % kLanes),
        active(chunk * kPer < args.head_dim),
        key(its_piece.lo + threadIdx.x / 32 * kStretchKeys + threadIdx.x % 32) {}

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

  GPU_DEVICE bool sees() const { return threadIdx.x % 32 < kStretchKeys && key < piece.hi; }
  GPU_DEVICE void load_page() {
    const int64_t id = sees() ? load_index(table, rows.map.entry(key)) : -1;
    page = id >= 0 && id < a.pages ? static_cast<int>(id) : -1;
  }

  // Starts the copies of a step, and turns to the next.
  GPU_DEVICE void copy() {
    if (sees() && page < 0) raise_flag(a.error_flag, kPageOutOfRange);
    const unsigned counts =
        __ballot_sync(kWholeWarp, sees() && (page >= 0 || key == piece.new_key));
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      live = live << 1 | (counts >> (u * kRowsAtOnce + threadIdx.x % 32 / kLanes) & 1);
    }
    ring.fill(rows, {key, page, counts});
    key += kStepKeys;
    load_page();
  }

  // Takes in the oldest step under way. What does not count was never copied.
  GPU_DEVICE void use() {
    const int chunks = a.head_dim / kPer;
    const uint4* places = ring.wait() + threadIdx.x % 32 / kLanes * chunks + chunk;
    const auto load = [&](int u, int side, float (&row)[kPer]) {
      const bool there = active && counts(u);
      unpack<T>(there ? gpu_load16(places + u * kRowsAtOnce * chunks + side) : uint4{}, row);
    };
    float scores[kHeads][kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      float keys[kPer];
      load(u, 0, keys);
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        float dot = 0.0f;
#pragma unroll
        for (int i = 0; i < kPer; ++i) dot += q[h][i] * keys[i];
        dot = sum_lanes<kLanes>(dot);
        scores[h][u] = counts(u) ? dot : -INFINITY;
      }
    }
    float values[kUnroll][kPer];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) load(u, kSide, values[u]);
#pragma unroll
    for (int h = 0; h < kHeads; ++h) state.add(h, scores[h], values);
  }
  GPU_DEVICE bool counts(int u) const { return live >> (kUnroll * kStages - 1 - u) & 1; }

  GPU_DEVICE void run() {
    load_q();
    state.reset();
    load_page();
    for (int lo = piece.lo - (kStages - 1) * kStepKeys; lo < piece.hi; lo += kStepKeys) {
      copy();
      if (lo >= piece.lo) use();
    }
    // The lanes that hold other rows of keys.
#pragma unroll
    for (int offset = kLanes; offset < 32; offset *= 2) state.merge_lanes(offset);
  }
};

}  // namespace paged_decode
