"""GELU(x Wᵀ + b) by its definition.

Source: Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016: x Φ(x), and its tanh form.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def linear_gelu(x: Tensor, w: Tensor, b: Tensor | None, *, approximate: str = "none") -> Tensor:
    """What `bertgpt.ops.linear_gelu` computes; the arguments are described there."""
    b = None if b is None else b.to(x.dtype)
    return gelu(F.linear(x, w.to(x.dtype), b), approximate)


def gelu(h: Tensor, approximate: str) -> Tensor:
    """GELU in float32 at least, rounded once to h's dtype: "none" by erf, "tanh" as in GPT-2."""
    z = h.to(torch.promote_types(h.dtype, torch.float32))
    if approximate == "none":
        cdf = 0.5 * (1.0 + torch.erf(z / math.sqrt(2.0)))
    else:
        cdf = 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (z + 0.044715 * z**3)))
    return (z * cdf).to(h.dtype)
