"""Tables and plots from result files, and from nothing else.

    python -m bertgpt.benchmarks.report [FILE...]             the committed ones, in the documents
    python -m bertgpt.benchmarks.report FILE... --out FOLDER  others, as a text and plots

A GPU's table gives times, rates, the share of the floor and the ratio to the best peer; a CPU's
gives ratios alone, since only those outlast the machine's mood.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bertgpt.benchmarks import results
from bertgpt.benchmarks.environment import ROOT
from bertgpt.benchmarks.results import Row, best_peer, by_default, speed_ratio
from bertgpt.benchmarks.suite import by_case

NO_GPU = "No GPU result is committed: no speed on a GPU is claimed here."
IMAGES = ROOT / "docs" / "images"
# The documents that hold generated text, and the name of the block that each holds.
DOCUMENTS = {ROOT / "docs" / "benchmarks.md": "results", ROOT / "README.md": "gpu-results"}

Document = dict[str, Any]
Run = tuple[str, Document, list[Row]]


def load(paths: Iterable[Path]) -> list[Run]:
    """Each file's stem, document and rows, in the order of their names."""
    return [(path.stem, *results.read(path)) for path in sorted(paths)]


def committed() -> list[Path]:
    """The result files of this checkout."""
    return sorted(results.FOLDER.glob("*.json"))


def tables(runs: Sequence[Run], images: str | None = None) -> str:
    """Every run as Markdown; with `images`, the plots in that folder are shown."""
    sections = [_section(name, document, rows, images) for name, document, rows in runs]
    if not any(document["environment"]["kind"] == "cuda" for _, document, _ in runs):
        sections.insert(0, NO_GPU)
    return "\n\n".join(sections)


def summary(runs: Sequence[Run]) -> str:
    """What the README shows: each GPU's cases by the default backend, or that there is none."""
    gpus = [run for run in runs if run[1]["environment"]["kind"] == "cuda"]
    if not gpus:
        return NO_GPU
    lines = []
    for _, document, rows in gpus:
        lines += [f"**{_title(document)}** (bf16 unless said, cold L2)", "", *_SUMMARY_HEAD]
        for group in by_case(row for row in rows if row.cache == "cold"):
            mine, peer = by_default(group), best_peer(group)
            if mine is not None and peer is not None:
                peers = sum(not row.ours for row in group if row.samples)
                lines.append(
                    f"| {mine.op}: {mine.case} | {_time(mine.seconds)} | {_share(mine)} | "
                    f"{speed_ratio(mine, peer):.2f}× {peer.provider} | {peers} |"
                )
        lines.append("")
    return "\n".join(lines).strip()


_SUMMARY_HEAD = (
    "| case | time | of the floor | speed against the best peer | peers measured |",
    "|---|---|---|---|---|",
)


def _section(name: str, document: Document, rows: Sequence[Row], images: str | None) -> str:
    gpu = document["environment"]["kind"] == "cuda"
    parts = [f"### {_title(document)}", _circumstances(document)]
    if gpu:
        parts.append(_floors(document))
    if images is not None:
        parts += [f"![{kind}]({images}/{name}-{kind}.png)" for kind in plot_kinds(document)]
    for op in dict.fromkeys(row.op for row in rows):
        mine = [row for row in rows if row.op == op]
        parts.append("\n".join([f"**{op}**", "", *_table(mine, gpu)]))
    parts += _unmeasured(rows)
    return "\n\n".join(parts)


def plot_kinds(document: Document) -> tuple[str, ...]:
    """The plots that a document's machine allows."""
    gpu = document["environment"]["kind"] == "cuda"
    return ("roofline", "ratio", "memory") if gpu else ("ratio",)


def _title(document: Document) -> str:
    environment = document["environment"]
    threads = f", {environment['threads']} thread(s)" if environment["kind"] == "cpu" else ""
    rehearsal = ": a rehearsal, whose times mean nothing" if environment["rehearsal"] else ""
    return f"{environment['device']}{threads}{rehearsal}"


def _circumstances(document: Document) -> str:
    environment = document["environment"]
    commit = (environment["commit"] or "unknown")[:12]
    packages = ", ".join(f"{name} {v}" for name, v in environment["packages"].items())
    gpu = environment["gpu"]
    clocks = f"; driver {gpu['driver_version']}, SM clock {gpu['clocks.max.sm']}" if gpu else ""
    dirty = " with uncommitted changes" if environment["dirty"] else ""
    return f"{environment['when'][:10]}, commit {commit}{dirty}; {packages}{clocks}."


