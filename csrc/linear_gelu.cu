#include "linear_gelu.cuh"

namespace linear_gelu {
namespace {

template <typename T, int kRows>
void launch(const LinearGeluArgs& a, void* stream) {
  constexpr int kBlockOutputs = kWarps * outputs_of(kRows);
  gpu_launch(linear_gelu_kernel<T, kRows>, (a.outputs + kBlockOutputs - 1) / kBlockOutputs,
             kThreads, stream, a);
}

template <typename T>
void launch_rows(const LinearGeluArgs& a, void* stream) {
  if (a.rows == 1) return launch<T, 1>(a, stream);
  if (a.rows <= 4) return launch<T, 4>(a, stream);
  launch<T, 16>(a, stream);
}

}  // namespace
}  // namespace linear_gelu

void launch_linear_gelu(const LinearGeluArgs& args, void* stream) {
  using namespace linear_gelu;
  if (args.rows == 0 || args.outputs == 0) return;
  switch (args.dtype) {
    case Dtype::kFloat32:
      return launch_rows<float>(args, stream);
    case Dtype::kFloat16:
      return launch_rows<__half>(args, stream);
    case Dtype::kBfloat16:
      return launch_rows<__nv_bfloat16>(args, stream);
  }
}
