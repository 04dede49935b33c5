#include "paged_decode.cuh"

template void paged_decode::launch_dtype<float>(const PagedDecodeArgs&, void*);
