"""The C++ kernel of `linear_gelu` for a few rows, on the host engine."""

import pytest
import torch
from cases import HALF_DTYPES, KERNEL_DTYPES, poisoned_allocations, randn
from tolerance import assert_accurate, assert_bitwise

from bertgpt import ops, reference

pytestmark = pytest.mark.usefixtures("host_engine")
CUDA = {"backend": "cuda"}


def inputs(rows, outputs, chunks, dtype):
    width = chunks * 16 // dtype.itemsize
    x, w, b = randn(rows, width), randn(outputs, width, seed=1), randn(outputs, seed=2)
    return x.to(dtype), (w / width**0.5).to(dtype), b.to(dtype)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize(
    ("rows", "outputs", "chunks"),
    [(1, 5, 96), (1, 17, 1), (2, 64, 33), (4, 3, 31), (5, 40, 70), (16, 9, 32), (0, 4, 2)],
)
def test_a_few_rows_are_accurate(rows, outputs, chunks, approximate, dtype):
    tensors = inputs(rows, outputs, chunks, dtype)
    with poisoned_allocations():
        y = ops.linear_gelu(*tensors, approximate=approximate, **CUDA)
    oracle = reference.linear_gelu(*(t.double() for t in tensors), approximate=approximate)
    assert_accurate(y, oracle, reference.linear_gelu(*tensors, approximate=approximate))


def test_a_row_gives_the_same_bits_beside_others():
    x, w, b = inputs(4, 20, 40, torch.float32)
    y = ops.linear_gelu(x, w, b, **CUDA)
    assert_bitwise(ops.linear_gelu(x[2:4], w, b, **CUDA), y[2:4])


def test_strides_and_a_missing_bias():
    x, w, _ = inputs(3, 12, 8, torch.float32)
    wide = torch.full((12, 64), float("nan"))
    wide[:, 16:48] = w
    y = ops.linear_gelu(x[None], wide[:, 16:48], None, **CUDA)
    assert_bitwise(y[0], ops.linear_gelu(x, w, torch.zeros(12), **CUDA))


def test_large_inputs_reach_the_limits_of_gelu():
    x = torch.tensor([[300.0, 0, 0, 0], [-300.0, 0, 0, 0]])
    for approximate in ("none", "tanh"):
        y = ops.linear_gelu(x, torch.eye(4)[:1], None, approximate=approximate, **CUDA)
        assert y.flatten().tolist() == [300.0, 0.0]


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_what_it_does_not_do_is_refused_in_words(dtype):
    x, w, b = inputs(17, 4, 2, dtype)
    with pytest.raises(ops.BackendUnavailable, match="17 rows are more than the 16"):
        ops.linear_gelu(x, w, b, **CUDA)
    with pytest.raises(ops.BackendUnavailable, match="must have x's dtype"):
        ops.linear_gelu(x[:2], w.float(), b.float(), **CUDA)
    with pytest.raises(ops.BackendUnavailable, match="not a multiple of 16 bytes"):
        ops.linear_gelu(x[:2, :12], w[:, :12], b, **CUDA)
