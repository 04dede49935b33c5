"""Gradients and dropout of `linear_gelu` and `gelu_ffn` on Triton, by its interpreter."""

import math

import pytest
import torch
from cases import KERNEL_DTYPES, awkward_sizes, banded_copy, examples, randn
from gradients import check_gradients, gradients, pulls_of
from hypothesis import given
from hypothesis import strategies as st
from tolerance import assert_accurate, assert_bitwise

from bertgpt import ops, reference
from bertgpt.philox import keep_rows

triton = pytest.importorskip("triton")

from bertgpt.kernels import linear_gelu as forward  # noqa: E402
from bertgpt.kernels.linear_gelu_backward import _gelu_bwd  # noqa: E402

pytestmark = [
    pytest.mark.interpreter,
    # NumPy warns where the hardware gives inf, which is what the kernels want of 2^x there.
    pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning"),
]
FORMS = ("none", "tanh")


def ffn(M, E, N, K, dtype, seed=0, bias=True, strided=False):
    """x, w_in, b_in, w_out, b_out."""
    return (
        randn(M, E, dtype=dtype, seed=seed, strided=strided),
        randn(N, E, dtype=dtype, seed=seed + 1, scale=max(E, 1) ** -0.5, strided=strided),
        randn(N, dtype=dtype, seed=seed + 2) if bias else None,
        randn(K, N, dtype=dtype, seed=seed + 3, scale=max(N, 1) ** -0.5, strided=strided),
        randn(K, dtype=dtype, seed=seed + 4) if bias else None,
    )


def check_ffn(inputs, approximate="none", **options):
    x, w_out = inputs[0], inputs[3]
    pulls = pulls_of([(*x.shape[:-1], w_out.shape[0])], x.dtype)
    return check_gradients("gelu_ffn", inputs, pulls, approximate=approximate, **options)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("approximate", FORMS)
@pytest.mark.parametrize("bias", [True, False])
def test_both_ops(dtype, approximate, bias):
    for M, E, N, K in ((64, 64, 64, 64), (65, 33, 130, 70)):
        inputs = ffn(M, E, N, K, dtype, bias=bias)
        check_ffn(inputs, approximate)
        pulls = pulls_of([(M, N)], dtype)
        check_gradients("linear_gelu", inputs[:3], pulls, approximate=approximate)


@pytest.mark.parametrize("M", awkward_sizes(64))
def test_awkward_rows(M):
    check_ffn(ffn(M, 40, 72, 24, torch.float16))


@pytest.mark.parametrize("N", awkward_sizes(64))
def test_awkward_hidden_widths(N):
    check_ffn(ffn(9, 24, N, 40, torch.float16))


@pytest.mark.parametrize("K", awkward_sizes(64))
def test_awkward_outputs(K):
    check_ffn(ffn(9, 24, 40, K, torch.float32), "tanh")


@examples(25)
@given(
    leading=st.lists(st.integers(0, 5), max_size=3),
    E=st.integers(0, 70),
    N=st.integers(0, 100),
    K=st.integers(0, 70),
    dtype=st.sampled_from(KERNEL_DTYPES),
    bias=st.booleans(),
    approximate=st.sampled_from(FORMS),
    p=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 99),
)
def test_odd_shapes_and_strides(leading, E, N, K, dtype, bias, approximate, p, seed):
    _, *rest = ffn(1, E, N, K, dtype, seed=seed, bias=bias, strided=True)
    x = randn(*leading, E, dtype=dtype, seed=seed, strided=True)
    check_ffn((x, *rest), approximate, dropout_p=p, seed=seed)


@pytest.mark.parametrize("capability", [80, 90, 100, 120])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_every_config_is_right(monkeypatch, capability, dtype):
    monkeypatch.setattr(forward, "compute_capability", lambda: capability)
    monkeypatch.setattr(forward, "multiprocessor_count", lambda: 1)
    for M, N in ((50, 144), (140, 144), (140, 145)):
        check_ffn(ffn(M, 48, N, 80, dtype))


