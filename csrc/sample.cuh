// Maths: w[i] = floor(2^40 exp((x[i] - max x) / T)) in integers (docs/sampling.md); top-k keeps
// x >= the k-th largest; top-p the fewest of the largest whose w reach floor(p sum w), at least 1;
// min-p w >= p 2^40; the token is the first whose cumulative kept w exceeds floor(U sum w / 2^64), U the 64 bits of
// Philox counter (step, sequence, sequence >> 32, 2). Integer sums are exact in any order.
// Memory: no copy and no sort of the row. It is read once for the maximum, once to draw, and, for
// top-k and top-p each, once for every four bits of a logit; the first comes from memory, the
// others from the L2 where the rows at work fit it. Accesses of 16 bytes, but for a row's ends.
// Grid: a block a row.
#pragma once

#include "device/error_flag.cuh"
#include "device/philox.cuh"
#include "device/reduce.cuh"
#include "device/vec.cuh"
#include "sample.h"

namespace sample {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kDigitBits = 4;
constexpr int kBins = 1 << kDigitBits;
constexpr int kAhead = 4;  // 16-byte loads under way in each thread
constexpr int kWeightBits = 40;
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLargest = 3.4028234663852886e38f;

// Bits of a float32 that are 0 whatever the element's value was.
template <typename T>
constexpr int kUnusedBits = 0;
template <>
inline constexpr int kUnusedBits<__half> = 13;
template <>
inline constexpr int kUnusedBits<__nv_bfloat16> = 16;
template <typename T>
constexpr int kDigits = (32 - kUnusedBits<T> + kDigitBits - 1) / kDigitBits;

template <typename V>
GPU_DEVICE V setting(const PerRow<V>& value, int64_t row) {
  return value.at == nullptr ? value.same : __ldg(value.at + row);
}

// Unsigned integers in the order of the logits. Adding 0 makes -0 the 0 that it equals.
template <typename T>
GPU_DEVICE unsigned key_of(float x) {
  const unsigned bits = __float_as_uint(x + 0.0f);
  return (bits >> 31 ? ~bits : bits | 0x80000000u) >> kUnusedBits<T>;
}

// Softmax in integers: each step is exact or rounded to nearest, and none may be contracted.
struct Softmax {
  float top;   // the row's largest logit
  float rate;  // log2(e) / T

  GPU_DEVICE uint64_t weight(float x) const {
    const float y = __fmul_rn(top - x, rate);  // how many bits less likely than the top
    if (!(y < kWeightBits + 1)) return 0;
    const float whole = floorf(y);
    const unsigned f = static_cast<unsigned>((y - whole) * 4294967296.0f);
    unsigned m = 0x00005ed3u;  // 2^-f in units of 2^-31: bertgpt/exact_softmax.py
    m = 0x0004e100u - __umulhi(m, f);
    m = 0x002b9458u - __umulhi(m, f);
    m = 0x013b20d4u - __umulhi(m, f);
    m = 0x071ac093u - __umulhi(m, f);
    m = 0x1ebfbde5u - __umulhi(m, f);
    m = 0x58b90bfcu - __umulhi(m, f);
    m = 0x80000000u - __umulhi(m, f);
    return (static_cast<uint64_t>(m) << (kWeightBits - 31)) >> static_cast<int>(whole);
  }
};

// A row as 16-byte chunks: the first and the last may lie partly outside it.
template <typename T>
struct Row {
  const T* data;
  int size;
  int skew;  // elements of chunk 0 that lie before the row
  int chunks;

  GPU_DEVICE Row(const T* row, int count) : data(row), size(count) {
    skew = static_cast<int>(reinterpret_cast<uintptr_t>(row) % sizeof(uint4) / sizeof(T));
    chunks = (skew + count + kPerChunk<T> - 1) / kPerChunk<T>;
  }

  // Where there is no element, -inf: it is never drawn, and every logit is at least as large.
  GPU_DEVICE uint4 load(int chunk) const {
    const int first = chunk * kPerChunk<T> - skew;
    if (first >= 0 && first + kPerChunk<T> <= size) return gpu_load16(data + first);
    float values[kPerChunk<T>];
#pragma unroll
    for (int i = 0; i < kPerChunk<T>; ++i) {
      const bool inside = first + i >= 0 && first + i < size;
      values[i] = inside ? to_float(data[first + i]) : -INFINITY;
    }
    return pack<T>(values);
  }

