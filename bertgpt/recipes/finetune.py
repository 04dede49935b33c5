"""Fine-tuning from a folder and data to a folder, and predictions from what it leaves behind."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bertgpt.auto import encoder_class
from bertgpt.checkpoint import read_json
from bertgpt.configuration import PretrainedConfig
from bertgpt.recipes.classify import Classifier
from bertgpt.recipes.datasets import read_questions, read_sentences, read_texts
from bertgpt.recipes.loop import train
from bertgpt.recipes.qa import Answerer
from bertgpt.recipes.recipe import Recipe
from bertgpt.recipes.settings import Settings
from bertgpt.recipes.split import hold_out
from bertgpt.recipes.tag import Tagger
from bertgpt.recipes.task import Task
from bertgpt.recipes.text import copy_tokenizer
from bertgpt.text import load_tokenizer

FACTS = "finetuning.json"
RECIPES: dict[str, type[Recipe]] = {
    "classify": Classifier,
    "pair": Classifier,
    "tag": Tagger,
    "qa": Answerer,
}


@dataclass(frozen=True)
class Columns:
    """Where a table keeps its texts and classes.

    Attributes:
        text: column of the text.
        second: column of the text beside it, None where there is one only.
        label: column of the class.
    """

    text: str = "text"
    second: str | None = None
    label: str = "label"


@dataclass(frozen=True)
class Report:
    """What fine-tuning came to.

    Attributes:
        training: examples trained on.
        held_out: examples held out.
        baseline: figures of predictions that need no model, on those held out.
        before: the model's figures on them with its new head.
        after: its figures after training, empty until they are measured.
    """

    training: int
    held_out: int
    baseline: dict[str, float]
    before: dict[str, float]
    after: dict[str, float]


def read_examples(task: str, data: Path, columns: Columns, *, labelled: bool = True) -> list[Any]:
    """Examples of a task, from the format that it reads; errors as in `datasets`."""
    if task == "tag":
        return read_sentences(data, tagged=labelled)
    if task == "qa":
        return read_questions(data, answered=labelled)
    label = columns.label if labelled else None
    return read_texts(data, text=columns.text, second=columns.second, label=label)


def new_recipe(
    task: str, folder: Path, examples: Sequence[Any], max_length: int | None = None, seed: int = 0
) -> Recipe:
    """A recipe whose model is a folder's encoder with a head for the examples' classes.

    A folder that has such a head already keeps it, and its classes; if they have no names but
    LABEL_0 and so on, the examples' are theirs. Weights are float32 whatever is stored.

    Args:
        task: one of `RECIPES`.
        folder: of BERT or a family like it, with its tokenizer.
        examples: whose classes the head is for.
        max_length: longest sequence in tokens; by default the recipe's usual one.
        seed: of a new head's weights.

    Raises:
        FileNotFoundError: a file of the model or its tokenizer is missing.
        ValueError: a file is broken; the examples have too few classes, or another number than
            a head without names; `max_length` is too long.
    """
    kind = RECIPES[task]
    named: dict[str, Any] = {}
    names = kind.labels(examples)
    model_class = encoder_class(folder, kind.head)
    stored = model_class.config_class.from_pretrained(folder)
    if any(name.endswith(kind.head) for name in stored.architectures or []):
        names = _names_of_nameless(stored, names)
    if names is not None:
        named = {
            "id2label": dict(enumerate(names)),
            "label2id": {name: i for i, name in enumerate(names)},
        }
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(seed)
        warnings.filterwarnings("ignore", message=".* has no weights for")  # the head is new
        model = model_class.from_pretrained(folder, dtype=torch.float32, **named)
    return kind(model, load_tokenizer(folder), max_length)


def _names_of_nameless(stored: PretrainedConfig, names: list[str] | None) -> list[str] | None:
    """What a stored head's classes are to be called, if their names say nothing; else None.

    Stock numbers classes that nobody named, and leaves even that out where they are two.
    """
    numbered = [f"LABEL_{i}" for i in range(stored.num_labels)]
    if names is None or (stored.id2label and list(stored.id2label.values()) != numbered):
        return None
    if set(names) <= set(numbered):
        return numbered
    if len(names) != stored.num_labels:
        raise ValueError(
            f"the model's head has {stored.num_labels} classes without names, the data has "
            f"{len(names)} ({', '.join(names)}): take the model without its head"
        )
    return names


def fit(
    recipe: Recipe,
    training: Sequence[Any],
    held: Sequence[Any],
    settings: Settings,
    *,
    write: Callable[[Report], None] = lambda _: None,
    resume: bool = False,
    console: Console | None = None,
) -> Report:
    """Trains a recipe's model in place, and measures it on held-out examples before and after.

    `write` is called once the model is in its folder, with a report that lacks the figures after
    training, and again with all. What `bertgpt.recipes.loop.train` leaves in the output folder and
    raises, this does too.
    """
    items = recipe.encode(training)
    recipe.encode(held)  # a label that the model does not know is found before the work
    recipe.model.to(_device(settings))
    before = recipe.evaluate(held)  # of a run that is resumed, too: its checkpoint is read later
    report = Report(len(training), len(held), recipe.baseline(training, held), before, {})

    def measure(model: Any) -> None:
        recipe.model = model
        report.after.update(recipe.evaluate(held))
        write(report)

    train(
        Task(recipe.model, recipe.collate),
        items,
        settings,
        beside=lambda: write(report),
        measure=measure,
        resume=resume,
        console=console,
    )
    return report


def _device(settings: Settings) -> torch.device:
    """Where this rank's model is going to be trained."""
    if settings.cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def finetune(
    task: str,
    folder: Path,
    data: Path,
    settings: Settings,
    *,
    columns: Columns | None = None,
    max_length: int | None = None,
    held_out: float = 0.2,
    threshold: float | None = None,
    resume: bool = False,
    console: Console | None = None,
) -> tuple[Recipe, Report, list[Any]]:
    """Fine-tunes an encoder on labelled data and writes a folder that stock transformers loads.

    Args:
        task: one of `RECIPES`.
        folder: the encoder and its tokenizer.
        data: labelled data, in the format of the task.
        settings: the run; its `output` becomes the model's folder, tokenizer and figures included.
        columns: where a table keeps its texts and classes.
        max_length: longest sequence in tokens; by default the recipe's usual one.
        held_out: share of the data to measure on.
        threshold: confidence under which predictions are to be handed on, kept for `predict`.
        resume: go on from the checkpoint in the output folder.
        console: where a progress bar goes.

    Returns:
        The recipe with its trained model, its figures, and the examples held out.

    Raises:
        FileNotFoundError: the data or a file of the model is missing.
        FileExistsError: the output folder holds something, and the run is not to resume.
        ValueError: data or a setting is wrong; the message names the file and line.
    """
    columns = columns or Columns()
    examples = read_examples(task, data, columns)
    training, held = hold_out(examples, held_out, settings.seed)
    recipe = new_recipe(task, folder, examples, max_length, settings.seed)

    def write(report: Report) -> None:
        if os.environ.get("RANK", "0") != "0":
            return
        copy_tokenizer(folder, settings.output)
        facts = {
            "task": task,
            "columns": asdict(columns),
            "max_length": recipe.max_length,
            "threshold": threshold,
            **asdict(report),
        }
        (settings.output / FACTS).write_text(json.dumps(facts, indent=2) + "\n", "utf-8")

    report = fit(recipe, training, held, settings, write=write, resume=resume, console=console)
    return recipe, report, held


