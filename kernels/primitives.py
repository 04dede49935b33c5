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
def sequence_spans(cu_q_ptr, cu_k_ptr, key_lengths_ptr, index, len_q, len_k):
    """Sequence `index` of a batch: first query, queries, first key, keys, and keys in use.

    Packed, the lengths given are all tokens; padded (no cu_seqlens), each sequence starts at 0 of
    its own batch entry.
    """
    start_q, start_k = tl.zeros([], tl.int64), tl.zeros([], tl.int64)
    if cu_q_ptr is not None:
        start_q, len_q = packed_span(cu_q_ptr, index, len_q)
        start_k, len_k = packed_span(cu_k_ptr, index, len_k)
    used = len_k
    if key_lengths_ptr is not None:
        used = tl.minimum(tl.maximum(tl.load(key_lengths_ptr + index), 0), len_k).to(tl.int32)
    return start_q, len_q, start_k, len_k, used


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
def query_tiles(
    key_first, key_last, diagonal, queries, window_left, window_right,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The queries, of the first `queries`, that see keys key_first … key_last.

    `key_tiles` seen from the other side: key j sits on query j - diagonal, and is seen from
    window_right queries before it to window_left past it. Returns the same of queries.
    """
    return key_tiles(
        key_first, key_last, -diagonal, queries, window_right, window_left,
        HAS_RIGHT, HAS_LEFT, BLOCK_M,
    )  # fmt: skip


@triton.jit
def mask_scores(
    scores, queries, keys, query_inside, key_inside, diagonal, window_left, window_right,
    mask_base, stride_mm, stride_mn,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, IS_ADDITIVE: tl.constexpr,
    MASK_PER_QUERY: tl.constexpr,
):  # fmt: skip
    """Scores with their bias, the pairs that may meet, and the part of the mask that was read.

    Queries and keys are indices and `…_inside` says which exist, shaped to broadcast to the tile
    [BLOCK_M, BLOCK_N] or to its transpose. Query i sits on key i + diagonal. Without
    MASK_PER_QUERY one mask row serves every query. The mask read is 0 outside.
    """
    inside = key_inside & query_inside
    visible = inside
    if HAS_RIGHT:
        visible &= keys <= queries + (diagonal + window_right)
    if HAS_LEFT:
        visible &= keys >= queries + (diagonal - window_left)
    allowed = inside
    if mask_base is not None:
        mask_keys = mask_base + keys.to(tl.int64) * stride_mn
        if MASK_PER_QUERY:
            mask_rows = queries.to(tl.int64) * stride_mm
            allowed = tl.load(mask_keys + mask_rows, mask=inside, other=0)
        else:
            allowed = tl.load(mask_keys, mask=key_inside, other=0)
        if IS_ADDITIVE:
            allowed = allowed.to(tl.float32)
            scores += allowed
            allowed = allowed != float("-inf")
        visible &= allowed
    return scores, visible, allowed


@triton.jit
def score_gradients(
    scores, grad_weights, queries, keys, query_inside, key_inside, row_max, row_log_sum, delta,
    keep, mask_base, stride_mm, stride_mn, diagonal, window_left, window_right, scale, keep_scale,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, IS_ADDITIVE: tl.constexpr,
    NATURAL: tl.constexpr, MASK_PER_QUERY: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The weights that dropout kept, the scores' gradients p ∘ (z ∘ dO vᵀ - δ), and visible pairs.

    scores are q kᵀ and grad_weights dO vᵀ, a tile [BLOCK_M, BLOCK_N] or its transpose, to which
    all others broadcast; row_max and row_log_sum (base 2) are the forward pass's. Not MASKED:
    every pair is visible. Hidden pairs are selected away: their scores and gradients may be NaN.
    """
    visible = True
    if NATURAL:
        scores *= scale
    if MASKED:
        scores, visible, _ = mask_scores(
            scores, queries, keys, query_inside, key_inside, diagonal, window_left, window_right,
            mask_base, stride_mm, stride_mn, HAS_LEFT, HAS_RIGHT, IS_ADDITIVE, MASK_PER_QUERY,
        )  # fmt: skip
    if NATURAL:  # the difference of two large biases is exact where it comes first
        p = tl.exp2((scores - row_max) * LOG2E - row_log_sum)
    else:
        p = tl.exp2(scores * scale - (row_max + row_log_sum))
    if MASKED:
        p = tl.where(visible, p, 0.0)
    kept = p
    if keep is not None:
        kept = tl.where(keep, p, 0.0)
        grad_weights = tl.where(keep, grad_weights * keep_scale, 0.0)
    grad_scores = p * (grad_weights - delta)
    if MASKED:
        grad_scores = tl.where(visible, grad_scores, 0.0)
    return kept, grad_scores, visible


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
