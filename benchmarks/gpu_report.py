"""Everything a machine can testify, in one command and one folder: `make gpu-report`.

    python -m bertgpt.benchmarks.gpu_report [--budget SECONDS] [--tune] [--stages NAME,...]
                                            [--rehearse] [--out FOLDER]

No network, the system's own Python. Stages, each recorded whether it holds or fails, and each
followed by the next:

    build                                        the CUDA part, for this card
    tests, validate                              the GPU's tests, and the error table
    smoke                                        a small call of every op on every backend
    memcheck, racecheck, initcheck, synccheck    the same under compute-sanitizer's tools
    repeats                                      1,000 times the same bits, beside a busy stream
    replays                                      CUDA graphs whose lengths and pages change
    suite                                        the benchmarks, within --budget seconds
    tune                                         the search for configs (on request)
    plots, size                                  of what was measured

The folder ($OUT, or out/) gets report.json, summary.txt and PNG plots, under 16 MB in all.
`--rehearse` runs the same lines on a CPU with small cases; its times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bertgpt.benchmarks import environment, report, results, suite
from bertgpt.benchmarks.environment import ROOT
from bertgpt.benchmarks.floors import Floors
from bertgpt.benchmarks.harness import EFFORT, REHEARSAL

SIZE_LIMIT = 16_000_000
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
REPEATS = 1000
_REHEARSED_REPEATS = 3
# Seconds that a stage may take before it is ended, and counts as failed.
_TIMEOUT = {
    "build": 600,
    "tests": 300,
    "validate": 300,
    "smoke": 120,
    "repeats": 300,
    "replays": 60,
}
_TIMEOUT |= dict.fromkeys(TOOLS, 120)
_LOG_CHARACTERS = 20_000


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

    @property
    def reason(self) -> str:
        """Why it did not pass: what its log ends with."""
        if self.outcome == "passed" or not self.log.strip():
            return ""
        return f": {self.log.strip().splitlines()[-1]}"


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
        print(f"   {outcome} in {seconds:.0f} s{self.stages[-1].reason}", flush=True)
        self.write()

    def write(self) -> None:
        """report.json and summary.txt as things stand."""
        document = results.as_json(self.environment, self.floors, self.rows)
        document |= {"stages": [asdict(stage) for stage in self.stages], **self.extra}
        path = self.folder / "report.json"
        results.write(path, document)
        lines = [
            f"{stage.outcome:8} {stage.seconds:7.1f} s  {stage.name}{stage.reason}"
            for stage in self.stages
        ]
        tables = report.tables([("report", document, self.rows)]) if self.rows else ""
        extra = json.dumps(self.extra, indent=1, ensure_ascii=False) if self.extra else ""
        (self.folder / "summary.txt").write_text("\n".join([*lines, "", tables, extra, ""]))

    def command(self, *arguments: str, timeout: float, **variables: str) -> str:
        """Runs a command in the checkout; its output, or RuntimeError with the end of it."""
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        process = subprocess.Popen(
            arguments,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **variables},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            process_group=0,  # what it starts is ended with it
        )
        late = ""
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            late = f"ended after {timeout:.0f} s; "
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        if process.returncode != 0:
            told = output[-_LOG_CHARACTERS:]
            raise RuntimeError(f"{late}exit code {process.returncode}\n{told}")
        return output

    def module(self, name: str, *arguments: str, stage: str) -> str:
        """Runs a module of this folder on the report's device."""
        command = [sys.executable, "-P", "-m", f"bertgpt.benchmarks.{name}", *arguments]
        return self.command(*command, "--device", self.device, timeout=_TIMEOUT[stage])

    def build(self) -> str:
        """The CUDA part, in place, for this card alone unless BERTGPT_CUDA_ARCHS says more."""
        if not (ROOT / "csrc").is_dir():
            raise Skipped("there is no csrc/")
        if self.options.rehearse:
            raise Skipped("a rehearsal has no GPU to build for")
        archs = os.environ.get("BERTGPT_CUDA_ARCHS") or arch_of(*torch.cuda.get_device_capability())
        command = [sys.executable, str(ROOT / "csrc" / "build.py")]
        return self.command(*command, timeout=_TIMEOUT["build"], BERTGPT_CUDA_ARCHS=archs)

    def tests(self) -> str:
        """The tests that need a GPU; rehearsed, a file that is quick everywhere in their place."""
        command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        files = gpu_test_files()  # no others: they may need packages that are not here
        chosen = ["tests/test_tolerance.py"] if self.options.rehearse else ["-m", "gpu", *files]
        return self.command(*command, *chosen, timeout=_TIMEOUT["tests"])

    def validate(self) -> str:
        """The error table."""
        start = "from bertgpt.cli import main; main()"
        command = [sys.executable, "-P", "-c", start, "validate", "--device", self.device]
        if self.options.rehearse:
            command += ["--op", "linear_gelu"]
        return self.command(*command, timeout=_TIMEOUT["validate"])

    def smoke(self) -> str:
        """A small call of every op on every backend; compiles what the sanitizer then watches."""
        return self.module("smoke", stage="smoke")

    def sanitize(self, tool: str) -> str:
        """The smoke set under a tool of compute-sanitizer: whatever it finds is a failure."""
        if self.options.rehearse:
            raise Skipped("compute-sanitizer watches a GPU's kernels; a rehearsal has none")
        folders = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
        sanitizer = shutil.which("compute-sanitizer", path=folders)
        if sanitizer is None:
            raise Skipped("compute-sanitizer is not installed")
        output = self.command(
            # Unless told more, the tool waits ten seconds for its process, which imports torch.
            sanitizer, "--tool", tool, "--error-exitcode", "9", "--launch-timeout", "100",
            sys.executable, "-P", "-m", "bertgpt.benchmarks.smoke", "--device", self.device,
            timeout=_TIMEOUT[tool],
            PYTORCH_NO_CUDA_MEMORY_CACHING="1",  # each tensor its own memory, so that bounds show
        )  # fmt: skip
        found = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", output)
        if not found or any(map(int, found)):
            what = "reports errors" if found else "gave no summary"
            raise RuntimeError(f"{tool} {what}\n{output[-_LOG_CHARACTERS:]}")
        return output

    def repeats(self) -> str:
        """The same bits every time, while another stream keeps the card busy."""
        count = _REHEARSED_REPEATS if self.options.rehearse else REPEATS
        return self.module("gate", "repeats", "--repeats", str(count), stage="repeats")

    def replays(self) -> str:
        """Captured calls follow lengths, pages, slots and bounds that change in place."""
        return self.module("gate", "replays", stage="replays")

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
        if not self.rows:
            raise Skipped("nothing was measured")
        from bertgpt.benchmarks.plots import draw

        document, rows = results.read(self.folder / "report.json")
        return "\n".join(str(path) for path in draw("report", document, rows, self.folder))

    def size(self) -> str:
        """Everything fits the limit; raw samples go before the rest does."""
        total, every = _folder_bytes(self.folder), 1
        while _folder_bytes(self.folder) > SIZE_LIMIT and any(
            len(r.samples) > 2 for r in self.rows
        ):
            every *= 2
            self.extra["thinned"] = f"one sample in {every}, since the folder held {total} bytes"
            self.rows = [replace(row, samples=row.samples[::2]) for row in self.rows]
            self.write()
        if _folder_bytes(self.folder) > SIZE_LIMIT:
            raise RuntimeError(f"{self.folder} holds {_folder_bytes(self.folder)} bytes")
        return f"{_folder_bytes(self.folder)} bytes"

    def run(self) -> list[str]:
        """Every stage; the names of those that failed."""
        stages: dict[str, Callable[[], str]] = {
            "build": self.build,
            "tests": self.tests,
            "validate": self.validate,
            "smoke": self.smoke,
            **{tool: partial(self.sanitize, tool) for tool in TOOLS},
            "repeats": self.repeats,
            "replays": self.replays,
            "suite": self.suite,
            "tune": self.tune,
        }
        wanted = self.options.stages or list(stages)
        if unknown := set(wanted) - set(stages):
            raise SystemExit(
                f"no stage {', '.join(sorted(unknown))}: choose of {', '.join(stages)}"
            )
        for name in stages:
            if name in wanted:
                self.stage(name, stages[name])
        self.stage("plots", self.plots)
        self.stage("size", self.size)
        return [stage.name for stage in self.stages if stage.outcome == "failed"]


def arch_of(major: int, minor: int) -> str:
    """The name that nvcc has for a compute capability, with Hopper's own instructions."""
    return f"{major}{minor}{'a' if (major, minor) == (9, 0) else ''}"


def gpu_test_files() -> list[str]:
    """The files that hold a test marked for a GPU."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    return [f"tests/{path.name}" for path in files if "mark.gpu" in path.read_text()]


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs every stage; exit code 1 when any failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--budget", type=float, default=540.0, help="seconds for the suite")
    parser.add_argument("--only", help="cases whose name contains this")
    parser.add_argument("--tune", action="store_true", help="search configs too")
    parser.add_argument(
        "--stages", type=lambda names: names.split(","), help="only these, separated by commas"
    )
    parser.add_argument("--rehearse", action="store_true", help="small cases on a CPU")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or "out"))
    options = parser.parse_args(arguments)
    run = Report(options)
    failed = run.run()
    print(f"{run.folder}: {'failed: ' + ', '.join(failed) if failed else 'all stages held'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