@dataclass(frozen=True)
class Predictor:
    """A fine-tuned folder, ready to predict.

    Attributes:
        task: what it was fine-tuned for.
        recipe: model and tokenizer.
        columns: where tables keep their texts.
        threshold: confidence under which a class is handed on; None hands nothing on.
    """

    task: str
    recipe: Recipe
    columns: Columns
    threshold: float | None

    @classmethod
    def from_folder(cls, folder: Path, *, device: str = "cpu") -> Predictor:
        """Opens what `finetune` wrote.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: the folder was not made by `finetune`, or is broken.
        """
        facts = read_json(folder / FACTS, "`bertgpt finetune` writes it, fine-tune the model first")
        try:
            task, columns = facts["task"], Columns(**facts["columns"])
            kind, max_length, threshold = RECIPES[task], facts["max_length"], facts["threshold"]
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{folder} has no sound {FACTS}, as `bertgpt finetune` leaves it ({error!r})"
            ) from None
        model = encoder_class(folder, kind.head).from_pretrained(folder).to(device)
        return cls(task, kind(model, load_tokenizer(folder), max_length), columns, threshold)

    def predict(self, data: Path) -> Iterator[Mapping[str, Any]]:
        """One JSON object an example of a file; labels need not be there, and are not read.

        A classification under the threshold says `"handed_on": true`.
        """
        examples = read_examples(self.task, data, self.columns, labelled=False)
        for example, found in zip(examples, self.recipe.predict(examples), strict=True):
            line = self.recipe.describe(example, found)
            if self.threshold is not None and isinstance(self.recipe, Classifier):
                line = {**line, "handed_on": found.confidence < self.threshold}
            yield line

    def with_threshold(self, threshold: float | None) -> Predictor:
        """The same with another threshold, if one is given."""
        return self if threshold is None else replace(self, threshold=threshold)
