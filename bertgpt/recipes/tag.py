"""Spans of words: a word's first piece carries its tag, and tags come back word by word."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bertgpt.objectives import IGNORE
from bertgpt.recipes.datasets import Sentence
from bertgpt.recipes.inputs import Item, batches
from bertgpt.recipes.metrics import accuracy, span_f1, spans
from bertgpt.recipes.recipe import Recipe

Tags = list[str]


class Tagger(Recipe):
    """BIO tags of a sentence's words."""

    head = "ForTokenClassification"
    metric = "span_f1"
    baseline_name = "each word's commonest tag, O where it is new"

    def __init__(self, model: Any, tokenizer: Any, max_length: int | None = None) -> None:
        super().__init__(model, tokenizer, max_length)
        tokenizer.enable_truncation(self.max_length)
        pieces = tokenizer.pre_tokenizer
        if hasattr(pieces, "add_prefix_space"):  # words come one by one, and follow a space
            pieces.add_prefix_space = True

    @classmethod
    def labels(cls, examples: Sequence[Sentence]) -> list[str]:
        """O, then the other tags that occur."""
        names = {tag for example in examples for tag in example.tags} - {"O"}
        if not names:
            raise ValueError("every word is tagged O: there is no span to learn")
        return ["O", *sorted(names)]

    @classmethod
    def baseline(cls, training: Sequence[Sentence], held: Sequence[Sentence]) -> dict[str, float]:
        """Figures of tagging each word as it was tagged most often."""
        seen: dict[str, Counter[str]] = defaultdict(Counter)
        for sentence in training:
            for word, tag in zip(sentence.words, sentence.tags, strict=True):
                seen[word][tag] += 1
        commonest = {word: tags.most_common(1)[0][0] for word, tags in seen.items()}
        return _figures([[commonest.get(word, "O") for word in s.words] for s in held], held)

    def encode(self, examples: Sequence[Sentence]) -> list[Item]:
        """Sequences of at most `max_length`, as many as a sentence needs.

        Raises:
            ValueError: a tag that the model does not know.
        """
        known = {name: i for i, name in self.model.config.id2label.items()}
        coded = self.tokenizer.encode_batch([list(e.words) for e in examples], is_pretokenized=True)
        items = []
        for i, (example, first) in enumerate(zip(examples, coded, strict=True)):
            for tag in example.tags:
                if tag not in known:
                    raise ValueError(
                        f"{example.where}: unknown tag {tag!r}: the model has {', '.join(known)}"
                    )
            last = None
            for window in (first, *first.overflowing):
                places: list[int | None] = []
                for word in window.word_ids:
                    begins = word is not None and word != last
                    places.append(word if begins else None)
                    last = last if word is None else word
                target = None
                if example.tags:
                    target = [IGNORE if w is None else known[example.tags[w]] for w in places]
                items.append(Item(window.ids, self._types(window), target, i, tuple(places)))
        return items

    def targets(self, items: Sequence[Item]) -> tuple[dict[str, Tensor], int]:
        """`labels` `[T]`, −100 for all but first pieces."""
        labels = torch.tensor([label for item in items for label in item.target])
        return {"labels": labels}, int((labels != IGNORE).sum())

    def predict(self, examples: Sequence[Sentence]) -> list[Tags]:
        """A tag for each word; O for a word of which the tokenizer keeps nothing."""
        items = self.encode(examples)
        names = self.model.config.id2label
        found = [["O"] * len(example.words) for example in examples]
        for indices, tokens in batches(items, self.model.device):
            best_T = self._forward(tokens).logits.argmax(-1).cpu()
            for i, best in zip(indices, best_T.split(tokens.lengths), strict=True):
                for word, tag in zip(items[i].places, best.tolist(), strict=True):
                    if word is not None:
                        found[items[i].source][word] = names[tag]
        return found

    def evaluate(self, examples: Sequence[Sentence]) -> dict[str, float]:
        """`span_f1` of whole spans, and `accuracy` over words."""
        return _figures(self.predict(examples), examples)

    def describe(self, example: Sentence, prediction: Tags) -> Mapping[str, Any]:
        """`words`, `tags`, and `spans` with their type, text, first word and one past the last."""
        found = [
            {"type": kind, "text": " ".join(example.words[start:end]), "start": start, "end": end}
            for kind, start, end in spans(prediction)
        ]
        return {"words": list(example.words), "tags": prediction, "spans": found}


def _figures(found: Sequence[Tags], examples: Sequence[Sentence]) -> dict[str, float]:
    flat = [tag for tags in found for tag in tags]
    true = [tag for example in examples for tag in example.tags]
    return {
        "span_f1": span_f1(found, [example.tags for example in examples]),
        "accuracy": accuracy(flat, true),
    }
