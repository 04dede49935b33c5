"""GELU(x Wᵀ + b) on the GEMM and GELU at hand."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor
from torch.nn import functional as F

from bertgpt.portable.products import is_finite, linear, linear_backward

_IDENTITY_ABOVE = 100.0  # Φ(100) is 1 to the last bit, also of a float64


def linear_gelu(x: Tensor, w: Tensor, b: Tensor | None, *, approximate: str = "none") -> Tensor:
    """What `bertgpt.ops.linear_gelu` computes; the arguments are described there."""
    return gelu(linear(x, w.to(x.dtype), None if b is None else b.to(x.dtype)), approximate)


def linear_gelu_backward(
    grad: Tensor,
    wanted: Collection[str],
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    *,
    approximate: str = "none",
) -> dict[str, Tensor]:
    """Gradients by name of those wanted among x, w and b; x wᵀ + b is computed again."""
    h = linear(x, w.to(x.dtype), None if b is None else b.to(x.dtype))
    return linear_backward(gelu_backward(grad, h, approximate), x, w, {"x", "w", "b"} & {*wanted})


def gelu(h: Tensor, approximate: str) -> Tensor:
    """GELU(h), also where h is large or infinite."""
    y = F.gelu(h, approximate=approximate)
    # torch's CPU erf-GELUs turn +inf into NaN and overflow just below it; there GELU(h) is h.
    if h.device.type == "cpu" and not is_finite(y):
        y = torch.where(h > _IDENTITY_ABOVE, h, y)
    return y


def gelu_backward(grad: Tensor, h: Tensor, approximate: str) -> Tensor:
    """GELU's derivative at h, times grad."""
    made = torch.ops.aten.gelu_backward(grad, h, approximate=approximate)
    if h.device.type == "cpu" and not is_finite(made):  # past ±100 the slope is 1 or 0, at ±inf too
        h = h.clamp(-_IDENTITY_ABOVE, _IDENTITY_ABOVE)
        made = torch.ops.aten.gelu_backward(grad, h, approximate=approximate)
    return made
