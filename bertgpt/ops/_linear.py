"""A linear layer's product where no op of its own is called for: torch's, or a faster GEMM."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from bertgpt.ops._watched import tangents, watched
from bertgpt.portable import products


def linear(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """`F.linear`, on the faster GEMM of a CPU where nothing watches the call."""
    if watched((x, w, b)) or tangents() or torch.is_autocast_enabled(x.device.type):
        return F.linear(x, w, b)
    return products.linear(x, w, b)
