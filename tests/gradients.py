"""Gradients of an op's tensors on a backend, held to the rule of accuracy against the reference."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from cases import poisoned_allocations, randn
from tolerance import assert_accurate

from bertgpt import ops, reference

FACTOR = 3.0  # of the baseline's error, for gradients


def gradients(
    function: Callable[..., Any],
    inputs: Sequence[torch.Tensor | None],
    pulls: Sequence[torch.Tensor],
    **options: Any,
) -> list[torch.Tensor | None]:
    """Gradients of `inputs`, in their own layouts, with the outputs' gradients `pulls`."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    outputs = function(*leaves, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    pulls = [pull.to(output.dtype) for output, pull in zip(outputs, pulls, strict=True)]
    torch.autograd.backward(outputs, pulls)
    return [None if leaf is None else leaf.grad for leaf in leaves]


def pulls_of(
    shapes: Sequence[torch.Size], dtype: torch.dtype, seed: int = 50
) -> list[torch.Tensor]:
    """A random gradient for each output."""
    return [randn(*shape, dtype=dtype, seed=seed + i) for i, shape in enumerate(shapes)]


def check_gradients(
    op: str,
    inputs: Sequence[torch.Tensor | None],
    pulls: Sequence[torch.Tensor],
    *,
    backend: str = "triton",
    **options: Any,
) -> list[torch.Tensor | None]:
    """Asserts that every gradient is accurate, in memory that starts as NaN; returns them."""
    with poisoned_allocations():
        actual = gradients(getattr(ops, op), inputs, pulls, backend=backend, **options)
    define = getattr(reference, op)
    doubles = [None if x is None else x.double() for x in inputs]
    oracle = gradients(define, doubles, [p.double() for p in pulls], **options)
    baseline = gradients(define, inputs, pulls, **options)
    for i, (a, o, b) in enumerate(zip(actual, oracle, baseline, strict=True)):
        assert (a is None) == (o is None)
        if a is not None:
            x = inputs[i]
            assert (a.shape, a.dtype) == (x.shape, x.dtype), f"gradient {i}"
            assert_accurate(a, o, b, factor=FACTOR, what=f"gradient of argument {i}")
    return actual
