"""A small op and its contests, for the tests of the benchmark harness."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bertgpt.benchmarks.case import Case, Inputs, Measurement, Provider
from bertgpt.benchmarks.floors import Floors
from bertgpt.benchmarks.harness import REHEARSAL, Contest
from bertgpt.benchmarks.timing import DeviceClock, Timed, WallClock

ROWS, WIDTH, TILE = 96, 64, 16
FLOORS = Floors("cpu", {"float32": 1e15}, 1e15, 1e15)  # a machine that nothing here outruns


def fresh(generator: torch.Generator, device: torch.device) -> Inputs:
    x = torch.randn(ROWS, WIDTH, generator=generator, device=device)
    limits = torch.randint(WIDTH // 2, WIDTH, (ROWS,), generator=generator, device=device)
    return {"x": x, "limits": limits}


def mask(limits: Tensor) -> Tensor:
    return torch.arange(WIDTH) < limits[:, None]


def softmax(inputs: Inputs, dtype: torch.dtype = torch.float32) -> Tensor:
    """The op under test: a softmax over each row's first `limits` columns."""
    x = inputs["x"].to(dtype).masked_fill(~mask(inputs["limits"]), float("-inf"))
    return x.softmax(-1)


def case_of(draw: Callable[..., Inputs] = fresh, **options: Any) -> Case:
    return Case("softmax", "masked", "cpu", torch.float32, draw, softmax, 1e3, 1e3, **options)


def contest(
    prepare: Callable[[Case, Inputs], Callable[[], object]],
    *,
    case: Case | None = None,
    floors: Floors = FLOORS,
    clock: WallClock | DeviceClock | None = None,
) -> list[Measurement]:
    provider = Provider("contender", prepare)
    return Contest(case or case_of(), [provider], floors, REHEARSAL, clock).run()


def reason_of(prepare: Callable[[Case, Inputs], Callable[[], object]], **options: Any) -> str:
    """Why the contender was refused; it must have no samples then."""
    found = contest(prepare, **options)
    assert {m.cache for m in found} == {"cold", "warm"}
    assert all(not m.samples and not m.measured and not m.absent for m in found)
    return found[0].reason


def honest(case: Case, inputs: Inputs) -> Callable[[], Tensor]:
    return lambda: softmax(inputs)


class Watched(WallClock):
    """Tells a contender that it is being timed: more than any contender can know."""

    timing = False

    def sample(self, row: Any) -> Timed:
        type(self).timing = True
        try:
            return super().sample(row)
        finally:
            type(self).timing = False
