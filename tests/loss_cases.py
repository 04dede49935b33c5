"""Calls of `linear_cross_entropy` for its tests: inputs, gradients, and the rule for both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from cases import generator, randn
from tolerance import assert_accurate

from bertgpt import ops, reference

IGNORE = -100
Call = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]


def inputs(
    T: int,
    V: int,
    E: int,
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    ignored: float = 0.3,
    strided: bool = False,
    bias: bool = True,
    ruled_out: bool = False,
) -> Call:
    """Hidden [T, E], weight [V, E], bias [V] or None, labels [T]; ignored rows hold NaN.

    `ruled_out` gives token 0, which is then no label, a bias of −inf.
    """
    hidden = randn(T, E, dtype=dtype, seed=seed, strided=strided)
    weight = randn(V, E, dtype=dtype, seed=seed + 1, scale=2 * max(E, 1) ** -0.5, strided=strided)
    b = randn(V, dtype=dtype, seed=seed + 2) if bias else None
    lowest = 1 if ruled_out and V > 1 else 0
    labels = torch.randint(lowest, max(V, 1), (T,), generator=generator(seed + 3))
    labels[torch.rand(T, generator=generator(seed + 4)) < ignored] = IGNORE
    if V == 0:
        labels.fill_(IGNORE)
    hidden[labels == IGNORE] = torch.nan
    if b is not None and lowest:
        b[0] = -torch.inf
    return hidden, weight, b, labels


def results(function: Callable[..., Any], call: Call, **options: Any) -> list[torch.Tensor]:
    """The loss, and the gradients of hidden, weight and bias by its randomly weighted sum."""
    *tensors, labels = call
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    loss = function(*leaves, labels, **options)
    pull = randn(*loss.shape, seed=9).to(loss.dtype) if loss.dim() else torch.ones_like(loss)
    gradients = torch.autograd.grad(loss, [leaf for leaf in leaves if leaf is not None], pull)
    return [loss.detach(), *gradients]


def check(call: Call, backend: str, **options: Any) -> list[torch.Tensor]:
    """Fails unless loss and gradients obey the rule; returns them."""
    doubles: Any = tuple(t.double() if t is not None and t.is_floating_point() else t for t in call)
    actual = results(ops.linear_cross_entropy, call, backend=backend, **options)
    oracle = results(reference.linear_cross_entropy, doubles, **options)
    baseline = results(reference.linear_cross_entropy, call, **options)
    names = ("loss", "hidden", "weight", "bias")
    for name, got, want, low in zip(names, actual, oracle, baseline, strict=False):
        factor = 2.0 if name == "loss" else 3.0
        assert_accurate(got, want, low, factor=factor, what=name)
    return actual


def assert_small_gradients_survive(backend: str) -> None:
    """A probability times 1e-6, a row's part of a large mean, lies below the smallest float16."""
    hidden, weight, bias, labels = inputs(60, 100, 8, ignored=0.0)
    gradients = []
    for dtype, leaf in ((torch.float16, weight), (torch.float64, weight.double())):
        leaf = leaf.detach().requires_grad_()
        call = hidden.half().to(dtype), leaf, bias.to(leaf.dtype), labels
        name = backend if dtype == torch.float16 else "reference"
        loss = ops.linear_cross_entropy(*call, reduction="sum", backend=name) * 1e-6
        gradients += [g.double() for g in torch.autograd.grad(loss, leaf)]
    got, want = gradients
    assert float((got - want).norm()) < 0.002 * float(want.norm())