  // visit(logit, index) for the elements of chunks first, first + step, ... before last.
  template <typename Visit>
  GPU_DEVICE void each(int first, int last, int step, Visit visit) const {
#pragma unroll 1
    for (int c = first; c < last; c += kAhead * step) {
      uint4 raw[kAhead];
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        if (c + a * step < last) raw[a] = load(c + a * step);
      }
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        if (c + a * step >= last) break;
        float values[kPerChunk<T>];
        unpack<T>(raw[a], values);
        const int index = (c + a * step) * kPerChunk<T> - skew;
#pragma unroll
        for (int i = 0; i < kPerChunk<T>; ++i) visit(values[i], index + i);
      }
    }
  }
};

struct Shared {
  uint64_t bins[kBins][kThreads];  // a column a thread: no atomics, no conflicts
  uint64_t totals[kBins];
  uint64_t sums[kWarps];
  float tops[kWarps];
  uint64_t point;  // what is left to walk, from where on
  int start;
};

GPU_DEVICE uint64_t sum_warp(uint64_t value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kWholeWarp, value, offset);
  }
  return value;
}

struct Threshold {
  unsigned key;
  uint64_t above;  // the sum of what lies above it
};

// The largest key for which value(x, key), summed over the elements of that key and above, reaches
// enough(total): a digit at a time from the top, by a histogram of the elements that agree with
// the digits found.
template <typename T, typename Value, typename Enough>
GPU_DEVICE Threshold search(const Row<T>& row, Shared& s, Value value, Enough enough) {
  Threshold found{0, 0};
  uint64_t wanted = 0;
#pragma unroll 1
  for (int digit = kDigits<T> - 1; digit >= 0; --digit) {
    for (int b = 0; b < kBins; ++b) s.bins[b][threadIdx.x] = 0;
    row.each(threadIdx.x, row.chunks, kThreads, [&](float x, int) {
      const unsigned key = key_of<T>(x);
      const unsigned digits = key >> (digit * kDigitBits);
      if (digits / kBins == found.key) s.bins[digits % kBins][threadIdx.x] += value(x, key);
    });
    __syncthreads();
    for (int b = threadIdx.x / 32; b < kBins; b += kWarps) {
      uint64_t sum = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += s.bins[b][w * 32 + threadIdx.x % 32];
      sum = sum_warp(sum);
      if (threadIdx.x % 32 == 0) s.totals[b] = sum;
    }
    __syncthreads();
    if (digit == kDigits<T> - 1) {
      uint64_t total = 0;
      for (int b = 0; b < kBins; ++b) total += s.totals[b];
      wanted = enough(total);
    }
    unsigned bin = kBins - 1;
    for (; bin > 0 && found.above + s.totals[bin] < wanted; --bin) found.above += s.totals[bin];
    found.key = found.key * kBins + bin;
  }
  return found;
}

// The first element at which the running sum of value(x, index) exceeds point(total): each thread
// takes a stretch of the row, then each a stretch of the one in which that happens.
template <typename T, typename Value, typename Point>
GPU_DEVICE int walk(const Row<T>& row, Shared& s, Value value, Point point) {
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  int start = 0;
  int chunks = row.chunks;
  uint64_t wanted = 0;
#pragma unroll 1
  for (bool whole = true;; whole = false) {
    const int share = (chunks + kThreads - 1) / kThreads;
    const int first = start + threadIdx.x * share;
    uint64_t mine = 0;
    row.each(first, min(first + share, start + chunks), 1,
             [&](float x, int index) { mine += value(x, index); });
    uint64_t upto = mine;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const uint64_t before = __shfl_up_sync(kWholeWarp, upto, offset);
      if (lane >= offset) upto += before;
    }
    if (lane == 31) s.sums[warp] = upto;
    __syncthreads();
    uint64_t total = 0;
    for (int w = 0; w < kWarps; ++w) {
      if (w == warp) upto += total;
      total += s.sums[w];
    }
    if (whole) wanted = point(total);
    if (upto - mine <= wanted && wanted < upto) {  // one thread's stretch
      uint64_t left = wanted - (upto - mine);
      int at = first;
      if (share == 1) {
        bool passed = false;
        row.each(first, first + 1, 1, [&](float x, int index) {
          const uint64_t step = value(x, index);
          if (!passed && left < step) at = index;
          passed = passed || left < step;
          left -= step;
        });
      }
      s.point = left;
      s.start = at;
    }
    __syncthreads();
    start = s.start;
    wanted = s.point;
    if (share == 1) return start;
    chunks = share;  // past the row's end there is nothing to add
  }
}

