// How keys and values get into shared memory several steps ahead: a ring of stages for each warp,
// of which one is used while the others fill. A stage holds a stretch of neighbouring keys: their
// rows of K, one after the other, then their rows of V. Two rings fill it: by bulk copies, which a
// barrier counts (sm_90 and above), and by each lane's own 16-byte copies.
#pragma once

#include "device/reduce.cuh"
#include "device/vec.cuh"
#include "paged_decode.h"

namespace paged_decode {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kStages = 4;  // steps whose copies are under way, one of them being used
constexpr int kUnroll = 2;  // keys a lane takes in a step
constexpr int kSide = kUnroll * 32;         // 16-byte places for a step's rows of K, or of V
constexpr int kRing = kStages * 2 * kSide;  // those of a warp

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

// Where a piece's keys and values are.
template <typename T>
struct Rows {
  const PagedDecodeArgs& a;
  const Piece& piece;
  const PageMap map;

  GPU_DEVICE int slot(int key) const { return key - map.entry(key) * a.page_size; }
  GPU_DEVICE const T* k(int key, int page) const {
    if (key == piece.new_key) {
      return static_cast<const T*>(a.new_k) + piece.seq * a.new_k_seq_stride +
             piece.kv_head * a.new_k_head_stride;
    }
    return static_cast<const T*>(a.k_pages) + page * a.k_page_stride +
           piece.kv_head * a.k_head_stride + slot(key) * a.k_slot_stride;
  }
  GPU_DEVICE const T* v(int key, int page) const {
    if (key == piece.new_key) {
      return static_cast<const T*>(a.new_v) + piece.seq * a.new_v_seq_stride +
             piece.kv_head * a.new_v_head_stride;
    }
    return static_cast<const T*>(a.v_pages) + page * a.v_page_stride +
           piece.kv_head * a.v_head_stride + slot(key) * a.v_slot_stride;
  }
};

// A stretch of keys of one warp. Lane i knows key i, which is row i of the stage, and its page. Bit
// i of `counts`, in every lane, says whether that key is there; others are not copied.
struct Stretch {
  int key, page;
  unsigned counts;
};

#if GPU_ARCH >= 900
// A run of keys that lie one after the other in a page is one copy of K and one of V, by the lane
// of its first key; so is each key where slots lie apart. A stage's barrier tells when all bytes
// are there, in phases that go on from piece to piece.
template <typename T, int kLanes>
struct Ring {
  uint4* places;       // of the warp
  uint64_t* barriers;  // likewise, one a stage
  unsigned filled = 0;

  GPU_DEVICE Ring(uint4* rings, uint64_t* all_barriers)
      : places(rings + threadIdx.x / 32 * kRing),
        barriers(all_barriers + threadIdx.x / 32 * kStages) {
    if (threadIdx.x % 32 < kStages) gpu_mbarrier_init(barriers + threadIdx.x % 32, 1);
    __syncwarp();
  }

  GPU_DEVICE void fill(const Rows<T>& rows, const Stretch& stretch) {
    constexpr int kKeys = kUnroll * 32 / kLanes;
    const PagedDecodeArgs& a = rows.a;
    const int lane = threadIdx.x % 32;
    const int stage = filled++ % kStages;
    const int row_bytes = a.head_dim * static_cast<int>(sizeof(T));
    __syncwarp();  // no lane still reads the stage
    if (lane == 0) {
      gpu_mbarrier_arrive_expect(barriers + stage, 2 * __popc(stretch.counts) * row_bytes);
    }
    if ((stretch.counts >> lane & 1) == 0) return;
    const int key = stretch.key;
    const int slot = rows.slot(key);
    const bool dense = a.k_slot_stride == a.head_dim && a.v_slot_stride == a.head_dim;
    const bool fresh = key == rows.piece.new_key;
    if (dense && !fresh && lane > 0 && slot > 0) return;  // part of an earlier lane's run
    const int end = rows.piece.new_key >= 0 ? rows.piece.new_key : rows.piece.hi;
    const int run = dense && !fresh ? min(min(a.page_size - slot, kKeys - lane), end - key) : 1;
    char* to = reinterpret_cast<char*>(places + stage * 2 * kSide) + lane * row_bytes;
    gpu_copy_bulk(to, rows.k(key, stretch.page), run * row_bytes, barriers + stage);
    gpu_copy_bulk(to + kSide * 16, rows.v(key, stretch.page), run * row_bytes, barriers + stage);
  }

  // Waits for the oldest stage under way.
  GPU_DEVICE const uint4* wait() {
    const unsigned oldest = filled - kStages;
    gpu_mbarrier_wait(barriers + oldest % kStages, oldest / kStages);
    return places + oldest % kStages * 2 * kSide;
  }

  // After the places held something else, and before the barrier that ends that.
  GPU_DEVICE void give_back() { gpu_fence_bulk_copies(); }
};
#else
// A lane copies the 16 bytes that it will use itself, so that none waits for another.
template <typename T, int kLanes>
struct Ring {
  uint4* places;  // of the warp
  unsigned filled = 0;

  GPU_DEVICE Ring(uint4* rings, uint64_t*) : places(rings + threadIdx.x / 32 * kRing) {}

  GPU_DEVICE void fill(const Rows<T>& rows, const Stretch& stretch) {
    const int chunks = rows.a.head_dim / kPerChunk<T>;
    const int chunk = threadIdx.x % kLanes;
    uint4* to = places + filled++ % kStages * 2 * kSide + chunk;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int i = u * (32 / kLanes) + threadIdx.x % 32 / kLanes;
      const int page = __shfl_sync(kWholeWarp, stretch.page, i);
      if (chunk >= chunks || (stretch.counts >> i & 1) == 0) continue;
      const int key = stretch.key - threadIdx.x % 32 + i;
      gpu_copy16_async(to + i * chunks, rows.k(key, page) + chunk * kPerChunk<T>);
      gpu_copy16_async(to + i * chunks + kSide, rows.v(key, page) + chunk * kPerChunk<T>);
    }
    gpu_copies_commit();
  }

  // Waits for the oldest stage under way.
  GPU_DEVICE const uint4* wait() {
    gpu_copies_wait<kStages - 1>();
    return places + filled % kStages * 2 * kSide;
  }

  GPU_DEVICE void give_back() {}
};
#endif

}  // namespace paged_decode
