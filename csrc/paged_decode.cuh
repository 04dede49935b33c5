// Maths: s = scale * q k^T over the keys a sequence's newest token sees; out = softmax(s) v, with a
// running maximum and sum (FlashAttention-2, arXiv:2307.08691); lse = ln sum exp s.
// Memory: every page in use crosses HBM once for each kHeads query heads that share its KV head
// (with prefix_keys: once for kHeads heads of any sequences). A lane copies its own 16 bytes of a
// row to shared memory kStages - 1 steps ahead and reads back only those, so the main loop has no
// barrier; page ids are read one step ahead of their copies.
// Grid: as many blocks as the card holds at once. Each works out from the lengths, on the device,
// which (sequence, split, KV head, tile of heads) are its own; so work is balanced over skewed
// lengths and a captured launch stays right as they grow.
// Bits: a split depends on its sequence's length alone, and every sum has one order.
// Dims: B sequences, H query heads, K KV heads, G = H / K, D head_dim, P pages of N keys.
#pragma once

#include "paged_worker.cuh"

namespace paged_decode {

// Puts the warps' results together, in their order, and writes the rows.
template <typename T, int kHeads>
GPU_DEVICE void write_rows(const PagedDecodeArgs& a, const Piece& piece, const float* values,
                           const float* stats) {
  const int dim = a.head_dim;
  for (int i = threadIdx.x; i < kHeads * dim; i += kThreads) {
    const int h = i / dim;
    const int d = i - h * dim;
    if (h >= piece.rows) break;
    float m = -INFINITY;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) m = fmaxf(m, stats[(w * kHeads + h) * 2]);
    const float shift = finite_shift(m);
    float l = 0.0f;
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float weight = gpu_exp2(stats[(w * kHeads + h) * 2] - shift);
      l += weight * stats[(w * kHeads + h) * 2 + 1];
      sum += weight * values[(w * kHeads + h) * dim + d];
    }
    const bool keyless = l == 0.0f;
    const float out = keyless ? 0.0f : sum / l;
    const float lse2 = keyless ? -INFINITY : m + gpu_log(l) * kLog2E;
    const int row = piece.first_row + h;
    const int64_t seq = seq_of(a, piece, row);
    const int64_t head = head_of(a, piece, row);
    if (piece.slot < 0) {
      static_cast<T*>(a.out)[(seq * a.heads + head) * dim + d] = from_float<T>(out);
      if (a.lse != nullptr && d == 0) a.lse[head * a.batch + seq] = lse2 * kLn2;
    } else {
      const int64_t part = (seq * a.heads + head) * a.slots + piece.slot;
      a.part[part * dim + d] = out;
      if (d == 0) a.part_lse[part] = lse2;
    }
  }
}

// The newest token's key and value go to their page.
template <typename T>
GPU_DEVICE void store_new(const PagedDecodeArgs& a, const Piece& piece) {
  const IndexArray table{static_cast<const char*>(a.page_table) +
                             piece.seq * a.table_seq_stride * (a.wide_table ? 8 : 4),
                         a.table_page_stride, a.wide_table};
  const int d = threadIdx.x * kPerChunk<T>;
  const int64_t page = load_index(table, piece.new_key / a.page_size);
  if (d >= a.head_dim || page < 0 || page >= a.pages) return;
  const int64_t at = piece.new_key % a.page_size;
  const T* k = static_cast<const T*>(a.new_k) + piece.seq * a.new_k_seq_stride +
               piece.kv_head * a.new_k_head_stride;
  const T* v = static_cast<const T*>(a.new_v) + piece.seq * a.new_v_seq_stride +
               piece.kv_head * a.new_v_head_stride;
  gpu_store16(static_cast<T*>(a.k_pages) + page * a.k_page_stride +
                  piece.kv_head * a.k_head_stride + at * a.k_slot_stride + d,
              gpu_load16(k + d));
  gpu_store16(static_cast<T*>(a.v_pages) + page * a.v_page_stride +
                  piece.kv_head * a.v_head_stride + at * a.v_slot_stride + d,
              gpu_load16(v + d));
}

