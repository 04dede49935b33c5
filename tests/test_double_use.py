"""Gradients of an op used twice, recomputed under checkpointing, and compiled without a break."""

from functools import partial

import pytest
import torch
from cases import cu_seqlens, randn
from tolerance import assert_bitwise
from torch.utils.checkpoint import checkpoint

from bertgpt import ops
from bertgpt.ops._dispatch import OPS


def attention(q, k, v, mask, **options):
    return ops.attention(q, k, v, mask=mask, causal=True, **options)


def packed(q, k, v, **options):
    return ops.attention(q, k, v, cu_seqlens_q=cu_seqlens((2, 0, 5)), **options)


def both(x, residual, weight, bias, **options):
    y, total = ops.add_layer_norm(x, residual, weight, bias, return_sum=True, **options)
    return y * 2 + total


def pool(x):
    return ops.pool(x, cu_seqlens((2, 1, 5)), pooling="mean", normalize=True)


def loss(hidden, weight, bias):
    return ops.linear_cross_entropy(hidden, weight, bias, torch.tensor([3, -100, 0, 8, 1]))


_QKV = (1, 5, 4, 8), (1, 7, 2, 8), (1, 7, 2, 8)
# Name of a call: the function, and the shapes of the tensors whose gradients it has.
CALLS = {
    "attention": (attention, (*_QKV, (4, 1, 7))),
    "attention, packed": (packed, ((7, 4, 8), (7, 2, 8), (7, 2, 8))),
    "linear_gelu": (ops.linear_gelu, ((5, 8), (9, 8), (9,))),
    "gelu_ffn": (ops.gelu_ffn, ((5, 8), (9, 8), (9,), (8, 9), (8,))),
    "add_layer_norm": (both, ((5, 8), (5, 8), (8,), (8,))),
    "pool": (pool, ((8, 8),)),
    "linear_cross_entropy": (loss, ((5, 8), (9, 8), (9,))),
}
DROPPING = sorted(set(CALLS) - {"linear_gelu", "pool", "linear_cross_entropy"})


def tensors(name):
    shapes = CALLS[name][1]
    return [randn(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]


def gradients(function, leaves):
    out = function(*leaves)
    weights = randn(*out.shape, seed=20)
    return torch.autograd.grad((out * weights).sum(), leaves)


def test_every_op_with_a_gradient_is_here():
    assert {name.partition(",")[0] for name in CALLS} == {
        name for name, op in OPS.items() if op.differentiable
    }


@pytest.mark.parametrize("name", CALLS)
def test_twice_and_under_checkpointing(name):
    function, leaves = CALLS[name][0], tensors(name)

    def twice(*t):
        return function(*t) + function(*t)

    once = gradients(function, leaves)
    doubled = gradients(twice, leaves)
    again = gradients(lambda *t: checkpoint(twice, *t, use_reentrant=False), leaves)
    for single, double, recomputed in zip(once, doubled, again, strict=True):
        assert single.any()
        assert_bitwise(double, 2 * single)
        assert_bitwise(recomputed, double)


@pytest.mark.parametrize("name", DROPPING)
def test_checkpointing_drops_what_the_first_pass_dropped(name):
    """With a seed drawn inside, which the recomputation draws again."""
    leaves = tensors(name)
    function = partial(CALLS[name][0], dropout_p=0.5)
    torch.manual_seed(3)
    expected = gradients(function, leaves)
    torch.manual_seed(3)
    recomputed = gradients(lambda *t: checkpoint(function, *t, use_reentrant=False), leaves)
    for a, b in zip(recomputed, expected, strict=True):
        assert_bitwise(a, b)
    torch.manual_seed(4)
    others = gradients(function, leaves)
    assert not all(a.equal(b) for a, b in zip(others, expected, strict=True))


@pytest.mark.parametrize("name", CALLS)
def test_twice_in_one_compiled_graph(name):
    function, leaves = CALLS[name][0], tensors(name)

    def twice(*t):
        return function(*t) * function(*t)

    torch._dynamo.reset()
    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    for a, b in zip(gradients(compiled, leaves), gradients(twice, leaves), strict=True):
        assert_bitwise(a, b)
