"""The committed table of static figures: how it is written, and how two of them differ."""

import difflib
from collections import Counter
from collections.abc import Iterator
from dataclasses import astuple

import triton
from aot_driver import Launch
from machine_code import MachineCode
from occupancy import LIMITS, resident_blocks

_KEY = ("case", "sm", "kernel")
_KERNEL = ("registers", "spills", "shared", "blocks", "warps", "matrix", "SASS")
_LOOP = ("loop", "MMA", "MUFU", "FMA", "LDS", "copy")
HEADER = (*_KEY, "config", *_KERNEL, *_LOOP)
NONE = "–"

Row = tuple[str, ...]


def blocks_of(launch: Launch, code: MachineCode, capability: int) -> int:
    """How many of its blocks a multiprocessor holds at once."""
    return resident_blocks(
        capability,
        warps=launch.num_warps,
        registers=code.registers,
        shared=launch.shared_bytes,
        tensor_columns=launch.tensor_columns,
    )


def figures(launch: Launch, code: MachineCode, capability: int) -> Row:
    """The cells of a kernel from "registers" on."""
    blocks = blocks_of(launch, code, capability)
    return (
        str(code.registers),
        str(code.stack_bytes),
        str(launch.shared_bytes),
        str(blocks),
        f"{blocks * launch.num_warps}/{LIMITS[capability].warps}",
        " ".join(f"{count} {name}" for name, count in code.matrix.items()) or NONE,
        str(code.instructions),
        *(map(str, astuple(code.loop)) if code.loop else [NONE] * len(_LOOP)),
    )


def title() -> str:
    """The first line: the compiler that the figures belong to."""
    return f"Compiled ahead of time by Triton {triton.__version__}; see docs/static_figures.md."


def render(rows: list[Row]) -> str:
    """The table as Markdown, aligned, so that a change shows as a line."""
    table = [HEADER, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(HEADER))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in table
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join([title(), "", *lines, ""])


def difference(committed: str, compiled: str) -> str:
    """A unified diff, then every changed row with what changed in it, from and to."""
    diff = difflib.unified_diff(
        committed.splitlines(), compiled.splitlines(), "committed", "compiled now", n=0, lineterm=""
    )
    return "\n".join([*diff, "", *_changes(_by_key(committed), _by_key(compiled))])


def cells_of(text: str) -> list[Row]:
    """The header and the rows of a table as it is written."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines]


def _by_key(text: str) -> dict[Row, dict[str, str]]:
    """Each row's cells by column. A kernel that a case launches twice is told apart by number."""
    header, *rows = cells_of(text) or [HEADER]
    seen: Counter[Row] = Counter()
    found = {}
    for row in rows:
        cells = dict(zip(header, row, strict=True))
        key = tuple(cells[column] for column in _KEY)
        seen[key] += 1
        found[*key, str(seen[key])] = cells
    return found


def _changes(before: dict[Row, dict[str, str]], after: dict[Row, dict[str, str]]) -> Iterator[str]:
    for key in dict.fromkeys([*before, *after]):
        case, capability, kernel, _ = key
        name = f"{case}, sm_{capability}, {kernel}"
        if key not in after:
            yield f"{name}: gone"
        elif key not in before:
            yield f"{name}: new"
        else:
            old, new = before[key], after[key]
            changed = [
                f"{column} {old.get(column, NONE)} → {new.get(column, NONE)}"
                for column in dict.fromkeys([*old, *new])
                if old.get(column, NONE) != new.get(column, NONE)
            ]
            if changed:
                yield f"{name}: {', '.join(changed)}"
