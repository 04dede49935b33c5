"""Derivatives: those no rule here has are errors by name, never zeros; first ones, watched."""

from functools import partial

import pytest
import torch
from cases import randn
from torch.utils._python_dispatch import TorchDispatchMode

from bertgpt import ops

CALLS = {
    "linear_gelu": lambda x: ops.linear_gelu(x, randn(8, 16, seed=1), None),
    "gelu_ffn": lambda x: ops.gelu_ffn(x, randn(8, 16, seed=1), None, randn(16, 8, seed=2), None),
    "add_layer_norm": lambda x: ops.add_layer_norm(x, None, randn(16, seed=1), None),
    "pool": lambda x: ops.pool(x, torch.tensor([0, 1, 3])),
    "attention": lambda x: ops.attention(*(x.view(1, 3, 2, 8),) * 3),
    "linear_cross_entropy": lambda x: ops.linear_cross_entropy(
        x, randn(9, 16, seed=1), None, torch.tensor([1, 2, 3])
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_second_derivative_is_an_error_by_name(name):
    x = randn(3, 16).requires_grad_()
    (gradient,) = torch.autograd.grad(CALLS[name](x).pow(2).sum(), x, create_graph=True)
    (plain,) = torch.autograd.grad(CALLS[name](x).pow(2).sum(), x)
    assert gradient.equal(plain)
    with pytest.raises(RuntimeError, match=f"{name} has no second derivative"):
        gradient.sum().backward()


def test_a_gradient_of_a_plain_sum_is_caught_too():
    """Nothing that comes in to the backward pass asks for gradients there: the inputs do."""
    x, w = randn(3, 16).requires_grad_(), randn(8, 16, seed=1).requires_grad_()
    (gradient,) = torch.autograd.grad(ops.linear_gelu(x, w, None).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("name", CALLS)
def test_a_forward_mode_derivative_is_an_error_by_name(name):
    x, tangent = randn(3, 16), randn(3, 16, seed=1)
    words = f"{name} has no forward-mode derivative"
    with pytest.raises(RuntimeError, match=words):
        torch.func.jvp(CALLS[name], (x,), (tangent,))
    with torch.autograd.forward_ad.dual_level():
        with pytest.raises(RuntimeError, match=words):
            CALLS[name](torch.autograd.forward_ad.make_dual(x, tangent))
        CALLS[name](x)  # what has no tangent is none of its business


class Watching(TorchDispatchMode):
    """Lets every operation through, as FLOP counters and memory trackers do."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("name", CALLS)
def test_a_first_derivative_is_the_same_under_a_dispatch_mode(name, backend, monkeypatch):
    """A mode shuts autograd out of what runs below it, the recomputed forward pass included."""
    monkeypatch.setattr(ops, name, partial(getattr(ops, name), backend=backend))
    x = randn(3, 16).requires_grad_()
    (plain,) = torch.autograd.grad(CALLS[name](x).pow(2).sum(), x)
    with Watching():
        (watched,) = torch.autograd.grad(CALLS[name](x).pow(2).sum(), x)
    assert watched.equal(plain)
    assert watched.abs().max() > 0


@pytest.mark.parametrize("name", CALLS)
def test_a_functional_gradient_is_refused(name):
    x = randn(3, 16)
    loss = lambda x: CALLS[name](x).sum()  # noqa: E731
    for transform in (torch.func.grad, torch.func.jacrev):
        with pytest.raises(RuntimeError, match=r"has no gradient inside torch\.func\.grad"):
            transform(loss)(x)
    (plain,) = torch.autograd.grad(loss(x.requires_grad_()), x)
    assert plain.isfinite().all()
