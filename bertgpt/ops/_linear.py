"""A linear layer's product where no op of its own is called for: torch's, or a faster GEMM."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor
from torch.nn import functional as F

from bertgpt.ops._dispatch import needs_grad
from bertgpt.ops._watched import tangents, watched
from bertgpt.portable import products


def linear(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """`F.linear`, on the faster GEMM of a CPU where nothing watches the call."""
    if watched((x, w, b)) or tangents() or torch.is_autocast_enabled(x.device.type):
        return F.linear(x, w, b)
    if not needs_grad(x, w, b) or not products.gains(x, w, b):
        return products.linear(x, w, b)
    y: Tensor = _Linear.apply(torch.atleast_2d(x).flatten(0, -2), w.t(), b)
    return y.view(*x.shape[:-1], w.shape[0])


class _Linear(torch.autograd.Function):
    """The gradient that oneDNN's product lacks, for x [T, E], wᵀ [E, F] and b [F].

    It saves what `F.linear` does, in its order: checkpointing compares, where something watches one
    of two passes only. Frozen weights save no input.
    """

    @staticmethod
    def forward(ctx: Any, x_TE: Tensor, w_EF: Tensor, b_F: Tensor | None) -> Tensor:
        x_too, w_too, _ = ctx.needs_input_grad
        ctx.save_for_backward(x_TE if w_too else None, w_EF if x_too else None)
        return products.linear(x_TE, w_EF.t(), b_F)

    @staticmethod
    def backward(ctx: Any, grad_TF: Tensor) -> tuple[Tensor | None, ...]:
        x_TE, w_EF = ctx.saved_tensors
        multiply = torch.mm if _differentiated(grad_TF, x_TE, w_EF) else products.product
        return (
            None if w_EF is None else multiply(grad_TF, w_EF.t()),
            None if x_TE is None else multiply(grad_TF.t(), x_TE).t(),
            grad_TF.sum(0) if ctx.needs_input_grad[2] else None,
        )


def _differentiated(grad: Tensor, *saved: Tensor | None) -> bool:
    """Whether a gradient is itself differentiated, watched or batched: torch's products can be."""
    return (
        torch.is_grad_enabled()
        or watched((grad, *saved))
        or tangents()
        or is_legacy_batchedtensor(grad)
    )
