#include "paged_decode.cuh"

template void paged_decode::launch_dtype<__nv_bfloat16>(const PagedDecodeArgs&, void*);