// The largest logit in every thread; NaN where there is a NaN or +inf.
template <typename T>
GPU_DEVICE float largest(const Row<T>& row, Shared& s) {
  float most = -INFINITY;
  bool good = true;
  row.each(threadIdx.x, row.chunks, kThreads, [&](float x, int) {
    good = good && x <= kLargest;
    most = fmaxf(most, x);
  });
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    most = fmaxf(most, __shfl_xor_sync(kWholeWarp, most, offset));
  }
  if (threadIdx.x % 32 == 0) s.tops[threadIdx.x / 32] = most;
  if (__syncthreads_or(!good)) return NAN;
  for (int w = 0; w < kWarps; ++w) most = fmaxf(most, s.tops[w]);
  return most;
}

// Three blocks a multiprocessor allow 80 registers; left to itself the compiler spills on sm_90.
template <typename T>
GPU_KERNEL(kThreads, 3) sample_kernel(GPU_CONSTANT SampleArgs a) {
  GPU_SHARED(Shared, shared, 1);
  Shared& s = *shared;
  const int64_t b = blockIdx.x;
  const Row<T> row(static_cast<const T*>(a.logits) + b * a.row_stride, a.vocabulary);
  const float temperature = setting(a.temperature, b);
  const float top_p = setting(a.top_p, b);
  const float min_p = setting(a.min_p, b);
  const int64_t top_k = setting(a.top_k, b);

  // 1. The largest logit, and whether there is anything to draw. The same in every thread.
  const float top = largest(row, s);
  const bool in_range = temperature >= 0.0f && temperature <= kLargest && top_k >= 0 &&
                        top_p > 0.0f && top_p <= 1.0f && min_p >= 0.0f && min_p <= 1.0f;
  if (!(top >= -kLargest) || !in_range) {
    if (threadIdx.x == 0) {
      a.tokens[b] = -1;
      raise_flag(a.error_flag, in_range ? kNothingToDraw : kSettingOutOfRange);
    }
    return;
  }

  // 2. What is kept: keys above `lowest`, and of those equal to it the ones up to index `last`.
  unsigned lowest = 0;
  int last = a.vocabulary;
  const Softmax softmax{top, fminf(__fdiv_rn(kLog2E, temperature), kLargest)};
  if (temperature == 0.0f) {
    lowest = key_of<T>(top);
  } else {
    if (top_k > 0 && top_k < a.vocabulary) {
      lowest = search(row, s, [](float, unsigned) -> uint64_t { return 1; },
                      [&](uint64_t) { return static_cast<uint64_t>(top_k); }).key;
    }
    if (top_p < 1.0f) {
      uint64_t enough = 0;
      const uint64_t share = static_cast<uint64_t>(top_p * 4294967296.0f) << 32;
      const Threshold head = search(
          row, s,
          [&](float x, unsigned key) { return key >= lowest ? softmax.weight(x) : 0; },
          [&](uint64_t total) {
            enough = __umul64hi(total, share);
            if (enough == 0) enough = 1;
            return enough;
          });
      lowest = head.key;
      // Equal logits weigh the same: the last one kept is where enough is reached.
      const uint64_t missing = enough - head.above;
      last = walk(row, s,
                  [&](float x, int) { return key_of<T>(x) == lowest ? softmax.weight(x) : 0; },
                  [&](uint64_t) { return missing - 1; });
    }
  }

  // 3. A point of the kept mass, and the token there; at temperature 0 the first largest logit.
  //    A power of two times min_p is exact, and the largest logit's weight is never below it.
  const uint64_t least = static_cast<uint64_t>(ceilf(min_p * (1ull << kWeightBits)));
  const uint64_t sequence = static_cast<uint64_t>(setting(a.sequence, b));
  const uint4 words = philox(static_cast<uint64_t>(setting(a.seed, b)),
                             uint4{static_cast<unsigned>(setting(a.step, b)),
                                   static_cast<unsigned>(sequence),
                                   static_cast<unsigned>(sequence >> 32), 2});
  const uint64_t random = static_cast<uint64_t>(words.x) << 32 | words.y;
  const int token = walk(
      row, s,
      [&](float x, int index) {
        const unsigned key = key_of<T>(x);
        const bool kept = key > lowest || (key == lowest && index <= last);
        const uint64_t weight = kept ? softmax.weight(x) : 0;
        return weight >= least ? weight : 0;
      },
      [&](uint64_t total) { return temperature > 0.0f ? __umul64hi(total, random) : 0; });
  if (threadIdx.x == 0) a.tokens[b] = token;
}

}  // namespace sample
