"""Token states to one vector a sequence on torch's own reductions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def pool(
    x: Tensor, cu_seqlens: Tensor, *, pooling: str = "mean", normalize: bool = False
) -> Tensor:
    """What `bertgpt.ops.pool` computes; the arguments are described there."""
    tokens, width = x.shape
    if tokens == 0:
        return x.new_zeros(cu_seqlens.shape[0] - 1, width)
    wide, offsets = x.to(torch.promote_types(x.dtype, torch.float32)), cu_seqlens.long()
    if pooling == "cls":
        vectors = wide[offsets[:-1].clamp(max=tokens - 1)]
    elif pooling == "mean":
        vectors = torch.segment_reduce(wide, "mean", offsets=offsets)
    else:  # segment_reduce's maximum gives a negative gradient to each of several equals whole
        owner = torch.repeat_interleave(offsets.diff(), output_size=tokens)  # [T]
        vectors = wide.new_zeros(offsets.shape[0] - 1, width).scatter_reduce(
            0, owner[:, None].expand(tokens, width), wide, "amax", include_self=False
        )
    vectors = vectors.masked_fill((offsets.diff() == 0)[:, None], 0.0)  # empty sequences
    return (F.normalize(vectors, dim=-1) if normalize else vectors).to(x.dtype)
