"""Which examples are held out: seeded, in like shares of each class, and no text on both sides."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Protocol, TypeVar


class Example(Protocol):
    """What a split asks of an example."""

    @property
    def group(self) -> str:
        """Examples of one group stay together."""

    @property
    def stratum(self) -> str:
        """Both parts hold like shares of each."""


Kind = TypeVar("Kind", bound=Example)


def hold_out(
    examples: Sequence[Kind], fraction: float = 0.2, seed: int = 0
) -> tuple[list[Kind], list[Kind]]:
    """Parts examples into those to train on and those held out, each in the order given.

    Args:
        examples: what is parted. Equal texts (or questions on one article) go the same way, so
            that what is held out was never seen.
        fraction: share of the groups of each stratum to hold out.
        seed: decides which.

    Raises:
        ValueError: one of the parts would be empty.
    """
    if not 0.0 < fraction < 1.0:
        raise ValueError(f"the fraction to hold out must lie between 0 and 1, not {fraction}")
    strata: dict[str, list[str]] = {}
    seen = set()
    for example in examples:
        if example.group not in seen:
            seen.add(example.group)
            strata.setdefault(example.stratum, []).append(example.group)
    chosen: set[str] = set()
    draw = random.Random(seed)
    for _, groups in sorted(strata.items()):
        draw.shuffle(groups)
        chosen.update(groups[: round(fraction * len(groups))])
    training = [example for example in examples if example.group not in chosen]
    held = [example for example in examples if example.group in chosen]
    if not training or not held:
        raise ValueError(
            f"{len(examples)} examples are too few to train on some and hold {fraction:.0%} out: "
            "give more data"
        )
    return training, held
