"""The gradients that the torch backend brings itself: accurate, and taken."""

import pytest
import torch
from attention_calls import check_gradients as check_attention
from cases import ALL_DTYPES, KERNEL_DTYPES, cu_seqlens, randn
from gradients import check_gradients, gradients, pulls_of
from tolerance import assert_bitwise

from bertgpt import ops
from bertgpt.ops import _autograd


@pytest.fixture
def alone(monkeypatch):
    """No forward pass may be computed again and differentiated."""

    def refuse(op, *args):
        raise AssertionError(f"{op.name} was computed again")

    monkeypatch.setattr(_autograd, "_differentiated", refuse)


def check(op, tensors, outputs, **options):
    """Gradients of random pulls on outputs of these shapes, by the rule of accuracy."""
    pulls = pulls_of([torch.Size(shape) for shape in outputs], tensors[0].dtype)
    return check_gradients(op, tensors, pulls, backend="torch", **options)


def ffn_tensors(dtype, rows=(5, 7), bias=True, strided=False):
    x = randn(*rows, 12, dtype=dtype, strided=strided)
    w_in, w_out = (randn(*s, dtype=dtype, seed=1, scale=0.3) for s in ((20, 12), (9, 20)))
    b_in, b_out = (randn(n, dtype=dtype, seed=2) if bias else None for n in (20, 9))
    return x, w_in, b_in, w_out, b_out


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize(
    ("options", "rows", "bias", "strided"),
    [
        ({}, (5, 7), True, False),
        ({"dropout_p": 0.3, "seed": 3}, (33,), True, True),
        ({}, (0,), False, False),
        ({"dropout_p": 1.0, "seed": 3}, (2, 3, 4), False, False),
    ],
    ids=["plain", "dropout", "no rows", "all dropped"],
)
def test_feed_forward(alone, dtype, approximate, options, rows, bias, strided):
    tensors = ffn_tensors(dtype, rows, bias, strided)
    options = {**options, "approximate": approximate}
    check("gelu_ffn", tensors, [(*rows, 9)], **options)
    del options["approximate"]
    check("linear_gelu", tensors[:3], [(*rows, 20)], approximate=approximate)


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.3, "seed": 3}], ids=["plain", "dropout"])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("both", [True, False])
def test_add_layer_norm(alone, dtype, options, residual, both):
    x, other = (randn(4, 5, 24, dtype=dtype, seed=s, strided=True) for s in (0, 1))
    weight, bias = (randn(24, dtype=dtype, seed=s) for s in (2, 3))
    tensors = (x, other if residual else None, weight, bias if both else None)
    outputs = [x.shape] * (2 if both else 1)
    check("add_layer_norm", tensors, outputs, return_sum=both, eps=1e-5, **options)


LENGTHS = (5, 0, 9, 5, 1, 5, 2)  # a bucket side by side, one apart, an empty sequence


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dropout", [{}, {"dropout_p": 0.3, "seed": 3}], ids=["plain", "dropout"])
def test_attention(alone, dtype, kv_heads, causal, dropout):
    options = {"causal": causal, "scale": 0.3, **dropout}
    q = randn(sum(LENGTHS), 4, 8, dtype=dtype, strided=True)
    k, v = (randn(sum(LENGTHS), kv_heads, 8, dtype=dtype, seed=s) for s in (1, 2))
    check_attention(q, k, v, backend="torch", cu_seqlens_q=cu_seqlens(LENGTHS), **options)
    dense = [t[:24].unflatten(0, (3, 8)) for t in (q, k, v)]
    check_attention(*dense, backend="torch", **options)


@pytest.mark.parametrize("dropout", [{}, {"dropout_p": 0.3, "seed": 3}], ids=["plain", "dropout"])
def test_attention_in_float64_and_to_other_keys(alone, dropout):
    q, (k, v) = randn(9, 2, 8), (randn(12, 2, 8, seed=s) for s in (1, 2))
    lengths = {"cu_seqlens_q": (3, 2, 3, 1), "cu_seqlens_k": (5, 0, 5, 2)}
    boundaries = {name: cu_seqlens(each) for name, each in lengths.items()}
    check_attention(q, k, v, backend="torch", **boundaries, **dropout)
    leaves = [t.double().requires_grad_() for t in (q, k, v)]
    assert torch.autograd.gradcheck(
        lambda *tensors: ops.attention(*tensors, **boundaries, **dropout), leaves
    )


def test_weights_under_dropout_are_bounded(alone, monkeypatch):
    """Whatever sequences share a call, a sequence's gradients are the same bits."""
    q, k, v = (randn(18, 2, 8, seed=s) for s in range(3))
    call = {"cu_seqlens_q": cu_seqlens((6, 6, 6)), "dropout_p": 0.4, "seed": 1}
    pulls = pulls_of([q.shape], q.dtype)
    whole = gradients(ops.attention, (q, k, v), pulls, **call)
    monkeypatch.setattr("bertgpt.portable.length_buckets._WEIGHTS", 1)
    for one, other in zip(gradients(ops.attention, (q, k, v), pulls, **call), whole, strict=True):
        assert_bitwise(one, other)


@pytest.mark.parametrize(
    "options",
    [
        {"mask": torch.ones(5, 7).tril(2) > 0},
        {"key_lengths": torch.tensor([7, 3])},
        {"causal": True},
        {"window": (2, 1)},
        {"scale": -0.5},
        {"scale": 0.0},
    ],
    ids=str,
)
def test_what_it_leaves_is_computed_again(options):
    q, (k, v) = randn(2, 5, 2, 8), (randn(2, 7, 2, 8, seed=s) for s in (1, 2))
    check_attention(q, k, v, backend="torch", **options)


@pytest.mark.parametrize("where", ["x", "residual"])
def test_nan_stays_in_its_row(where):
    tensors = {"x": randn(4, 8), "residual": randn(4, 8, seed=1)}
    tensors[where][2, 3] = torch.nan
    leaves = (*tensors.values(), randn(8, seed=2), None)
    grad, *_ = gradients(ops.add_layer_norm, leaves, pulls_of([leaves[0].shape], torch.float32))
    assert grad[2].isnan().all()
    assert grad[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_infinite_inputs_of_the_gelu(approximate):
    """Its slope is 1 far to the right and 0 far to the left, also where torch's own is NaN."""
    x = torch.tensor([[torch.inf], [1e30], [-torch.inf], [-1e30], [0.0]], requires_grad=True)
    ops.linear_gelu(x, torch.ones(1, 1), None, approximate=approximate).sum().backward()
    assert x.grad.flatten().tolist() == [1.0, 1.0, 0.0, 0.0, 0.5]
