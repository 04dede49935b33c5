"""Accuracy, F1 of classes, of spans and of answers."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence

Span = tuple[str, int, int]  # type, first word, one past the last


def accuracy(found: Sequence[str], true: Sequence[str]) -> float:
    """Share of equal labels."""
    return sum(a == b for a, b in zip(found, true, strict=True)) / len(true)


def macro_f1(found: Sequence[str], true: Sequence[str]) -> float:
    """Mean over the true classes of the harmonic mean of precision and recall."""
    hits = Counter(a for a, b in zip(found, true, strict=True) if a == b)
    drawn, wanted = Counter(found), Counter(true)
    return sum(2 * hits[c] / (drawn[c] + wanted[c]) for c in wanted) / len(wanted)


def spans(tags: Sequence[str]) -> list[Span]:
    """Spans of BIO tags; an I- that goes on nothing of its type begins a span."""
    found: list[Span] = []
    begin, kind = 0, ""
    for i, tag in enumerate([*tags, "O"]):
        state, _, name = tag.partition("-")
        if kind and (state != "I" or name != kind):
            found.append((kind, begin, i))
            kind = ""
        if state != "O" and not kind:
            begin, kind = i, name
    return found


def span_f1(found: Iterable[Sequence[str]], true: Iterable[Sequence[str]]) -> float:
    """Micro-averaged F1 of whole spans, type and both ends right, over sentences of BIO tags."""
    hits = drawn = wanted = 0
    for mine, theirs in zip(found, true, strict=True):
        a, b = set(spans(mine)), set(spans(theirs))
        hits, drawn, wanted = hits + len(a & b), drawn + len(a), wanted + len(b)
    return 2 * hits / (drawn + wanted) if drawn + wanted else 1.0


def normalise(answer: str) -> str:
    """An answer as SQuAD compares it: no case, punctuation, articles, or runs of spaces."""
    bare = "".join(letter for letter in answer.lower() if letter not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def exact_match(found: str, true: Iterable[str]) -> float:
    """1 where the answer equals one of those given, normalised; else 0.

    Source: Rajpurkar et al., "SQuAD: 100,000+ Questions for Machine Comprehension of Text", 2016.
    """
    return float(normalise(found) in {normalise(answer) for answer in true})


def answer_f1(found: str, true: Iterable[str]) -> float:
    """Best F1 of the words shared with one of the answers given, normalised; source as above."""
    mine = normalise(found).split()

    def f1(answer: str) -> float:
        theirs = normalise(answer).split()
        shared = (Counter(mine) & Counter(theirs)).total()
        if not mine or not theirs:
            return float(mine == theirs)
        return 2 * shared / (len(mine) + len(theirs))

    return max(f1(answer) for answer in true)
