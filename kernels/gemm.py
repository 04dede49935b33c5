"""The main loop of a product with an epilogue, and the order in which its tiles run."""

import triton
import triton.language as tl


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


@triton.jit
def column_halves(acc, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """A tile's left and right half: an epilogue of one after the other halves its registers."""
    return acc.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1).split()
