"""The search for kernel configs: each op's candidates contend with one another, as peers would.

    python -m bertgpt.benchmarks.tune [--only TEXT]

A candidate is the config that `pick_config` gives now with some fields changed. Candidates go
through the whole protocol of the harness, so one that is fast and wrong does not win. The table at
the end says, for what `pick_config` was asked, which config won and by how much; it is written into
`pick_config` by hand.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

from bertgpt.benchmarks import suite
from bertgpt.benchmarks.case import Case, Inputs, Provider, Run
from bertgpt.benchmarks.floors import Floors
from bertgpt.benchmarks.harness import EFFORT, REHEARSAL, Contest, Effort
from bertgpt.benchmarks.results import row_of, speed_ratio

Space = Mapping[str, Sequence[Any]]

# By op: the values to try for the fields of its Config.
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
}
# Cases of at least this value are searched: the shapes that the targets name.
_VALUE = 7.0


@dataclass(frozen=True)
class Winner:
    """The best candidate of one case.

    Attributes:
        op: the op.
        case: the case's name.
        asked: what `pick_config` was asked, as text.
        config: the winning config's fields.
        seconds: its median time, cold.
        gain: how many times faster than the present config.
    """

    op: str
    case: str
    asked: str
    config: dict[str, Any]
    seconds: float
    gain: float


def candidates(present: Any, space: Space) -> Iterator[Any]:
    """The present config first, then every other combination of the space."""
    yield present
    known = {name: values for name, values in space.items() if name in asdict(present)}
    for values in product(*known.values()):
        candidate = replace(present, **dict(zip(known, values, strict=True)))
        if candidate != present:
            yield candidate


def asked_and_present(module: Any, run: Run) -> tuple[str, Any]:
    """What a call asks of `pick_config`, and the answer: its first question where it asks more."""
    original, seen = module.pick_config, []

    def recording(*args: Any, **kwargs: Any) -> Any:
        config = original(*args, **kwargs)
        words = [*map(str, args), *(f"{name}={value}" for name, value in kwargs.items())]
        seen.append((", ".join(words), config))
        return config

    module.pick_config = recording
    try:
        run()
    finally:
        module.pick_config = original
    return seen[0]


def _with_config(base: Provider, module: Any, config: Any) -> Provider:
    """The Triton backend under a fixed config, whatever is asked."""
    original = module.pick_config

    def prepare(case: Case, inputs: Inputs) -> Run:
        run = base.prepare(case, inputs)

        def under_config() -> Any:
            module.pick_config = lambda *args, **kwargs: config
            try:
                return run()
            finally:
                module.pick_config = original

        return under_config

    return Provider(str(config), prepare, base.absent)


def search(case: Case, base: Provider, floors: Floors, effort: Effort) -> Winner:
    """Lets every candidate contend in one case.

    Raises:
        RuntimeError: No candidate gave a right result.
    """
    module = importlib.import_module(f"bertgpt.kernels.{case.op}")
    contest = Contest(case, [], floors, effort)
    sample = case.inputs(contest.generator, contest.device)
    asked, present = asked_and_present(module, base.prepare(case, sample))
    configs = list(candidates(present, SPACES[case.op]))
    providers = [_with_config(base, module, config) for config in configs]
    found = Contest(case, providers, floors, effort).run()
    rows = [row_of(measurement) for measurement in found if measurement.cache == "cold"]
    measured = [row for row in rows if row.samples]
    if not measured:
        raise RuntimeError(f"{case.label}: no candidate held: {rows[0].reason}")
    best = min(measured, key=lambda row: row.seconds)
    now = next((row for row in measured if row.provider == str(present)), best)
    config = next(config for config in configs if str(config) == best.provider)
    gain = speed_ratio(best, now)
    return Winner(case.op, case.name, asked, asdict(config), best.seconds, gain)


def search_all(
    device: str, rehearse: bool, only: str = "", report: Callable[[str], None] = print
) -> list[dict[str, Any]]:
    """The winners of every case worth a search, as plain values; failures are reported and left."""
    floors, winners = Floors(device), []
    effort = REHEARSAL if rehearse else EFFORT[device]
    for entry in suite.entries(device, only):
        case = entry.case
        if case.op not in SPACES or (case.value < _VALUE and not rehearse):
            continue
        base = next(p for p in entry.providers if p.name == "bertgpt triton")
        floors.measure([case.dtype])
        try:
            winner = search(case, base, floors, effort)
        except Exception as error:  # one case's failure must not end the search
            report(f"{case.label}: {type(error).__name__}: {error}")
            continue
        winners.append(asdict(winner))
        report(as_table([winners[-1]]))
    return winners


def as_table(winners: Sequence[dict[str, Any]]) -> str:
    """One line a winner: what `pick_config` is asked → what it should answer."""
    lines = []
    for winner in winners:
        fields = ", ".join(f"{name}={value}" for name, value in winner["config"].items())
        lines.append(
            f"{winner['op']}  pick_config({winner['asked']}) → Config({fields})"
            f"  # {winner['case']}: {winner['seconds'] * 1e6:.1f} µs, "
            f"{winner['gain']:.2f}× the present one"
        )
    return "\n".join(lines)


def main() -> None:
    """Searches on the GPU of this machine."""
    parser = argparse.ArgumentParser(description="Search kernel configs on this GPU.")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    search_all("cuda", False, parser.parse_args().only)


if __name__ == "__main__":
    main()
