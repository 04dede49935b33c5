"""Cross-entropy of a linear layer's scores, by its definition: −log softmax(h Wᵀ + b)[label].

Source: Goodfellow, Bengio and Courville, "Deep Learning", 2016, section 6.2.2.3.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """What `bertgpt.ops.linear_cross_entropy` computes; the arguments are described there."""
    losses, _ = row_losses(hidden, weight, bias, labels, ignore_index=ignore_index)
    return reduced(losses, labels != ignore_index, reduction)


def reduced(losses: Tensor, kept: Tensor, reduction: str) -> Tensor:
    """The losses themselves, their sum, or their mean over the rows that are kept (0 of none)."""
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / kept.sum().clamp(min=1)


def row_losses(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Each row's loss and the log-sum-exp of its scores, both shaped like labels; 0 if ignored."""
    kept = labels != ignore_index
    hidden_RE, labels_R1 = hidden[kept], labels[kept].long()[:, None]
    bias = None if bias is None else bias.to(hidden.dtype)
    logits_RV = F.linear(hidden_RE, weight.to(hidden.dtype), bias)
    logits_RV = logits_RV.to(torch.promote_types(hidden.dtype, torch.float32))
    lse_R = logits_RV.logsumexp(-1)
    losses_R = lse_R - logits_RV.gather(-1, labels_R1)[:, 0]
    blank = lse_R.new_zeros(labels.shape)
    return blank.masked_scatter(kept, losses_R), blank.masked_scatter(kept, lse_R)
