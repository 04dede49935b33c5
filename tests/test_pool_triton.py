"""The Triton kernel of `pool`, run by Triton's interpreter."""

import math

import pytest
import torch
from cases import (
    KERNEL_DTYPES,
    PACKED_LENGTHS,
    banded,
    banded_copy,
    cu_seqlens,
    examples,
    poisoned_allocations,
    randn,
    rows_far_apart,
)
from hypothesis import given
from hypothesis import strategies as st
from tolerance import assert_accurate, assert_bitwise

from bertgpt import ops, reference

pytest.importorskip("triton")
from bertgpt.kernels import pool as kernels

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning"),
]
POOLINGS = ("cls", "mean", "max")


def run(x, boundaries, **options):
    with poisoned_allocations():
        return ops.pool(x, boundaries, backend="triton", **options)


def check(x, boundaries, **options):
    vectors = run(x, boundaries, **options)
    oracle = reference.pool(x.double(), boundaries, **options)
    assert_accurate(vectors, oracle, reference.pool(x, boundaries, **options))
    assert_bitwise(run(x, boundaries, **options), vectors)
    assert vectors.is_contiguous()
    return vectors


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_ragged_batches(pooling, normalize):
    for lengths in PACKED_LENGTHS:
        for dtype in KERNEL_DTYPES:
            x = randn(sum(lengths), 40, dtype=dtype)
            check(x, cu_seqlens(lengths), pooling=pooling, normalize=normalize)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("E", [1, 31, 33, 384, 768, 1025, 8192])
def test_widths(E, pooling):
    check(randn(40, E, dtype=torch.float16), cu_seqlens((0, 17, 23)), pooling=pooling)


@examples(50)
@given(
    lengths=st.lists(st.integers(0, 40), max_size=4),
    E=st.integers(0, 90),
    dtype=st.sampled_from(KERNEL_DTYPES),
    pooling=st.sampled_from(POOLINGS),
    normalize=st.booleans(),
)
def test_odd_shapes_and_strides(lengths, E, dtype, pooling, normalize):
    x = randn(sum(lengths), E, dtype=dtype, strided=True)
    boundaries = cu_seqlens(lengths, torch.int64)
    expected = check(x, boundaries, pooling=pooling, normalize=normalize)
    columns = x.t().contiguous().t()
    spread = torch.stack([boundaries, boundaries], 1)[:, 0]
    assert_bitwise(check(columns, spread, pooling=pooling, normalize=normalize), expected)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_nan_and_inf_as_the_definition_has_them(pooling, normalize):
    x = randn(9, 7)
    x[0, 1] = x[4, 2] = math.nan
    x[7, 3] = math.inf
    boundaries, options = cu_seqlens((3, 3, 3)), {"pooling": pooling, "normalize": normalize}
    check(x, boundaries, **options)
    check(torch.full_like(x, -math.inf), boundaries, pooling=pooling)
    alone = run(x[3:6], cu_seqlens((3,)), **options)
    assert_bitwise(run(x, boundaries, **options)[1:2], alone)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_nothing_outside_the_buffers_is_read_or_written(monkeypatch, pooling):
    x, boundaries = banded_copy(randn(20, 37)), banded_copy(cu_seqlens((17, 3)))
    out = banded((2, 37), torch.float32)
    monkeypatch.setattr(kernels.torch, "empty", lambda *shape, **options: out.view)
    kernels.pool(x.view, boundaries.view, pooling=pooling, normalize=True)
    out.check()
    assert out.view.isfinite().all()


@pytest.mark.parametrize("pooling", POOLINGS)
def test_boundaries_that_lie_read_nothing_outside(pooling):
    """On a GPU nobody looks at them before the launch."""
    x = banded_copy(randn(6, 5))
    for wrong in ([0, 4, 99], [-7, 3, 6], [5, 2, 6], [2**31 - 1, 0, 6]):
        vectors = kernels.pool(
            x.view, torch.tensor(wrong, dtype=torch.int32), pooling=pooling, normalize=False
        )
        assert vectors.isfinite().all()


def test_offsets_are_64_bit():
    x, boundaries = randn(5, 40, dtype=torch.float16), cu_seqlens((2, 3))
    for pooling in POOLINGS:
        expected = run(x, boundaries, pooling=pooling)
        assert_bitwise(run(rows_far_apart(x), boundaries, pooling=pooling), expected)


def test_every_width_has_a_tile_that_covers_it_and_fits_registers():
    for capability in (80, 90, 100, 120):
        for E in range(1, kernels.MAX_WIDTH + 1):
            config = kernels.pick_config(capability, E)
            assert config.block_e >= E
            assert config.block_t * config.block_e <= 16 * 32 * config.num_warps


def test_refusals_in_words():
    for x, words in (
        (randn(2, kernels.MAX_WIDTH + 1), "columns do not fit"),
        (randn(2, 3, dtype=torch.float64), "float64"),
        (randn(2, 3).requires_grad_(), "no gradient"),
    ):
        with pytest.raises(ops.BackendUnavailable, match=words):
            run(x, cu_seqlens((2,)))
