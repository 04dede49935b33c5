"""The Triton kernel of `add_layer_norm`, run by Triton's interpreter."""

import math

import pytest
import torch
from cases import (
    HALF_DTYPES,
    KERNEL_DTYPES,
    awkward_sizes,
    banded,
    banded_copy,
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
from bertgpt.kernels import add_layer_norm as kernels

pytestmark = [
    pytest.mark.interpreter,
    # NumPy warns where the hardware gives inf or NaN, as these tests want.
    pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning"),
]


def inputs(leading, E, dtype, seed=0, strided=False):
    shapes = [(*leading, E), (*leading, E), (E,), (E,)]
    return [
        randn(*shape, dtype=dtype, seed=seed + i, strided=strided) for i, shape in enumerate(shapes)
    ]


def run(*tensors, **kwargs):
    with poisoned_allocations():
        return ops.add_layer_norm(*tensors, backend="triton", **kwargs)


def check(tensors, eps=1e-12):
    y, total = run(*tensors, eps=eps, return_sum=True)
    doubles = [None if t is None else t.double() for t in tensors]
    oracles = reference.add_layer_norm(*doubles, eps=eps, return_sum=True)
    baselines = reference.add_layer_norm(*tensors, eps=eps, return_sum=True)
    assert_accurate(y, oracles[0], baselines[0], what="y")
    assert_bitwise(total, baselines[1].contiguous(), what="sum")
    assert_bitwise(run(*tensors, eps=eps), y)
    assert y.is_contiguous()
    assert total.is_contiguous()
    return y


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("has_residual", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
def test_each_form(dtype, has_residual, has_bias):
    for rows, E in ((9, 100), (3, 768)):
        x, residual, weight, bias = inputs((rows,), E, dtype)
        check((x, residual if has_residual else None, weight, bias if has_bias else None))


@pytest.mark.parametrize(
    "E", [1, 2, 31, 32, 33, 255, 257, 769, 1023, 1024, 1025, 4097, 8192, 16384]
)
def test_awkward_widths(E):
    check(inputs((3,), E, torch.bfloat16))


@pytest.mark.parametrize("rows", awkward_sizes(4))
def test_awkward_row_counts(rows):
    check(inputs((rows,), 300, torch.float16))


@examples(50)
@given(
    leading=st.lists(st.integers(0, 5), max_size=3),
    E=st.integers(0, 600),
    dtype=st.sampled_from(KERNEL_DTYPES),
    has_residual=st.booleans(),
    has_bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_odd_shapes_and_strides(leading, E, dtype, has_residual, has_bias, seed):
    x, _, weight, bias = inputs(leading, E, dtype, seed, strided=True)
    residual = randn(*leading, E, dtype=dtype, seed=seed + 7, strided=True)
    check((x, residual if has_residual else None, weight, bias if has_bias else None), eps=1e-5)


def test_any_stride():
    x, residual, weight, bias = inputs((3, 4), 70, torch.float16)
    spread = torch.stack([weight, bias], 1)
    row = residual[:1, :1].expand(3, 4, 70)
    expected = check((x, row.contiguous(), weight, bias))
    transposed = x.transpose(0, 2).contiguous().transpose(0, 2)
    assert_bitwise(check((transposed, row, spread[:, 0], spread[:, 1])), expected)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize(("scale", "offset"), [(1e-3, 0.0), (100.0, 100.0), (1e4, -2e4)])
def test_magnitudes(dtype, scale, offset):
    """A variance taken as E[s²] − E[s]² would fail the offsets."""
    x, residual, weight, bias = inputs((16,), 384, dtype)
    check((x * scale + offset, residual * scale, weight, bias))


def test_an_offset_a_thousand_times_the_spread():
    x, _, weight, bias = inputs((16,), 384, torch.float32)
    check((x + 1000.0, None, weight, bias))


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@pytest.mark.parametrize("half_bias", [False, True])
def test_float32_weights_beside_half_inputs(dtype, half_bias):
    x, residual, _, _ = inputs((9,), 200, dtype)
    _, _, weight, bias = inputs((9,), 200, torch.float32)
    check((x, residual, weight, bias.to(dtype) if half_bias else bias))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("E", [7, 300, 1100])
def test_constant_rows_nan_and_inf(dtype, E):
    x, residual, weight, bias = inputs((6,), E, dtype)
    x[1], residual[1] = 3.0, -1.0
    x[2, -1], residual[3, 0] = math.nan, math.inf
    weight[0], bias[1] = math.nan, math.nan
    y = run(x, residual, weight, bias)
    assert_bitwise(y[1, 2:], bias[2:])
    assert y[2:4].isnan().all()
    assert y[:, :2].isnan().all()
    assert y[[0, 1, 4, 5], 2:].isfinite().all()


def test_eps_zero_and_large():
    x, residual, weight, bias = inputs((5,), 50, torch.float32)
    check((x, residual, weight, bias), eps=0.0)
    check((x, residual, weight, bias), eps=3.0)
    constant = torch.ones(2, 50)
    assert run(constant, None, weight, bias, eps=0.0).isnan().all()


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_nothing_outside_the_buffers_is_read_or_written(monkeypatch, dtype):
    for rows, E in ((5, 37), (1, 1), (3, 1030)):
        x, residual, weight, bias = (banded_copy(t) for t in inputs((rows,), E, dtype))
        outputs = [banded((rows, E), dtype), banded((rows, E), dtype)]
        waiting = list(outputs)
        give = lambda *args, waiting=waiting, **kwargs: waiting.pop(0).view  # noqa: E731
        monkeypatch.setattr(kernels.torch, "empty", give)
        monkeypatch.setattr(kernels.torch, "empty_like", give)
        kernels.add_layer_norm(
            x.view, residual.view, weight.view, bias.view,
            eps=1e-5, dropout_p=0.0, seed=None, return_sum=True,
        )  # fmt: skip
        monkeypatch.undo()
        for out, name in zip(outputs, ("output", "sum"), strict=True):
            out.check(name)
            assert out.view.isfinite().all()


def test_rows_do_not_depend_on_their_batch():
    x, residual, weight, bias = inputs((67,), 500, torch.float16)
    whole = run(x, residual, weight, bias)
    assert_bitwise(run(x, residual, weight, bias), whole)
    assert_bitwise(run(x[40:41], residual[40:41], weight, bias)[0], whole[40])


def test_row_offsets_are_64_bit():
    x, residual, weight, bias = inputs((5,), 40, torch.float16)
    expected = run(x, residual, weight, bias)
    assert_bitwise(run(rows_far_apart(x), residual, weight, bias), expected)
    assert_bitwise(run(x, rows_far_apart(residual), weight, bias), expected)


def test_every_width_has_a_config_that_covers_it():
    for capability in (80, 90, 100, 120):
        for E in [*range(1, 1100), *range(1100, kernels.MAX_WIDTH + 1, 97), kernels.MAX_WIDTH]:
            config = kernels.pick_config(capability, E)
            assert config.chunk * (config.chunks - 1) < E <= config.chunk * config.chunks
            a_lane_holds = config.rows * config.chunk * config.chunks / (32 * config.num_warps)
            assert a_lane_holds <= 32


def test_refusals_in_words():
    x, residual, weight, bias = inputs((2,), kernels.MAX_WIDTH + 1, torch.float16)
    with pytest.raises(ops.BackendUnavailable, match="columns do not fit"):
        run(x, residual, weight, bias)
    x, residual, weight, bias = inputs((2,), 8, torch.float64)
    with pytest.raises(ops.BackendUnavailable, match="float64"):
        run(x, residual, weight, bias)
