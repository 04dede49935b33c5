"""Matrix products by the fastest library at hand: oneDNN for float32 on a CPU, else torch's own.

The weight alone chooses, and oneDNN gives a row the same bits whatever other rows come with it: so
a text's numbers depend neither on its batch nor on whether its tokens come together or one by one.
oneDNN also fuses a GELU, which saves nothing that can be measured beside the product.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

_INNER = 1024  # terms that oneDNN adds up one after the other: with more, roundings show,
_PART = 768  # and so they are added up in parts
_WEIGHTS = 2**16  # with fewer, oneDNN's longer way to its kernel costs more than it saves


def linear(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """The product x · wᵀ + b, for x [..., K], w [N, K] and b [N], all of one dtype."""
    if w.numel() < _WEIGHTS or not _takes_onednn(x, w, b):
        return F.linear(x, w, b)
    if x.shape[-1] <= _INNER:
        return _onednn(x, w, b)
    first, *others = zip(x.split(_PART, -1), w.split(_PART, -1), strict=True)
    y = _onednn(*first, b)
    for x_part, w_part in others:
        y += _onednn(x_part, w_part, None)
    return y


def product(x: Tensor, w: Tensor) -> Tensor:
    """The product x · w, for x [..., K] and w [K, N]."""
    # oneDNN reads w's transpose: a copy is cheap beside the product.
    if _is_float32_on_cpu(x, w):
        return linear(x.contiguous(), w.t().contiguous())
    return x @ w


def is_finite(y: Tensor) -> bool:
    """By a sum, the cheapest way, in float32 where y is: to widen costs as much as a GELU."""
    return math.isfinite(y.detach().sum(dtype=torch.promote_types(y.dtype, torch.float32)))


def _takes_onednn(x: Tensor, w: Tensor, b: Tensor | None) -> bool:
    """Whether oneDNN can multiply these as they lie: float32 on a CPU, without gradients."""
    if not _is_float32_on_cpu(x, w) or x.numel() == 0 or w.numel() == 0:
        return False
    if not (x.is_contiguous() and w.is_contiguous()):  # it would misread others
        return False
    if b is not None and not b.is_contiguous():
        return False
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, w, b)):
        return False
    return torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)


def _onednn(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    if x.numel() == x.shape[-1]:  # of a single row oneDNN adds the terms up in another order
        return _onednn(x.reshape(1, -1).expand(2, -1), w, b)[0].view(*x.shape[:-1], -1)
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), w.contiguous(), b, "none", [], "")


def _is_float32_on_cpu(x: Tensor, w: Tensor) -> bool:
    return x.is_cpu and x.dtype == w.dtype == torch.float32
