"""`ops.gelu_ffn` on torch and reference: the definition, its fine print, dropout, gradients."""

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
FORMS = ("none", "tanh")


def inputs(leading=(5,), E=7, F=12, dtype=torch.float32, seed=0, strided=False):
    shapes = [(*leading, E), (F, E), (F,), (E, F), (E,)]
    return [
        randn(*shape, dtype=dtype, seed=seed + i, strided=strided) for i, shape in enumerate(shapes)
    ]


def oracle_and_baseline(tensors, **kwargs):
    doubles = [None if t is None else t.double() for t in tensors]
    return reference.gelu_ffn(*doubles, **kwargs), reference.gelu_ffn(*tensors, **kwargs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("approximate", FORMS)
def test_the_definition_by_hand(approximate, backend):
    x, w_in, b_in, w_out, b_out = (t.double() for t in inputs())
    y = ops.gelu_ffn(x, w_in, b_in, w_out, b_out, approximate=approximate, backend=backend)
    root = math.sqrt(2 / math.pi)
    for i in range(5):
        hidden = []
        for f in range(12):
            z = float(x[i] @ w_in[f] + b_in[f])
            cdf = 0.5 * math.erfc(-z / math.sqrt(2))
            if approximate == "tanh":
                cdf = 0.5 * (1 + math.tanh(root * (z + 0.044715 * z**3)))
            hidden.append(z * cdf)
        for e in range(7):
            expected = float(b_out[e]) + sum(float(w_out[e, f]) * hidden[f] for f in range(12))
            assert float(y[i, e]) == pytest.approx(expected, rel=1e-11, abs=1e-12)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("approximate", FORMS)
def test_torch_is_accurate(dtype, approximate):
    tensors = inputs((40,), 64, 256, dtype)
    y = ops.gelu_ffn(*tensors, approximate=approximate, backend="torch")
    assert_accurate(y, *oracle_and_baseline(tensors, approximate=approximate))


@given(
    leading=st.lists(st.integers(0, 4), max_size=3),
    E=st.integers(0, 12),
    F=st.integers(0, 20),
    dtype=st.sampled_from(ALL_DTYPES),
    biases=st.tuples(st.booleans(), st.booleans()),
    approximate=st.sampled_from(FORMS),
    seed=st.integers(0, 99),
)
def test_odd_shapes_and_strides(leading, E, F, dtype, biases, approximate, seed):
    tensors = inputs(leading, E, F, dtype, seed, strided=True)
    for place, given_bias in zip((2, 4), biases, strict=True):
        tensors[place] = tensors[place] if given_bias else None
    y = ops.gelu_ffn(*tensors, approximate=approximate)
    assert y.shape == (*leading, E)
    assert y.is_contiguous()
    assert_accurate(y, *oracle_and_baseline(tensors, approximate=approximate))


def test_the_output_may_have_another_width():
    x, w_in, b_in, w_out, b_out = inputs()
    y = ops.gelu_ffn(x, w_in, b_in, w_out[:3], b_out[:3])
    torch.testing.assert_close(y, ops.gelu_ffn(x, w_in, b_in, w_out, b_out)[:, :3])


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_weights_beside_half_inputs(dtype, backend):
    x, *weights = inputs()
    mixed = ops.gelu_ffn(x.to(dtype), *weights, backend=backend)
    halves = [t.to(dtype) for t in (x, *weights)]
    assert_bitwise(mixed, ops.gelu_ffn(*halves, backend=backend))


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_dropout_falls_on_the_output_with_one_mask_for_all(dtype):
    tensors = inputs((3, 50), 21, 9, dtype)
    plain = ops.gelu_ffn(*tensors, backend="reference")
    keep = keep_rows(99, 150, 21, 0.3).view(3, 50, 21)
    for backend in BACKENDS:
        for seed in (99, torch.tensor(99)):
            y = ops.gelu_ffn(*tensors, dropout_p=0.3, seed=seed, backend=backend)
            assert torch.equal(y != 0, keep & (plain != 0))
            oracle = oracle_and_baseline(tensors, dropout_p=0.3, seed=99)
            assert_accurate(y, *oracle)
    flat = [tensors[0].flatten(0, 1), *tensors[1:]]
    rows = ops.gelu_ffn(*flat, dropout_p=0.3, seed=99)
    assert_bitwise(rows.view(3, 50, 21) != 0, y != 0)


def test_dropout_of_everything_is_zero_and_seeds_are_drawn_from_torch():
    tensors = inputs((40,))
    assert not ops.gelu_ffn(*tensors, dropout_p=1.0).any()
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(ops.gelu_ffn(*tensors, dropout_p=0.5))
    assert_bitwise(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kwargs", [{}, {"approximate": "tanh", "dropout_p": 0.4, "seed": 3}])
def test_gradients(kwargs, backend):
    leaves = tuple(t.requires_grad_() for t in inputs(dtype=torch.float64))
    function = lambda *t: ops.gelu_ffn(*t, backend=backend, **kwargs)  # noqa: E731
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradcheck(function, (leaves[0].detach()[0].requires_grad_(), *leaves[1:]))


def test_backward_drops_what_forward_dropped():
    x, *weights = inputs((200,))
    weights[-1].requires_grad_()
    y = ops.gelu_ffn(x, *weights, dropout_p=0.5)  # a drawn seed must be kept for the backward pass
    (gradient,) = torch.autograd.grad(y.sum(), weights[-1])
    torch.testing.assert_close(gradient, 2.0 * (y != 0).sum(0))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.tensor(1.0)}, ValueError, "x must be"),
        ({"x": torch.ones(5, 8)}, ValueError, "w_in must be"),
        ({"w_in": None}, TypeError, "w_in must be a tensor"),
        ({"w_in": torch.ones(12, 7).double()}, TypeError, "w_in is torch.float64"),
        ({"w_out": torch.ones(7, 11)}, ValueError, "w_out must be"),
        ({"w_out": torch.ones(7, 12, device="meta")}, ValueError, "w_out is on meta"),
        ({"b_in": torch.ones(7)}, ValueError, "b_in must be"),
        ({"b_out": torch.ones(12)}, ValueError, "b_out must be"),
        ({"b_out": torch.ones(7).half()}, TypeError, "b_out is torch.float16"),
        ({"approximate": None}, ValueError, "approximate must be"),
        ({"dropout_p": 1.5}, ValueError, "dropout_p must"),
        ({"dropout_p": math.nan}, ValueError, "dropout_p must"),
        ({"dropout_p": 0.5, "seed": 2**64}, ValueError, "seed must fit"),
        ({"backend": "numpy"}, ValueError, "unknown backend"),
    ],
)
def test_refusals_by_name(change, error, message):
    call = dict(zip(("x", "w_in", "b_in", "w_out", "b_out"), inputs(), strict=True)) | change
    with pytest.raises(error, match=message):
        ops.gelu_ffn(**call)


