"""GELU(x Wᵀ + b) on torch's own GEMM and GELU, fused where torch fuses them."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

_IDENTITY_ABOVE = 100.0  # Φ(100) is 1 to the last bit, also of a float64


def linear_gelu(x: Tensor, w: Tensor, b: Tensor | None, *, approximate: str = "none") -> Tensor:
    """What `bertgpt.ops.linear_gelu` computes; the arguments are described there."""
    w = w.to(x.dtype)
    b = None if b is None else b.to(x.dtype)
    if _has_fused_epilogue(x, w, b):
        y = torch.ops.mkldnn._linear_pointwise(x, w, b, "gelu", [], approximate)
        if _is_finite(y):
            return y
    h = F.linear(x, w, b)
    y = F.gelu(h, approximate=approximate)
    # torch's CPU erf-GELUs turn +inf into NaN and overflow just below it; there GELU(h) is h.
    if h.device.type == "cpu" and not _is_finite(y):
        y = torch.where(h > _IDENTITY_ABOVE, h, y)
    return y


def _is_finite(y: Tensor) -> bool:
    """By a sum, the cheapest way, in float32 where y is: to widen costs as much as the GELU."""
    return math.isfinite(y.detach().sum(dtype=torch.promote_types(y.dtype, torch.float32)))


def _has_fused_epilogue(x: Tensor, w: Tensor, b: Tensor | None) -> bool:
    """Whether oneDNN runs the GELU on the GEMM's tiles: float32 on a CPU, without gradients."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or 0 in (*x.shape, *w.shape):
        return False
    if not all(t is None or t.is_contiguous() for t in (x, w, b)):  # it would misread others
        return False
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, w, b)):
        return False
    return torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
