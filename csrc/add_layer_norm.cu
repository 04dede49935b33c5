#include "add_layer_norm.cuh"

namespace add_layer_norm {
namespace {

template <typename T>
void launch(const AddLayerNormArgs& a, void* stream) {
  if (a.width <= width_of(1)) {
    const int64_t blocks = (a.rows + kNarrowRows - 1) / kNarrowRows;
    return gpu_launch(add_layer_norm_kernel<T, 1>, blocks, threads_of(1), stream, a);
  }
  gpu_launch(add_layer_norm_kernel<T, 8>, a.rows, threads_of(8), stream, a);
}

}  // namespace
}  // namespace add_layer_norm

void launch_add_layer_norm(const AddLayerNormArgs& args, void* stream) {
  using namespace add_layer_norm;
  static_assert(width_of(8) == kMaxNormWidth);
  if (args.rows == 0 || args.width == 0) return;
  switch (args.dtype) {
    case Dtype::kFloat32:
      return launch<float>(args, stream);
    case Dtype::kFloat16:
      return launch<__half>(args, stream);
    case Dtype::kBfloat16:
      return launch<__nv_bfloat16>(args, stream);
  }
}
