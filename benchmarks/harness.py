"""The protocol of one contest: check, time in turns, check again, judge.

For one case and all its providers:

1. draw sets of random inputs, enough of them to exceed the last-level cache; refuse trivial ones;
2. let each provider prepare for every set, then put new values into the same memory;
3. check each: outputs NaN beforehand, the result copied at once, the inputs unchanged;
4. time in rounds, each provider once a round in a changing order, until the medians settle:
   first cold (the sets in rotation), then warm (one set); before a round whose result is kept its
   outputs are NaN, and what it changes in place is renewed;
5. check the kept results, and that no set has changed; put in new values and check as in 3;
6. refuse what is faster than the floor.

A provider that fails any of it, or changes a setting of torch, has a reason and no time.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from bertgpt.benchmarks import checks
from bertgpt.benchmarks.case import (
    SEED,
    Case,
    Inputs,
    Measurement,
    Provider,
    Refused,
    Run,
    Unavailable,
)
from bertgpt.benchmarks.floors import TOLERANCE, Floors, cache_bytes
from bertgpt.benchmarks.timing import (
    DeviceClock,
    Graph,
    Row,
    WallClock,
    clock_for,
    copied,
    quartiles,
    settled,
)

CACHES = ("cold", "warm")
_MAX_CALLS = 4096


@dataclass(frozen=True)
class Effort:
    """How long to try.

    Attributes:
        sample_seconds: the least that one sample lasts, by repeating the call.
        rounds: fewest and most rounds.
        spread: standard error of a median, relative, at which it counts as settled.
        case_seconds: the rounds of one case and cache stop after this.
        sets: the most sets of inputs to rotate through.
    """

    sample_seconds: float
    rounds: tuple[int, int]
    spread: float
    case_seconds: float
    sets: int = 64


# On a CPU samples are short, to fit between a neighbour's time slices, and many.
EFFORT = {
    "cuda": Effort(sample_seconds=1e-3, rounds=(11, 51), spread=0.005, case_seconds=4.0),
    "cpu": Effort(sample_seconds=0.0, rounds=(25, 400), spread=0.01, case_seconds=2.0),
}
# Every line once; the times mean nothing.
REHEARSAL = Effort(sample_seconds=0.0, rounds=(2, 2), spread=1.0, case_seconds=1.0, sets=2)


@dataclass(frozen=True)
class Witness:
    """A result: its values, the set of inputs it belongs to, and what it should be.

    Without `truth` it should be what the set's inputs, which nobody may change, say later.
    """

    result: Any
    index: int
    truth: checks.Truth | None


@dataclass
class Timing:
    """One contender's samples with one state of the cache, and the timed result that was kept."""

    samples: list[float] = field(default_factory=list)
    timer: str = ""
    witness: Witness | None = None


@dataclass
class Contender:
    """A provider at work on one case: its calls, one for each set of inputs, and its fate."""

    provider: Provider
    calls: list[Run] = field(default_factory=list)
    reason: str = ""
    absent: bool = False
    seconds_a_call: float = 0.0
    peak_bytes: int | None = None
    offset: int = 0
    timings: dict[str, Timing] = field(default_factory=dict)