// The number of pieces in each of kThreads neighbouring sequences, summed up to and including each.
GPU_DEVICE void scan(int pieces, int* ends, int* warp_sums) {
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  int sum = pieces;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const int before = __shfl_up_sync(kWholeWarp, sum, offset);
    if (lane >= offset) sum += before;
  }
  if (lane == 31) warp_sums[warp] = sum;
  __syncthreads();
  for (int w = 0; w < warp; ++w) sum += warp_sums[w];
  ends[threadIdx.x] = sum;
  __syncthreads();
}

// Piece number `index` of sequence `seq`, or of the prefix where seq < 0.
template <int kHeads>
GPU_DEVICE Piece piece_of(const PagedDecodeArgs& a, int seq, int index) {
  const int group = a.heads / a.kv_heads;
  const bool prefix = seq < 0;
  const int all_rows = prefix ? a.batch * group : group;
  const int tiles = (all_rows + kHeads - 1) / kHeads;
  const int prefix_splits = count_splits(a.prefix_keys);
  const Span span = prefix ? Span{0, a.prefix_keys, prefix_splits} : span_of(a, seq);
  const int tile = index % tiles;
  const int split = index / tiles / a.kv_heads;
  const int keys = split_keys(span.hi > span.lo ? span.hi - span.lo : 0);

  Piece piece;
  piece.seq = prefix ? 0 : seq;
  piece.kv_head = index / tiles % a.kv_heads;
  piece.first_row = tile * kHeads;
  piece.rows = min(kHeads, all_rows - piece.first_row);
  piece.lo = span.lo + split * keys;
  piece.hi = min(piece.lo + keys, span.hi);
  piece.new_key = a.new_k != nullptr && !prefix && piece.hi == span.hi ? span.hi - 1 : -1;
  piece.slot = prefix ? split : prefix_splits + split;
  if (!prefix && prefix_splits == 0 && span.splits == 1) piece.slot = -1;
  return piece;
}

template <typename T, int kLanes, int kHeads>
GPU_KERNEL(kThreads, blocks_per_multiprocessor(kHeads))
paged_decode_kernel(GPU_CONSTANT PagedDecodeArgs a) {
  using Work = Worker<T, kLanes, kHeads>;
  GPU_SHARED(uint4, rings, kWarps * kRing);
  GPU_SHARED(uint64_t, barriers, kWarps * kStages);
  GPU_SHARED(float, stats, kWarps * kHeads * 2);
  GPU_SHARED(int, ends, kThreads);
  GPU_SHARED(int, warp_sums, kWarps);
  const int group = a.heads / a.kv_heads;
  const int tiles = a.kv_heads * ((group + kHeads - 1) / kHeads);
  const int prefix_tiles = a.kv_heads * ((a.batch * group + kHeads - 1) / kHeads);

  Ring<T, kLanes> ring(rings, barriers);

  // Sequences are looked at kThreads at a time; before them, as one, the prefix.
  int next = blockIdx.x;  // this block's next piece, counted from the first of these sequences
  for (int first = a.prefix_keys > 0 ? -kThreads : 0; first < a.batch; first += kThreads) {
    // 1. How many pieces each has.
    const int seq = first + static_cast<int>(threadIdx.x);
    int pieces = 0;
    if (first >= 0) {
      pieces = seq < a.batch ? span_of(a, seq).splits * tiles : 0;
    } else if (threadIdx.x == 0) {
      pieces = count_splits(a.prefix_keys) * prefix_tiles;
    }
    scan(pieces, ends, warp_sums);

    // 2. Those that are this block's, one after the other.
    const int count = ends[kThreads - 1];
    for (; next < count; next += gridDim.x) {
      int owner = 0;
      for (int half = kThreads / 2; half > 0; half /= 2) {
        if (ends[owner + half - 1] <= next) owner += half;
      }
      const int index = next - (owner > 0 ? ends[owner - 1] : 0);
      const Piece piece = piece_of<kHeads>(a, first < 0 ? -1 : first + owner, index);
      if (piece.new_key >= 0 && piece.first_row == 0) store_new<T>(a, piece);
      Work work(a, piece, ring);
      work.run();

      // 3. The warps' results meet in the rings, which all warps have to be done with.
      __syncthreads();
      float* values = reinterpret_cast<float*>(rings);
      const int warp = threadIdx.x / 32;
      if (threadIdx.x % 32 < kLanes) {
#pragma unroll
        for (int h = 0; h < kHeads; ++h) {
#pragma unroll
          for (int i = 0; i < Work::kPer; ++i) {
            if (!work.active) break;
            values[(warp * kHeads + h) * a.head_dim + work.chunk * Work::kPer + i] =
                work.state.acc[h][i];
          }
          if (work.chunk == 0) {
            stats[(warp * kHeads + h) * 2] = work.state.m[h];
            stats[(warp * kHeads + h) * 2 + 1] = work.state.l[h];
          }
        }
      }
      __syncthreads();
      write_rows<T, kHeads>(a, piece, values, stats);
      ring.give_back();
      __syncthreads();
    }
    next -= count;
    __syncthreads();
  }
}

