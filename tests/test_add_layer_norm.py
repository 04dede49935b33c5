"""`ops.add_layer_norm` on torch and reference: the definition, its fine print, gradients."""

import math

import pytest
import torch
from cases import ALL_DTYPES, HALF_DTYPES, randn
from hypothesis import given
from hypothesis import strategies as st
from tolerance import assert_accurate, assert_bitwise

from bertgpt import ops, reference
from bertgpt.ops._dispatch import OPS
from bertgpt.reference.philox import keep_rows

BACKENDS = ("torch", "reference")


def inputs(leading=(5,), E=7, dtype=torch.float32, seed=0, strided=False):
    shapes = [(*leading, E), (*leading, E), (E,), (E,)]
    return [
        randn(*shape, dtype=dtype, seed=seed + i, strided=strided) for i, shape in enumerate(shapes)
    ]


def oracle_and_baseline(tensors, **kwargs):
    doubles = [None if t is None else t.double() for t in tensors]
    return (
        reference.add_layer_norm(*doubles, return_sum=True, **kwargs),
        reference.add_layer_norm(*tensors, return_sum=True, **kwargs),
    )


def assert_both_accurate(actual, tensors, **kwargs):
    for got, oracle, baseline in zip(actual, *oracle_and_baseline(tensors, **kwargs), strict=True):
        assert_accurate(got, oracle, baseline)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-5, 2.0])
def test_the_definition_by_hand(eps, backend):
    x, residual, weight, bias = inputs(dtype=torch.float64)
    y, total = ops.add_layer_norm(
        x, residual, weight, bias, eps=eps, return_sum=True, backend=backend
    )
    for i in range(5):
        row = [float(x[i, j] + residual[i, j]) for j in range(7)]
        mean = sum(row) / 7
        variance = sum((s - mean) ** 2 for s in row) / 7
        for j, s in enumerate(row):
            expected = (s - mean) / math.sqrt(variance + eps) * float(weight[j]) + float(bias[j])
            assert float(y[i, j]) == pytest.approx(expected, rel=1e-11, abs=1e-12)
            assert float(total[i, j]) == s


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (1e-3, 0.0), (100.0, 100.0)])
def test_torch_is_accurate(dtype, scale, offset):
    x, residual, weight, bias = inputs((64,), 256, dtype)
    tensors = (x * scale + offset, residual * scale, weight, bias)
    both = ops.add_layer_norm(*tensors, return_sum=True, backend="torch")
    assert_both_accurate(both, tensors)


