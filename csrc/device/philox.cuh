// Philox-4x32-10 (Salmon et al., SC 2011): 128 random bits for each counter under a 64-bit key.
#pragma once

#include "gpu.cuh"

GPU_DEVICE uint4 philox(uint64_t seed, uint4 c) {
  unsigned k0 = static_cast<unsigned>(seed);
  unsigned k1 = static_cast<unsigned>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const unsigned high0 = __umulhi(0xd2511f53u, c.x);
    const unsigned high1 = __umulhi(0xcd9e8d57u, c.z);
    c = uint4{high1 ^ c.y ^ k0, 0xcd9e8d57u * c.z, high0 ^ c.w ^ k1, 0xd2511f53u * c.x};
    k0 += 0x9e3779b9u;  // the golden ratio
    k1 += 0xbb67ae85u;  // sqrt(3) - 1
  }
  return c;
}
