"""The commands `bertgpt finetune` and `bertgpt predict`."""

from __future__ import annotations

import json
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from bertgpt.recipes import cli

if TYPE_CHECKING:
    from bertgpt.recipes.finetune import Report


class TaskName(StrEnum):
    """What an encoder can be fine-tuned for."""

    CLASSIFY = "classify"
    PAIR = "pair"
    TAG = "tag"
    QA = "qa"


Folder = Annotated[
    Path,
    typer.Option(
        exists=True, file_okay=False, help="Folder of a BERT (or the like) and its tokenizer."
    ),
]
Threshold = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="Hand on classes whose confidence is lower."),
]


def finetune(
    task: Annotated[TaskName, typer.Argument(help="What the model is to do.")],
    model: Folder,
    data: Annotated[
        Path, typer.Option(help="Labelled data: see docs/finetuning.md for each task's format.")
    ],
    output: cli.Output,
    text: Annotated[
        str | None, typer.Option(help="Column of the text; by default text, for pairs sentence1.")
    ] = None,
    second: Annotated[
        str | None, typer.Option(help="Column of a pair's second text; by default sentence2.")
    ] = None,
    label: Annotated[str, typer.Option(help="Column of the class.")] = "label",
    max_length: Annotated[
        int | None, typer.Option(help="Longest sequence in tokens; by default 128, for qa 384.")
    ] = None,
    learning_rate: cli.LearningRate = 2e-4,
    warmup: cli.Warmup = 0.1,
    weight_decay: cli.WeightDecay = 0.01,
    clip_norm: cli.ClipNorm = 1.0,
    batch_size: cli.BatchSize = 16,
    accumulation: cli.Accumulation = 1,
    epochs: cli.Epochs = 3.0,
    max_steps: cli.MaxSteps = None,
    precision: cli.Precision = "no",
    held_out: Annotated[float, typer.Option(help="Share of the data to measure on.")] = 0.2,
    threshold: Threshold = None,
    seed: cli.Seed = 0,
    checkpoint_every: cli.CheckpointEvery = 100,
    resume: cli.Resume = False,
    cpu: cli.Cpu = False,
) -> None:
    """Fine-tune a BERT on labelled data, and measure it on a part that is held out."""
    pair = task is TaskName.PAIR
    if second is not None and not pair:
        raise typer.BadParameter("only a pair has a second text", param_hint="--second")
    if threshold is not None and task not in (TaskName.CLASSIFY, TaskName.PAIR):
        raise typer.BadParameter("only classes are handed on", param_hint="--threshold")
    from bertgpt.recipes import finetune as recipes
    from bertgpt.recipes.classify import Classifier
    from bertgpt.recipes.settings import Settings

    settings = Settings(
        output,
        learning_rate=learning_rate,
        warmup=warmup,
        weight_decay=weight_decay,
        clip_norm=clip_norm,
        batch_size=batch_size,
        accumulation=accumulation,
        epochs=epochs,
        max_steps=max_steps,
        precision=precision,
        seed=seed,
        checkpoint_every=checkpoint_every,
        cpu=cpu,
    )
    columns = recipes.Columns(
        text or ("sentence1" if pair else "text"),
        (second or "sentence2") if pair else None,
        label,
    )
    with cli.stopping():
        recipe, report, held = recipes.finetune(
            task.value,
            model,
            data,
            settings,
            columns=columns,
            max_length=max_length,
            held_out=held_out,
            threshold=threshold,
            resume=resume,
            console=cli.console(),
        )
    screen = Console(soft_wrap=True, quiet=os.environ.get("RANK", "0") != "0")
    screen.print(_table(report, recipe.baseline_name))
    if threshold is not None and isinstance(recipe, Classifier):
        handed = recipe.hand_on(held, threshold)
        right = f", {handed.accuracy:.1%} of them right" if handed.kept else ""
        screen.print(
            f"At confidence {threshold} and more: {handed.kept} predictions{right}; "
            f"{handed.handed_on} handed on"
        )
    screen.print(f"{output}: the model; `bertgpt predict {output} FILE` uses it")


def predict(
    model: Annotated[
        Path, typer.Argument(exists=True, file_okay=False, help="Folder that finetune wrote.")
    ],
    data: Annotated[Path, typer.Argument(help="Data as for finetune; labels may be left out.")],
    output: Annotated[Path | None, typer.Option(help="Write here, not to standard output.")] = None,
    threshold: Threshold = None,
    device: Annotated[
        str | None, typer.Option(help="Such as cpu or cuda; by default a GPU if any.")
    ] = None,
) -> None:
    """Predict by a fine-tuned model: a line of JSON for each example."""
    if output is not None and (output.is_dir() or not output.parent.is_dir()):
        raise typer.BadParameter(f"{output} cannot be a file here", param_hint="--output")
    from bertgpt.cli import as_device
    from bertgpt.recipes.classify import Classifier
    from bertgpt.recipes.finetune import Predictor

    predictor = Predictor.from_folder(model, device=as_device(device)).with_threshold(threshold)
    if threshold is not None and not isinstance(predictor.recipe, Classifier):
        raise typer.BadParameter("only classes are handed on", param_hint="--threshold")
    lines = [json.dumps(line, ensure_ascii=False) for line in predictor.predict(data)]
    whole = "".join(f"{line}\n" for line in lines)
    if output is None:
        sys.stdout.write(whole)
    else:
        output.write_text(whole, "utf-8")


def _table(report: Report, baseline: str) -> Table:
    table = Table(title=f"{report.training} examples trained on, {report.held_out} held out")
    for column in ("held out", "baseline", "before", "after"):
        table.add_column(column, justify="left" if column == "held out" else "right")
    for name, value in report.after.items():
        figures = (report.baseline[name], report.before[name], value)
        table.add_row(name, *(f"{figure:.3f}" for figure in figures))
    table.caption = f"baseline: {baseline}"
    return table