@given(
    leading=st.lists(st.integers(0, 4), max_size=3),
    E=st.integers(0, 40),
    dtype=st.sampled_from(ALL_DTYPES),
    has_residual=st.booleans(),
    has_bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_odd_shapes_and_strides(leading, E, dtype, has_residual, has_bias, seed):
    x, residual, weight, bias = inputs(leading, E, dtype, seed, strided=True)
    tensors = (x, residual if has_residual else None, weight, bias if has_bias else None)
    y, total = ops.add_layer_norm(*tensors, eps=1e-5, return_sum=True)
    assert y.is_contiguous()
    assert total.is_contiguous()
    assert_both_accurate((y, total), tensors, eps=1e-5)
    assert_bitwise(ops.add_layer_norm(*tensors, eps=1e-5), y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_stride(backend):
    x, residual, weight, bias = inputs((3, 4))
    expected = ops.add_layer_norm(x, residual[:1].expand(3, 4, 7), weight, bias)
    transposed = x.transpose(0, 2).contiguous().transpose(0, 2)
    spread = torch.stack([weight, bias], 1)
    y = ops.add_layer_norm(
        transposed, residual[:1].expand(3, 4, 7), spread[:, 0], spread[:, 1], backend=backend
    )
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_sum_is_the_callers_own(backend):
    x, _, weight, bias = inputs()
    before = x.clone()
    _, total = ops.add_layer_norm(x, None, weight, bias, return_sum=True, backend=backend)
    assert_bitwise(total, x)
    total.zero_()
    assert_bitwise(x, before)


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@pytest.mark.parametrize("half_bias", [False, True])
def test_float32_weights_beside_half_inputs(dtype, half_bias):
    x, residual, _, _ = inputs((40,), 64, dtype)
    _, _, weight, bias = inputs((40,), 64)
    bias = bias.to(dtype) if half_bias else bias
    both = ops.add_layer_norm(x, residual, weight, bias, return_sum=True)
    assert both[0].dtype == dtype
    assert_both_accurate(both, (x, residual, weight, bias))


@pytest.mark.parametrize("backend", BACKENDS)
def test_constant_rows_and_nan(backend):
    x, residual, weight, bias = inputs()
    x[1], residual[1] = 3.0, -1.0
    x[2, 4], residual[3, 0] = math.nan, math.inf
    y = ops.add_layer_norm(x, residual, weight, bias, backend=backend)
    assert_bitwise(y[1], bias)
    assert y[2:4].isnan().all()
    assert y[[0, 1, 4]].isfinite().all()


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_dropout_falls_on_x_with_one_mask_for_all(dtype):
    x, residual, weight, bias = inputs((3, 50), 21, dtype)
    keep = keep_rows(99, 150, 21, 0.3).view(3, 50, 21)
    for backend in BACKENDS:
        for seed in (99, torch.tensor(99)):
            both = ops.add_layer_norm(
                x,
                residual,
                weight,
                bias,
                dropout_p=0.3,
                seed=seed,
                return_sum=True,
                backend=backend,
            )
            dropped = torch.where(keep, x * (1 / 0.7), 0.0)
            assert_bitwise(both[1], dropped + residual)
            tensors = (x, residual, weight, bias)
            assert_both_accurate(both, tensors, dropout_p=0.3, seed=99)
    y = ops.add_layer_norm(x, residual, weight, bias, dropout_p=0.3, seed=99)
    flat = ops.add_layer_norm(
        x.view(150, 21), residual.view(150, 21), weight, bias, dropout_p=0.3, seed=99
    )
    assert_bitwise(flat, y.view(150, 21))


def test_dropout_of_everything_leaves_the_residual_and_seeds_are_drawn_from_torch():
    x, residual, weight, bias = inputs((40,))
    y = ops.add_layer_norm(x, residual, weight, bias, dropout_p=1.0)
    assert_bitwise(y, ops.add_layer_norm(torch.zeros_like(x), residual, weight, bias))
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(ops.add_layer_norm(x, residual, weight, bias, dropout_p=0.5))
    assert_bitwise(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kwargs", [{}, {"dropout_p": 0.4, "seed": 3}], ids=str)
@pytest.mark.parametrize("return_sum", [False, True])
def test_gradients(kwargs, return_sum, backend):
    leaves = tuple(t.requires_grad_() for t in inputs(dtype=torch.float64))
    kwargs = {**kwargs, "eps": 1e-5, "return_sum": return_sum, "backend": backend}
    assert torch.autograd.gradcheck(lambda *t: ops.add_layer_norm(*t, **kwargs), leaves)
    x, _, weight, _ = leaves
    function = lambda x, weight: ops.add_layer_norm(x, None, weight, None, **kwargs)  # noqa: E731
    assert torch.autograd.gradcheck(function, (x, weight))


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_low_precision_gradients(dtype):
    upstream = randn(30, 64, dtype=dtype, seed=9)

    def gradients(function, tensors):
        leaves = [t.clone().requires_grad_() for t in tensors]
        return torch.autograd.grad(function(*leaves), leaves, upstream.to(leaves[0].dtype))

    tensors = inputs((30,), 64, dtype)
    oracle = gradients(reference.add_layer_norm, [t.double() for t in tensors])
    baseline = gradients(reference.add_layer_norm, tensors)
    actual = gradients(ops.add_layer_norm, tensors)
    for got, true, low in zip(actual, oracle, baseline, strict=True):
        assert_accurate(got, true, low, factor=3.0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.tensor(1.0)}, ValueError, "x must be"),
        ({"x": torch.ones(5, 7).long()}, TypeError, "x must be float16"),
        ({"residual": torch.ones(4, 7)}, ValueError, "residual must be"),
        ({"residual": torch.ones(1, 7)}, ValueError, "residual must be"),
        ({"residual": torch.ones(5, 7).half()}, TypeError, "residual is torch.float16"),
        ({"x": torch.ones(5, 7).half()}, TypeError, "residual is torch.float32"),
        ({"residual": torch.ones(5, 7, device="meta")}, ValueError, "residual is on meta"),
        ({"weight": None}, TypeError, "weight must be a tensor"),
        ({"weight": torch.ones(6)}, ValueError, "weight must be"),
        ({"weight": torch.ones(1, 7)}, ValueError, "weight must have 1 dimensions"),
        ({"weight": torch.ones(7).half()}, TypeError, "weight is torch.float16"),
        ({"weight": torch.ones(7).double()}, TypeError, "weight is torch.float64"),
        ({"bias": torch.ones(8)}, ValueError, "bias must be"),
        ({"bias": torch.ones(7).bfloat16()}, TypeError, "bias is torch.bfloat16"),
        ({"eps": -1e-5}, ValueError, "eps must"),
        ({"eps": math.nan}, ValueError, "eps must"),
        ({"dropout_p": -0.1}, ValueError, "dropout_p must lie"),
        ({"backend": "numpy"}, ValueError, "unknown backend"),
    ],
)
def test_refusals_by_name(change, error, message):
    call = dict(zip(("x", "residual", "weight", "bias"), inputs(), strict=True)) | change
    with pytest.raises(error, match=message):
        ops.add_layer_norm(**call)


def test_registration():
    op = OPS["add_layer_norm"]
    x, residual, weight, bias = (t.requires_grad_() for t in inputs())
    for leaves, kwargs in (
        ((x, residual, weight, bias), {"dropout_p": 0.5, "seed": 3, "return_sum": True}),
        ((x, None, weight, None), {"return_sum": True}),
        ((x.detach().t().contiguous().t(), residual, weight, bias), {"backend": "reference"}),
    ):
        call = op.check(*leaves, **kwargs)
        results = torch.library.opcheck(op.overload, tuple(call[f] for f in op.fields))
        assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_break(dynamic):
    def function(x, residual, weight, bias):
        y, total = ops.add_layer_norm(x, residual, weight, bias, return_sum=True)
        return y * 2 + total

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (5, 9):
        x, *rest = inputs((rows,))
        x.requires_grad_()
        assert_bitwise(compiled(x, *rest), function(x, *rest))
        (gradient,) = torch.autograd.grad(compiled(x, *rest).sum(), x)
        assert_bitwise(gradient, torch.autograd.grad(function(x, *rest).sum(), x)[0])


def test_autocast_takes_a_float32_residual_and_keeps_float32_weights():
    x, residual, weight, bias = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ops.add_layer_norm(x.bfloat16(), residual, weight, bias)
    assert_bitwise(y, ops.add_layer_norm(x.bfloat16(), residual.bfloat16(), weight, bias))
