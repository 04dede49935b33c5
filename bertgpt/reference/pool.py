"""Token states to one vector a sequence by its definition.

Source: Reimers and Gurevych, "Sentence-BERT", 2019, section 3.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def pool(
    x: Tensor, cu_seqlens: Tensor, *, pooling: str = "mean", normalize: bool = False
) -> Tensor:
    """What `bertgpt.ops.pool` computes; the arguments are described there."""
    rows = [x.new_zeros(0, x.shape[1])]
    for start, end in pairwise(cu_seqlens.tolist()):
        tokens = x[start:end].to(torch.promote_types(x.dtype, torch.float32))  # [L, E]
        if start == end:
            vector = tokens.new_zeros(x.shape[1])
        elif pooling == "cls":
            vector = tokens[0]
        elif pooling == "mean":
            vector = tokens.sum(dim=0) / (end - start)
        else:
            vector = tokens.amax(dim=0)
        if normalize:
            vector = vector / torch.linalg.vector_norm(vector).clamp(min=1e-12)
        rows.append(vector.to(x.dtype)[None])
    return torch.cat(rows)
