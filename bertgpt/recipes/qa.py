"""Answers that stand in a text: its windows, each window's likeliest span, the best of them all."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bertgpt.recipes.datasets import Question
from bertgpt.recipes.inputs import Item, batches
from bertgpt.recipes.metrics import answer_f1, exact_match, normalise
from bertgpt.recipes.recipe import Recipe

MAX_ANSWER = 30  # tokens
NOWHERE = (0, 0)  # target of a window without the answer: its first token, [CLS]


@dataclass(frozen=True)
class Answer:
    """A span of the context.

    Attributes:
        text: its text.
        start: its first character.
        log_score: log of the probability of its start times that of its end, in its window.
    """

    text: str
    start: int
    log_score: float

    @property
    def score(self) -> float:
        """The probability, which may be too small for a float."""
        return math.exp(self.log_score)


_NONE = Answer("", 0, -math.inf)


class Answerer(Recipe):
    """The span of a context that answers a question."""

    head = "ForQuestionAnswering"
    usual_length = 384  # a question needs the text around its answer
    metric = "f1"
    baseline_name = "the sentence that shares most words with the question"

    def __init__(self, model: Any, tokenizer: Any, max_length: int | None = None) -> None:
        super().__init__(model, tokenizer, max_length)
        self.longest_question = self.max_length // 3

    @classmethod
    def labels(cls, examples: Sequence[Question]) -> None:
        """None: a span has two ends and no class."""
        return

    @classmethod
    def baseline(cls, training: Sequence[Question], held: Sequence[Question]) -> dict[str, float]:
        """Figures of answering with a whole sentence."""
        return _figures([_sentence(question) for question in held], held)

    def encode(self, examples: Sequence[Question]) -> list[Item]:
        """Windows over each context, each overlapping the next; the question comes first in all."""
        pairs = [(self._question(example), example.context) for example in examples]
        self.tokenizer.enable_truncation(
            self.max_length, stride=self.max_length // 4, strategy="only_second"
        )
        coded = self.tokenizer.encode_batch(pairs)
        items = []
        for i, (example, first) in enumerate(zip(examples, coded, strict=True)):
            for window in (first, *first.overflowing):
                places = tuple(
                    offsets if part == 1 else None
                    for part, offsets in zip(window.sequence_ids, window.offsets, strict=True)
                )
                target = _target(places, *example.answers[0]) if example.answers else None
                items.append(Item(window.ids, self._types(window), target, i, places))
        return items

    def _question(self, example: Question) -> str:
        """The question, cut where it would leave no room for the context."""
        self.tokenizer.no_truncation()
        coded = self.tokenizer.encode(example.question, add_special_tokens=False)
        if len(coded.ids) <= self.longest_question:
            return example.question
        return example.question[: coded.offsets[self.longest_question - 1][1]]

    def targets(self, items: Sequence[Item]) -> tuple[dict[str, Tensor], int]:
        """`start_positions` and `end_positions` `[B]`."""
        starts, ends = torch.tensor([item.target for item in items]).unbind(-1)
        return {"start_positions": starts, "end_positions": ends}, len(items)

    def predict(self, examples: Sequence[Question]) -> list[Answer]:
        """The likeliest span of at most 30 tokens over all windows of each example.

        Raises:
            ValueError: the model's scores are no numbers.
        """
        items = self.encode(examples)
        best = [_NONE] * len(examples)
        for indices, tokens in batches(items, self.model.device):
            output = self._forward(tokens)
            ends = (output.start_logits.float().cpu(), output.end_logits.float().cpu())
            windows = zip(*(scores_T.split(tokens.lengths) for scores_T in ends), strict=True)
            for i, (start_L, end_L) in zip(indices, windows, strict=True):
                source = items[i].source
                answer = _best(start_L, end_L, items[i].places, examples[source].context)
                best[source] = max(best[source], answer, key=lambda found: found.log_score)
        return best

    def evaluate(self, examples: Sequence[Question]) -> dict[str, float]:
        """SQuAD's `f1` of words and `exact_match`, means over the questions."""
        return _figures([answer.text for answer in self.predict(examples)], examples)

    def describe(self, example: Question, prediction: Answer) -> Mapping[str, Any]:
        """`id`, `question`, `answer`, `start` and `score`."""
        return {
            "id": example.id,
            "question": example.question,
            "answer": prediction.text,
            "start": prediction.start,
            "score": round(prediction.score, 4),
        }


def _target(places: Sequence[Any], answer: str, start: int) -> tuple[int, int]:
    """First and last token of an answer, if the window holds all of it."""
    end = start + len(answer)
    tokens = [i for i, place in enumerate(places) if place and place[0] < end and place[1] > start]
    if not tokens or places[tokens[0]][0] > start or places[tokens[-1]][1] < end:
        return NOWHERE
    return tokens[0], tokens[-1]


def _best(start_L: Tensor, end_L: Tensor, places: Sequence[Any], context: str) -> Answer:
    """The likeliest span of a window's context, not empty, of at most `MAX_ANSWER` tokens."""
    inside = torch.tensor([place is not None and place[1] > place[0] for place in places])
    if not inside.any():
        return _NONE
    if start_L.isnan().any() or end_L.isnan().any():
        raise ValueError("the model's scores are NaN: its weights are broken, train it again")
    outside = ~inside
    start_L = start_L.log_softmax(-1).masked_fill(outside, -torch.inf)
    end_L = end_L.log_softmax(-1).masked_fill(outside, -torch.inf)
    pairs_LL = start_L[:, None] + end_L[None, :]
    span_LL = torch.ones_like(pairs_LL, dtype=torch.bool).triu().tril(MAX_ANSWER - 1)
    pairs_LL = pairs_LL.masked_fill(~span_LL, -torch.inf)
    first, last = divmod(int(pairs_LL.argmax()), len(places))
    begin, end = places[first][0], places[last][1]
    return Answer(context[begin:end], begin, float(pairs_LL[first, last]))


def _sentence(question: Question) -> str:
    """The first of the sentences that share most words with the question."""
    wanted = set(normalise(question.question).split())
    sentences = re.split(r"(?<=[.!?])\s+", question.context)
    return max(sentences, key=lambda s: len(wanted & set(normalise(s).split())))


def _figures(found: Sequence[str], examples: Sequence[Question]) -> dict[str, float]:
    pairs = [(a, [text for text, _ in e.answers]) for a, e in zip(found, examples, strict=True)]
    return {
        "f1": sum(answer_f1(*pair) for pair in pairs) / len(pairs),
        "exact_match": sum(exact_match(*pair) for pair in pairs) / len(pairs),
    }
