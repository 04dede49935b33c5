"""What the recipes of fine-tuning share: a model with a head, and batches of encoded examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from bertgpt.packing import PackedBatch
from bertgpt.recipes.inputs import Item, pack_items
from bertgpt.recipes.task import Batch

_LEAST = 16  # tokens of a sequence: room for special tokens, a question and some of its context


class Recipe:
    """Base of the recipes.

    Args:
        model: one of BERT's or a family like it, with the head that is wanted.
        tokenizer: one of the `tokenizers` library, without padding and truncation.
        max_length: longest sequence in tokens; by default `usual_length`, or the model's positions
            if those are fewer.

    Attributes:
        head: what follows the family's name in the name of a model with the head that is wanted.
        usual_length: longest sequence where nothing else is said, in tokens.
        metric: the figure that says how good predictions are, one of `evaluate`'s.
        baseline_name: what `baseline` does, in words.

    Raises:
        ValueError: `max_length` is too small, or more than the model has positions.
    """

    head: ClassVar[str]
    usual_length: ClassVar[int] = 128
    metric: ClassVar[str]
    baseline_name: ClassVar[str]

    def __init__(self, model: Any, tokenizer: Any, max_length: int | None = None) -> None:
        limits = model.base_model.limits
        positions = limits.longest
        if max_length is None:
            max_length = min(self.usual_length, positions)
        if not min(_LEAST, positions) <= max_length <= positions:
            raise ValueError(
                f"max_length must lie between {min(_LEAST, positions)} and the model's {positions} "
                f"positions, not {max_length}"
            )
        self.model, self.tokenizer, self.max_length = model, tokenizer, max_length
        self._parted = limits.types > 1

    @classmethod
    def labels(cls, examples: Sequence[Any]) -> list[str] | None:
        """Names of the classes that occur, None where the head has none.

        Raises:
            ValueError: too few of them to learn anything.
        """
        raise NotImplementedError

    @classmethod
    def baseline(cls, training: Sequence[Any], held: Sequence[Any]) -> dict[str, float]:
        """`evaluate`'s figures of predictions that need no model."""
        raise NotImplementedError

    def encode(self, examples: Sequence[Any]) -> list[Item]:
        """Sequences of the examples, with targets where the examples have labels."""
        raise NotImplementedError

    def targets(self, items: Sequence[Item]) -> tuple[dict[str, Tensor], int]:
        """The model's arguments that name the targets, and how many of them there are."""
        raise NotImplementedError

    def predict(self, examples: Sequence[Any]) -> list[Any]:
        """One prediction an example."""
        raise NotImplementedError

    def evaluate(self, examples: Sequence[Any]) -> dict[str, float]:
        """How good predictions of labelled examples are."""
        raise NotImplementedError

    def describe(self, example: Any, prediction: Any) -> Mapping[str, Any]:
        """A prediction as it is written in JSON."""
        raise NotImplementedError

    def _types(self, coded: Any) -> list[int]:
        """A tokenizer's types of tokens, for a model that tells a pair's texts apart by them."""
        return coded.type_ids if self._parted else [0] * len(coded.ids)

    def collate(self, items: Sequence[Item], seeds: Sequence[int]) -> Batch:
        """A batch to learn from; nothing in it is random."""
        labels, count = self.targets(items)
        return Batch(pack_items(items), labels, {"loss": count})

    @torch.inference_mode()
    def _forward(self, tokens: PackedBatch) -> Any:
        self.model.eval()
        return self.model(tokens, return_dict=True)
