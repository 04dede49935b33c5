"""Calls like one before: what was settled for it is not settled again.

A decoding step repeats a few calls thousands of times a second, each time with other values in
tensors of the same make. Checks and refusals look at that make alone (values of index tensors are
looked at apart), and together they cost as much as the launch. So what came of them is kept by all
that they look at; where anything of that changes, the call is another one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from torch import Tensor

_MOST = 4096  # plans of an op: a server's shapes, and some megabytes
_ALIGNMENT = 16  # what launchers ask of addresses


@dataclass(frozen=True)
class _Plan:
    """A settled call without its tensors, and which argument each of these is."""

    call: dict[str, Any]
    tensors: tuple[tuple[str, int], ...]


class Plans:
    """The settled calls of an op whose C++ kernel took them.

    Args:
        parameters: Names of the check's parameters; a call's values come in their order.
        tensors: Names of those that may be tensors.
    """

    def __init__(self, parameters: Sequence[str], tensors: Sequence[str]) -> None:
        self._plans: dict[Hashable, _Plan | None] = {}
        self._place = {name: i for i, name in enumerate(parameters)}
        self.tensors = itemgetter(*(self._place[name] for name in tensors))
        self._others = itemgetter(*(i for n, i in self._place.items() if n not in tensors))

    def make_of(self, values: tuple[Any, ...]) -> Hashable | None:
        """All that checks and refusals may look at in values without autograd and autocast.

        Types come along, since True is 1 to a dictionary and not to a check. Strides of contiguous
        tensors do not: a dimension of size 1 may have any, and nothing looks at it. None where an
        integer stands for a tensor: a step's is another one in each call.
        """
        kinds = tuple(map(type, values))
        if tuple in kinds:  # of window's bounds too
            kinds += tuple(type(part) for v in values if type(v) is tuple for part in v)
        made: list[Any] = [kinds, self._others(values)]
        for t in self.tensors(values):
            if isinstance(t, Tensor):
                strides = t.is_contiguous() or t.stride()
                made.append((t.shape, strides, t.dtype, t.device, t.data_ptr() % _ALIGNMENT))
            elif isinstance(t, int):
                return None
            else:
                made.append(t)
        return tuple(made)

    def find(self, make: Hashable, values: tuple[Any, ...]) -> dict[str, Any] | None:
        """The settled call for these values, where one of their make is known."""
        try:
            plan = self._plans.get(make)
        except TypeError:  # a list among them
            return None
        if plan is None:
            return None
        call = plan.call.copy()
        for field, place in plan.tensors:
            call[field] = values[place]
        return call

    def keep(
        self,
        make: Hashable,
        values: tuple[Any, ...],
        call: dict[str, Any],
        taken: Callable[[], bool],
    ) -> None:
        """Remembers what was settled, if the kernel has `taken` it, and asks that only once."""
        try:
            if make in self._plans:
                return
        except TypeError:
            return
        if len(self._plans) >= _MOST:
            self._plans.clear()
        self._plans[make] = self._plan(values, call) if taken() else None

    def _plan(self, values: tuple[Any, ...], call: dict[str, Any]) -> _Plan | None:
        tensors = []
        for field, settled in call.items():
            place = self._place.get(field)
            given = None if place is None else values[place]
            if isinstance(given, Tensor) and settled is given:
                tensors.append((field, self._place[field]))
            elif isinstance(given, Tensor) or (given is None and isinstance(settled, Tensor)):
                return None  # a copy, or a seed drawn for this call
        kept = {field for field, _ in tensors}
        constants = {field: None if field in kept else value for field, value in call.items()}
        return _Plan(constants, tuple(tensors))
