"""Repeats give the same bits; a row alone gives those of the row in a batch, where promised."""

import os

import pytest
import torch
from cases import HALF_DTYPES, KERNEL_DTYPES, cu_seqlens, randn
from paged_batch import paged_batch
from tolerance import assert_bitwise

from bertgpt import ops

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = ("triton",) if INTERPRETING else ("torch", "reference")
pytestmark = [
    *([pytest.mark.interpreter] if INTERPRETING else []),
    # NumPy warns of 0 / 0 and ln 0, which the kernels select away.
    pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning"),
]
BATCHES = (2, 3, 16) if INTERPRETING else (2, 3, 16, 61, 256)


def padded(batch, dtype):
    q = randn(batch, 5, 2, 8, dtype=dtype)
    return q, *(randn(batch, 7, 1, 8, dtype=dtype, seed=i) for i in (1, 2))


def outputs(result):
    return result if isinstance(result, tuple) else (result,)


def calls(dtype, backend):
    """One call of every op; those that write give what they wrote."""
    rows, w, b = (randn(*shape, dtype=dtype) for shape in ((9, 24), (40, 24), (40,)))
    w_out = randn(24, 40, dtype=dtype)
    packed = [randn(12, 2, 8, dtype=dtype, seed=i) for i in range(3)]
    pages = paged_batch((9, 0, 30), dtype=dtype)
    chunks = paged_batch((9, 4, 30), (3, 1, 20), dtype=dtype)
    run = {"backend": backend}

    def write():
        stored = pages.k_pages.clone(), pages.v_pages.clone()
        slots = torch.tensor([5, 5, 1])  # of one slot's tokens the last stays
        k = randn(3, 1, 8, dtype=dtype)
        ops.paged_write(k, -k, *stored, slots, **run)
        return stored

    return {
        "attention": lambda: ops.attention(*padded(3, dtype), causal=True, return_lse=True, **run),
        "packed": lambda: ops.attention(*packed, cu_seqlens_q=cu_seqlens((3, 0, 9)), **run),
        "linear_gelu": lambda: ops.linear_gelu(rows, w, b, **run),
        "gelu_ffn": lambda: ops.gelu_ffn(rows, w, b, w_out, None, **run),
        "add_layer_norm": lambda: ops.add_layer_norm(
            rows, rows * 2, w_out[:, 0].contiguous(), None, return_sum=True, **run
        ),
        "pool": lambda: ops.pool(rows, cu_seqlens((rows.shape[0],)), normalize=True, **run),
        "paged_attention": lambda: ops.paged_attention(*pages.args, return_lse=True, **run),
        "paged chunks": lambda: ops.paged_attention(*chunks.args, **chunks.chunks, **run),
        "paged_write": write,
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("name", calls(torch.float32, None))
def test_repeats_give_the_same_bits(name, dtype, backend):
    call = calls(dtype, backend)[name]
    first = [t.clone() for t in outputs(call())]
    for _ in range(3):
        for again, expected in zip(outputs(call()), first, strict=True):
            assert_bitwise(again, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("batch", BATCHES)
def test_a_row_of_add_layer_norm_alone(batch, dtype, backend):
    x, residual, weight = (randn(*s, dtype=dtype) for s in ((batch, 70), (batch, 70), (70,)))
    run = {"return_sum": True, "backend": backend}
    whole = ops.add_layer_norm(x, residual, weight, None, **run)
    for i in (0, batch // 2, batch - 1):
        alone = ops.add_layer_norm(x[i : i + 1], residual[i : i + 1], weight, None, **run)
        for one, all_rows in zip(alone, whole, strict=True):
            assert_bitwise(one[0], all_rows[i])


@pytest.mark.interpreter
@pytest.mark.skipif(not INTERPRETING, reason="promised of Triton's kernels alone")
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@pytest.mark.parametrize("batch", [2, 17])
class TestTritonAlone:
    """No tile, split or order of summation follows from the batch."""

    def test_attention(self, batch, dtype):
        q, k, v = padded(batch, dtype)
        run = {"causal": True, "return_lse": True, "backend": "triton"}
        out, lse = ops.attention(q, k, v, **run)
        for i in (0, batch - 1):
            one = slice(i, i + 1)
            alone, alone_lse = ops.attention(q[one], k[one], v[one], **run)
            assert_bitwise(alone, out[one])
            assert_bitwise(alone_lse, lse[one])

    def test_paged_attention(self, batch, dtype):
        whole = paged_batch([1 + 7 * i % 40 for i in range(batch)], page_size=16, dtype=dtype)
        out = ops.paged_attention(*whole.args, backend="triton")
        for i in (0, batch - 1):
            alone = ops.paged_attention(*whole.alone(i).args, backend="triton")
            assert_bitwise(alone, out[i : i + 1])

    def test_linear_gelu(self, batch, dtype):
        x, w, b = (randn(*s, dtype=dtype) for s in ((batch, 64), (40, 64), (40,)))
        whole = ops.linear_gelu(x, w, b, backend="triton")
        for i in (0, batch - 1):
            assert_bitwise(ops.linear_gelu(x[i : i + 1], w, b, backend="triton")[0], whole[i])
