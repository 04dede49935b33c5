"""The ahead-of-time gate: every committed Triton config, compiled for every architecture, no GPU.

    python benchmarks/aot.py --check           the gate, and the table against the committed one
    python benchmarks/aot.py --update          the gate, and the table rewritten
    python benchmarks/aot.py --only TEXT       the rows of matching cases, nothing compared

The gate fails when a kernel spills registers, wants more registers or shared memory than a block
may have, lacks the matrix instructions its case names, or when `pick_config` can return a config
that no case reaches. The table (registers, shared memory, occupancy, instruction counts) belongs to
one Triton version; under another the gate holds and the table is left alone.
"""

import argparse
import dataclasses
import importlib
import multiprocessing
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import aot_table
import machine_code
import triton
from aot_case import Case
from aot_cases import CASES, DOMAINS
from aot_driver import CAPABILITIES, SHARED_LIMIT, Launch, launches_of
from rich.progress import Progress, TextColumn, TimeElapsedColumn

TABLE = Path(__file__).parent / "results" / "aot.md"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one case gave on one architecture."""

    rows: list[aot_table.Row]
    problems: list[str]
    picked: set[Any]


def examine(index: int, capability: int) -> Outcome:
    """Compiles one case for one architecture and reads its machine code."""
    case = CASES[index]
    label = f"{case.op}: {case.name}"
    module = importlib.import_module(f"bertgpt.kernels.{case.op}")
    picked: set[Any] = set()
    restore = _record_picks(module, picked)
    try:
        launches = launches_of(case.call, capability)
    except Exception as error:  # whatever the compiler raises is this case's failure
        reason = str(error).strip().splitlines()
        return Outcome(
            [], [f"{label} sm_{capability}: {type(error).__name__}: {reason[:3]}"], picked
        )
    finally:
        restore()
    rows, problems, matrix = [], [], set()
    for launch in launches:
        code = machine_code.read(launch.cubin)
        matrix |= set(code.matrix)
        rows.append(
            (
                label,
                str(capability),
                launch.kernel,
                _config(launch, picked),
                *aot_table.figures(launch, code, capability),
            )
        )
        if code.stack_bytes or code.local_accesses:
            problems.append(f"{launch.kernel} spills ({code.stack_bytes} bytes a thread)")
        if launch.shared_bytes > SHARED_LIMIT[capability]:
            problems.append(f"{launch.kernel} wants {launch.shared_bytes} bytes of shared memory")
        elif not aot_table.blocks_of(launch, code, capability):
            threads = f"{launch.num_warps * 32} threads of {code.registers} registers"
            problems.append(f"{launch.kernel} does not fit a multiprocessor with {threads}")
    wanted = case.matrix.get(capability)
    if wanted is not None and wanted not in matrix:
        problems.append(f"no {wanted}, found {sorted(matrix) or 'no matrix instruction'}")
    if not launches:
        problems.append("launched nothing")
    return Outcome(rows, [f"{label} sm_{capability}: {text}" for text in problems], picked)


def _record_picks(module: Any, picked: set[Any]) -> Any:
    """Notes what `pick_config` returns; returns the function that puts it back."""
    original = getattr(module, "pick_config", None)
    if original is None:
        return lambda: None

    def recording(*args: Any, **kwargs: Any) -> Any:
        config = original(*args, **kwargs)
        picked.add(config)
        return config

    module.pick_config = recording
    return lambda: setattr(module, "pick_config", original)


def _config(launch: Launch, picked: set[Any]) -> str:
    """The compile-time choices: what is named BLOCK_…, and the fields of the picked config."""
    fields = {field.name.upper() for config in picked for field in dataclasses.fields(config)}
    chosen = [
        f"{name.lower().removeprefix('block_')}{value}"
        for name, value in launch.constants.items()
        if name.startswith("BLOCK_") or name in fields
    ]
    return " ".join([*chosen, f"{launch.num_warps}w", f"{launch.num_stages}s"])


def unreached(op: str, capability: int, picked: set[Any]) -> list[str]:
    """Configs that `pick_config` can return and no case reached."""
    module = importlib.import_module(f"bertgpt.kernels.{op}")
    missing = {module.pick_config(*args) for args in DOMAINS[op](capability)} - picked
    return sorted(f"{op} sm_{capability}: no case reaches {config}" for config in missing)


def run(cases: Iterable[int], workers: int) -> tuple[list[aot_table.Row], list[str]]:
    """Rows and problems of the given cases, in their order."""
    tasks = [(index, capability) for index in cases for capability in CAPABILITIES]
    outcomes: dict[tuple[int, int], Outcome] = {}
    columns = (*Progress.get_default_columns()[:2], TextColumn("{task.completed}/{task.total}"))
    context = multiprocessing.get_context("spawn")
    with (
        Progress(*columns, TimeElapsedColumn(), transient=True) as progress,
        ProcessPoolExecutor(workers, mp_context=context) as pool,
    ):
        bar = progress.add_task("compiling", total=len(tasks))
        futures = {pool.submit(examine, *task): task for task in tasks}
        try:
            for future in as_completed(futures):
                outcomes[futures[future]] = future.result()
                progress.advance(bar)
        except BaseException:
            pool.shutdown(cancel_futures=True)  # an error or Ctrl-C need not wait for the rest
            raise
    ordered = [outcomes[task] for task in tasks]
    rows = [row for outcome in ordered for row in outcome.rows]
    problems = [problem for outcome in ordered for problem in outcome.problems]
    if len(tasks) == len(CASES) * len(CAPABILITIES):
        problems += _all_unreached(outcomes)
    return rows, problems


def _all_unreached(outcomes: dict[tuple[int, int], Outcome]) -> Iterator[str]:
    for op in DOMAINS:
        for capability in CAPABILITIES:
            picked: set[Any] = set()
            for (index, compiled_for), outcome in outcomes.items():
                if CASES[index].op == op and compiled_for == capability:
                    picked |= outcome.picked
            yield from unreached(op, capability, picked)


def _compare(text: str) -> int:
    committed = TABLE.read_text() if TABLE.exists() else ""
    if committed.splitlines()[:1] != [aot_table.title()]:
        print(f"{TABLE.name} is of another Triton than {triton.__version__}: not compared")
        return 0
    if committed == text:
        return 0
    print(aot_table.difference(committed, text))
    print("The table has changed. If that is meant: python benchmarks/aot.py --update")
    return 1


def main() -> int:
    """Runs the gate; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--check", action="store_true", help="compare with the committed table")
    action.add_argument("--update", action="store_true", help="rewrite the committed table")
    action.add_argument("--only", metavar="TEXT", help="print the rows of cases containing TEXT")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()

    chosen = [i for i, case in enumerate(CASES) if _matches(case, arguments.only)]
    rows, problems = run(chosen, arguments.workers)
    text = aot_table.render(rows)
    status = 0
    if arguments.only is not None:
        print(text)
    elif arguments.update:
        TABLE.write_text(text)
    else:
        status = _compare(text)
    for problem in problems:
        print(problem)
    print(f"{len(rows)} kernels, {len(problems)} problems, Triton {triton.__version__}")
    return 1 if problems else status


def _matches(case: Case, text: str | None) -> bool:
    return text is None or text in f"{case.op}: {case.name}"


if __name__ == "__main__":
    sys.exit(main())
