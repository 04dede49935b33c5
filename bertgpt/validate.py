"""`bertgpt validate`: the error of every op, backend and dtype against the float64 reference.

Each backend that does not refuse a call is held to the rule of `bertgpt.accuracy`, the one the
tests use. A backend that refuses is listed with its reason.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isfinite

import torch
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from bertgpt import ops, reference
from bertgpt.accuracy import Accuracy, measure
from bertgpt.validation_cases import OPS, Sample, samples

BACKENDS = ("cuda", "triton", "torch", "reference")
DTYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float64: "fp64",
}
_COLOURS = {"pass": "green", "FAIL": "bold red", "refused": "dim"}


@dataclass
class Row:
    """One line of the table: an op on a backend in a dtype, over all its cases.

    Attributes:
        op: The op's name.
        backend: The backend's name.
        dtype: Such as "bf16", or "all" when every dtype was refused.
        cases: How many calls ran.
        max_error: Largest absolute error over them.
        error_ratio: Largest error of a case ÷ the low-precision reference's own error there.
        rms_ratio: Largest rms(error) / rms(oracle) over the cases.
        failures: What was violated, in words.
        refusals: Reasons of the calls that the backend refused, without repeats.
    """

    op: str
    backend: str
    dtype: str
    cases: int = 0
    max_error: float = 0.0
    error_ratio: float = 0.0
    rms_ratio: float = 0.0
    failures: list[str] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """One of "pass", "FAIL" and, when no call ran, "refused"."""
        if self.failures:
            return "FAIL"
        return "pass" if self.cases else "refused"

    def add(self, accuracy: Accuracy) -> None:
        """Takes one output's figures into account."""
        self.max_error = max(self.max_error, accuracy.max_error)
        self.error_ratio = max(self.error_ratio, accuracy.error_ratio)
        self.rms_ratio = max(self.rms_ratio, accuracy.rms_ratio)
        self.failures.extend(accuracy.failures)


def run(op: str | None = None, device: str | None = None) -> list[Row]:
    """Measures everything this machine can run, showing progress.

    Args:
        op: One op's name; None means all.
        device: "cpu" or "cuda"; None means a GPU where there is one.

    Returns:
        Rows by op, backend and dtype.

    Raises:
        ValueError: There is no such op, or the device is not there.
    """
    if op is not None and op not in OPS:
        raise ValueError(f"unknown op {op!r}: choose one of {', '.join(OPS)}")
    target = _device(device)
    chosen = OPS if op is None else (op,)
    rows: list[Row] = []
    with Progress(console=Console(stderr=True), transient=True) as progress, torch.no_grad():
        bar = progress.add_task("validating", total=len(chosen) * len(DTYPES))
        for name in chosen:
            by_dtype = []
            for dtype in DTYPES:
                progress.update(bar, description=f"{name} {DTYPES[dtype]}")
                by_dtype.append(_validate(name, dtype, target))
                progress.advance(bar)
            for rows_of_backend in zip(*by_dtype, strict=True):
                rows += _merged(rows_of_backend)
    return rows


def print_table(rows: list[Row]) -> None:
    """Prints the rows, then every violation and refusal in full, then a summary line."""
    console = Console()
    table = Table(title="Error against the float64 reference", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for title in ("op", "backend", "dtype"):
        table.add_column(title, no_wrap=True)
    for title in ("cases", "max error", "÷ ref's", "rms ratio", "verdict"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(row.op, row.backend, row.dtype, *_cells(row))
    console.print(table)
    for row in rows:
        for refusal in row.refusals:
            console.print(f"{row.op} {row.backend} {row.dtype} refused: {refusal}", style="dim")
    for row in rows:
        for failure in row.failures:
            console.print(f"{row.op} {row.backend} {row.dtype} FAILED: {failure}", style="red")
    count = {verdict: sum(row.verdict == verdict for row in rows) for verdict in _COLOURS}
    console.print(", ".join(f"{number} {verdict}" for verdict, number in count.items()))


def _validate(op: str, dtype: torch.dtype, device: torch.device) -> tuple[Row, ...]:
    """A row for each backend."""
    rows = tuple(Row(op, backend, DTYPES[dtype]) for backend in BACKENDS)
    for sample in samples(op, dtype):
        sample = sample.mapped(lambda t: t.to(device))
        oracle = sample.mapped(_doubled).results(getattr(reference, op))
        baseline = sample.results(getattr(reference, op))
        for row in rows:
            refusal = refusal_of(sample, row.backend)
            if refusal is not None:
                if refusal not in row.refusals:
                    row.refusals.append(refusal)
                continue
            actual = sample.results(getattr(ops, op), backend=row.backend)
            row.cases += 1
            for got, want, low in zip(actual, oracle, baseline, strict=True):
                # The log-sum-exp is float32 whatever the inputs are, the oracle's too.
                tensors = got.tensor.cpu(), want.tensor.cpu().double(), low.tensor.cpu()
                row.add(measure(*tensors, factor=got.factor))
    return rows


def refusal_of(sample: Sample, backend: str) -> str | None:
    """Why the backend does not take this call, or None."""
    sample = sample.differentiable()
    with torch.set_grad_enabled(bool(sample.wrt)):
        return ops.explain(sample.op, *sample.args, **sample.kwargs).refusals.get(backend)


def _doubled(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _merged(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """One row in place of several when a backend refused every dtype."""
    if any(row.cases for row in rows):
        return rows
    reasons = dict.fromkeys(reason for row in rows for reason in row.refusals)
    return (Row(rows[0].op, rows[0].backend, "all", refusals=list(reasons)),)


def _cells(row: Row) -> tuple[str, ...]:
    verdict = f"[{_COLOURS[row.verdict]}]{row.verdict}"
    if not row.cases:
        return ("0", "", "", "", verdict)
    ratio = f"{row.error_ratio:.2f}" if isfinite(row.error_ratio) else "–"  # a perfect reference
    figures = f"{row.max_error:.2e}", ratio, f"{row.rms_ratio:.2e}"
    return (str(row.cases), *figures, verdict)


def _device(name: str | None) -> torch.device:
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("there is no CUDA device here; use --device cpu")
    return device
