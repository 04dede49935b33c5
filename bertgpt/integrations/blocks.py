"""What patched blocks share: where their weights are, and the ops that run on them."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bertgpt import ops, portable
from bertgpt.integrations.inspection import (
    dropout_of,
    first_obstacle,
    gelu_of,
    is_linear,
    weights_of,
)
from bertgpt.integrations.padding import Packing, attend_padded
from bertgpt.ops._checks import autocasting
from bertgpt.ops._watched import alone
from bertgpt.portable import products

Mask = Packing | Tensor | None


class Attention(NamedTuple):
    """A stock attention sub-block, without the norm around it.

    Attributes:
        owners: the modules whose own forward is passed by.
        projections: of queries, keys and values, or the one of all three.
        out: the output projection.
        weights_dropout: dropout of the attention weights.
        dropping: whether that is on.
        head_dim: D.
        scale: of the scores.
        causal: whether a query sees the keys up to its own place only.
        window: how many places back and on it sees, −1 for all; where that is given, causality
            holds beside a mask as well, counted from the last key. None where masks say it all.
    """

    owners: tuple[nn.Module, ...]
    projections: tuple[nn.Module, ...]
    out: nn.Module
    weights_dropout: Any
    dropping: bool
    head_dim: int
    scale: float
    causal: bool = False
    window: tuple[int, int] | None = None

    def obstacle(self) -> str | None:
        """Why the whole sub-block must be called; None if it need not."""
        for linear in (*self.projections, self.out):
            if not is_linear(linear):
                return f"{type(linear).__name__} is not known to be linear"
        if type(self.weights_dropout) is not nn.Dropout:
            return f"a {type(self.weights_dropout).__name__} drops its weights"
        return first_obstacle((*self.owners, *self.projections, self.out, self.weights_dropout))

    def adapted(self) -> str | None:
        """What stands where a plain linear layer would: called, and no obstacle."""
        found = {type(m).__name__ for m in (*self.projections, self.out) if type(m) not in _PLAIN}
        return ", ".join(sorted(found)) or None

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`[..., E]` → queries, keys and values, `[..., H, D]` each."""
        if len(self.projections) == 1:
            parts = self.projections[0](x).chunk(3, dim=-1)
        else:
            parts = [_linear(projection, x) for projection in self.projections]
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in parts)
        return q, k, v

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        """Attention and the output projection: `[..., H, D]` each → `[..., E]`."""
        p = self.weights_dropout.p if self.dropping else 0.0
        if isinstance(mask, Packing):
            mixed = mask.attend(q, k, v, self.scale, p, self.causal, self.window)
        else:
            mixed = attend_padded(q, k, v, mask, self.scale, p, self.causal, self.window)
        return _linear(self.out, mixed.flatten(-2))


def _linear(module: Any, x: Tensor) -> Tensor:
    """What the module gives, by its weights where they may be read: on a CPU's faster GEMM."""
    weights = weights_of(module, nn.Linear) if alone(x) else None
    made: Tensor = module(x) if weights is None else products.linear(x, *weights)
    return made


_PLAIN = (nn.Linear, Conv1D)


class FeedForward(NamedTuple):
    """A stock feed-forward sub-block, without its dropout and norm.

    Attributes:
        owners: the modules whose own forward is passed by.
        inner: the linear layer that widens.
        activation: what stands between.
        outer: the linear layer that narrows.
    """

    owners: tuple[nn.Module, ...]
    inner: Any
    activation: nn.Module
    outer: Any

    def obstacle(self) -> str | None:
        """Why the whole sub-block must be called; None if it need not."""
        for linear in (self.inner, self.outer):
            if not is_linear(linear):
                return f"{type(linear).__name__} is not known to be linear"
        return first_obstacle((*self.owners, self.inner, self.outer))

    def adapted(self) -> str | None:
        """What keeps the weights from being read: the parts are called one by one."""
        found = {type(m).__name__ for m in (self.inner, self.outer) if type(m) not in _PLAIN}
        if gelu_of(self.activation) is None:
            found.add(type(self.activation).__name__)
        return ", ".join(sorted(found)) or None

    def __call__(self, x: Tensor) -> Tensor:
        """`[..., E]` → `[..., E]`."""
        gelu, inner, outer = gelu_of(self.activation), self.inner, self.outer
        if gelu is None:
            return outer(self.activation(inner(x)))
        into, out_of = weights_of(inner, nn.Linear), weights_of(outer, nn.Linear)
        if into is None or out_of is None:
            return outer(nn.functional.gelu(inner(x), approximate=gelu))
        made: Any
        if alone(x, *into, *out_of):
            made = portable.gelu_ffn(x, *into, *out_of, approximate=gelu)
        else:
            made = ops.gelu_ffn(x, *into, *out_of, approximate=gelu)
        return made


def add_norm(
    x: Tensor,
    residual: Tensor,
    dropout: nn.Module | None,
    norm: Any,
    return_sum: bool = False,
) -> tuple[Tensor, Tensor]:
    """LayerNorm(dropout(x) + residual), and the sum where it is asked for (else the norm twice).

    In the dtype of the residual stream, as stock code adds: under autocast that is wider than x.
    """
    made: Any
    p = 0.0 if dropout is None else dropout_of(dropout)
    weights = weights_of(norm, nn.LayerNorm)
    if p is None or weights is None or weights[0].dtype != residual.dtype:
        total = (x if dropout is None else dropout(x)) + residual
        return norm(total), total
    if p == 0.0 and alone(x, residual, *weights):
        made = portable.add_layer_norm(x, residual, *weights, eps=norm.eps, return_sum=return_sum)
        return made if return_sum else (made, made)
    with _without_autocast(x.device.type):
        made = ops.add_layer_norm(
            x.to(residual.dtype),
            residual,
            *weights,
            eps=norm.eps,
            dropout_p=p,
            return_sum=return_sum,
        )
    return made if return_sum else (made, made)


def _without_autocast(device_type: str) -> AbstractContextManager[object]:
    if autocasting(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


class Parts(NamedTuple):
    """The sub-blocks of a layer that run on ops."""

    attention: Attention
    feed_forward: FeedForward


class Patched(nn.Module):
    """Mark of a class that patching puts before a stock one."""

    if TYPE_CHECKING:  # what the stock class brings

        def __getattr__(self, name: str) -> Any: ...

    def refusal(self) -> str | None:
        """Why patching leaves a module of this kind as it is; None where it does not."""
        return None

    def parts(self) -> Parts | None:
        """Where a layer's weights are; None for what is no layer."""
        return None

    def obstacles(self) -> dict[str, str]:
        """The sub-blocks that stock code runs, and why."""
        found = {name: part.obstacle() for name, part in _named(self.parts())}
        return {name: reason for name, reason in found.items() if reason is not None}

    def adapted(self) -> dict[str, str]:
        """The sub-blocks of which a part is called that would be read, and what it is."""
        found = {name: part.adapted() for name, part in _named(self.parts())}
        return {name: what for name, what in found.items() if what is not None}


def _named(parts: Parts | None) -> Iterable[tuple[str, Attention | FeedForward]]:
    return () if parts is None else zip(parts._fields, parts, strict=True)
