"""What patching did to a model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from io import StringIO

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Replaced:
    """A module that runs another way.

    Attributes:
        path: its place in the model, as `named_modules` has it.
        kind: the name of its stock class.
    """

    path: str
    kind: str


@dataclass(frozen=True)
class Skipped:
    """A module, or a part of one, that stock code runs.

    Attributes:
        path: its place in the model.
        reason: why.
    """

    path: str
    reason: str


@dataclass(frozen=True)
class PatchReport:
    """What `patch` replaced and what it left, and why.

    Attributes:
        replaced: the modules that run on this library's ops now.
        skipped: what stock code runs, and adapters that are called inside replaced modules.
    """

    replaced: tuple[Replaced, ...]
    skipped: tuple[Skipped, ...]

    def __rich__(self) -> Table:
        """Modules of one kind, or skipped for one reason, share a line."""
        table = Table(title="bertgpt.patch")
        for column in ("", "what", "where"):
            table.add_column(column, overflow="fold")
        for kind, paths in _grouped((item.kind, item.path) for item in self.replaced):
            table.add_row("[green]replaced", kind, paths)
        for reason, paths in _grouped((item.reason, item.path) for item in self.skipped):
            table.add_row("[yellow]skipped", reason, paths)
        return table

    def __str__(self) -> str:
        text = StringIO()
        Console(file=text, width=100, color_system=None).print(self.__rich__())
        return text.getvalue().rstrip()


def _grouped(pairs: Iterator[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    groups: dict[str, list[str]] = {}
    for name, path in pairs:
        groups.setdefault(name, []).append(path or "the model")
    for name, paths in groups.items():
        more = f" … {paths[-1]} ({len(paths)})" if len(paths) > 1 else ""
        yield name, paths[0] + more
