"""Everything a machine can testify, in one command and one folder: `make gpu-report`.

    python -m bertgpt.benchmarks.gpu_report [--budget SECONDS] [--tune] [--rehearse] [--out FOLDER]

No network, the system's own Python. Stages, each recorded whether it holds or fails, and each
followed by the next: build the CUDA part, the GPU's tests, the error table, compute-sanitizer over
a smoke set, the suite, the search for configs (on request), the plots. The folder ($OUT, or out/)
gets report.json, summary.txt and PNG plots, under 16 MB in all. `--rehearse` runs the same lines
on a CPU with small cases; its times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bertgpt.benchmarks import environment, report, results, suite
from bertgpt.benchmarks.environment import ROOT
from bertgpt.benchmarks.floors import Floors
from bertgpt.benchmarks.harness import EFFORT, REHEARSAL

SIZE_LIMIT = 16 << 20
_LOG_CHARACTERS = 20_000
_NO_TESTS = 5  # pytest's exit code


@dataclass(frozen=True)
class Stage:
    """What came of one stage.

    Attributes:
        name: the stage.
        outcome: "passed", "failed" or "skipped".
        seconds: how long it took.
        log: the end of its output, or why it was skipped.
    """

    name: str
    outcome: str
    seconds: float
    log: str


class Skipped(Exception):
    """A stage has nothing to do here; the message says why."""


class Report:
    """The stages so far and what they measured; written again after each, so that none is lost."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = "cpu" if options.rehearse else "cuda"
        self.folder: Path = options.out
        self.floors = Floors(self.device)
        self.stages: list[Stage] = []
        self.rows: list[results.Row] = []
        self.extra: dict[str, Any] = {}
        suite.set_up(self.device)
        self.environment = {**self._environment(), "rehearsal": options.rehearse}

    def _environment(self) -> dict[str, Any]:
        try:
            return environment.describe(self.device)
        except (RuntimeError, AssertionError) as error:  # no GPU: the report says so
            self.stages.append(Stage("device", "failed", 0.0, str(error)))
            return {**environment.describe("cpu"), "kind": self.device, "device": "no GPU"}

    def stage(self, name: str, run: Callable[[], str]) -> None:
        """Runs a stage, records what came of it, and writes the report."""
        print(f"== {name}", flush=True)
        started = time.monotonic()
        try:
            outcome, log = "passed", run()
        except Skipped as reason:
            outcome, log = "skipped", str(reason)
        except Exception:  # recorded: the next stage runs all the same
            outcome, log = "failed", traceback.format_exc()
        seconds = round(time.monotonic() - started, 1)
        self.stages.append(Stage(name, outcome, seconds, log[-_LOG_CHARACTERS:]))
        print(f"   {outcome} in {seconds:.0f} s", flush=True)
        self.write()

    def write(self) -> None:
        """report.json and summary.txt as things stand."""
        document = results.as_json(self.environment, self.floors, self.rows)
        document |= {"stages": [asdict(stage) for stage in self.stages], **self.extra}
        path = self.folder / "report.json"
        results.write(path, document)
        lines = [f"{stage.outcome:8} {stage.seconds:7.1f} s  {stage.name}" for stage in self.stages]
        tables = report.tables([("report", document, self.rows)]) if self.rows else ""
        extra = json.dumps(self.extra, indent=1, ensure_ascii=False) if self.extra else ""
        (self.folder / "summary.txt").write_text("\n".join([*lines, "", tables, extra, ""]))

    def command(self, *arguments: str, timeout: float) -> str:
        """Runs a command in the checkout; its output, or RuntimeError with the end of it."""
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        variables = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        done = subprocess.run(
            arguments,
            cwd=ROOT,
            env=variables,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        output = done.stdout + done.stderr
        if done.returncode == _NO_TESTS and "pytest" in arguments:
            raise Skipped("no test is marked for a GPU")
        if done.returncode != 0:
            raise RuntimeError(f"exit code {done.returncode}\n{output[-_LOG_CHARACTERS:]}")
        return output

    def build(self) -> str:
        """The CUDA part, in place."""
        if not (ROOT / "csrc").is_dir():
            raise Skipped("there is no csrc/")
        if self.options.rehearse:
            raise Skipped("a rehearsal has no GPU to build for")
        os.environ["BERTGPT_BUILD_CUDA"] = "1"
        return self.command(sys.executable, "setup.py", "build_ext", "--inplace", timeout=900)

    def gpu_tests(self) -> str:
        """The tests that need a GPU."""
        return self.command(*self._pytest("gpu"), timeout=900)

    def _pytest(self, marker: str) -> list[str]:
        """Pytest over the tests of a marker; rehearsed, over a file that is quick everywhere."""
        base = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        if self.options.rehearse:
            return [*base, "tests/test_tolerance.py"]
        return [*base, "-m", marker, "tests"]

    def validate(self) -> str:
        """The error table."""
        start = "from bertgpt.cli import main; main()"
        command = [sys.executable, "-P", "-c", start, "validate", "--device", self.device]
        if self.options.rehearse:
            command += ["--op", "linear_gelu"]
        return self.command(*command, timeout=900)

    def sanitize(self) -> str:
        """compute-sanitizer's memcheck over the smoke set, with errors as failures."""
        if self.options.rehearse:
            raise Skipped("compute-sanitizer needs a GPU")
        tool = next(filter(os.path.exists, _sanitizers()), None)
        if tool is None:
            raise Skipped("compute-sanitizer is not installed")
        smoke = [sys.executable, "-P", "-m", "bertgpt.benchmarks.smoke"]
        return self.command(
            tool, "--tool", "memcheck", "--error-exitcode", "9", *smoke, timeout=600
        )

    def suite(self) -> str:
        """The benchmark suite, within the budget."""
        effort = REHEARSAL if self.options.rehearse else EFFORT[self.device]
        entries = suite.entries(self.device, self.options.only)

        def keep(rows: list[results.Row]) -> None:
            self.rows += rows
            self.write()

        outcome = suite.run(entries, self.floors, effort, budget=self.options.budget, report=keep)
        self.extra["beyond the budget"] = outcome.skipped
        self.extra["faults"] = outcome.faults
        measured = len({(row.op, row.case) for row in self.rows})
        self.environment["gpu after"] = environment.gpu_state()
        if outcome.faults:
            raise RuntimeError(f"{len(outcome.faults)} cases could not be measured")
        return f"{measured} cases measured, {len(outcome.skipped)} beyond the budget"

    def tune(self) -> str:
        """The search for configs."""
        if not self.options.tune:
            raise Skipped("not asked for (--tune)")
        from bertgpt.benchmarks import tune

        self.extra["tuned"] = tune.search_all(self.device, self.options.rehearse)
        return tune.as_table(self.extra["tuned"])

    def plots(self) -> str:
        """PNG plots of what was measured."""
        from bertgpt.benchmarks.plots import draw

        document, rows = results.read(self.folder / "report.json")
        return "\n".join(str(path) for path in draw("report", document, rows, self.folder))

    def size(self) -> str:
        """Everything fits the limit; raw samples go before the rest does."""
        total = _folder_bytes(self.folder)
        if total > SIZE_LIMIT:
            self.extra["thinned"] = f"every second sample, since the folder held {total} bytes"
            self.rows = [
                results.Row(**{**asdict(row), "samples": row.samples[::2]}) for row in self.rows
            ]
            self.write()
        if _folder_bytes(self.folder) > SIZE_LIMIT:
            raise RuntimeError(f"{self.folder} holds {_folder_bytes(self.folder)} bytes")
        return f"{_folder_bytes(self.folder)} bytes"


def _sanitizers() -> list[str]:
    folders = [*os.environ.get("PATH", "").split(os.pathsep), "/usr/local/cuda/bin"]
    return [os.path.join(folder, "compute-sanitizer") for folder in folders]


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs every stage; exit code 1 when any failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--budget", type=float, default=540.0, help="seconds for the suite")
    parser.add_argument("--only", help="cases whose name contains this")
    parser.add_argument("--tune", action="store_true", help="search configs too")
    parser.add_argument("--rehearse", action="store_true", help="small cases on a CPU")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or "out"))
    options = parser.parse_args(arguments)
    run = Report(options)
    run.stage("build", run.build)
    run.stage("GPU tests", run.gpu_tests)
    run.stage("validate", run.validate)
    run.stage("compute-sanitizer", run.sanitize)
    run.stage("suite", run.suite)
    run.stage("tune", run.tune)
    run.stage("plots", run.plots)
    run.stage("size", run.size)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    failed = [stage.name for stage in run.stages if stage.outcome == "failed"]
    print(f"{run.folder}: {'failed: ' + ', '.join(failed) if failed else 'all stages held'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
