// Draws each row's next token; plain C++ for the bindings.
#pragma once

#include <stdint.h>

#include "dtype.h"

// A setting of each row on the device, or one for all rows.
template <typename V>
struct PerRow {
  const V* at;  // [B], or null: it is `same`
  V same;
};

struct SampleArgs {
  const void* logits;  // [B, V], unit last stride
  int64_t* tokens;     // [B]; -1 where a row or its settings are no good
  int* error_flag;     // or null
  PerRow<float> temperature, top_p, min_p;
  PerRow<int64_t> top_k, seed, sequence, step;
  int64_t rows, row_stride;  // the stride in elements
  int vocabulary;            // 1 ... 2^22, so that a sum of weights stays below 2^62
  Dtype dtype;
};

// Throws std::runtime_error where the driver or the launch fails.
void launch_sample(const SampleArgs& args, void* stream);
