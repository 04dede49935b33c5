"""The feed-forward layer on torch's own GEMMs and GELU."""

from __future__ import annotations

from torch import Tensor

from bertgpt.philox import dropout_rows
from bertgpt.portable.linear import linear
from bertgpt.portable.linear_gelu import linear_gelu


def gelu_ffn(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    *,
    approximate: str = "none",
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """What `bertgpt.ops.gelu_ffn` computes; the arguments are described there."""
    hidden = linear_gelu(x, w_in, b_in, approximate=approximate)
    b_out = None if b_out is None else b_out.to(x.dtype)
    return dropout_rows(linear(hidden, w_out.to(x.dtype), b_out), dropout_p, seed)
