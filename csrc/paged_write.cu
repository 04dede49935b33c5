#include "paged_write.cuh"

void launch_paged_write(const PagedWriteArgs& args, void* stream) {
  using namespace paged_write;
  if (args.tokens == 0) return;
  auto* kernel = args.access_bytes == 16  ? paged_write_kernel<uint4>
                 : args.access_bytes == 4 ? paged_write_kernel<uint32_t>
                                          : paged_write_kernel<uint16_t>;
  gpu_launch(kernel, args.tokens, kThreads, stream, args);
}
