"""Clocks: how long a row of calls takes, on a CPU and on a GPU, and what one may believe of it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import torch

from bertgpt.benchmarks.case import Refused, Run

# Below this an event pair measures launches rather than kernels: a graph's replays are timed.
GRAPH_BELOW_SECONDS = 20e-6
# A process that has just slept is given a whole time slice: a neighbour interrupts it less.
_REST_SECONDS = 1e-3
# Work that goes on longer than this after the event that closes the timing was not timed.
_LATE_SECONDS = 100e-6


@dataclass(frozen=True)
class Timed:
    """One sample.

    Attributes:
        seconds: for all the calls together.
        witness: a copy of the last call's result, taken as soon as the call was over.
    """

    seconds: float
    witness: Any


@dataclass(frozen=True)
class Graph:
    """A row of calls captured once: one replay runs them all."""

    replay: Run
    result: Any
    calls: int


Row = Sequence[Run] | Graph


class WallClock:
    """Wall-clock time on a CPU; where another process took it meanwhile, the processor's time."""

    name = "wall clock"

    def synchronize(self) -> None:
        """Nothing is asynchronous here."""

    def capture(self, calls: Sequence[Run], seconds_a_call: float) -> Graph | None:
        """There are no graphs here."""
        return None

    def sample(self, row: Row) -> Timed:
        """Runs the row once."""
        assert not isinstance(row, Graph)
        result = None
        time.sleep(_REST_SECONDS)
        interruptions, own = _interruptions(), time.process_time()
        start = time.perf_counter()
        for call in row:
            result = call()
        seconds, own = time.perf_counter() - start, time.process_time() - own
        if _interruptions() != interruptions:  # all threads' time: none is had for nothing
            seconds = own
        return Timed(seconds, copied(result))


class DeviceClock:
    """CUDA events around the calls, or around a graph's replay where calls are short.

    Args:
        cuda: `torch.cuda`, or what stands in for it in a test.
    """

    name = "CUDA events"

    def __init__(self, cuda: Any = torch.cuda) -> None:
        self.cuda = cuda

    def synchronize(self) -> None:
        """Waits for every stream."""
        self.cuda.synchronize()

    def capture(self, calls: Sequence[Run], seconds_a_call: float) -> Graph | None:
        """The calls as a graph, where each is short and it can be captured."""
        if seconds_a_call >= GRAPH_BELOW_SECONDS:
            return None
        graph, result = self.cuda.CUDAGraph(), None
        self.cuda.synchronize()
        try:
            with self.cuda.graph(graph):
                for call in calls:
                    result = call()
        except RuntimeError:  # it synchronises, which a graph cannot: events must do
            self.cuda.synchronize()
            return None
        return Graph(graph.replay, result, len(calls))

    def sample(self, row: Row) -> Timed:
        """Runs the row once, between two events.

        Raises:
            Refused: The device was still at work, on another stream, after the closing event.
        """
        begin = self.cuda.Event(enable_timing=True)
        end = self.cuda.Event(enable_timing=True)
        result = None
        self.cuda.synchronize()
        begin.record()
        if isinstance(row, Graph):
            row.replay()
            result = row.result
        else:
            for call in row:
                result = call()
        end.record()
        witness = copied(result)  # on this stream: what another one writes later is not in it
        copy_done = self.cuda.Event()
        copy_done.record()
        copy_done.synchronize()
        closed = time.perf_counter()
        self.cuda.synchronize()
        late = time.perf_counter() - closed
        if late > _LATE_SECONDS:
            raise Refused(
                f"the device was at work for {late * 1e6:.0f} µs after the timing had closed: "
                "part of the work is on another stream"
            )
        return Timed(begin.elapsed_time(end) * 1e-3, witness)


def _interruptions() -> int:
    """How often this thread has had to give the processor to another; 0 where nobody counts."""
    try:
        import resource

        return resource.getrusage(resource.RUSAGE_THREAD).ru_nivcsw
    except (ImportError, AttributeError):  # not Linux
        return 0


def clock_for(device: str) -> WallClock | DeviceClock:
    """The clock of a kind of device."""
    return DeviceClock() if device == "cuda" else WallClock()


def copied(result: Any) -> Any:
    """A copy of a result, a tensor or a sequence of them, now.

    Raises:
        Refused: It is something else: what is computed when it is read was not timed.
    """
    if isinstance(result, (tuple, list)):
        return tuple(copied(item) for item in result)
    if type(result) not in (torch.Tensor, torch.nn.Parameter):
        raise Refused(f"its result is a {type(result).__name__}, not a plain tensor")
    return result.detach().clone()


def quartiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(samples) < 2:
        return samples[0], samples[0], samples[0]
    low, _, high = quantiles(samples, n=4, method="inclusive")
    return low, median(samples), high


def settled(samples: Sequence[float], spread: float) -> bool:
    """Whether the median's standard error is within `spread` of it.

    For near-normal samples that error is 1.2533 σ / √n with σ = IQR / 1.349.
    """
    if len(samples) < 5:
        return False
    low, middle, high = quartiles(samples)
    error = 1.2533 * (high - low) / 1.349 / len(samples) ** 0.5
    return error <= spread * middle


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Median of the ratios of each round: a drift that both share falls out."""
    return median(n / d for n, d in zip(numerator, denominator, strict=True))
