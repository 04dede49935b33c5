"""GELU(x Wᵀ + b) on torch's own GEMM and GELU, fused where torch fuses them."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from bertgpt.portable.linear import onednn_takes

_IDENTITY_ABOVE = 100.0  # Φ(100) is 1 to the last bit, also of a float64


def linear_gelu(x: Tensor, w: Tensor, b: Tensor | None, *, approximate: str = "none") -> Tensor:
    """What `bertgpt.ops.linear_gelu` computes; the arguments are described there."""
    w = w.to(x.dtype)
    b = None if b is None else b.to(x.dtype)
    if onednn_takes(x, w, b):  # it runs the GELU on the GEMM's tiles
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
