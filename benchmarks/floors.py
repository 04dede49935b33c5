"""What the machine allows: its matrix rate and its memory rate, measured in the run they judge."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from bertgpt.benchmarks.case import Case, Run
from bertgpt.benchmarks.timing import DeviceClock, WallClock, clock_for

_MATRIX_SIDE = {"cuda": 8192, "cpu": 512}
_COPY_BYTES = {"cuda": 2 << 30, "cpu": 32 << 20}
_REPEATS = {"cuda": 8, "cpu": 12}
# How far a result may seem to pass the floor before it is taken for a bug in the benchmark: a
# CPU's clock moves with its neighbours' work.
TOLERANCE = {"cuda": 0.05, "cpu": 0.20}


@dataclass
class Floors:
    """The best rates seen so far in this run.

    Attributes:
        device: "cuda" or "cpu".
        flops: operations a second of a large matrix product on random data, by dtype name.
        copy_bytes: bytes read and written a second by a large copy.
        read_bytes: bytes read a second by a large reduction.
    """

    device: str
    flops: dict[str, float] = field(default_factory=dict)
    copy_bytes: float = 0.0
    read_bytes: float = 0.0

    def measure(self, dtypes: Iterable[torch.dtype]) -> None:
        """Measures every rate, and keeps the better of this and what was seen before."""
        for dtype in dtypes:
            rate = matrix_rate(self.device, dtype)
            self.flops[name_of(dtype)] = max(rate, self.flops.get(name_of(dtype), 0.0))
        copy, read = memory_rates(self.device)
        self.copy_bytes = max(copy, self.copy_bytes)
        self.read_bytes = max(read, self.read_bytes)

    def seconds(self, case: Case) -> float:
        """The case's floor: max(FLOPs / F, bytes / W), W the better of copy and read."""
        return max(self.compute_seconds(case), case.bytes / max(self.copy_bytes, self.read_bytes))

    def compute_seconds(self, case: Case) -> float:
        """The part of the floor that holds even where the data is in a cache."""
        return case.flops / self.flops[name_of(case.dtype)]

    def limit(self, case: Case, cache: str) -> float:
        """What no honest time is below: memory counts only where a cache cannot serve it."""
        if cache == "cold" and self.device == "cuda":
            return self.seconds(case)
        return self.compute_seconds(case)


def name_of(dtype: torch.dtype) -> str:
    """The dtype's name without torch in front of it."""
    return str(dtype).removeprefix("torch.")


def matrix_rate(device: str, dtype: torch.dtype) -> float:
    """Operations a second of a square matrix product on normal data; the best of several.

    A CPU has two libraries of products, either the faster by its maker: MKL behind `torch.mm`, and
    oneDNN, which fused calls use.
    """
    side = _MATRIX_SIDE[device]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    ways: list[Run] = [lambda: torch.mm(a, b, out=out)]
    if device == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available():
        ways.append(lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""))
    return 2 * side**3 / min(_best(clock_for(device), way) for way in ways)


def memory_rates(device: str) -> tuple[float, float]:
    """Bytes a second of a copy (read and written) and of a reduction (read)."""
    source = torch.randn(_COPY_BYTES[device] // 4, device=device)
    target = torch.empty_like(source)
    size = source.numel() * 4
    clock = clock_for(device)
    copy = _best(clock, lambda: target.copy_(source))
    read = _best(clock, lambda: source.amax())  # a maximum, since sums of floats cost more adds
    return 2 * size / copy, size / read


def _best(clock: WallClock | DeviceClock, call: Run) -> float:
    clock.sample([call])
    repeats = _REPEATS["cpu" if isinstance(clock, WallClock) else "cuda"]
    return min(clock.sample([call]).seconds for _ in range(repeats))


def cache_bytes(device: str) -> int:
    """The cache that rotating inputs must exceed: the L2 of a GPU, 32 MB on a CPU."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size)
    return 32 << 20
