#include "sample.cuh"

void launch_sample(const SampleArgs& args, void* stream) {
  using namespace sample;
  if (args.rows == 0) return;
  auto* kernel = args.dtype == Dtype::kFloat32   ? sample_kernel<float>
                 : args.dtype == Dtype::kFloat16 ? sample_kernel<__half>
                                                 : sample_kernel<__nv_bfloat16>;
  gpu_launch(kernel, args.rows, kThreads, stream, args);
}
