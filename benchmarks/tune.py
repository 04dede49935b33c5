"""The search for kernel configs: candidates contend with one another, as peers would.

    python -m bertgpt.benchmarks.tune [--only TEXT] [--budget SECONDS]

Searched is every kernel file that asks a `pick_config`, in the cases of its op. A candidate is the
config that `pick_config` gives now with some fields changed. Candidates go through the whole
protocol of the harness, so one that is fast and wrong does not win. The table at the end says, for
what `pick_config` was asked, which config won and by how much; it is written into `pick_config` by
hand.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations, product
from types import ModuleType
from typing import Any

from bertgpt.benchmarks import suite
from bertgpt.benchmarks.case import Case, Inputs, Provider, Run
from bertgpt.benchmarks.floors import Floors
from bertgpt.benchmarks.harness import EFFORT, REHEARSAL, Contest, Effort
from bertgpt.benchmarks.results import row_of, speed_ratio

Space = Mapping[str, Sequence[Any]]

# By kernel file: the values to try for the fields of its Config. Others have their neighbours
# tried: each number halved and doubled, each switch turned, one field and two at a time.
SPACES: dict[str, Space] = {
    "attention": {
        "BLOCK_M": (64, 128),
        "BLOCK_N": (32, 64, 128),
        "num_warps": (4, 8),
        "num_stages": (2, 3),
        "descriptors": (False, True),
    },
    "linear_gelu": {
        "block_m": (64, 128, 256),
        "block_n": (64, 128, 256),
        "num_warps": (4, 8),
        "num_stages": (3, 4),
    },
    "linear_cross_entropy": {
        "block_m": (64, 128),
        "block_n": (64, 128, 256),
        "num_warps": (4, 8),
        "num_stages": (2, 3, 4),
    },
    "linear_cross_entropy_backward": {
        "block_m": (64, 128),
        "block_n": (64, 128),
        "num_warps": (4, 8),
        "num_stages": (2, 3, 4),
    },
    "add_layer_norm": {"rows": (1, 2, 4, 8), "num_warps": (1, 2, 4, 8)},
    "paged_attention": {
        "BLOCK_N": (16, 32, 64, 128),
        "num_warps": (2, 4, 8),
        "num_stages": (2, 3, 4),
    },
    "sample": {"block": (512, 1024, 2048), "num_warps": (4, 8, 16)},
}
# Cases of at least this value are searched: the shapes that the targets name.
_VALUE = 7.0


def searched() -> list[str]:
    """The kernel files that ask a `pick_config`, their own or another's."""
    package = importlib.import_module("bertgpt.kernels")
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    return [n for n in names if _asks(importlib.import_module(f"bertgpt.kernels.{n}"))]


def _asks(module: ModuleType) -> bool:
    """Whether a module has both kernels and configs to launch them by."""
    return hasattr(module, "pick_config") and any(n.endswith("_kernel") for n in vars(module))


def cases_of(kernel: str, device: str, only: str = "") -> list[suite.Entry]:
    """The cases in which a kernel file's configs contend, most valuable first.

    Those of the op of that name; else, for a file named backward, those of its op that are named
    so; forward files take the others, where there are such.
    """
    entries = suite.entries(device, only)
    stem, backward = kernel.removesuffix("_backward"), kernel.endswith("_backward")
    of_op = [entry for entry in entries if entry.case.op == kernel]
    of_op = of_op or [entry for entry in entries if entry.case.op == stem]
    fitting = [entry for entry in of_op if ("backward" in entry.case.name) == backward]
    return fitting or of_op


@dataclass(frozen=True)
class Winner:
    """The best candidate of one case and one question.

    Attributes:
        kernel: the kernel file.
        case: the case's label.
        asked: what `pick_config` was asked, as text.
        config: the winning config's fields.
        seconds: its median time, cold.
        gain: how many times faster than the present config.
    """

    kernel: str
    case: str
    asked: str
    config: dict[str, Any]
    seconds: float
    gain: float


def candidates(present: Any, space: Space | None) -> Iterator[Any]:
    """The present config first, then every other combination of the space, or its neighbours."""
    yield present
    if space is None:
        yield from _neighbours(present)
        return
    known = {name: values for name, values in space.items() if name in asdict(present)}
    for values in product(*known.values()):
        candidate = replace(present, **dict(zip(known, values, strict=True)))
        if candidate != present:
            yield candidate


