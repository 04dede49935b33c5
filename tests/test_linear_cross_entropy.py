"""`ops.linear_cross_entropy` on torch and reference: the definition, its fine print, gradients."""

import math

import pytest
import torch
import torch.nn.functional as F
from cases import ALL_DTYPES, HALF_DTYPES, awkward_sizes, examples
from hypothesis import given
from hypothesis import strategies as st
from loss_cases import IGNORE, assert_small_gradients_survive, check, inputs, results
from tolerance import assert_bitwise

from bertgpt import ops
from bertgpt.ops._dispatch import OPS
from bertgpt.portable import linear_cross_entropy as portable

BACKENDS = ("torch", "reference")
REDUCTIONS = ("mean", "sum", "none")


@pytest.fixture
def small_tiles(monkeypatch):
    """The torch backend in tiles of 16 rows and 32 tokens."""
    monkeypatch.setattr(portable, "_ROWS", 16)
    monkeypatch.setattr(portable, "_COLUMNS", 32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_definition_by_hand(backend):
    hidden, weight, bias, labels = inputs(5, 4, 3, torch.float64, ignored=0.0)
    labels[2] = IGNORE
    losses = ops.linear_cross_entropy(
        hidden, weight, bias, labels, reduction="none", backend=backend
    )
    expected = []
    for t in range(5):
        z = [float(hidden[t] @ weight[v] + bias[v]) for v in range(4)]
        total = sum(math.exp(x) for x in z)
        expected.append(0.0 if t == 2 else -math.log(math.exp(z[labels[t]]) / total))
    assert losses.tolist() == pytest.approx(expected, rel=1e-12)
    call = hidden, weight, bias, labels
    total = ops.linear_cross_entropy(*call, reduction="sum", backend=backend)
    assert float(total) == pytest.approx(sum(expected), rel=1e-12)
    mean = ops.linear_cross_entropy(*call, backend=backend)
    assert float(mean) == pytest.approx(sum(expected) / 4, rel=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_it_is_torchs_cross_entropy(reduction, backend):
    hidden, weight, bias, labels = inputs(12, 9, 5, torch.float64, ignored=0.0)
    labels[::4] = 3
    call = hidden, weight, bias, labels
    options = {"ignore_index": 3, "reduction": reduction}
    actual = results(ops.linear_cross_entropy, call, backend=backend, **options)
    expected = results(
        lambda h, w, b, y, **kw: F.cross_entropy(F.linear(h, w, b), y, **kw), call, **options
    )
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want)


@examples(60)
@given(
    T=st.integers(0, 40),
    V=st.integers(1, 70),
    E=st.integers(0, 20),
    dtype=st.sampled_from(ALL_DTYPES),
    bias=st.booleans(),
    ruled_out=st.booleans(),
    ignored=st.sampled_from([0.0, 0.4, 1.0]),
    reduction=st.sampled_from(REDUCTIONS),
    seed=st.integers(0, 99),
)
def test_odd_shapes_and_strides(T, V, E, dtype, bias, ruled_out, ignored, reduction, seed):
    call = inputs(
        T, V, E, dtype, seed=seed, ignored=ignored, strided=True, bias=bias, ruled_out=ruled_out
    )
    check(call, "torch", reduction=reduction)


@pytest.mark.parametrize("T", awkward_sizes(16))
@pytest.mark.parametrize("V", awkward_sizes(32))
@pytest.mark.usefixtures("small_tiles")
def test_awkward_numbers_of_tiles(T, V):
    check(inputs(T, V, 7, torch.bfloat16), "torch")
    check(inputs(T, V, 7), "torch", reduction="none")


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_leading_dimensions_and_dtypes(dtype, backend):
    hidden, weight, bias, labels = inputs(12, 9, 5, dtype)
    flat = check((hidden, weight, bias, labels), backend, reduction="none")
    shaped = (hidden.view(3, 1, 4, 5), weight, bias, labels.view(3, 1, 4).int())
    losses = ops.linear_cross_entropy(*shaped, reduction="none", backend=backend)
    assert losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_bitwise(losses, flat[0].view(3, 1, 4))
    one = ops.linear_cross_entropy(hidden[-1], weight, bias, torch.tensor(4), backend=backend)
    assert one.shape == ()
    transposed = labels.view(3, 4).t(), hidden.view(3, 4, 5).transpose(0, 1)
    turned = ops.linear_cross_entropy(
        transposed[1], weight, bias, transposed[0], reduction="none", backend=backend
    )
    assert turned.is_contiguous()
    torch.testing.assert_close(turned.t(), flat[0].view(3, 4))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("T", "V"), [(6, 5), (0, 5), (6, 0), (0, 0)])
