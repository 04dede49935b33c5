"""The harness's clock for a GPU, on a `torch.cuda` of its own: streams, events and graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bertgpt.benchmarks import timing
from bertgpt.benchmarks.case import Case, Inputs, Measurement, Provider
from bertgpt.benchmarks.floors import Floors
from bertgpt.benchmarks.harness import REHEARSAL, Contest
from bertgpt.benchmarks.timing import DeviceClock

FLOORS = Floors("cpu", {"float32": 1e15}, 1e15, 1e15)


def _draw(generator: torch.Generator, device: torch.device) -> Inputs:
    return {"x": torch.randn(64, 64, generator=generator, device=device)}


def _softmax(inputs: Inputs, dtype: torch.dtype = torch.float32) -> Tensor:
    return inputs["x"].to(dtype).softmax(-1)


def _run(prepare: Callable[..., Any], cuda: FakeCuda) -> list[Measurement]:
    case = Case("softmax", "rows", "cpu", torch.float32, _draw, _softmax, 1e3, 1e3)
    provider = Provider("contender", prepare)
    return Contest(case, [provider], FLOORS, REHEARSAL, DeviceClock(cuda)).run()


class FakeCuda:
    """`torch.cuda` on a clock of its own: work lasts, the host runs ahead, streams do not wait."""

    def __init__(self) -> None:
        self.now = self.main = self.side = 0.0
        self.captured: list[tuple[float, Callable[[], Any]]] | None = None

    def work(
        self, seconds: float, side: bool = False, kernel: Callable[[], Any] = lambda: None
    ) -> None:
        if self.captured is not None:
            self.captured.append((seconds, kernel))
        elif side:
            self.side = max(self.side, self.now) + seconds
        else:
            self.main = max(self.main, self.now) + seconds

    def synchronize(self) -> None:
        self.now = max(self.now, self.main, self.side)

    def Event(self, enable_timing: bool = False) -> Any:
        cuda = self

        class Event:
            at = 0.0

            def record(self) -> None:
                self.at = max(cuda.main, cuda.now)

            def synchronize(self) -> None:
                cuda.now = max(cuda.now, self.at)

            def elapsed_time(self, end: Any) -> float:
                return (end.at - self.at) * 1e3

        return Event()

    def CUDAGraph(self) -> Any:
        cuda = self

        class Graph:
            launches: list[tuple[float, Callable[[], Any]]]

            def replay(self) -> None:
                cuda.work(sum(seconds for seconds, _ in self.launches))
                for _, kernel in self.launches:
                    kernel()

        return Graph()

    def graph(self, graph: Any) -> Any:
        cuda = self

        class Capture:
            def __enter__(self) -> None:
                graph.launches = cuda.captured = []

            def __exit__(self, *error: Any) -> None:
                cuda.captured = None

        return Capture()


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: fake.now)
    return fake


def _on_device(cuda: FakeCuda, seconds: float, side: bool) -> Callable[..., Any]:
    def prepare(case: Case, inputs: Inputs) -> Callable[[], Tensor]:
        def run() -> Tensor:
            out = _softmax(inputs)
            cuda.work(seconds, side, lambda: out.copy_(_softmax(inputs)))
            return out

        return run

    return prepare


def test_events_time_the_current_stream(cuda):
    found = _run(_on_device(cuda, 3e-3, side=False), cuda)
    assert all(m.measured for m in found)
    assert all(m.samples == pytest.approx([3e-3] * 2) for m in found)
    assert "CUDA events" in found[0].timer


def test_work_on_a_side_stream_is_refused(cuda):
    found = _run(_on_device(cuda, 3e-3, side=True), cuda)
    assert all(not m.measured and not m.samples for m in found)
    assert "another stream" in found[0].reason


def test_short_launches_are_timed_as_graph_replays(cuda):
    found = _run(_on_device(cuda, 5e-6, side=False), cuda)
    assert all(m.measured for m in found)
    assert all(m.samples == pytest.approx([5e-6] * 2) for m in found)
    assert "graph" in found[0].timer


def test_what_cannot_be_captured_is_timed_by_events(cuda):
    def refuse(*calls: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    cuda.graph = refuse
    found = _run(_on_device(cuda, 5e-6, side=False), cuda)
    assert all(m.measured for m in found)
    assert "CUDA events" in found[0].timer


def test_a_contender_that_launches_nothing_while_it_is_captured_is_refused(cuda):
    """Its buffer holds the right result from the calls before."""

    def prepare(case: Case, inputs: Inputs) -> Callable[[], Tensor]:
        buffer = torch.empty(64, 64)

        def run() -> Tensor:
            cuda.work(5e-6)
            return buffer if cuda.captured is not None else buffer.copy_(_softmax(inputs))

        return run

    found = _run(prepare, cuda)
    assert not found[0].measured
    assert "wrong while timed cold: NaN" in found[0].reason