def _floors(document: Document) -> str:
    floors = document["floors"]
    rates = ", ".join(f"{rate / 1e12:.0f} TFLOP/s {name}" for name, rate in floors["flops"].items())
    copy, read = floors["copy_bytes"] / 1e12, floors["read_bytes"] / 1e12
    return f"Floors measured in this run: {rates}; copy {copy:.2f} TB/s, read {read:.2f} TB/s."


def _table(rows: Sequence[Row], gpu: bool) -> list[str]:
    if gpu:
        head = "| case | L2 | provider | median | IQR | rate | of the floor | against best peer |"
    else:
        head = "| case | cache | provider | against best peer |"
    lines = [head, "|---" * (head.count("|") - 1) + "|"]
    for group in by_case(rows):
        peer = best_peer(group)
        for row in sorted((row for row in group if row.samples), key=lambda row: row.seconds):
            ratio = "–" if peer is None else f"{speed_ratio(row, peer):.2f}×"
            cells = [row.case, row.cache, f"**{row.provider}**" if row.ours else row.provider]
            if gpu:
                cells += [_time(row.seconds), f"{row.spread:.1%}", _rate(row), _share(row)]
            lines.append(f"| {' | '.join([*cells, ratio])} |")
    return lines


def _unmeasured(rows: Sequence[Row]) -> list[str]:
    """Refusals, each with its reason, and what could not take part, once for each reason."""
    refused = {
        f"- {row.op}: {row.case}, {row.provider}: {row.reason}"
        for row in rows
        if row.reason and not row.absent
    }
    absent: dict[str, list[str]] = {}
    for row in rows:
        if row.absent and row.provider not in absent.setdefault(row.reason, []):
            absent[row.reason].append(row.provider)
    parts = []
    if refused:
        parts.append("\n".join(["Refused:", "", *sorted(refused)]))
    if absent:
        listed = sorted(f"- {', '.join(names)}: {reason}" for reason, names in absent.items())
        parts.append("\n".join(["Took no part:", "", *listed]))
    return parts


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.3f} ms"


def _rate(row: Row) -> str:
    """FLOP/s or bytes/s, whichever the floor is made of; and tokens/s of models."""
    if row.op.startswith(("bert", "gpt2")) and row.tokens:
        return f"{row.tokens / row.seconds:,.0f} tokens/s"
    if bound_by_memory(row):
        return f"{row.bytes / row.seconds / 1e9:.0f} GB/s"
    return f"{row.flops / row.seconds / 1e12:.0f} TFLOP/s"


def bound_by_memory(row: Row) -> bool:
    """Whether fewer than 100 operations a byte are to be done: no machine here needs fewer."""
    return row.flops < 100 * row.bytes


def _share(row: Row) -> str:
    return f"{row.floor / row.seconds:.0%}"


def replace_block(text: str, name: str, content: str) -> str:
    """`text` with what stands between the comments `name` and `/name` replaced.

    Raises:
        ValueError: there is no such block.
    """
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"no block <!-- {name} --> … <!-- /{name} -->")
    return pattern.sub(lambda match: f"{match[1]}{content}{match[2]}", text)


def documents(runs: Sequence[Run]) -> dict[Path, str]:
    """The generated documents' whole text, by path."""
    content = {"results": tables(runs, images="images"), "gpu-results": summary(runs)}
    return {
        path: replace_block(path.read_text(), name, content[name])
        for path, name in DOCUMENTS.items()
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Rewrites the documents, or writes a report of the given files."""
    parser = argparse.ArgumentParser(description="Tables and plots from result files.")
    parser.add_argument("files", nargs="*", type=Path, help="result files; default: the committed")
    parser.add_argument("--out", type=Path, help="a folder for report.md and plots")
    chosen = parser.parse_args(arguments)
    publish(chosen.files, chosen.out)


def publish(files: Sequence[Path], out: Path | None) -> list[Path]:
    """Writes report.md and plots into `out`, or, without it, the documents and their images.

    Raises:
        ValueError: files without a folder that are not the committed ones, which alone the
            documents show.
    """
    if out is None:
        if files and {path.resolve() for path in files} != {path.resolve() for path in committed()}:
            raise ValueError(
                f"the documents show the files in {results.FOLDER} and no others: name a folder "
                "for the report of these files, --out FOLDER"
            )
        if not all(path.exists() for path in DOCUMENTS):
            raise ValueError("the documents are in a checkout alone: name a folder with --out")
        runs = load(committed())
        texts, images = documents(runs), IMAGES
    else:
        runs = load(files or committed())
        texts, images = {out / "report.md": tables(runs, images=".") + "\n"}, out
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    from bertgpt.benchmarks.plots import draw

    drawn = [path for run in runs for path in draw(*run, images)]
    return [*texts, *drawn]


if __name__ == "__main__":
    main()
