"""Matrix products by the fastest library at hand: oneDNN for float32 on a CPU, else torch's own.

oneDNN also fuses a GELU, which saves nothing that can be measured beside the product.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor
from torch.nn import functional as F

_INNER = 1024  # terms that oneDNN adds up one after the other: with more, roundings show,
_PART = 768  # and so they are added up in parts,
_ROWS_OF_PARTS = 64  # where there are rows enough beside which copying the weight's is cheap
_MULTIPLICATIONS = 3 * 2**19  # below, oneDNN's longer way to its kernel costs more than it saves


def linear(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """The product x · wᵀ + b, for x [..., K], w [N, K] and b [N], all of one dtype."""
    recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, w, b))
    if recorded or not gains(x, w, b):
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


def linear_backward(
    grad: Tensor, x: Tensor, w: Tensor, wanted: Collection[str]
) -> dict[str, Tensor]:
    """Gradients of x · wᵀ + b in the dtypes of x and w, of those wanted among "x", "w" and "b"."""
    rows, inputs = (torch.atleast_2d(t).flatten(0, -2) for t in (grad, x))
    made = {}
    if "x" in wanted:
        made["x"] = product(grad, w.to(grad.dtype))
    if "w" in wanted:
        made["w"] = product(rows.t(), inputs).to(w.dtype)
    if "b" in wanted:
        made["b"] = rows.sum(0, dtype=torch.promote_types(grad.dtype, torch.float32)).to(w.dtype)
    return made


def is_finite(y: Tensor) -> bool:
    """By a sum, the cheapest way, in float32 where y is: to widen costs as much as a GELU."""
    return math.isfinite(y.detach().sum(dtype=torch.promote_types(y.dtype, torch.float32)))


def gains(x: Tensor, w: Tensor, b: Tensor | None) -> bool:
    """Whether oneDNN can multiply these as they lie, and does so faster; it has no gradient."""
    return _is_worth_onednn(x, w) and _takes_onednn(x, w, b)


def _is_worth_onednn(x: Tensor, w: Tensor) -> bool:
    *outer, inner = x.shape
    rows = math.prod(outer)
    if rows * inner * w.shape[0] < _MULTIPLICATIONS:
        return False
    return inner <= _INNER or rows >= _ROWS_OF_PARTS


def _takes_onednn(x: Tensor, w: Tensor, b: Tensor | None) -> bool:
    if not _is_float32_on_cpu(x, w) or 0 in (*x.shape, *w.shape):
        return False
    if b is not None and b.dtype != torch.float32:
        return False
    if not all(t is None or t.is_contiguous() for t in (x, w, b)):  # it would misread others
        return False
    return torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)


def _onednn(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), w.contiguous(), b, "none", [], "")


def _is_float32_on_cpu(x: Tensor, w: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == w.dtype == torch.float32
