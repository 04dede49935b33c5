"""Heads over the vocabulary: the scores and their loss, or the loss alone and no scores."""

from __future__ import annotations

from torch import Tensor, nn

from bertgpt import objectives, ops
from bertgpt.door import leave
from bertgpt.packing import PackedBatch


def score(
    hidden_TE: Tensor,
    decoder: nn.Linear,
    labels_T: Tensor | None,
    batch: PackedBatch,
    skip_logits: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Scores of every word for every token, and the mean cross-entropy of what they are to say.

    Args:
        hidden_TE: packed states.
        decoder: the layer over the vocabulary.
        labels_T: words, −100 where a token is to say nothing; None for no loss.
        batch: the tokens' batch.
        skip_logits: whether only the loss is wanted: tokens without a label are then left out, and
            the others' scores are never whole in memory.

    Returns:
        Scores in the caller's layout, `[B, L, V]` or `[T, V]`, or None; and the loss or None.

    Raises:
        TypeError, ValueError, IndexError: `skip_logits` without labels, or labels that are no
            words.
    """
    if skip_logits:
        if labels_T is None:
            raise ValueError("skip_logits leaves nothing to return without labels: give both")
        return None, ops.linear_cross_entropy(hidden_TE, decoder.weight, decoder.bias, labels_T)
    logits_TV = decoder(hidden_TE)
    loss = None if labels_T is None else objectives.cross_entropy(logits_TV, labels_T)
    return leave(logits_TV, batch), loss
