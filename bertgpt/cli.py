"""The `bertgpt` command: every subcommand, and how a mistake of the caller ends.

A caller's mistake ends in one line that says what to do, without a traceback: exit code 2 for the
command line itself, 1 for anything else. Libraries are imported by the command that needs them.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from bertgpt import bench, generate_command
from bertgpt.recipes import cli as recipes
from bertgpt.recipes import finetune_cli

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Fused attention, GELU FFN and paged decoding for BERT and GPT-2.",
)
app.add_typer(bench.app, name="bench")
app.command()(recipes.pretrain)
app.command()(finetune_cli.finetune)
app.command()(finetune_cli.predict)
app.command()(generate_command.generate)
Device = Annotated[str | None, typer.Option(help="Such as cpu or cuda; by default a GPU if any.")]


def _folder(help: str) -> Any:
    return typer.Argument(exists=True, file_okay=False, help=help)


@app.command()
def doctor() -> None:
    """Say what this machine can run, and why not more."""
    from bertgpt.doctor import report

    report(Console())


@app.command()
def validate(
    op: Annotated[
        str | None, typer.Option(help="One op, such as attention; by default all.")
    ] = None,
    device: Device = None,
) -> None:
    """Measure the error of every op, backend and dtype against the float64 reference."""
    from bertgpt import validate as validation

    rows = validation.run(op=op, device=None if device is None else as_device(device))
    validation.print_table(rows)
    raise typer.Exit(0 if all(row.verdict != "FAIL" for row in rows) else 1)


@app.command()
def demo() -> None:
    """Run two real models, side by side with transformers."""
    # Read when torch is imported: on a busy machine, threads that wait by spinning take minutes.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from bertgpt.demo import main as run_demo

    raise typer.Exit(run_demo(Console()))


@app.command()
def embed(
    model: Annotated[Path, _folder("Folder of a BERT (or the like) and its tokenizer.")],
    file: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, help="Text file, one text a line.")
    ],
    output: Annotated[
        Path | None, typer.Option(help="Write a NumPy array [lines, E] here.")
    ] = None,
    device: Device = None,
) -> None:
    """Turn each line of a file into a vector, printed one a line or written as .npy."""
    if output is not None and output.suffix != ".npy":
        raise typer.BadParameter(f"{output} must end in .npy", param_hint="--output")
    if output is not None and (output.is_dir() or not output.parent.is_dir()):
        raise typer.BadParameter(f"{output} cannot be a file here", param_hint="--output")
    import numpy as np
    from rich.progress import Progress

    from bertgpt.embedding import SentenceEncoder

    lines = _read_lines(file)
    encoder = SentenceEncoder.from_pretrained(model, device=as_device(device))
    token_ids = encoder.tokenize(lines)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("Embedding", total=len(lines))
        vectors = encoder.encode_ids(token_ids, lambda count: progress.advance(task, count)).numpy()
    cut = sum(len(ids) == encoder.max_length for ids in token_ids)
    if cut:
        typer.echo(
            f"{cut} of {len(lines)} lines reach {encoder.max_length} tokens, where texts are cut",
            err=True,
        )
    if output is None:
        np.savetxt(sys.stdout, vectors, fmt="%.7g")
    else:
        partial = output.with_name(f".{output.name}.partial")
        try:
            with partial.open("wb") as whole:
                np.save(whole, vectors)
            partial.replace(output)  # a file that was there stays until this one is whole
        finally:
            partial.unlink(missing_ok=True)
        typer.echo(f"{output}: {vectors.shape[0]} vectors of {vectors.shape[1]} numbers", err=True)


def _read_lines(file: Path) -> list[str]:
    """The file's lines; an empty line is a text too, so that vectors and lines keep step."""
    try:
        text = file.read_text(encoding="utf-8")  # every line end read as \n
        lines = text.removesuffix("\n").split("\n") if text else []
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error.reason}): convert it first") from error
    if not lines:
        raise ValueError(f"{file} holds no text: put one text on each line")
    return lines


def as_device(name: str | None) -> str:
    """A device that torch can use: the one named, or a GPU if there is one."""
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name).cpu()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        message = f"torch cannot use {name!r} here ({reason})"
        raise typer.BadParameter(message, param_hint="--device") from None
    return name


def main() -> None:
    """Runs the command line; mistakes of the caller end in one line and exit code 1."""
    try:
        app()
    except (ValueError, TypeError, IndexError, OSError, ModuleNotFoundError) as error:
        console = Console(stderr=True, soft_wrap=True)
        console.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False)
        sys.exit(1)
