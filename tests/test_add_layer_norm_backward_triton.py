"""The gradient and the dropout of `add_layer_norm` on Triton, by Triton's interpreter."""

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

from bertgpt.kernels import add_layer_norm as forward  # noqa: E402
from bertgpt.kernels import add_layer_norm_backward as kernels  # noqa: E402

pytestmark = pytest.mark.interpreter
SEED = -(2**62) - 3


def inputs(shape, dtype, *, residual=True, bias=True, seed=0, strided=False):
    """x, residual, weight, bias."""
    width = shape[-1]
    return (
        randn(*shape, dtype=dtype, seed=seed, strided=strided),
        randn(*shape, dtype=dtype, seed=seed + 1, strided=strided) if residual else None,
        randn(width, dtype=dtype, seed=seed + 2),
        randn(width, dtype=dtype, seed=seed + 3) if bias else None,
    )


def check(call, *, return_sum=False, eps=1e-5, **options):
    x = call[0]
    pulls = pulls_of([x.shape] * (1 + return_sum), x.dtype)
    return check_gradients("add_layer_norm", call, pulls, eps=eps, return_sum=return_sum, **options)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("return_sum", [True, False])
def test_each_form(dtype, residual, return_sum):
    for shape, p in (((9, 100), 0.3), ((3, 768), 0.0)):
        call = inputs(shape, dtype, residual=residual, bias=p > 0)
        check(call, return_sum=return_sum, dropout_p=p, seed=SEED)


@pytest.mark.parametrize("E", [1, 2, 31, 33, 129, 257, 1025, 2047, 2049, 4096])
def test_awkward_widths(E):
    check(inputs((3, E), torch.float16), dropout_p=0.1, seed=5)


@pytest.mark.parametrize("rows", [*awkward_sizes(4), 70])
def test_more_rows_than_programs_and_fewer(rows):
    check(inputs((rows, 60), torch.float32), return_sum=True)


@examples(30)
@given(
    leading=st.lists(st.integers(0, 5), max_size=3),
    E=st.integers(0, 300),
    dtype=st.sampled_from(KERNEL_DTYPES),
    residual=st.booleans(),
    bias=st.booleans(),
    return_sum=st.booleans(),
    p=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 99),
)
def test_odd_shapes_and_strides(leading, E, dtype, residual, bias, return_sum, p, seed):
    call = inputs((*leading, E), dtype, residual=residual, bias=bias, seed=seed, strided=True)
    check(call, return_sum=return_sum, dropout_p=p, seed=seed)


@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_dropout_has_the_written_bits(p, dtype):
    x, residual, weight, bias = inputs((70, 130), dtype)
    x[3, 7] = torch.nan if not keep_rows(SEED, 70, 130, p)[3, 7] else 1.0
    options = {"eps": 1e-5, "dropout_p": p, "seed": SEED, "return_sum": True}
    _, total = ops.add_layer_norm(x, None, weight, bias, backend="triton", **options)
    keep = keep_rows(SEED, 70, 130, p)
    assert total[~keep].eq(0).all(), "something was kept that the bits drop"
    assert total[keep].ne(0).all()
    for with_residual in (None, residual):
        tensors = (x, with_residual, weight, bias)
        actual = ops.add_layer_norm(*tensors, backend="triton", **options)
        doubles = [None if t is None else t.double() for t in tensors]
        oracle = reference.add_layer_norm(*doubles, **options)
        baseline = reference.add_layer_norm(*tensors, **options)
        for a, o, b in zip(actual, oracle, baseline, strict=True):
            assert_accurate(a, o, b)


def test_rows_past_2_to_the_32_have_bits_of_their_own():
    """The row's high word is part of the counter; only its arithmetic is tried: no such tensor."""
    rows = torch.tensor([0, 2**32, 2**33 + 1])
    first, second, third = keep_rows(SEED, rows, 64, 0.5)
    assert not first.equal(second)
    assert not second.equal(third)


def test_the_same_bits_on_the_portable_backend_and_here():
    x, residual, weight, bias = inputs((33, 77), torch.float32)
    options = {"dropout_p": 0.2, "seed": 11, "return_sum": True}
    sums = [
        ops.add_layer_norm(x, residual, weight, bias, backend=b, **options)[1]
        for b in ("triton", "torch")
    ]
    assert_bitwise(sums[0] == residual, sums[1] == residual)


def test_float32_weights_beside_half_rows():
    x, residual, _, _ = inputs((9, 200), torch.bfloat16)
    _, _, weight, bias = inputs((9, 200), torch.float32)
    check((x, residual, weight, bias), dropout_p=0.2, seed=3)


def test_bitwise_again_and_a_row_alone():
    call = inputs((70, 300), torch.float16)
    pull = randn(70, 300, dtype=torch.float16, seed=50)
    first = gradients(ops.add_layer_norm, call, [pull], backend="triton")
    for mine, again in zip(
        first, gradients(ops.add_layer_norm, call, [pull], backend="triton"), strict=True
    ):
        assert_bitwise(mine, again)
    for row in (0, 41, 69):
        alone = (call[0][row : row + 1], call[1][row : row + 1], *call[2:])
        made = gradients(ops.add_layer_norm, alone, [pull[row : row + 1]], backend="triton")
        assert_bitwise(made[0][0], first[0][row])


def test_gradients_share_no_memory():
    """A compiler may write over one of an operator's results while it needs another."""
    x, residual = (randn(3, 16, seed=i).requires_grad_() for i in (0, 1))
    y = ops.add_layer_norm(x, residual, torch.ones(16), None, backend="triton")
    dx, dresidual = torch.autograd.grad(y, (x, residual), randn(3, 16, seed=2))
    assert_bitwise(dx, dresidual)
    assert dx.data_ptr() != dresidual.data_ptr()


def test_nothing_outside_the_inputs_is_used():
    call = inputs((7, 130), torch.float16)
    fenced = [banded_copy(x) for x in call]
    pull = banded_copy(randn(7, 130, dtype=torch.float16, seed=50))
    made = gradients(ops.add_layer_norm, [f.view for f in fenced], [pull.view], backend="triton")
    for fence in (*fenced, pull):
        fence.check()
    expected = gradients(ops.add_layer_norm, call, [pull.view.clone()], backend="triton")
    for mine, theirs in zip(made, expected, strict=True):
        assert_bitwise(mine, theirs)


def test_rows_too_wide_for_a_gradient_go_on_to_torch():
    x = torch.ones(2, 4097, requires_grad=True)
    weight = torch.ones(4097)
    told = ops.explain("add_layer_norm", x, None, weight, None)
    assert "4097 columns and their gradients" in told.refusals["triton"]
    with torch.no_grad():
        assert "triton" not in ops.explain("add_layer_norm", x, None, weight, None).refusals


def test_every_width_has_a_config_that_covers_it():
    for width in range(1, forward.MAX_GRADIENT_WIDTH + 1):
        config = kernels.pick_config(90, width)
        assert config.chunk * config.chunks >= width > config.chunk * (config.chunks - 1)