def test_nothing_to_average_gives_zero(T, V, reduction, backend):
    call = inputs(T, V, 3, ignored=1.0)
    for tensor in results(ops.linear_cross_entropy, call, reduction=reduction, backend=backend):
        assert not tensor.count_nonzero()  # NaN would count


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_ignored_rows_hold_changes_nothing(backend):
    hidden, weight, bias, labels = inputs(20, 9, 5)
    poisoned = results(ops.linear_cross_entropy, (hidden, weight, bias, labels), backend=backend)
    assert hidden.isnan().any()
    clean = hidden.nan_to_num(3.0), weight, bias, labels
    for a, b in zip(
        poisoned, results(ops.linear_cross_entropy, clean, backend=backend), strict=True
    ):
        assert_bitwise(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bias_of_minus_infinity_rules_a_token_out(backend):
    hidden, weight, bias, labels = inputs(8, 6, 5, torch.float64, ignored=0.0, ruled_out=True)
    call = hidden, weight, bias, labels
    _, _, grad_weight, grad_bias = results(ops.linear_cross_entropy, call, backend=backend)
    assert not grad_weight[0].any()
    assert float(grad_bias[0]) == 0.0
    without = hidden, weight[1:], bias[1:], labels - 1
    expected = ops.linear_cross_entropy(*without, backend=backend)
    torch.testing.assert_close(ops.linear_cross_entropy(*call, backend=backend), expected)
    labels[3] = 0
    losses = ops.linear_cross_entropy(*call, reduction="none", backend=backend)
    assert losses.isposinf().tolist() == [t == 3 for t in range(8)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_far_from_zero(backend):
    hidden, weight, bias, labels = inputs(8, 600, 5, ignored=0.0)
    for shift in (1e4, -1e4):
        check((hidden, weight, bias + shift, labels), backend)
    check((hidden * 300, weight, bias, labels), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_float32_weights_beside_half_inputs(dtype, backend):
    hidden, weight, bias, labels = inputs(12, 40, 8)
    call = hidden.to(dtype), weight, bias, labels
    mixed = check(call, backend)
    assert [t.dtype for t in mixed] == [torch.float32, dtype, torch.float32, torch.float32]


def test_small_gradients_do_not_underflow():
    assert_small_gradients_survive("torch")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradients_in_float64(reduction, backend):
    hidden, weight, bias, labels = inputs(6, 5, 4, torch.float64)
    leaves = tuple(t.nan_to_num(0.5).requires_grad_() for t in (hidden, weight, bias))
    function = lambda *t: ops.linear_cross_entropy(  # noqa: E731
        *t, labels, reduction=reduction, backend=backend
    )
    assert torch.autograd.gradcheck(function, leaves)
    hidden, weight, _ = leaves
    frozen = lambda h: function(h, weight.detach(), None)  # noqa: E731
    assert torch.autograd.gradcheck(frozen, (hidden,))
    head = lambda w: function(hidden.detach(), w, None)  # noqa: E731
    assert torch.autograd.gradcheck(head, (weight,))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": torch.tensor(1.0)}, ValueError, "hidden must be"),
        ({"hidden": [1.0]}, TypeError, "hidden must be a tensor"),
        ({"hidden": torch.ones(4, 6)}, ValueError, "weight must be"),
        ({"weight": torch.ones(7, 5).half()}, TypeError, "weight is torch.float16"),
        ({"weight": torch.ones(5)}, ValueError, "weight must have 2 dimensions"),
        ({"bias": torch.ones(6)}, ValueError, "bias must be"),
        ({"labels": torch.ones(4)}, TypeError, "labels must be int32 or int64"),
        ({"labels": [1, 2, 3, 4]}, TypeError, "labels must be a tensor"),
        ({"labels": torch.zeros(5, dtype=torch.int64)}, ValueError, "labels must be one per row"),
        ({"labels": torch.zeros(4, 1, dtype=torch.int64)}, ValueError, "labels must have 1 dim"),
        ({"labels": torch.zeros(4, dtype=torch.int64, device="meta")}, ValueError, "labels is on"),
        ({"labels": torch.tensor([0, 7, 1, 2])}, IndexError, "holds 7.* 7 tokens.*-100"),
        ({"labels": torch.tensor([0, -1, 1, 2])}, IndexError, "holds -1"),
        ({"labels": torch.tensor([0, -100, 1, 2]), "ignore_index": 0}, IndexError, "holds -100"),
        ({"ignore_index": 0.5}, TypeError, "ignore_index must be an int"),
        ({"reduction": "max"}, ValueError, "reduction must be one of 'mean'"),
        ({"backend": "numpy"}, ValueError, "unknown backend"),
        ({"backend": "cuda"}, ops.BackendUnavailable, "'cuda' refuses"),
        ({"backend": "triton"}, ops.BackendUnavailable, "CPU|not installed"),
    ],
)
def test_refusals_by_name(change, error, message):
    hidden, weight, bias, labels = inputs(4, 7, 5, ignored=0.0)
    call = {"hidden": hidden, "weight": weight, "bias": bias, "labels": labels, **change}
    tensors = [call.pop(name) for name in ("hidden", "weight", "bias", "labels")]
    with pytest.raises(error, match=message):
        ops.linear_cross_entropy(*tensors, **call)


@pytest.mark.parametrize("has_bias", [True, False])
def test_registration(has_bias):
    op = OPS["linear_cross_entropy"]
    hidden, weight, bias, labels = inputs(6, 7, 5, bias=has_bias)
    leaves = [
        None if t is None else t.nan_to_num().requires_grad_() for t in (hidden, weight, bias)
    ]
    call = op.check(*leaves, labels)
    outcome = torch.library.opcheck(op.overload, tuple(call[f] for f in op.fields))
    assert set(outcome.values()) == {"SUCCESS"}


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_break(dynamic):
    def function(*call):
        return ops.linear_cross_entropy(*call) * 2

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (5, 9):
        call = inputs(rows, 7, 4)
        for got, want in zip(results(compiled, call), results(function, call), strict=True):
            assert_bitwise(got, want)


def test_double_use_and_checkpointing():
    hidden, weight, bias, labels = inputs(9, 7, 4)
    call = hidden, weight, bias, labels

    def twice(h, w, b, y):
        return ops.linear_cross_entropy(h, w, b, y) + ops.linear_cross_entropy(h, w, b, y)

    def again(h, w, b, y):
        return torch.utils.checkpoint.checkpoint(twice, h, w, b, y, use_reentrant=False)

    once = results(ops.linear_cross_entropy, call)
    for single, double, recomputed in zip(
        once, results(twice, call), results(again, call), strict=True
    ):
        assert_bitwise(double, 2 * single)
        assert_bitwise(recomputed, double)


def test_autocast_and_flops():
    hidden, weight, bias, labels = inputs(9, 7, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, *gradients = results(ops.linear_cross_entropy, (hidden, weight, bias, labels))
    half = hidden.bfloat16(), weight, bias, labels
    assert_bitwise(loss.detach(), ops.linear_cross_entropy(*half))
    assert [g.dtype for g in gradients] == [torch.float32] * 3
    hidden.requires_grad_()
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        loss = ops.linear_cross_entropy(hidden, weight, bias, labels)
        assert counter.get_total_flops() == 2 * 9 * 7 * 4
        loss.backward()
    assert counter.get_total_flops() == 4 * 2 * 9 * 7 * 4


def test_explain_takes_it():
    told = ops.explain(ops.linear_cross_entropy, *inputs(4, 7, 5), reduction="sum")
    assert told.backend == "torch"
    assert set(told.refusals) == {"cuda", "triton"}


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_an_ignored_index_beyond_32_bits_ignores_nothing(backend):
    hidden, weight = torch.randn(2, 4), torch.randn(3, 4)
    labels = torch.tensor([0, 1], dtype=torch.int32)
    call = {"reduction": "none", "backend": backend}
    plain = ops.linear_cross_entropy(hidden, weight, None, labels, **call)
    for far in (2**32, -(2**40)):
        losses = ops.linear_cross_entropy(hidden, weight, None, labels, ignore_index=far, **call)
        assert losses.equal(plain)
    for wrong, error in ((2**64, ValueError), (True, TypeError)):
        with pytest.raises(error, match="ignore_index"):
            ops.linear_cross_entropy(hidden, weight, None, labels, ignore_index=wrong)


def test_a_gradient_that_is_not_finite_stays_in_its_row():
    hidden = torch.randn(3, 4).requires_grad_()
    losses = ops.linear_cross_entropy(
        hidden, torch.randn(5, 4), None, torch.tensor([0, 2, 1]), reduction="none"
    )
    losses.backward(torch.tensor([1.0, float("nan"), 1.0]))
    assert hidden.grad.isfinite().all(dim=1).tolist() == [True, False, True]