class Contest:
    """One case and its providers.

    Args:
        case: the case.
        providers: who contends.
        floors: rates of this machine, measured in this run.
        effort: how long to try.
        clock: the clock; by default that of the case's device.
    """

    def __init__(
        self,
        case: Case,
        providers: Sequence[Provider],
        floors: Floors,
        effort: Effort,
        clock: WallClock | DeviceClock | None = None,
    ) -> None:
        self.case = case
        self.floors = floors
        self.effort = effort
        self.clock = clock or clock_for(case.device)
        self.contenders = [Contender(provider) for provider in providers]
        self.device = torch.device(case.device)
        self.random = random.Random()
        self.generator = torch.Generator(self.device).manual_seed(self.random.getrandbits(62))
        self.sets: list[Inputs] = []
        self._truths: dict[int, checks.Truth] = {}
        self._prints: list[checks.Fingerprint] = []
        self._seed = 0  # of the part that is compared; no contender sees it
        self._settings = checks.settings()

    def run(self) -> list[Measurement]:
        """The measurements of every provider, cold then warm.

        Raises:
            Refused: The case itself is at fault: its inputs are trivial.
        """
        self._draw()
        self._each(self._prepare)
        self._refresh()
        self._check_all("before timing")
        for cache in CACHES:
            self._time(cache)
        self._refresh()
        self._check_all("after timing")
        return [self._measurement(c, cache) for cache in CACHES for c in self.contenders]

    def _draw(self) -> None:
        first = self.case.inputs(self.generator, self.device)
        checks.insist_on_random(self.case, first)
        size = sum(t.numel() * t.element_size() for t in checks.tensors_of(first))
        enough = math.ceil(2 * cache_bytes(self.case.device) / max(size, 1))
        count = min(self.case.sets or max(enough, 2), self.effort.sets)
        more = (self.case.inputs(self.generator, self.device) for _ in range(count - 1))
        self.sets = [first, *more]

    def _each(self, step: Callable[[Contender], None], shuffled: bool = False) -> None:
        """Takes every contender still standing a step further; a failure is its own."""
        standing = self._standing()
        if shuffled:
            self.random.shuffle(standing)
        for contender in standing:
            try:
                try:
                    step(contender)
                finally:
                    checks.insist_on_settings(self._settings)
            except Unavailable as reason:
                contender.reason, contender.absent = str(reason), True
            except Refused as reason:
                contender.reason = str(reason)
            except Exception as error:  # a peer may fail in any way: that is its result
                first_line = next(iter(str(error).splitlines()), "")
                contender.reason = f"{type(error).__name__}: {first_line}"[:300]

    def _standing(self) -> list[Contender]:
        return [contender for contender in self.contenders if not contender.reason]

    def _prepare(self, contender: Contender) -> None:
        reason = contender.provider.absent(self.case)
        if reason is not None:
            raise Unavailable(reason)
        contender.calls = [contender.provider.prepare(self.case, inputs) for inputs in self.sets]
        for call in contender.calls:
            call()  # compiles, and fills caches of plans
        self.clock.synchronize()
        start = time.perf_counter()
        for call in contender.calls[:3]:
            call()
        self.clock.synchronize()
        contender.seconds_a_call = (time.perf_counter() - start) / len(contender.calls[:3])

    def _refresh(self) -> None:
        """New values in the same memory: what was kept from before fits no longer."""
        for inputs in self.sets:
            checks.refresh(self.case, inputs, self.generator)
        self._prints = [checks.fingerprint(self.case, inputs) for inputs in self.sets]
        self._truths.clear()
        self._seed = self.random.getrandbits(62)

    def _judged(self, index: int) -> Inputs:
        """A set as the definition sees it: with the seed of the part that is compared."""
        return {**self.sets[index], SEED: self._seed}

    def _truth(self, index: int) -> checks.Truth:
        if index not in self._truths:
            self._truths[index] = checks.Truth.of(self.case, self._judged(index))
        return self._truths[index]

    def _insist_on_correct(self, witness: Witness, when: str) -> None:
        judged, truth = self._judged(witness.index), witness.truth or self._truth(witness.index)
        checks.insist_on_correct(self.case, judged, truth, witness.result, when)

    def _check_all(self, when: str) -> None:
        index = self.random.randrange(len(self.sets))
        self._each(lambda contender: self._check(contender, index, when))

    def _check(self, contender: Contender, index: int, when: str) -> None:
        call, inputs = contender.calls[index], self.sets[index]
        truth = self._truth(index)
        before = checks.snapshot(self.case, inputs)
        previous = call()
        with checks.poisoned_outputs(previous, inputs):
            result, contender.peak_bytes = self._peak(call)
        checks.insist_on_unchanged(inputs, before)
        self._insist_on_correct(Witness(result, index, truth), when)

    def _peak(self, call: Run) -> tuple[Any, int | None]:
        """A copy of the call's result, taken at once, and what the call allocated at most."""
        if self.case.device != "cuda":
            return copied(call()), None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        peak = torch.cuda.max_memory_allocated() - before
        return copied(result), peak

    def _time(self, cache: str) -> None:
        for contender in self._standing():
            contender.timings[cache] = Timing()
        graphs: dict[int, Graph | None] = {}
        least, most = self.effort.rounds
        started = time.monotonic()
        for turn in range(most):
            self._each(lambda contender: self._sample(contender, cache, graphs), shuffled=True)
            timings = [contender.timings[cache] for contender in self._standing()]
            if turn + 1 < least:
                continue
            if time.monotonic() - started > self.effort.case_seconds:
                break
            if all(settled(timing.samples, self.effort.spread) for timing in timings):
                break
        self._each(lambda contender: self._check_witness(contender, cache))

    def _sample(self, contender: Contender, cache: str, graphs: dict[int, Graph | None]) -> None:
        row, count, last = self._row(contender, cache, graphs)
        timing = contender.timings[cache]
        kind = "CUDA graph replay" if isinstance(row, Graph) else self.clock.name
        timing.timer = f"{kind}, {count} calls a sample"
        # Each round's result is kept equally likely; the contender cannot tell which.
        kept = self.random.randrange(len(timing.samples) + 1) == 0
        truth = self._spoil(contender, row, last) if kept else None
        if cache == "warm":
            contender.calls[0]()  # the other contenders have been here
        timed = self.clock.sample(row)
        timing.samples.append(timed.seconds / count)
        if kept:
            inputs, when = self.sets[last], f"while timed {cache}"
            checks.insist_on_fingerprint(self.case, inputs, self._prints[last], when)
            timing.witness = Witness(timed.witness, last, truth)

    def _row(
        self, contender: Contender, cache: str, graphs: dict[int, Graph | None]
    ) -> tuple[Row, int, int]:
        """What a sample runs, the number of its calls, and the set of inputs of its last call."""
        calls = contender.calls if cache == "cold" else contender.calls[:1]
        wanted = self.effort.sample_seconds / max(contender.seconds_a_call, 1e-9)
        count = min(max(math.ceil(wanted), 1), _MAX_CALLS)
        if id(contender) not in graphs:
            whole_turns = calls * math.ceil(count / len(calls))
            graphs[id(contender)] = self.clock.capture(whole_turns, contender.seconds_a_call)
        graph = graphs[id(contender)]
        if graph is not None:
            return graph, graph.calls, len(calls) - 1
        # Each sample goes on in the rotation where the one before it stopped.
        row = [calls[(contender.offset + i) % len(calls)] for i in range(count)]
        last = (contender.offset + count - 1) % len(calls)
        contender.offset += count
        return row, count, last

    def _spoil(self, contender: Contender, row: Row, last: int) -> checks.Truth | None:
        """Leaves nothing of an earlier call for the coming one to pass off as its own.

        Returns what the coming result should be, where a call changes its inputs.
        """
        inputs = self.sets[last]
        previous = row.result if isinstance(row, Graph) else contender.calls[last]()
        checks.poison(previous, inputs)
        if not self.case.mutable:
            return None
        checks.refresh(self.case, inputs, self.generator, self.case.mutable)
        self._truths.pop(last, None)
        return self._truth(last)

    def _check_witness(self, contender: Contender, cache: str) -> None:
        timing = contender.timings[cache]
        assert timing.witness is not None
        for inputs, before in zip(self.sets, self._prints, strict=True):
            checks.insist_on_fingerprint(self.case, inputs, before, f"while all were timed {cache}")
        self._insist_on_correct(timing.witness, f"while timed {cache}")
        timing.witness = None
        self._insist_on_possible(cache, quartiles(timing.samples)[1])

    def _insist_on_possible(self, cache: str, seconds: float) -> None:
        """Refuses what is faster than the floor, after a second look at the floor itself."""
        slack = 1 - TOLERANCE[self.case.device]
        if seconds < slack * self.floors.limit(self.case, cache):
            self.floors.measure([self.case.dtype])
        limit = self.floors.limit(self.case, cache)
        if seconds < slack * limit:
            raise Refused(
                f"{seconds * 1e6:.3g} µs {cache} is faster than the machine allows "
                f"({limit * 1e6:.3g} µs): a bug in the benchmark"
            )

    def _measurement(self, contender: Contender, cache: str) -> Measurement:
        timing = contender.timings.get(cache, Timing())
        return Measurement(
            case=self.case,
            provider=contender.provider,
            cache=cache,
            samples=() if contender.reason else tuple(timing.samples),
            timer=timing.timer,
            floor=self.floors.seconds(self.case),
            peak_bytes=contender.peak_bytes,
            reason=contender.reason,
            absent=contender.absent,
        )
