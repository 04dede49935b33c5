"""Attention inputs, a call of each kind of mask, and the gradients' check, for kernels' tests."""

import torch
from cases import poisoned_allocations, randn
from tolerance import assert_accurate

from bertgpt import ops, reference

INF = float("inf")


def qkv(B=1, L=20, S=37, H=2, K=1, D=16, dtype=torch.float32, strided=False):
    q = randn(B, L, H, D, dtype=dtype, strided=strided)
    k, v = (randn(B, S, K, D, dtype=dtype, seed=i, strided=strided) for i in (1, 2))
    return q, k, v


def additive(*shape):
    """Biases that are ordinary, −inf, and as large as float32 holds."""
    bias = randn(*shape, seed=5)
    choice = randn(*shape, seed=6)
    bias = bias.masked_fill(choice > 1.0, -INF)
    return bias.masked_fill(choice < -1.5, torch.finfo(torch.float32).min)


MASKS = {
    "none": {},
    "causal": {"causal": True},
    "window": {"window": (5, 3)},
    "left": {"window": (0, -1)},
    "right": {"window": (-1, 9)},
    "causal window": {"causal": True, "window": (17, 4)},
    "lengths": {"key_lengths": torch.tensor([21, 0])},
    "bool": {"mask": randn(2, 1, 20, 37, seed=3) > 0},
    "per key": {"mask": randn(2, 1, 1, 37, seed=3) > 0},
    "per query": {"mask": randn(20, 1, seed=3) > 0},
    "additive": {"mask": additive(2, 20, 37)},
    "additive per key": {"mask": additive(37)},
    "all": {
        "causal": True,
        "window": (25, 2),
        "key_lengths": torch.tensor([33, 18], dtype=torch.int32),
        "mask": randn(2, 2, 20, 37, seed=4) > -0.7,
    },
    "all additive": {
        "causal": True,
        "key_lengths": torch.tensor([36, 9]),
        "mask": additive(20, 37),
    },
}


def gradients(function, inputs, grad_out, **call):
    """The function's gradients of q, k and v, in their own layouts."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves, **call)
    if not out.requires_grad:  # the definition's, of nothing to attend
        assert function is reference.attention
        return [torch.zeros_like(x) for x in leaves]
    unused = function is reference.attention  # of an empty batch
    return torch.autograd.grad(out, leaves, grad_out.to(out.dtype), materialize_grads=unused)


def triton_gradients(inputs, grad_out, **call):
    return gradients(ops.attention, inputs, grad_out, backend="triton", **call)


def check_gradients(q, k, v, grad_out=None, *, backend="triton", **call):
    """Gradients against the definition's, in memory that starts as NaN."""
    if grad_out is None:
        grad_out = randn(*q.shape, dtype=q.dtype, seed=9)
    with poisoned_allocations():
        actual = gradients(ops.attention, (q, k, v), grad_out, backend=backend, **call)
    if call.get("mask") is not None:
        call["mask"] = call["mask"].expand(q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    wide = [x.double() for x in (q, k, v)]
    oracle = gradients(reference.attention, wide, grad_out, **call)
    baseline = gradients(reference.attention, (q, k, v), grad_out, **call)
    for name, a, o, b in zip("qkv", actual, oracle, baseline, strict=True):
        # A query that sees one key has a zero gradient, the difference of two equal sums: right to
        # the size of those sums, not to its own. So a head's rows are judged together, and a
        # head of such queries alone by the rounding of sums of about 1.
        a, o, b = (x.transpose(-2, -3).flatten(-2).flatten(0, -2) for x in (a, o, b))
        cancelled = o.abs().sum(dim=1) < 1e-12
        assert (a[cancelled].abs() < 1e-5).all(), f"d{name} of queries with one key or none"
        assert_accurate(a[~cancelled], o[~cancelled], b[~cancelled], factor=3, what=f"d{name}")
    return actual