def test_registration():
    op = OPS["gelu_ffn"]
    tensors = [t.requires_grad_() for t in inputs()]
    for leaves, kwargs in (
        (tensors, {"dropout_p": 0.5, "seed": 3}),
        ((*tensors[:2], None, tensors[3], None), {"approximate": "tanh", "backend": "reference"}),
    ):
        call = op.check(*leaves, **kwargs)
        results = torch.library.opcheck(op.overload, tuple(call[f] for f in op.fields))
        assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_break(dynamic):
    def function(*tensors):
        return ops.gelu_ffn(*tensors, dropout_p=0.5, seed=7) * 2

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (5, 9):
        x, *weights = inputs((rows,))
        x.requires_grad_()
        assert_bitwise(compiled(x, *weights), function(x, *weights))
        (gradient,) = torch.autograd.grad(compiled(x, *weights).sum(), x)
        assert_bitwise(gradient, torch.autograd.grad(function(x, *weights).sum(), x)[0])


def test_autocast_flops_and_explain():
    tensors = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ops.gelu_ffn(*tensors)
    assert_bitwise(y, ops.gelu_ffn(*(t.bfloat16() for t in tensors)))
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        ops.gelu_ffn(*tensors)
    assert counter.get_total_flops() == 2 * 2 * 5 * 7 * 12
    answer = ops.explain(ops.gelu_ffn, *tensors, dropout_p=0.5)
    assert answer.backend == "torch"
    assert "on the CPU" in answer.refusals["triton"] or "installed" in answer.refusals["triton"]


@pytest.mark.parametrize("wanted", [(0, 1, 2, 3, 4), (0,), (1,), (2,), (3,), (4,)])
def test_flops_of_the_gradient_are_autograds_and_the_first_product_again(wanted):
    def backward_flops(function):
        leaves = [t.requires_grad_(i in wanted) for i, t in enumerate(inputs())]
        y = function(*leaves)
        with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
            y.sum().backward()
        return counter.get_total_flops()

    again = 0 if wanted == (4,) else 2 * 5 * 7 * 12
    assert backward_flops(ops.gelu_ffn) == backward_flops(reference.gelu_ffn) + again
