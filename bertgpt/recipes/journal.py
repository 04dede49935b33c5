"""What a run says of itself: a progress bar, a line of JSON a step, and a curve of the loss."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LOG, CURVE = "log.jsonl", "loss.png"


class Journal:
    """The log of a run in its folder, and its progress bar; silent on all ranks but one.

    Args:
        folder: the run's output.
        done: steps that an earlier part of the run has behind it; later lines of its log go.
        total: steps of the whole run.
        console: where the bar goes, or None for no bar.
        active: whether this rank writes.
    """

    def __init__(
        self, folder: Path, done: int, total: int, console: Console | None, active: bool
    ) -> None:
        self.folder, self.active = folder, active
        self.lines = _read(folder / LOG, done)
        if active:
            partial = folder / f".{LOG}.partial"
            partial.write_text("".join(f"{json.dumps(line)}\n" for line in self.lines), "utf-8")
            partial.replace(folder / LOG)
            self._file = (folder / LOG).open("a", encoding="utf-8")
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("loss {task.fields[loss]:.3f} · {task.fields[rate]:,.0f} tokens/s"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=console is None or not active,
        )
        self._task = self._progress.add_task(
            "", total=total, completed=done, loss=float("nan"), rate=0.0
        )

    def __enter__(self) -> Journal:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()
        if self.active:
            self._file.close()

    def write(self, line: dict[str, Any]) -> None:
        """One step's figures: `step`, `loss`, `tokens` and `seconds` among them."""
        self.lines.append(line)
        if self.active:
            self._file.write(f"{json.dumps(line)}\n")
            self._file.flush()
        rate = line["tokens"] / line["seconds"]
        self._progress.update(self._task, advance=1, loss=line["loss"], rate=rate)

    def draw(self) -> None:
        """Writes the curve of the loss."""
        if not self.active:
            return
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        axes.plot([line["step"] for line in self.lines], [line["loss"] for line in self.lines])
        axes.set(xlabel="step", ylabel="loss (nats)")
        figure.savefig(self.folder / CURVE, dpi=120)


def _read(file: Path, count: int) -> list[dict[str, Any]]:
    """The first lines of a log; what follows them may be cut off anywhere."""
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()[:count]]
