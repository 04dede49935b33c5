"""The Triton kernel of `linear_gelu` and `gelu_ffn`, run by Triton's interpreter."""

import math

import pytest
import torch
from cases import (
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
from bertgpt.philox import philox_words

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from bertgpt.kernels import linear_gelu as kernels  # noqa: E402

pytestmark = [
    pytest.mark.interpreter,
    # NumPy warns where the hardware gives inf, which is what the kernel wants of 2^x there.
    pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning"),
]

FORMS = ("none", "tanh")
CAPABILITIES = (80, 86, 89, 90, 100, 103, 120, 121)


def inputs(M, K, N, dtype, seed=0, strided=False):
    return (
        randn(M, K, dtype=dtype, seed=seed, strided=strided),
        randn(N, K, dtype=dtype, seed=seed + 1, strided=strided),
        randn(N, dtype=dtype, seed=seed + 2),
    )


def check(x, w, b, approximate="none"):
    with poisoned_allocations():
        y = ops.linear_gelu(x, w, b, approximate=approximate, backend="triton")
    doubles = (None if t is None else t.double() for t in (x, w, b))
    oracle = reference.linear_gelu(*doubles, approximate=approximate)
    assert_accurate(y, oracle, reference.linear_gelu(x, w, b, approximate=approximate))
    assert y.is_contiguous()
    return y


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("approximate", FORMS)
@pytest.mark.parametrize("has_bias", [True, False])
def test_whole_and_partial_tiles(dtype, approximate, has_bias):
    for M, K, N in ((64, 64, 64), (65, 70, 33), (130, 33, 129)):
        x, w, b = inputs(M, K, N, dtype)
        check(x, w, b if has_bias else None, approximate)


@pytest.mark.parametrize("M", awkward_sizes(128))
def test_awkward_rows(M):
    check(*inputs(M, 48, 80, torch.float16))


@pytest.mark.parametrize("N", awkward_sizes(128))
def test_awkward_columns(N):
    check(*inputs(70, 40, N, torch.bfloat16))


@pytest.mark.parametrize("K", awkward_sizes(64))
def test_awkward_inner_sizes(K):
    check(*inputs(70, K, 40, torch.float16))
    check(*inputs(3, K, 40, torch.float32))


@examples(50)
@given(
    leading=st.lists(st.integers(0, 6), max_size=3),
    K=st.integers(0, 140),
    N=st.integers(0, 140),
    dtype=st.sampled_from(KERNEL_DTYPES),
    has_bias=st.booleans(),
    approximate=st.sampled_from(FORMS),
    seed=st.integers(0, 99),
)
def test_odd_shapes_and_strides(leading, K, N, dtype, has_bias, approximate, seed):
    x = randn(*leading, K, dtype=dtype, seed=seed, strided=True)
    w = randn(N, K, dtype=dtype, seed=seed + 1, strided=True)
    b = torch.stack([randn(N, dtype=dtype, seed=seed + 2)] * 2, 1)[:, 0]
    assert check(x, w, b if has_bias else None, approximate).shape == (*leading, N)


def test_any_last_stride():
    x, w, b = inputs(20, 30, 40, torch.float16)
    expected = check(x, w, b)
    assert_bitwise(check(x.t().contiguous().t(), w.t().contiguous().t(), b), expected)


@pytest.mark.parametrize("approximate", FORMS)
def test_many_tiles_in_groups(monkeypatch, approximate):
    """Small tiles: more tile rows than one group holds, a last group that is not full."""
    config = kernels.Config(16, 32, 16, num_warps=4, num_stages=2, group_m=3)
    monkeypatch.setattr(kernels, "pick_config", lambda *args, **kwargs: config)
    check(*inputs(16 * 7 + 5, 50, 32 * 4 + 3, torch.float32), approximate)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_config_is_right(monkeypatch, capability, dtype):
    monkeypatch.setattr(kernels, "compute_capability", lambda: capability)
    monkeypatch.setattr(kernels, "multiprocessor_count", lambda: 1)
    for M, K, N in ((50, 80, 144), (140, 80, 144), (140, 81, 144), (140, 80, 145)):
        check(*inputs(M, K, N, dtype))


def test_configs_are_bounded():
    for capability in CAPABILITIES:
        for itemsize, ieee in ((2, False), (4, False), (4, True)):
            for m in (1, 64, 65, 2048, 1 << 20):
                for n in (1, 768, 3072):
                    config = kernels.pick_config(capability, itemsize, ieee, m, n, 132)
                    per_stage = (config.block_m + config.block_n) * config.block_k * itemsize
                    assert per_stage * config.num_stages <= 96 * 1024
                    if not ieee and capability // 10 in (9, 10):
                        assert config.block_m >= 64  # what a warpgroup's instruction needs


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_float32_products_follow_torchs_setting(monkeypatch, precision):
    asked = []
    original = kernels._linear_gelu_kernel

    class Recorder:
        def __getitem__(self, grid):
            def launch(*args, **kwargs):
                asked.append(kwargs["PRECISION"])
                return original[grid](*args, **kwargs)

            return launch

    monkeypatch.setattr(kernels, "_linear_gelu_kernel", Recorder())
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        check(*inputs(70, 64, 40, torch.float32))
    finally:
        torch.set_float32_matmul_precision(before)
    assert asked == ["ieee" if precision == "highest" else "tf32"]


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("approximate", FORMS)
def test_large_and_infinite_pre_activations(dtype, approximate):
    largest = torch.finfo(dtype).max
    z = torch.tensor([largest, -largest, math.inf, 1e4, -1e4, 300, -300, 0.0, math.nan])
    x, w = torch.ones(1, 1, dtype=dtype), torch.zeros(9, 1, dtype=dtype)
    y = ops.linear_gelu(x, w, z.to(dtype), approximate=approximate, backend="triton")[0]
    expected = torch.tensor([largest, 0, math.inf, 1e4, 0, 300, 0, 0, math.nan]).to(dtype)
    assert torch.equal(y.nan_to_num(7.0), (expected + 0.0).nan_to_num(7.0))
    small = torch.linspace(-9, 9, 400).to(dtype)
    check(torch.ones(2, 1, dtype=dtype), torch.zeros(400, 1, dtype=dtype), small, approximate)


def test_a_half_sum_past_the_largest_half_survives_to_the_epilogue():
    x, w = torch.full((1, 2), 300.0).half(), torch.full((1, 2), 300.0).half()
    w[0, 1] = -299.0
    assert float(ops.linear_gelu(x, w, None, backend="triton")) == 300.0


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_nan_stays_in_its_row_or_column(dtype):
    x, w, b = inputs(70, 40, 50, dtype)
    x[69, 39], w[4, 1], b[49] = math.nan, math.nan, math.nan
    bad = ops.linear_gelu(x, w, b, backend="triton").isnan()
    expected = torch.zeros(70, 50, dtype=torch.bool)
    expected[69], expected[:, 4], expected[:, 49] = True, True, True
    assert torch.equal(bad, expected)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_nothing_outside_the_buffers_is_read_or_written(monkeypatch, dtype):
    """Every buffer lies between bands of NaN; the output's must stay, none may reach a result."""
    for M, K, N in ((70, 37, 41), (1, 1, 1), (3, 130, 5)):
        x, w, b = (banded_copy(t) for t in inputs(M, K, N, dtype))
        y = banded((M, N), dtype)
        monkeypatch.setattr(kernels.torch, "empty", lambda *args, y=y, **kwargs: y.view)
        kernels.linear_gelu(x.view, w.view, b.view, approximate="none")
        monkeypatch.undo()
        y.check("output")
        doubles = [t.view.double() for t in (x, w, b)]
        baseline = reference.linear_gelu(x.view, w.view, b.view)
        assert_accurate(y.view, reference.linear_gelu(*doubles), baseline)


def test_rows_do_not_depend_on_their_batch():
    x, w, b = inputs(150, 96, 70, torch.float16)
    whole = ops.linear_gelu(x, w, b, backend="triton")
    assert_bitwise(ops.linear_gelu(x, w, b, backend="triton"), whole)
    alone = ops.linear_gelu(x[40:41], w, b, backend="triton")
    assert_bitwise(alone[0], whole[40])


def test_row_offsets_are_64_bit():
    x, w, b = inputs(4, 5, 3, torch.float16)
    expected = check(x, w, b)
    assert_bitwise(ops.linear_gelu(rows_far_apart(x), w, b, backend="triton"), expected)
    assert_bitwise(ops.linear_gelu(x, rows_far_apart(w), b, backend="triton"), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_float32_weights_beside_half_inputs(dtype):
    x, w, b = inputs(20, 30, 40, torch.float32)
    x = x.to(dtype)
    y = ops.linear_gelu(x, w, b, backend="triton")
    assert y.dtype == dtype
    rounded = ops.linear_gelu(x, w.to(dtype), b, backend="triton")
    assert_bitwise(y, rounded)  # the bias stays float32, which is only more precise
    doubles = (t.double() for t in (x, w.to(dtype), b))
    assert_accurate(y, reference.linear_gelu(*doubles), reference.linear_gelu(x, w, b))


@examples(15)
@given(
    leading=st.lists(st.integers(0, 5), max_size=2),
    E=st.integers(1, 40),
    F=st.integers(1, 90),
    dtype=st.sampled_from(KERNEL_DTYPES),
    has_bias=st.booleans(),
    approximate=st.sampled_from(FORMS),
)
def test_gelu_ffn(leading, E, F, dtype, has_bias, approximate):
    x = randn(*leading, E, dtype=dtype, strided=True)
    w_in, w_out = randn(F, E, dtype=dtype, seed=1), randn(E, F, dtype=dtype, seed=2)
    b_in, b_out = randn(F, dtype=dtype, seed=3), randn(E, dtype=dtype, seed=4)
    tensors = (x, w_in, b_in, w_out, b_out) if has_bias else (x, w_in, None, w_out, None)
    y = ops.gelu_ffn(*tensors, approximate=approximate, backend="triton")
    doubles = [None if t is None else t.double() for t in tensors]
    baseline = reference.gelu_ffn(*tensors, approximate=approximate)
    assert_accurate(y, reference.gelu_ffn(*doubles, approximate=approximate), baseline)


def test_refusals_in_words():
    x, w, b = inputs(4, 5, 6, torch.float64)
    with pytest.raises(ops.BackendUnavailable, match="float64"):
        ops.linear_gelu(x, w, b, backend="triton")


@triton.jit
def _philox_kernel(out_ptr, seed, c1, c2, c3, N: tl.constexpr):
    c0 = tl.arange(0, N).to(tl.uint32)
    zero = c0 * 0
    words = tl.philox(seed, c0, zero + c1, zero + c2, zero + c3)
    for i in tl.static_range(4):
        tl.store(out_ptr + i * N + tl.arange(0, N), words[i].to(tl.int64))


@pytest.mark.parametrize("seed", [0, 12345, (7 << 32) + 9, 2**63 - 1])
def test_dropout_words_are_those_of_tritons_philox(seed):
    out = torch.empty(4, 64, dtype=torch.int64)
    _philox_kernel[(1,)](out, seed, 5, 77, 1, N=64)
    c1, c2, c3 = (torch.tensor(c) for c in (5, 77, 1))
    expected = torch.stack(philox_words(seed, torch.arange(64), c1, c2, c3))
    assert torch.equal(out & 0xFFFFFFFF, expected)
