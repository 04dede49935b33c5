"""The whole suite: every case of every file, most valuable first, within a budget of time."""

from __future__ import annotations

import importlib
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from bertgpt.benchmarks.case import Case, Provider, Refused
from bertgpt.benchmarks.floors import Floors
from bertgpt.benchmarks.harness import Contest, Effort
from bertgpt.benchmarks.results import Row, row_of

FILES = (
    "bench_attention",
    "bench_attention_dmask",
    "bench_linear_gelu",
    "bench_gelu_ffn",
    "bench_linear_cross_entropy",
    "bench_add_layer_norm",
    "bench_embeddings",
    "bench_pool",
    "bench_paged_attention",
    "bench_paged_write",
    "bench_sample",
    "bench_models",
    "bench_decoding",
    "bench_training",
)


@dataclass(frozen=True)
class Entry:
    """A case and those who contend in it."""

    case: Case
    providers: Sequence[Provider]


def entries(device: str, only: str | None = None) -> list[Entry]:
    """The cases for a device whose label contains `only`, most valuable first.

    Among equals the ops take turns, so that a short budget sees something of each.
    """
    found: list[tuple[float, int, int, Entry]] = []
    for place, name in enumerate(FILES):
        module = importlib.import_module(f"bertgpt.benchmarks.{name}")
        fitting = [c for c in module.CASES if c.device == device and (only or "") in c.label]
        taken: Counter[float] = Counter()
        for case in fitting:
            taken[case.value] += 1
            entry = Entry(case, module.PROVIDERS)
            found.append((-case.value, taken[case.value], place, entry))
    return [entry for *_, entry in sorted(found, key=lambda item: item[:3])]


@dataclass
class Outcome:
    """What a run of the suite left.

    Attributes:
        rows: every measurement.
        skipped: labels of the cases that the budget did not reach.
        faults: cases that could not be measured at all, with the reason.
    """

    rows: list[Row]
    skipped: list[str]
    faults: dict[str, str]


def run(
    chosen: Iterable[Entry],
    floors: Floors,
    effort: Effort,
    *,
    budget: float | None = None,
    report: Callable[[list[Row]], None] = lambda rows: None,
) -> Outcome:
    """Measures the floors, then the cases in order until the budget is spent.

    Args:
        chosen: the cases, in the order to take them.
        floors: filled in here.
        effort: how long to try each case.
        budget: seconds; no case is begun that, going by the longest so far, would pass it.
        report: called with the rows of each case as they come.
    """
    started = time.monotonic()
    chosen = list(chosen)
    floors.measure(dict.fromkeys(entry.case.dtype for entry in chosen))
    outcome, longest = Outcome([], [], {}), 0.0
    for entry in chosen:
        begun = time.monotonic()
        if budget is not None and begun - started + longest > budget:
            outcome.skipped.append(entry.case.label)
            continue
        try:
            contest = Contest(entry.case, entry.providers, floors, effort)
            rows = [row_of(measurement) for measurement in contest.run()]
        except (Refused, torch.OutOfMemoryError) as reason:
            outcome.faults[entry.case.label] = str(reason)
            continue
        finally:
            _free(entry.case.device)
        outcome.rows += rows
        report(rows)
        longest = max(longest, time.monotonic() - begun)
    return outcome


def set_up(device: str) -> None:
    """What every run of the suite wants: on a CPU one thread, since neighbours disturb a pool."""
    if device == "cpu":
        torch.set_num_threads(1)


def _free(device: str) -> None:
    """Nothing of a case stays: neither memory nor compiled code (torch keeps few shapes of it)."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    if device == "cuda":
        torch.cuda.empty_cache()


def by_case(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """The rows of each case and cache together, in the order of their first."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.op, row.case, row.cache), []).append(row)
    yield from groups.values()
