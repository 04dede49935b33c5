"""Which examples a step takes, on which rank, with which random numbers: all by arithmetic.

The examples are read as one endless stream: a new permutation of them for every epoch, one after
the other. Step s takes items s·G … (s + 1)·G − 1 of it, G the batch size, whatever the number of
ranks; so where a run stands is told by its step alone, and every step is full.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import torch


def mix(*numbers: int) -> int:
    """A seed of 63 bits that depends on every one of `numbers`."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


@dataclass(frozen=True)
class Order:
    """The stream of a run.

    Attributes:
        examples: how many there are, 1 or more.
        batch_size: items of a step.
        seed: of the permutations and of each item's own seed.
    """

    examples: int
    batch_size: int
    seed: int

    def step(self, step: int, part: int = 0, parts: int = 1) -> list[tuple[int, int]]:
        """(example, seed) of the items of one of a step's `parts`, which share them out in turn."""
        start = step * self.batch_size
        return [self._item(i) for i in range(start + part, start + self.batch_size, parts)]

    def _item(self, place: int) -> tuple[int, int]:
        epoch, within = divmod(place, self.examples)
        return _permutation(self.examples, mix(self.seed, epoch))[within], mix(self.seed, place, 1)


@lru_cache(maxsize=2)  # a step may reach into the next epoch
def _permutation(examples: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = torch.randperm(examples, generator=generator).tolist()
    return order
