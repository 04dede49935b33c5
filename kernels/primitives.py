"""Device functions used by more than one kernel family."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)  # 1 / ln 2
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def packed_span(cu_seqlens_ptr, index, total):
    """First token (int64) and length (int32) of sequence `index`, held inside [0, total]."""
    start = tl.load(cu_seqlens_ptr + index).to(tl.int64)
    stop = tl.load(cu_seqlens_ptr + index + 1).to(tl.int64)
    start = tl.minimum(tl.maximum(start, 0), total)
    stop = tl.minimum(tl.maximum(stop, start), total)
    return start, (stop - start).to(tl.int32)
