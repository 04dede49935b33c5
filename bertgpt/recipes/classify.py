"""Classes of texts and of text pairs, each with a confidence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bertgpt.recipes.datasets import Text
from bertgpt.recipes.inputs import Item, batches
from bertgpt.recipes.metrics import accuracy, macro_f1
from bertgpt.recipes.recipe import Recipe


@dataclass(frozen=True)
class Verdict:
    """A class and its probability, to 4 digits: what is shown is what thresholds compare."""

    label: str
    confidence: float


@dataclass(frozen=True)
class HandOn:
    """What a threshold of confidence does to predictions.

    Attributes:
        kept: how many reach it.
        handed_on: how many fall under it.
        accuracy: of those kept; 1 where none is.
    """

    kept: int
    handed_on: int
    accuracy: float


class Classifier(Recipe):
    """A text's class, or a pair's."""

    head = "ForSequenceClassification"
    metric = "accuracy"
    baseline_name = "the commonest class"

    def __init__(self, model: Any, tokenizer: Any, max_length: int | None = None) -> None:
        super().__init__(model, tokenizer, max_length)
        tokenizer.enable_truncation(self.max_length)

    @classmethod
    def labels(cls, examples: Sequence[Text]) -> list[str]:
        """Names of the classes that occur, 2 or more."""
        names = sorted({example.label for example in examples})
        if len(names) < 2:
            raise ValueError(f"every example is of class {names[0]!r}: give two classes or more")
        return names

    @classmethod
    def baseline(cls, training: Sequence[Text], held: Sequence[Text]) -> dict[str, float]:
        """Figures of always answering the commonest class."""
        commonest = Counter(example.label for example in training).most_common(1)[0][0]
        return _figures([commonest] * len(held), held)

    def encode(self, examples: Sequence[Text]) -> list[Item]:
        """One sequence an example, cut at `max_length`: the longer text of a pair first.

        Raises:
            ValueError: a label that the model does not know.
        """
        texts = [e.text if e.second is None else (e.text, e.second) for e in examples]
        known = {name: i for i, name in self.model.config.id2label.items()}
        items = []
        for i, (example, coded) in enumerate(
            zip(examples, self.tokenizer.encode_batch(texts), strict=True)
        ):
            if example.label and example.label not in known:
                raise ValueError(
                    f"{example.where}: unknown label {example.label!r}: the model has "
                    f"{', '.join(known)}"
                )
            target = known[example.label] if example.label else None
            items.append(Item(coded.ids, self._types(coded), target, i))
        return items

    def targets(self, items: Sequence[Item]) -> tuple[dict[str, Tensor], int]:
        """`labels` `[B]`."""
        return {"labels": torch.tensor([item.target for item in items])}, len(items)

    def predict(self, examples: Sequence[Text]) -> list[Verdict]:
        """The likeliest class of each example."""
        items = self.encode(examples)
        names = self.model.config.id2label
        found: dict[int, Verdict] = {}
        for indices, tokens in batches(items, self.model.device):
            likely_BC = self._forward(tokens).logits.float().softmax(-1).cpu()
            best_B = likely_BC.max(-1)
            rows = zip(indices, best_B.indices.tolist(), best_B.values.tolist(), strict=True)
            found.update({i: Verdict(names[c], round(p, 4)) for i, c, p in rows})
        return [found[i] for i in range(len(items))]

    def evaluate(self, examples: Sequence[Text]) -> dict[str, float]:
        """`accuracy`, and `macro_f1` over the classes."""
        return _figures([verdict.label for verdict in self.predict(examples)], examples)

    def hand_on(self, examples: Sequence[Text], threshold: float) -> HandOn:
        """What a threshold would hand on of labelled examples, and how good the rest is."""
        verdicts = self.predict(examples)
        kept = [
            (verdict.label, example.label)
            for verdict, example in zip(verdicts, examples, strict=True)
            if verdict.confidence >= threshold
        ]
        right = sum(a == b for a, b in kept) / len(kept) if kept else 1.0
        return HandOn(len(kept), len(examples) - len(kept), right)

    def describe(self, example: Text, prediction: Verdict) -> Mapping[str, Any]:
        """`text` (and `second`), `label`, `confidence`."""
        texts = {"text": example.text}
        if example.second is not None:
            texts["second"] = example.second
        return {**texts, "label": prediction.label, "confidence": prediction.confidence}


def _figures(found: Sequence[str], examples: Sequence[Text]) -> dict[str, float]:
    true = [example.label for example in examples]
    return {"accuracy": accuracy(found, true), "macro_f1": macro_f1(found, true)}
