// A softmax-weighted mean under way: maximum, sum and weighted values, for several rows at once.
// Scores are in powers of two: weight = 2^(score - m).
#pragma once

#include "device/reduce.cuh"
#include "gpu.cuh"

// -inf minus -inf is NaN: a row without a key is shifted by 0, which leaves its weights at 0.
GPU_DEVICE float finite_shift(float m) { return m == -INFINITY ? 0.0f : m; }

template <int kRows, int kValues>
struct SoftmaxState {
  float m[kRows];
  float l[kRows];
  float acc[kRows][kValues];

  GPU_DEVICE void reset() {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      m[r] = -INFINITY;
      l[r] = 0.0f;
#pragma unroll
      for (int i = 0; i < kValues; ++i) acc[r][i] = 0.0f;
    }
  }

  // Takes in kKeys keys of row r.
  template <int kKeys>
  GPU_DEVICE void add(int r, const float (&scores)[kKeys], const float (&values)[kKeys][kValues]) {
    float m_new = m[r];
#pragma unroll
    for (int u = 0; u < kKeys; ++u) m_new = fmaxf(m_new, scores[u]);
    const float shift = finite_shift(m_new);
    const float alpha = gpu_exp2(m[r] - shift);
    m[r] = m_new;
    l[r] *= alpha;
#pragma unroll
    for (int i = 0; i < kValues; ++i) acc[r][i] *= alpha;
#pragma unroll
    for (int u = 0; u < kKeys; ++u) {
      const float p = gpu_exp2(scores[u] - shift);
      l[r] += p;
#pragma unroll
      for (int i = 0; i < kValues; ++i) acc[r][i] += p * values[u][i];
    }
  }

  // Puts together the lanes that are `offset` apart.
  GPU_DEVICE void merge_lanes(int offset) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float m_other = __shfl_xor_sync(kWholeWarp, m[r], offset);
      const float l_other = __shfl_xor_sync(kWholeWarp, l[r], offset);
      const float shift = finite_shift(fmaxf(m[r], m_other));
      const float mine = gpu_exp2(m[r] - shift);
      const float theirs = gpu_exp2(m_other - shift);
      m[r] = fmaxf(m[r], m_other);
      l[r] = l[r] * mine + l_other * theirs;
#pragma unroll
      for (int i = 0; i < kValues; ++i) {
        const float other = __shfl_xor_sync(kWholeWarp, acc[r][i], offset);
        acc[r][i] = acc[r][i] * mine + other * theirs;
      }
    }
  }
};