// Splits of a row, one after the other: out = sum_s 2^(lse_s - lse) out_s. A warp a row.
template <typename T>
GPU_KERNEL(kThreads) paged_merge_kernel(GPU_CONSTANT PagedDecodeArgs a) {
  const int lane = threadIdx.x % 32;
  const int narrow_row = static_cast<int>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (narrow_row >= a.batch * a.heads) return;
  const int seq = narrow_row / a.heads;
  const int64_t head = narrow_row % a.heads;
  const int64_t row = narrow_row;
  const int splits = count_splits(a.prefix_keys) + span_of(a, seq).splits;
  if (splits == 1) return;  // written straight to out
  const float* part_lse = a.part_lse + row * a.slots;

  float m = -INFINITY;
  for (int s = 0; s < splits; ++s) m = fmaxf(m, part_lse[s]);
  const float shift = finite_shift(m);
  float l = 0.0f;
  for (int s = 0; s < splits; ++s) l += gpu_exp2(part_lse[s] - shift);
  const bool keyless = l == 0.0f;
  for (int d = lane; d < a.head_dim; d += 32) {
    float sum = 0.0f;
    for (int s = 0; s < splits; ++s) {
      sum += gpu_exp2(part_lse[s] - shift) * a.part[(row * a.slots + s) * a.head_dim + d];
    }
    static_cast<T*>(a.out)[row * a.head_dim + d] = from_float<T>(keyless ? 0.0f : sum / l);
  }
  if (a.lse != nullptr && lane == 0) {
    a.lse[head * a.batch + seq] = keyless ? -INFINITY : m * kLn2 + gpu_log(l);
  }
}

template <typename T, int kLanes, int kHeads>
void launch(const PagedDecodeArgs& a, void* stream) {
  const int64_t group = a.heads / a.kv_heads;
  const int64_t tiles = a.kv_heads * ((group + kHeads - 1) / kHeads);
  const int64_t prefix_tiles = a.kv_heads * ((a.batch * group + kHeads - 1) / kHeads);
  const int64_t prefix_splits = count_splits(a.prefix_keys);
  const int64_t pieces = prefix_splits * prefix_tiles + (a.slots - prefix_splits) * a.batch * tiles;
  if (pieces >= int64_t{1} << 31) throw std::runtime_error("paged_decode: too many sequences");
  const int64_t resident = gpu_multiprocessors() * blocks_per_multiprocessor(kHeads);
  gpu_launch(paged_decode_kernel<T, kLanes, kHeads>, pieces < resident ? pieces : resident,
             kThreads, stream, a);
  if (a.slots > 1) {
    const int64_t rows = static_cast<int64_t>(a.batch) * a.heads;
    gpu_launch(paged_merge_kernel<T>, (rows + kWarps - 1) / kWarps, kThreads, stream, a);
  }
}

template <typename T, int kLanes>
void launch_heads(const PagedDecodeArgs& a, void* stream) {
  const int group = a.heads / a.kv_heads;
  if (a.prefix_keys > 0 || group > 4) return launch<T, kLanes, 8>(a, stream);
  return group > 1 ? launch<T, kLanes, 4>(a, stream) : launch<T, kLanes, 1>(a, stream);
}

// A row of D elements lies in a power of two of lanes, 16 bytes each. A file of its own for each
// type instantiates this, so that they compile side by side.
template <typename T>
void launch_dtype(const PagedDecodeArgs& a, void* stream) {
  constexpr int kNarrow = 32 / kPerChunk<T>;
  if (a.head_dim <= 32) return launch_heads<T, kNarrow>(a, stream);
  if (a.head_dim <= 64) return launch_heads<T, kNarrow * 2>(a, stream);
  return launch_heads<T, kNarrow * 4>(a, stream);
}

}  // namespace paged_decode
