"""Results as JSON, the only source of every table and plot.

A file holds one run: `environment`, `floors`, `measurements` (raw samples in seconds), and, from
`make gpu-report`, `stages` and `tuned`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bertgpt.benchmarks.case import Measurement
from bertgpt.benchmarks.floors import Floors
from bertgpt.benchmarks.timing import quartiles, ratio

FOLDER = Path(__file__).parent / "results"
FORMAT = 1


@dataclass(frozen=True)
class Row:
    """A measurement as it is stored and read back.

    Attributes:
        op: the case's op.
        case: the case's name.
        cache: "cold" or "warm".
        provider: the contender.
        ours: whether it is bertgpt's.
        samples: seconds a call, by round; empty where there is a reason.
        timer: how they were taken.
        flops: the case's operations.
        bytes: the case's traffic.
        tokens: the case's real tokens, or None.
        floor: the least seconds on this machine.
        peak_bytes: memory above the inputs, or None.
        reason: why there is no time.
        absent: whether it could not run here.
    """

    op: str
    case: str
    cache: str
    provider: str
    ours: bool
    samples: tuple[float, ...]
    timer: str
    flops: float
    bytes: float
    tokens: int | None
    floor: float
    peak_bytes: int | None
    reason: str
    absent: bool

    @property
    def seconds(self) -> float:
        """Median."""
        return quartiles(self.samples)[1]

    @property
    def spread(self) -> float:
        """Interquartile range over the median."""
        low, middle, high = quartiles(self.samples)
        return (high - low) / middle


def row_of(measurement: Measurement) -> Row:
    """What is stored of a measurement; samples to a tenth of a nanosecond."""
    case = measurement.case
    return Row(
        op=case.op,
        case=case.name,
        cache=measurement.cache,
        provider=measurement.provider.name,
        ours=measurement.provider.ours,
        samples=tuple(round(seconds, 10) for seconds in measurement.samples),
        timer=measurement.timer,
        flops=case.flops,
        bytes=case.bytes,
        tokens=case.tokens,
        floor=measurement.floor,
        peak_bytes=measurement.peak_bytes,
        reason=measurement.reason,
        absent=measurement.absent,
    )


def as_json(environment: dict[str, Any], floors: Floors, rows: Sequence[Row]) -> dict[str, Any]:
    """One run, ready for `json.dump`."""
    return {
        "format": FORMAT,
        "environment": environment,
        "floors": asdict(floors),
        "measurements": [asdict(row) for row in rows],
    }


def write(path: Path, document: dict[str, Any]) -> None:
    """Writes a document, one measurement a line, so that a change shows in a diff."""
    rest = {key: value for key, value in document.items() if key != "measurements"}
    head = json.dumps(rest, indent=1, ensure_ascii=False)[:-2]
    lines = ",\n".join(
        "  " + json.dumps(row, ensure_ascii=False) for row in document["measurements"]
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{head},\n "measurements": [\n{lines}\n ]\n}}\n')


def read(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """The document and its rows.

    Raises:
        ValueError: The file is not such a document, or of another format.
    """
    document = json.loads(path.read_text())
    if document.get("format") != FORMAT:
        raise ValueError(f"{path} has format {document.get('format')!r}, this reads {FORMAT}")
    rows = [Row(**{**row, "samples": tuple(row["samples"])}) for row in document["measurements"]]
    return document, rows


def best_peer(rows: Sequence[Row]) -> Row | None:
    """The fastest of the others among measured rows of one case and cache."""
    peers = [row for row in rows if row.samples and not row.ours]
    return min(peers, key=lambda row: row.seconds, default=None)


def by_default(rows: Sequence[Row]) -> Row | None:
    """Ours among measured rows of one case and cache: the first, which bertgpt takes by itself.

    Not the fastest: a user who names no backend does not get that one.
    """
    return next((row for row in rows if row.samples and row.ours), None)


def speed_ratio(row: Row, peer: Row) -> float:
    """How many times faster than the peer, by the median of the rounds' ratios."""
    return ratio(peer.samples, row.samples)
