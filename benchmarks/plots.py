"""Plots of one run: roofline with its floors, speed ratio by case, memory.

Each PNG carries the hash of the numbers it shows, so that a test can tell, without drawing, that
it belongs to its result file.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bertgpt.benchmarks.report import Document, plot_kinds
from bertgpt.benchmarks.results import Row, best_peer, by_default, speed_ratio
from bertgpt.benchmarks.suite import by_case

_OURS, _PEER, _ROOF = "#1a7f5a", "#8a8f98", "#b3402a"
_KEY = "Numbers"


def numbers(kind: str, document: Document, rows: Sequence[Row]) -> Any:
    """What a plot shows, as plain values."""
    cold = [row for row in rows if row.cache == "cold" and row.samples]
    if kind == "ratio":
        return _ratios(cold)
    if kind == "memory":
        return _memory(cold)
    floors = document["floors"]
    points = [
        (row.ours, row.flops / row.bytes, row.flops / row.seconds)
        for group in by_case(cold)
        for row in (by_default(group), best_peer(group))
        if row is not None
    ]
    roofs = sorted(floors["flops"].items())
    return {"bandwidth": max(floors["copy_bytes"], floors["read_bytes"]), "roofs": roofs,
            "points": points}  # fmt: skip


def _ratios(rows: Sequence[Row]) -> list[tuple[str, float, str]]:
    found = []
    for group in by_case(rows):
        mine, peer = by_default(group), best_peer(group)
        if mine is not None and peer is not None:
            label = f"{mine.op}: {mine.case}"
            found.append((label, round(speed_ratio(mine, peer), 4), peer.provider))
    return found


def _memory(rows: Sequence[Row]) -> list[tuple[str, int, int]]:
    """Peak bytes above the inputs: ours, and the most frugal peer's."""
    found = []
    for group in by_case(rows):
        known = [row for row in group if row.peak_bytes is not None]
        mine, peers = by_default(known), [row.peak_bytes or 0 for row in known if not row.ours]
        if mine is not None and peers:
            found.append((f"{mine.op}: {mine.case}", mine.peak_bytes or 0, min(peers)))
    return found


def fingerprint(shown: Any) -> str:
    """The hash of what a plot shows."""
    return hashlib.sha256(json.dumps(shown, ensure_ascii=False).encode()).hexdigest()


def stored_fingerprint(path: Path) -> str | None:
    """The hash inside a PNG that `draw` wrote; reads the file's text chunks alone."""
    data, place = path.read_bytes(), 8  # past the signature
    while place < len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        body = data[place + 8 : place + 8 + length]
        if kind == b"tEXt" and body.startswith(_KEY.encode() + b"\0"):
            return body.partition(b"\0")[2].decode("latin-1")
        place += 12 + length
    return None


def draw(name: str, document: Document, rows: Sequence[Row], folder: Path) -> list[Path]:
    """Writes a run's plots; returns their paths.

    Raises:
        ModuleNotFoundError: matplotlib is not installed (the extra `bench` brings it).
    """
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("plots need matplotlib: pip install 'bertgpt[bench]'") from error
    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    painters: dict[str, Callable[[Any, Any], None]] = {
        "roofline": _paint_roofline,
        "ratio": _paint_ratio,
        "memory": _paint_memory,
    }
    paths = []
    for kind in plot_kinds(document):
        shown = numbers(kind, document, rows)
        height = 5.0 if kind == "roofline" else 1.2 + 0.32 * max(len(shown), 1)
        figure = Figure(figsize=(9, height), dpi=110, layout="constrained")
        axes = figure.add_subplot()
        painters[kind](axes, shown)
        figure.suptitle(document["environment"]["device"], fontsize=10)
        paths.append(folder / f"{name}-{kind}.png")
        # No date and no version of the drawing software: the same numbers, the same file.
        metadata = {"Software": None, _KEY: fingerprint(shown)}
        figure.savefig(paths[-1], format="png", metadata=metadata)
    return paths


def _paint_roofline(axes: Any, shown: Any) -> None:
    bandwidth, peak = shown["bandwidth"], max(rate for _, rate in shown["roofs"])
    intensities = [intensity for _, intensity, _ in shown["points"]] or [1.0]
    ends = (min(intensities) / 2, max(*intensities, 2 * peak / bandwidth) * 2)
    for name, rate in shown["roofs"]:
        knee = rate / bandwidth
        axes.plot([ends[0], knee, ends[1]], [ends[0] * bandwidth, rate, rate], color=_ROOF, lw=1)
        axes.annotate(f"{rate / 1e12:.0f} TFLOP/s {name}", (knee, rate), fontsize=8, va="bottom")
    for ours, label in ((True, "bertgpt"), (False, "best peer")):
        chosen = [(x, y) for mine, x, y in shown["points"] if mine == ours]
        color = _OURS if ours else _PEER
        axes.scatter(*zip(*chosen, strict=True) if chosen else ((), ()), s=18, c=color, label=label)
    axes.set(xscale="log", yscale="log", xlabel="FLOP a byte", ylabel="FLOP/s")
    axes.legend(frameon=False, fontsize=8)


def _paint_ratio(axes: Any, shown: Any) -> None:
    places = range(len(shown))
    values = [value for _, value, _ in shown]
    axes.barh(places, values, color=[_OURS if value >= 1 else _PEER for value in values])
    axes.axvline(1.0, color=_ROOF, lw=1)
    for place, (_, value, peer) in zip(places, shown, strict=True):
        axes.annotate(f" {value:.2f}× {peer}", (value, place), fontsize=7, va="center")
    axes.set_yticks(places, [label for label, _, _ in shown], fontsize=7)
    axes.set_xlim(0, 1.6 * max([*values, 1.0]))
    axes.invert_yaxis()
    axes.set_xlabel("speed of bertgpt's default backend against the best peer")


def _paint_memory(axes: Any, shown: Any) -> None:
    places = range(len(shown))
    for shift, column, color, label in ((-0.2, 1, _OURS, "bertgpt"), (0.2, 2, _PEER, "best peer")):
        axes.barh(
            [place + shift for place in places],
            [row[column] / 2**20 for row in shown],
            height=0.4,
            color=color,
            label=label,
        )
    axes.set_yticks(places, [row[0] for row in shown], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("peak memory above the inputs, MB")
    axes.legend(frameon=False, fontsize=8)
