"""GELU(x Wᵀ + b) on torch's own GEMM and GELU."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def linear_gelu(x: Tensor, w: Tensor, b: Tensor | None, *, approximate: str = "none") -> Tensor:
    """What `bertgpt.ops.linear_gelu` computes; the arguments are described there."""
    b = None if b is None else b.to(x.dtype)
    h = F.linear(x, w.to(x.dtype), b)
    y = F.gelu(h, approximate=approximate)
    # torch's vectorised CPU erf-GELU turns +inf into NaN; a sum is the cheapest way to notice.
    # (In float32 where y is: converting every element to float64 first costs as much as the GELU.)
    wide = torch.promote_types(y.dtype, torch.float32)
    if h.device.type == "cpu" and not math.isfinite(y.detach().sum(dtype=wide)):
        y = torch.where(h == torch.inf, h, y)
    return y
