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


@triton.jit
def key_tiles(
    row_first, row_last, diagonal, keys, window_left, window_right,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The keys, of the first `keys`, that query rows row_first … row_last see.

    Row i sits on key i + diagonal and sees window_left keys before it and window_right past it.
    Returns lo, hi: some row sees each key of [lo, hi); the tiles [first, last) that hold them; and
    full_first, full_count: the run of tiles that every row sees whole.
    """
    lo = 0
    hi = keys
    full_lo = 0
    full_hi = keys
    if HAS_RIGHT:
        hi = tl.minimum(keys, row_last + diagonal + window_right + 1)
        full_hi = tl.minimum(keys, row_first + diagonal + window_right + 1)
    if HAS_LEFT:
        lo = tl.maximum(row_first + diagonal - window_left, 0)
        full_lo = tl.maximum(row_last + diagonal - window_left, 0)
    full_first = tl.cdiv(full_lo, BLOCK_N)
    full_count = tl.maximum(tl.maximum(full_hi, 0) // BLOCK_N - full_first, 0)
    return lo, hi, lo // BLOCK_N, tl.cdiv(tl.maximum(hi, 0), BLOCK_N), full_first, full_count


@triton.jit
def softmax_step(scores, m_i, l_i, scale_log2, NATURAL: tl.constexpr):
    """Weights of a score tile [BLOCK_M, BLOCK_N], the old rows' factor, and the new m and l.

    m is in units of log 2 and the scores unscaled, or both in natural units (NATURAL). The
    maximum may swallow a NaN; the exponentials never do.
    """
    if NATURAL:
        m_new = tl.maximum(m_i, tl.max(scores, 1))
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)  # -inf - -inf is NaN
        p = tl.exp2((scores - shift[:, None]) * LOG2E)
        alpha = tl.exp2((m_i - shift) * LOG2E)
    else:
        m_new = tl.maximum(m_i, tl.max(scores, 1) * scale_log2)
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(scores * scale_log2 - shift[:, None])
        alpha = tl.exp2(m_i - shift)
    return p, alpha, m_new, l_i * alpha + tl.sum(p, 1)


@triton.jit
def product_tile(
    a_ptrs, b_ptrs, mask_n, K, step_a, step_b,
    MASK_A: tl.constexpr, MASK_B: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Σ_k a[m, k] b[k, n] in float32, [BLOCK_M, BLOCK_N], from the addresses of the first K block.

    step_a and step_b are how far apart neighbours along K lie. MASK_A, MASK_B: that side is read
    as 0 past K; where K is no multiple of BLOCK_K, a side without must hold zeros there. mask_n:
    the columns of b that may be read, or None for all.
    """
    offs_k = tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        mask_k = offs_k < K - k
        if MASK_A:
            a = tl.load(a_ptrs, mask=mask_k[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        else:
            a = tl.load(a_ptrs)
        if mask_n is not None:
            b = tl.load(b_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        elif MASK_B:
            b = tl.load(b_ptrs, mask=mask_k[:, None], other=0.0)  # [BLOCK_K, BLOCK_N]
        else:
            b = tl.load(b_ptrs)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        a_ptrs += BLOCK_K * step_a
        b_ptrs += BLOCK_K * step_b
    return acc


@triton.jit
def grouped_tile(pid, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """The tile (row, column), int64, of program `pid`: GROUP_M tile rows deep, then to the right.

    Programs alive together so share a few slabs of both operands in the L2.
    """
    first_m = pid // (GROUP_M * tiles_n) * GROUP_M
    rows_in_group = tl.minimum(tiles_m - first_m, GROUP_M)
    pid_m = first_m + pid % (GROUP_M * tiles_n) % rows_in_group
    pid_n = pid % (GROUP_M * tiles_n) // rows_in_group
    return pid_m.to(tl.int64), pid_n.to(tl.int64)
