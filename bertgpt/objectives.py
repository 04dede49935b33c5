"""Losses, each over real tokens only: padding is never scored.

All are float32 means, as transformers computes them; −100 marks a token without a label. Shapes
are packed: one row per token `[T, ...]` or per sequence `[B, ...]`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bertgpt.packing import PackedBatch, pad

IGNORE = -100


def check_labels(name: str, labels: Any, beside: Tensor) -> Tensor:
    """`labels` is a tensor on the device of `beside`.

    Raises:
        TypeError: it is no tensor.
        ValueError: it lies elsewhere.
    """
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(labels).__name__}")
    if labels.device != beside.device:
        raise ValueError(f"{name} is on {labels.device}, but the model is on {beside.device}")
    return labels


def token_labels(name: str, labels: Tensor, batch: PackedBatch) -> Tensor:
    """Labels of a batch's tokens `[T]`, from `[T]`, or from the padded `[B, L]` it came from.

    Raises:
        TypeError: the labels are no tensor.
        ValueError: the labels have the shape of neither, or lie on another device.
    """
    labels = check_labels(name, labels, batch.values)
    tokens = batch.values.shape[0]
    if batch.grid is not None and labels.shape == batch.grid.shape:
        return batch.grid.select(labels)
    if batch.grid is None and labels.shape == (tokens,):
        return labels
    expected = [tokens] if batch.grid is None else list(batch.grid.shape)
    raise ValueError(f"{name} must have shape {expected}, not {list(labels.shape)}")


def cross_entropy(logits: Tensor, labels: Tensor, name: str = "labels") -> Tensor:
    """Mean cross-entropy of `logits` `[N, C]` against `labels`, N of them, −100 ignored.

    Raises:
        TypeError: labels that are no integers.
        ValueError: not one label a row, or labels on another device.
        IndexError: a label outside 0 … C − 1 on a CPU (on a GPU, PyTorch's own assertion).
    """
    labels = check_labels(name, labels, logits)
    if labels.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, not {labels.dtype}")
    if labels.numel() != logits.shape[0]:
        raise ValueError(f"{name} must have shape {[logits.shape[0]]}, not {list(labels.shape)}")
    labels = labels.reshape(-1)
    classes = logits.shape[1]
    if labels.device.type == "cpu":
        odd = labels[((labels < 0) | (labels >= classes)) & (labels != IGNORE)]
        if odd.numel():
            raise IndexError(f"{name} holds {int(odd[0])}, outside 0 … {classes - 1} and not −100")
    return F.cross_entropy(logits.float(), labels.long(), ignore_index=IGNORE)


def next_token_labels(labels: Tensor, batch: PackedBatch) -> Tensor:
    """Each token's successor's label `[T]`; a sequence's last token has none."""
    successors = torch.full_like(labels, IGNORE)
    successors[:-1] = labels[1:]
    if labels.numel():
        # An empty sequence names its predecessor's end again, or −1: the end of the whole batch.
        successors[batch.cu_seqlens[1:].long() - 1] = IGNORE
    return successors


def classification_loss(config: Any, logits: Tensor, labels: Tensor) -> Tensor:
    """Regression, single-label or multi-label loss of `logits` `[B, num_labels]`.

    `config.problem_type` says which; where it is None, one label means regression, and integer
    labels mean a single label.

    Raises:
        TypeError: labels of the wrong kind.
        ValueError: `config.problem_type` is none of the three, or labels of another shape.
    """
    labels = check_labels("labels", labels, logits)
    problem = config.problem_type
    if problem is None:
        integers = labels.dtype in (torch.int32, torch.int64)
        single = "single_label_classification" if integers else "multi_label_classification"
        problem = "regression" if config.num_labels == 1 else single
    if problem == "regression":
        if labels.numel() != logits.numel():
            raise ValueError(
                f"labels must have shape {list(logits.shape)}, not {list(labels.shape)}"
            )
        return F.mse_loss(logits.squeeze().float(), labels.squeeze().float())
    if problem == "single_label_classification":
        return cross_entropy(logits, labels)
    if problem == "multi_label_classification":
        return F.binary_cross_entropy_with_logits(logits.float(), labels.float())
    raise ValueError(
        f"config.problem_type {problem!r} is unknown: use regression, single_label_classification "
        "or multi_label_classification"
    )


def span_loss(
    logits: Tensor, start_positions: Tensor, end_positions: Tensor, batch: PackedBatch
) -> Tensor:
    """Mean of both ends' cross-entropy over each sequence's own tokens.

    Args:
        logits: `[T, 2]`, scores as start and as end.
        start_positions: `[B]` (or `[B, 1]`) columns of the padded row, or positions in the packed
            sequence; outside the row, or where it holds no token, they are ignored.
        end_positions: likewise.
        batch: the tokens' batch.

    Raises:
        TypeError: positions that are no integers.
        ValueError: not one position a sequence.
    """
    scores = pad(logits.float(), batch, fill=torch.finfo(torch.float32).min)
    real = pad(torch.ones_like(logits[:, 0], dtype=torch.bool), batch)
    rows, length = real.shape
    losses = []
    for i, (name, given) in enumerate(
        (("start_positions", start_positions), ("end_positions", end_positions))
    ):
        given = check_labels(name, given, logits)
        if given.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} must be int32 or int64, not {given.dtype}")
        if given.numel() != rows:
            raise ValueError(f"{name} must hold {rows} positions, not {list(given.shape)}")
        place = given.reshape(-1, 1).long().clamp(min=0)
        inside = place < length
        inside &= real.gather(1, place.clamp(max=max(length - 1, 0))) if length else inside
        target = place.masked_fill(~inside, IGNORE).view(-1)
        losses.append(F.cross_entropy(scores[..., i], target, ignore_index=IGNORE))
    return (losses[0] + losses[1]) / 2
