#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "paged_decode.h"

namespace paged_decode {
template <typename T>
void launch_dtype(const PagedDecodeArgs& args, void* stream);
}

void launch_paged_decode(const PagedDecodeArgs& args, void* stream) {
  using namespace paged_decode;
  if (args.batch == 0 || args.heads == 0) return;
  switch (args.dtype) {
    case Dtype::kFloat32:
      return launch_dtype<float>(args, stream);
    case Dtype::kFloat16:
      return launch_dtype<__half>(args, stream);
    case Dtype::kBfloat16:
      return launch_dtype<__nv_bfloat16>(args, stream);
  }
}
