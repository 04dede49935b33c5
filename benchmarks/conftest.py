"""The suite under pytest: `pytest benchmarks` times, and pytest-benchmark keeps the record.

The contenders of a case must run interleaved, so a case is measured once, when its first test
asks; each test then replays its own samples through pytest-benchmark's clock. Its statistics,
groups, JSON and `--benchmark-compare` so hold what the harness measured.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("bertgpt") is None:
    # Appended, not prepended: the folder kernels/ must never come before Hugging Face's package.
    sys.path.append(str(Path(__file__).resolve().parent.parent))

import torch

from bertgpt.benchmarks import suite
from bertgpt.benchmarks.case import Case, Measurement, Provider
from bertgpt.benchmarks.floors import Floors, name_of
from bertgpt.benchmarks.harness import CACHES, EFFORT, REHEARSAL, Contest


class Clock:
    """Shows the sum of the samples replayed so far."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        """Seconds, in pytest-benchmark's sense."""
        return self.seconds


_CLOCK = Clock()
_FLOORS: dict[str, Floors] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rehearse", action="store_true", help="run every line once; the times mean nothing"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each case of this machine, state of the cache, and provider."""
    if "contest" not in metafunc.fixturenames:
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    module = metafunc.module
    parameters = [
        pytest.param((module, case, cache_state, provider), id=f"{case.name}-{cache_state}-{name}")
        for case in module.CASES
        if case.device == device
        for cache_state in CACHES
        for provider in module.PROVIDERS
        for name in [provider.name]
    ]
    metafunc.parametrize("contest", parameters, indirect=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=_CLOCK))


@cache
def _measured(module: Any, case: Case, rehearse: bool) -> list[Measurement]:
    suite.set_up(case.device)
    floors = _FLOORS.setdefault(case.device, Floors(case.device))
    if name_of(case.dtype) not in floors.flops:
        floors.measure([case.dtype])
    effort = REHEARSAL if rehearse else EFFORT[case.device]
    return Contest(case, module.PROVIDERS, floors, effort).run()


@pytest.fixture
def contest(request: pytest.FixtureRequest, benchmark: Any) -> Callable[[], None]:
    """A function that reports one provider's samples, or says why there are none."""
    module, case, cache_state, provider = request.param

    def report() -> None:
        found = _measured(module, case, request.config.getoption("--rehearse"))
        result = next(
            m for m in found if m.cache == cache_state and m.provider.name == provider.name
        )
        if not result.measured:
            _give_up(provider, result)
        benchmark.group = f"{case.label}, {cache_state}"
        benchmark.extra_info = {
            "provider": provider.name,
            "ours": provider.ours,
            "cache": cache_state,
            "floor_seconds": result.floor,
            "flops": case.flops,
            "bytes": case.bytes,
            "timer": result.timer,
        }
        samples = iter(result.samples)

        def replay() -> None:
            _CLOCK.seconds += next(samples, 0.0)

        benchmark.pedantic(replay, rounds=len(result.samples), iterations=1)

    return report


def _give_up(provider: Provider, result: Measurement) -> None:
    if provider.ours and not result.absent:
        pytest.fail(result.reason)
    pytest.skip(result.reason)
