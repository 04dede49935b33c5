"""Encoded examples, and their batches for a model that learns or predicts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bertgpt.embedding import batches_by_length
from bertgpt.packing import PackedBatch, pack


@dataclass(frozen=True)
class Item:
    """One sequence for the model: a text, or a window of one that is too long.

    Attributes:
        ids: token ids, special tokens included.
        types: 0 for tokens of the first text, 1 for those of the second.
        target: what the model is to learn of it, in the task's own form; None if unknown.
        source: index of the example that it is from.
        places: what each token stands for in the example, in the task's own form; None for tokens
            that stand for nothing.
    """

    ids: list[int]
    types: list[int]
    target: Any = None
    source: int = 0
    places: tuple[Any, ...] = ()


def pack_items(items: Sequence[Item], device: torch.device | str = "cpu") -> PackedBatch:
    """The items' tokens as one batch, their types left out where all are 0."""
    types = [item.types for item in items] if any(any(item.types) for item in items) else None
    return pack([item.ids for item in items], token_type_ids=types, device=device)


def batches(
    items: Sequence[Item], device: torch.device | str
) -> Iterator[tuple[list[int], PackedBatch]]:
    """(indices of items, their tokens), neighbours in length together, bounded in tokens."""
    lengths = [len(item.ids) for item in items]
    order = sorted(range(len(items)), key=lengths.__getitem__)
    for indices in batches_by_length(order, lengths):
        yield indices, pack_items([items[i] for i in indices], device)