def test_many_tiles_in_groups(monkeypatch):
    config = forward.Config(16, 32, 16, num_warps=4, num_stages=2, group_m=3)
    monkeypatch.setattr(forward, "pick_config", lambda *args, **kwargs: config)
    check_ffn(ffn(16 * 7 + 5, 20, 32 * 4 + 3, 50, torch.float32), "tanh")


def test_float32_weights_beside_half_inputs():
    x, *weights = ffn(20, 24, 40, 33, torch.float32)
    half = x.bfloat16()
    pull = randn(20, 33, dtype=torch.bfloat16, seed=9)
    made = gradients(ops.gelu_ffn, (half, *weights), [pull], backend="triton")
    rounded = [w.bfloat16() for w in weights]
    expected = gradients(ops.gelu_ffn, (half, *rounded), [pull], backend="triton")
    assert [g.dtype for g in made] == [torch.bfloat16, *[torch.float32] * 4]
    for mine, theirs in zip(made, expected, strict=True):
        torch.testing.assert_close(mine, theirs.to(mine.dtype), rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("approximate", FORMS)
def test_the_slope_far_out(approximate):
    """0 and 1 where z is large, with no NaN from inf · 0; the definition's everywhere else."""
    far = torch.tensor([-3e38, -1e20, -1e10, -60.0, 60.0, 1e10, 1e20, 3e38])
    ones = torch.ones_like(far)
    assert_bitwise(_gelu_bwd(ones, far, approximate == "tanh"), (far > 0).float())
    near = torch.linspace(-12, 12, 4001)
    leaf = near.double().requires_grad_()
    torch.nn.functional.gelu(leaf, approximate=approximate).sum().backward()
    actual = _gelu_bwd(torch.ones_like(near), near, approximate == "tanh")
    assert (actual - leaf.grad).abs().max() < 1e-6


@pytest.mark.parametrize("p", [0.0, 0.4, 1.0])
def test_dropout_of_the_output(p):
    inputs = ffn(9, 24, 40, 1030, torch.float32)
    y = ops.gelu_ffn(*inputs, dropout_p=p, seed=2**63 - 5, backend="triton")
    expected = reference.gelu_ffn(*(x.double() for x in inputs), dropout_p=p, seed=2**63 - 5)
    keep = keep_rows(2**63 - 5, 9, 1030, p)
    assert y[~keep].eq(0).all()
    baseline = reference.gelu_ffn(*inputs, dropout_p=p, seed=2**63 - 5)
    assert_accurate(y, expected, baseline)
    check_ffn(inputs, dropout_p=p, seed=2**63 - 5)


def test_only_what_is_asked_for_and_bitwise_again():
    inputs = ffn(20, 24, 40, 33, torch.float16)
    whole = check_ffn(inputs)
    assert_bitwise(check_ffn(inputs)[0], whole[0])
    x = inputs[0].detach().requires_grad_()
    y = ops.gelu_ffn(x, *inputs[1:], backend="triton")
    y.backward(randn(20, 33, dtype=torch.float16, seed=50))
    assert_bitwise(x.grad, whole[0])


def test_nothing_outside_the_inputs_is_used():
    inputs = ffn(37, 24, 70, 33, torch.float16)
    fenced = [banded_copy(x) for x in inputs]
    pull = banded_copy(randn(37, 33, dtype=torch.float16, seed=50))
    made = gradients(ops.gelu_ffn, [f.view for f in fenced], [pull.view], backend="triton")
    for fence in (*fenced, pull):
        fence.check()
    expected = gradients(ops.gelu_ffn, inputs, [pull.view.clone()], backend="triton")
    for mine, theirs in zip(made, expected, strict=True):
        assert_bitwise(mine, theirs)
        assert not math.isnan(mine.float().sum())
