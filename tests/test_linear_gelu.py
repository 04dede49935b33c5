"""`ops.linear_gelu` on torch and reference: the definition, its fine print, gradients."""

import math

import pytest
import torch
from cases import ALL_DTYPES, HALF_DTYPES, randn
from hypothesis import given
from hypothesis import strategies as st
from tolerance import assert_accurate, assert_bitwise

from bertgpt import ops, reference
from bertgpt.ops._dispatch import OPS

BACKENDS = ("torch", "reference")
FORMS = ("none", "tanh")


def inputs(M=5, K=7, N=6, dtype=torch.float32, seed=0):
    return tuple(
        randn(*shape, dtype=dtype, seed=seed + i) for i, shape in enumerate([(M, K), (N, K), (N,)])
    )


def by_hand(z, approximate):
    if approximate == "none":
        return z * 0.5 * math.erfc(-z / math.sqrt(2))
    return 0.5 * z * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def oracle_and_baseline(x, w, b, approximate="none"):
    doubles = (None if t is None else t.double() for t in (x, w, b))
    return (
        reference.linear_gelu(*doubles, approximate=approximate),
        reference.linear_gelu(x, w, b, approximate=approximate),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("approximate", FORMS)
@pytest.mark.parametrize("has_bias", [True, False])
def test_the_definition_by_hand(approximate, has_bias, backend):
    x, w, b = inputs(dtype=torch.float64)
    b = b if has_bias else None
    y = ops.linear_gelu(x, w, b, approximate=approximate, backend=backend)
    for i in range(5):
        for j in range(6):
            z = sum(float(x[i, k] * w[j, k]) for k in range(7)) + (float(b[j]) if has_bias else 0)
            assert float(y[i, j]) == pytest.approx(by_hand(z, approximate), rel=1e-11, abs=1e-13)


def test_the_two_forms_differ():
    x, w, b = inputs(dtype=torch.float64)
    forms = [ops.linear_gelu(x, w, b, approximate=form) for form in FORMS]
    assert 1e-5 < float((forms[0] - forms[1]).abs().max()) < 1e-2


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("approximate", FORMS)
@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_torch_is_accurate(dtype, approximate, scale):
    x, w, b = inputs(40, 96, 50, dtype)
    x = x * scale
    y = ops.linear_gelu(x, w, b, approximate=approximate, backend="torch")
    assert_accurate(y, *oracle_and_baseline(x, w, b, approximate))


@given(
    leading=st.lists(st.integers(0, 4), max_size=3),
    K=st.integers(0, 20),
    N=st.integers(0, 20),
    dtype=st.sampled_from(ALL_DTYPES),
    has_bias=st.booleans(),
    approximate=st.sampled_from(FORMS),
    seed=st.integers(0, 99),
)
def test_odd_shapes_and_strides(leading, K, N, dtype, has_bias, approximate, seed):
    x = randn(*leading, K, dtype=dtype, seed=seed, strided=True)
    w = randn(N, K, dtype=dtype, seed=seed + 1, strided=True)
    b = randn(N, dtype=dtype, seed=seed + 2) if has_bias else None
    y = ops.linear_gelu(x, w, b, approximate=approximate)
    assert y.shape == (*leading, N)
    assert y.is_contiguous()
    # torch's vectorised erf is off by some 1e-6 on some CPUs, which shows in a row of one element.
    z = torch.nn.functional.linear(x.double(), w.double(), None if b is None else b.double())
    assert_accurate(y, *oracle_and_baseline(x, w, b, approximate), terms=z)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_last_stride(backend):
    x, w, b = inputs()
    b2 = torch.stack([b, b], 1)[:, 0]
    y = ops.linear_gelu(x.t().contiguous().t(), w.t().contiguous().t(), b2, backend=backend)
    torch.testing.assert_close(y, ops.linear_gelu(x, w, b))


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_weights_beside_half_inputs(dtype, backend):
    x, _, _ = inputs(dtype=dtype)
    _, w, b = inputs()
    mixed = ops.linear_gelu(x, w, b, backend=backend)
    assert_bitwise(mixed, ops.linear_gelu(x, w.to(dtype), b.to(dtype), backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("approximate", FORMS)
def test_large_and_infinite_pre_activations(dtype, approximate, backend):
    largest = torch.finfo(dtype).max
    special = [largest, -largest, math.inf, 1e4, -1e4, 0.0, -0.0, math.nan]
    z = torch.tensor(special * 6, dtype=torch.float64)  # enough for torch's vectorised path
    y = ops.linear_gelu(
        torch.ones(1, 1, dtype=dtype),
        torch.zeros(48, 1, dtype=dtype),
        z.to(dtype),
        approximate=approximate,
        backend=backend,
    )[0]
    assert torch.equal(y[2::8], torch.full((6,), math.inf, dtype=dtype))
    assert torch.equal(y[3::8], z[3::8].to(dtype))
    assert not y[[1, 4, 5, 6]].any()
    assert y[7::8].isnan().all()
    assert not (y[:7].isnan()).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_row_or_column(backend):
    x, w, b = inputs()
    x[2, 3] = math.nan
    w[4, 1] = math.nan
    bad = ops.linear_gelu(x, w, b, backend=backend).isnan()
    expected = torch.zeros(5, 6, dtype=torch.bool)
    expected[2], expected[:, 4] = True, True
    assert torch.equal(bad, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("approximate", FORMS)
def test_gradients(approximate, backend):
    leaves = tuple(t.requires_grad_() for t in inputs(dtype=torch.float64))
    function = lambda *t: ops.linear_gelu(*t, approximate=approximate, backend=backend)  # noqa: E731
    assert torch.autograd.gradcheck(function, leaves)
    x, w, _ = leaves
    assert torch.autograd.gradcheck(lambda w: function(x.detach(), w, None), (w,))
    assert torch.autograd.gradcheck(function, (leaves[0].detach()[0].requires_grad_(), *leaves[1:]))


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_low_precision_gradients(dtype):
    def gradients(function, tensors):
        leaves = [t.clone().requires_grad_() for t in tensors]
        return torch.autograd.grad(function(*leaves).sum(), leaves)

    tensors = inputs(20, 30, 25, dtype)
    oracle = gradients(reference.linear_gelu, [t.double() for t in tensors])
    baseline = gradients(reference.linear_gelu, tensors)
    for actual, true, low in zip(
        gradients(ops.linear_gelu, tensors), oracle, baseline, strict=True
    ):
        assert_accurate(actual, true, low, factor=3.0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.tensor(1.0)}, ValueError, "x must be"),
        ({"x": [1.0]}, TypeError, "x must be a tensor"),
        ({"x": torch.ones(5, 7, dtype=torch.int64)}, TypeError, "x must be float16"),
        ({"x": torch.ones(5, 8)}, ValueError, "w must be"),
        ({"w": None}, TypeError, "w must be a tensor"),
        ({"w": torch.ones(7)}, ValueError, "w must have 2 dimensions"),
        ({"w": torch.ones(6, 7).half()}, TypeError, "w is torch.float16"),
        ({"b": torch.ones(5)}, ValueError, "b must be"),
        ({"b": torch.ones(6, 1)}, ValueError, "b must have 1 dimensions"),
        ({"b": torch.ones(6).half()}, TypeError, "b is torch.float16"),
        ({"b": torch.ones(6, device="meta")}, ValueError, "b is on meta"),
        ({"approximate": "erf"}, ValueError, "approximate must be"),
        ({"backend": "numpy"}, ValueError, "unknown backend"),
        ({"backend": "cuda"}, ops.BackendUnavailable, "'cuda' refuses"),
        ({"backend": "triton"}, ops.BackendUnavailable, "CPU|not installed"),
    ],
)
def test_refusals_by_name(change, error, message):
    x, w, b = inputs()
    call = {"x": x, "w": w, "b": b, **change}
    with pytest.raises(error, match=message):
        ops.linear_gelu(call.pop("x"), call.pop("w"), call.pop("b"), **call)


def test_registration():
    op = OPS["linear_gelu"]
    for tensors, approximate in ((inputs(), "none"), ((*inputs()[:2], None), "tanh")):
        leaves = [None if t is None else t.requires_grad_() for t in tensors]
        call = op.check(*leaves, approximate=approximate)
        results = torch.library.opcheck(op.overload, tuple(call[f] for f in op.fields))
        assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_break(dynamic):
    def function(x, w, b):
        return ops.linear_gelu(x, w, b) * 2

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (5, 9):
        x, w, b = inputs(rows)
        x.requires_grad_()
        assert_bitwise(compiled(x, w, b), function(x, w, b))
        (gradient,) = torch.autograd.grad(compiled(x, w, b).sum(), x)
        assert_bitwise(gradient, torch.autograd.grad(function(x, w, b).sum(), x)[0])


def test_autocast_and_flops():
    x, w, b = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ops.linear_gelu(x, w, b)
    assert_bitwise(y, ops.linear_gelu(x.bfloat16(), w.bfloat16(), b.bfloat16()))
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        ops.linear_gelu(x.expand(3, 5, 7), w, b)
    assert counter.get_total_flops() == 2 * 15 * 7 * 6


@pytest.mark.parametrize("wanted", [(0, 1, 2), (0,), (1,), (2,)])
def test_flops_of_the_gradient_are_autograds_and_the_product_again(wanted):
    def backward_flops(function):
        leaves = [t.requires_grad_(i in wanted) for i, t in enumerate(inputs())]
        y = function(*leaves)
        with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
            y.sum().backward()
        return counter.get_total_flops()

    again = 2 * 5 * 7 * 6
    assert backward_flops(ops.linear_gelu) == backward_flops(reference.linear_gelu) + again


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_any_bias_stride(backend):
    x, w, b = inputs()
    for odd in (b.repeat_interleave(2)[::2], b[:1].expand(b.shape)):
        expected = ops.linear_gelu(x, w, odd.clone(), backend=backend)
        # Another stride may take another of torch's GELUs, but no other element.
        torch.testing.assert_close(ops.linear_gelu(x, w, odd, backend=backend), expected)