def _neighbours(present: Any) -> Iterator[Any]:
    """Each number halved and doubled, each switch turned: one field and two at a time."""
    steps: list[tuple[str, Any]] = []
    for name, value in asdict(present).items():
        if isinstance(value, bool):
            steps.append((name, not value))
        elif isinstance(value, int) and value > 0:
            steps += [(name, 2 * value), *([(name, value // 2)] if value > 1 else [])]
    for step in steps:
        yield replace(present, **dict([step]))
    for first, second in combinations(steps, 2):
        if first[0] != second[0]:
            yield replace(present, **dict([first, second]))


def asked_and_present(module: Any, run: Run) -> dict[str, Any]:
    """What a call asks of `pick_config`, as text, and the answer to each question.

    Raises:
        LookupError: The call asks nothing: it does not run this kernel.
    """
    original, seen = module.pick_config, {}

    def recording(*args: Any, **kwargs: Any) -> Any:
        config = seen[_question(args, kwargs)] = original(*args, **kwargs)
        return config

    module.pick_config = recording
    try:
        run()
    finally:
        module.pick_config = original
    if not seen:
        raise LookupError(f"the call asks nothing of {module.__name__}.pick_config")
    return seen


def _question(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    return ", ".join([*map(str, args), *(f"{name}={value}" for name, value in kwargs.items())])


def _with_config(base: Provider, module: Any, asked: str, config: Any) -> Provider:
    """The Triton backend with a fixed answer to one question."""
    original = module.pick_config

    def answer(*args: Any, **kwargs: Any) -> Any:
        return config if _question(args, kwargs) == asked else original(*args, **kwargs)

    def prepare(case: Case, inputs: Inputs) -> Run:
        run = base.prepare(case, inputs)

        def under_config() -> Any:
            module.pick_config = answer
            try:
                return run()
            finally:
                module.pick_config = original

        return under_config

    return Provider(str(config), prepare, base.absent)


def search(
    kernel: str, case: Case, base: Provider, floors: Floors, effort: Effort
) -> Iterator[Winner]:
    """Lets every candidate contend in one case, for each question that the case asks.

    Raises:
        LookupError: The case does not run this kernel.
        RuntimeError: No candidate gave a right result.
    """
    module = importlib.import_module(f"bertgpt.kernels.{kernel}")
    contest = Contest(case, [], floors, effort)
    sample = case.inputs(contest.generator, contest.device)
    for asked, present in asked_and_present(module, base.prepare(case, sample)).items():
        configs = list(candidates(present, SPACES.get(kernel)))
        providers = [_with_config(base, module, asked, config) for config in configs]
        found = Contest(case, providers, floors, effort).run()
        rows = [row_of(measurement) for measurement in found if measurement.cache == "cold"]
        measured = [row for row in rows if row.samples]
        if not measured:
            raise RuntimeError(f"{case.label}: no candidate held: {rows[0].reason}")
        best = min(measured, key=lambda row: row.seconds)
        now = next((row for row in measured if row.provider == str(present)), best)
        config = next(config for config in configs if str(config) == best.provider)
        gain = speed_ratio(best, now)
        yield Winner(kernel, case.label, asked, asdict(config), best.seconds, gain)


def search_all(
    device: str,
    rehearse: bool,
    only: str = "",
    report: Callable[[str], None] = print,
    budget: float = float("inf"),
) -> list[dict[str, Any]]:
    """The winners of every case worth a search, as plain values; failures are reported and left.

    No case is begun once `budget` seconds have passed; the kernels take turns.
    """
    floors, winners, started = Floors(device), [], time.monotonic()
    effort = REHEARSAL if rehearse else EFFORT[device]
    turns = [
        (place, kernel, entry)
        for kernel in searched()
        for place, entry in enumerate(cases_of(kernel, device, only))
        if rehearse or place == 0 or entry.case.value >= _VALUE
    ]
    for _, kernel, entry in sorted(turns, key=lambda turn: turn[0]):
        if time.monotonic() - started > budget:
            report(f"beyond the budget: {kernel} in {entry.case.label}")
            continue
        base = next(p for p in entry.providers if p.name == "bertgpt triton")
        floors.measure([entry.case.dtype])
        try:
            for winner in search(kernel, entry.case, base, floors, effort):
                winners.append(asdict(winner))
                report(as_table([winners[-1]]))
        except Exception as error:  # one case's failure must not end the search
            report(f"{kernel} in {entry.case.label}: {type(error).__name__}: {error}")
    return winners


def as_table(winners: Sequence[dict[str, Any]]) -> str:
    """One line a winner: what `pick_config` is asked → what it should answer."""
    lines = []
    for winner in winners:
        fields = ", ".join(f"{name}={value}" for name, value in winner["config"].items())
        lines.append(
            f"{winner['kernel']}.pick_config({winner['asked']}) → Config({fields})"
            f"  # {winner['case']}: {winner['seconds'] * 1e6:.1f} µs, "
            f"{winner['gain']:.2f}× the present one"
        )
    return "\n".join(lines)


def main() -> None:
    """Searches on the GPU of this machine."""
    parser = argparse.ArgumentParser(description="Search kernel configs on this GPU.")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds")
    chosen = parser.parse_args()
    search_all("cuda", False, chosen.only, budget=chosen.budget)


if __name__ == "__main__":
    main()
