"""`bertgpt pretrain`: the command line of the recipes. Nothing heavy is imported before a run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

Data = Annotated[Path, typer.Option(exists=True, help="A UTF-8 .txt file, or a folder of them.")]
Output = Annotated[Path, typer.Option(file_okay=False, help="Folder to write, new or empty.")]
LearningRate = Annotated[float, typer.Option(help="Peak of the schedule.")]
Warmup = Annotated[float, typer.Option(help="Rise to the peak: a share of the steps, or steps.")]
WeightDecay = Annotated[float, typer.Option(help="AdamW's, for matrices.")]
ClipNorm = Annotated[float, typer.Option(help="Largest norm of the gradient; inf for no limit.")]
BatchSize = Annotated[int, typer.Option(help="Sequences of a step, over all ranks and parts.")]
Accumulation = Annotated[int, typer.Option(help="Parts that a rank computes a step in.")]
Epochs = Annotated[float, typer.Option(help="Passes over the data.")]
MaxSteps = Annotated[int | None, typer.Option(help="Steps, in place of --epochs.")]
Precision = Annotated[str, typer.Option(help="no, bf16 or fp16.")]
Seed = Annotated[int, typer.Option(help="Of weights, order, masks and dropout.")]
CheckpointEvery = Annotated[int, typer.Option(help="Steps between checkpoints.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the output's checkpoint.")]
Cpu = Annotated[bool, typer.Option("--cpu", help="Stay on the CPU.")]


class Kind(StrEnum):
    """What `bertgpt pretrain` trains."""

    BERT = "bert"
    GPT = "gpt"


def pretrain(
    kind: Annotated[Kind, typer.Argument(help="Masked words and next sentences, or next words.")],
    data: Data,
    tokenizer: Annotated[
        Path, typer.Option(exists=True, help="Its folder, tokenizer.json or vocab.txt.")
    ],
    output: Output,
    width: Annotated[int, typer.Option(help="Hidden size.")] = 128,
    layers: Annotated[int, typer.Option(help="Number of layers.")] = 2,
    heads: Annotated[int, typer.Option(help="Attention heads of a layer.")] = 2,
    length: Annotated[int, typer.Option(help="Longest sequence, in tokens.")] = 128,
    held_out: Annotated[float, typer.Option(help="Share of the text to measure on.")] = 0.05,
    learning_rate: LearningRate = 1e-3,
    warmup: Warmup = 0.1,
    weight_decay: WeightDecay = 0.01,
    clip_norm: ClipNorm = 1.0,
    batch_size: BatchSize = 32,
    accumulation: Accumulation = 1,
    epochs: Epochs = 1.0,
    max_steps: MaxSteps = None,
    precision: Precision = "no",
    seed: Seed = 0,
    checkpoint_every: CheckpointEvery = 100,
    resume: Resume = False,
    cpu: Cpu = False,
) -> None:
    """Train a BERT or a GPT-2 from nothing on text; also under torchrun or accelerate launch."""
    from bertgpt.recipes.pretrain import Size, pretrain
    from bertgpt.recipes.settings import Settings

    settings = Settings(
        output=output,
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
    size = Size(width, layers, heads, length)
    with stopping():
        pretrain(
            kind.value,
            data,
            tokenizer,
            size,
            settings,
            held_out=held_out,
            resume=resume,
            console=console(),
        )


def console() -> Console:
    """Standard error, on the first rank only."""
    return Console(stderr=True, quiet=os.environ.get("RANK", "0") != "0")


@contextmanager
def stopping() -> Iterator[None]:
    """Ends a run that a signal or a lost loss stopped: one line, and an exit code that says which.

    128 plus the signal's number, as shells have it; 1 for the loss.
    """
    from bertgpt.recipes.loop import Interrupted

    try:
        yield
    except Interrupted as stop:
        console().print(str(stop), style="yellow", markup=False)
        raise typer.Exit(128 + stop.signal) from None
    except FloatingPointError as lost:
        console().print(f"error: {lost}", style="bold red", markup=False)
        raise typer.Exit(1) from None
