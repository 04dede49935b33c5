"""The main loop of a product with an epilogue, and the order in which its tiles run."""

import triton
import triton.language as tl


@triton.jit
def grouped_tile(
    M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr
):  # fmt: skip
    """This program's tile of an [M, N] output: GROUP_M tile rows deep, then to the right.

    So the programs alive together share a few slabs of both operands in the L2.
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    first_m = pid // (GROUP_M * tiles_n) * GROUP_M
    rows_in_group = tl.minimum(tiles_m - first_m, GROUP_M)
    pid_m = first_m + pid % (GROUP_M * tiles_n) % rows_in_group
    pid_n = pid % (GROUP_M * tiles_n) // rows_in_group
    return pid_m, pid_n


@triton.jit
def product_tile(
    x_ptr, w_ptr, offs_m, offs_n, M, N, K, stride_x, stride_w,
    TRANSPOSED: tl.constexpr,  # w is [N, K], else [K, N]; unit last stride
    PRECISION: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows offs_m and columns offs_n of x [M, K] times w, float32 [BLOCK_M, BLOCK_N].

    Offsets are 64-bit. Rows past the edge repeat the last row, or hold 0: never stored.
    """
    offs_k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + tl.minimum(offs_m, M - 1)[:, None] * stride_x + offs_k[None, :]  # [M, K]
    if TRANSPOSED:
        w_ptrs = w_ptr + tl.minimum(offs_n, N - 1)[None, :] * stride_w + offs_k[:, None]  # [K, N]
    else:
        w_ptrs = w_ptr + offs_k[:, None].to(tl.int64) * stride_w + offs_n[None, :]
    # Past K both sides load 0: their product must not be NaN.
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs)  # [BLOCK_M, BLOCK_K]
        else:
            x = tl.load(x_ptrs, mask=offs_k[None, :] < K - k, other=0.0)
        if EVEN_K and TRANSPOSED:
            w = tl.load(w_ptrs)  # [BLOCK_K, BLOCK_N]
        elif EVEN_K:
            w = tl.load(w_ptrs, mask=offs_n[None, :] < N, other=0.0)
        elif TRANSPOSED:
            w = tl.load(w_ptrs, mask=offs_k[:, None] < K - k, other=0.0)
        else:
            w = tl.load(w_ptrs, mask=(offs_k[:, None] < K - k) & (offs_n[None, :] < N), other=0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K if TRANSPOSED else BLOCK_K * stride_w
    return acc


@triton.jit
def column_halves(acc, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """A tile's left and right half: an epilogue of one after the other halves its registers."""
    return acc.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1).split()
