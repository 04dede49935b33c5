"""`bertgpt bench`: the benchmark suite on this machine, its tables and its plots.

The suite is installed with the library, as `bertgpt.benchmarks`; in a checkout it is the folder
`benchmarks/`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

app = typer.Typer(help="Time bertgpt and its peers, side by side, on this machine.")


@app.callback(invoke_without_command=True)
def bench(
    context: typer.Context,
    only: Annotated[str | None, typer.Option(help="Cases whose name contains this.")] = None,
    device: Annotated[
        str | None, typer.Option(help="cuda or cpu; by default a GPU if any.")
    ] = None,
    budget: Annotated[
        float | None, typer.Option(help="Seconds; the most valuable cases come first.")
    ] = None,
    rehearse: Annotated[
        bool, typer.Option(help="Run every line once; the times mean nothing.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for the JSON, the tables and plots.")] = Path(
        "out"
    ),
) -> None:
    """Run the suite; write results.json, report.md and plots into a folder."""
    if context.invoked_subcommand is not None:
        return
    import torch

    from bertgpt.benchmarks import environment, results, suite
    from bertgpt.benchmarks.floors import Floors
    from bertgpt.benchmarks.harness import EFFORT, REHEARSAL

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in EFFORT:
        raise ValueError(f"--device must be cuda or cpu, not {device!r}")
    chosen = suite.entries(device, only)
    if not chosen:
        raise ValueError(f"no case for {device} contains {only!r}")
    suite.set_up(device)
    where = {**environment.describe(device), "rehearsal": rehearse}
    floors, console = Floors(device), Console(stderr=True)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("Timing", total=len(chosen))
        outcome = suite.run(
            chosen,
            floors,
            REHEARSAL if rehearse else EFFORT[device],
            budget=budget,
            report=lambda rows: progress.advance(task),
        )
    path = out / "results.json"
    results.write(path, results.as_json(where, floors, outcome.rows))
    _publish([path], out)
    for label, reason in outcome.faults.items():
        console.print(f"not measured: {label}: {reason}", markup=False)
    if outcome.skipped:
        console.print(f"beyond the budget: {', '.join(outcome.skipped)}", markup=False)
    wrong = [row for row in outcome.rows if row.ours and row.reason and not row.absent]
    raise typer.Exit(1 if wrong or outcome.faults else 0)


@app.command()
def report(
    files: Annotated[list[Path] | None, typer.Argument(help="Result files.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="A folder; without it, the documents of the checkout.")
    ] = None,
) -> None:
    """Make tables and plots from result files; default: the committed ones, in the documents."""
    from bertgpt.benchmarks.report import publish

    for path in publish(files or [], out):
        typer.echo(path)


def _publish(files: list[Path], out: Path) -> None:
    """Tables to the terminal and to a file; plots where matplotlib is installed."""
    from rich.markdown import Markdown

    from bertgpt.benchmarks import report as reporting

    try:
        reporting.publish(files, out)
    except ModuleNotFoundError as error:
        typer.echo(f"tables without plots: {error}", err=True)
    Console().print(Markdown((out / "report.md").read_text()))
