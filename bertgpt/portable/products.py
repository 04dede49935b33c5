"""Matrix products by the fastest library at hand: oneDNN for float32 on a CPU, else torch's own."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def linear(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """X · wᵀ + b, for x [..., K], w [N, K] and b [N], all of one dtype."""
    if takes_onednn(x, w, b):
        return torch.ops.mkldnn._linear_pointwise(x, w, b, "none", [], "")
    return F.linear(x, w, b)


def product(x: Tensor, w: Tensor) -> Tensor:
    """X · w, for x [..., K] and w [K, N]."""
    # oneDNN reads w's transpose: a copy is cheap beside the product.
    if _is_float32_on_cpu(x, w):
        return linear(x.contiguous(), w.t().contiguous())
    return x @ w


def takes_onednn(x: Tensor, w: Tensor, b: Tensor | None = None) -> bool:
    """Whether oneDNN can multiply these as they lie: float32 on a CPU, without gradients."""
    if not _is_float32_on_cpu(x, w) or 0 in (*x.shape, *w.shape):
        return False
    if not all(t is None or t.is_contiguous() for t in (x, w, b)):  # it would misread others
        return False
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, w, b)):
        return False
    return torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)


def is_finite(y: Tensor) -> bool:
    """By a sum, the cheapest way, in float32 where y is: to widen costs as much as a GELU."""
    return math.isfinite(y.detach().sum(dtype=torch.promote_types(y.dtype, torch.float32)))


def _is_float32_on_cpu(x: Tensor, w: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == w.dtype == torch.float32
