"""x Wᵀ + b on torch's GEMMs: on a CPU oneDNN's where it is the faster of two."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

_WORTH_A_CALL = 2**21  # multiplications; below, oneDNN's longer way to its kernel outweighs it
_ROWS = 8  # below, a product is bound by reading the weights, which both do alike


def linear(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """What `torch.nn.functional.linear` computes.

    Args:
        x: [..., E].
        w: [F, E], x's dtype.
        b: [F], or None.
    """
    *outer, inputs = x.shape
    rows = math.prod(outer)
    worth = rows >= _ROWS and rows * inputs * w.shape[0] >= _WORTH_A_CALL
    if worth and onednn_takes(x, w, b):
        return torch.ops.mkldnn._linear_pointwise(x, w, b, "none", [], "")
    return F.linear(x, w, b)


def onednn_takes(x: Tensor, w: Tensor, b: Tensor | None) -> bool:
    """Whether oneDNN's GEMM can run: float32 on a CPU, without gradients."""
    if not x.is_cpu or x.dtype != torch.float32 or w.dtype != torch.float32:
        return False
    if x.numel() == 0 or w.numel() == 0:
        return False
    if not (x.is_contiguous() and w.is_contiguous() and (b is None or b.is_contiguous())):
        return False  # it would misread others
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, w, b)):
        return False
    return torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
