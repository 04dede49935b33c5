#include "paged_decode.cuh"

template void paged_decode::launch_dtype<__half>(const PagedDecodeArgs&, void*);
