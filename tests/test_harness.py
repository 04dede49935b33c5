"""The benchmark harness: each way to look fast without being so is refused, honest work is not."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from contests import (
    FLOORS,
    ROWS,
    TILE,
    WIDTH,
    case_of,
    contest,
    fresh,
    honest,
    mask,
    reason_of,
    softmax,
)
from torch import Tensor

from bertgpt.benchmarks import checks, timing
from bertgpt.benchmarks.case import Case, Inputs, Provider, Refused, Unavailable
from bertgpt.benchmarks.floors import Floors
from bertgpt.benchmarks.harness import REHEARSAL, Contest
from bertgpt.benchmarks.timing import Timed, WallClock


def test_honest_work_is_measured():
    found = contest(honest)
    assert [m.cache for m in found] == ["cold", "warm"]
    for m in found:
        assert m.measured, m.reason
        assert len(m.samples) == REHEARSAL.rounds[0]
        assert all(seconds > 0 for seconds in m.samples)


def _stale_forever(case: Case, inputs: Inputs) -> Callable[[], Tensor]:
    first = softmax(inputs)
    return lambda: first.clone()


def _stale_by_address(case: Case, inputs: Inputs) -> Callable[[], Tensor]:
    known: dict[int, Tensor] = {}

    def run() -> Tensor:
        if inputs["x"].data_ptr() not in known:
            known[inputs["x"].data_ptr()] = softmax(inputs)
        return known[inputs["x"].data_ptr()].clone()

    return run


def _unwritten_output(case: Case, inputs: Inputs) -> Callable[[], Tensor]:
    """Writes its buffer once and then relies on what stands in it."""
    buffer = softmax(inputs)
    return lambda: buffer


@pytest.mark.parametrize("cheat", [_stale_forever, _stale_by_address, _unwritten_output])
def test_a_stale_output_is_refused(cheat):
    assert "wrong before timing" in reason_of(cheat)


def test_a_result_that_goes_stale_once_it_has_been_checked_is_refused():
    calls = 0

    def prepare(case: Case, inputs: Inputs) -> Callable[[], Tensor]:
        kept = None

        def run() -> Tensor:
            nonlocal calls, kept
            calls += 1
            if calls <= 2 * REHEARSAL.sets + 3 or kept is None:  # warm-up, estimate, check
                kept = softmax(inputs).mul(1.001)  # what it repeats is a little off
                return softmax(inputs)
            return kept.clone()

        return run

    assert "wrong" in reason_of(prepare)


def test_a_tile_left_to_the_call_before_is_refused():
    """Every other call skips the last tile, which the one before has written."""
    out, calls = torch.empty(ROWS, WIDTH), 0

    def prepare(case: Case, inputs: Inputs) -> Callable[[], Tensor]:
        def run() -> Tensor:
            nonlocal calls
            calls += 1
            rows = ROWS if calls % 2 else ROWS - TILE
            out[:rows] = softmax(inputs)[:rows]
            return out

        return run

    assert "wrong before timing" in reason_of(prepare)


@pytest.mark.parametrize("reuse", [False, True])
def test_a_skipped_last_tile_is_refused(reuse):
    def prepare(case: Case, inputs: Inputs) -> Callable[[], Tensor]:
        kept = softmax(inputs)

        def run() -> Tensor:
            out = kept if reuse else torch.empty(ROWS, WIDTH)
            out[:-TILE] = softmax(inputs)[:-TILE]
            return out

        return run

    assert "wrong before timing" in reason_of(prepare)


def test_a_tile_outside_the_compared_part_is_missed_by_no_one():
    """The definition may be evaluated on a part; NaN is looked for everywhere."""

    def expected(inputs: Inputs, dtype: torch.dtype) -> Tensor:
        return softmax(inputs, dtype)[:TILE]

    case = Case(
        "softmax", "part", "cpu", torch.float32, fresh, expected, 1e3, 1e3,
        select=lambda inputs, result: result[:TILE],
    )  # fmt: skip

    def prepare(case: Case, inputs: Inputs) -> Callable[[], Tensor]:
        def run() -> Tensor:
            out = torch.empty(ROWS, WIDTH)
            out[:-TILE] = softmax(inputs)[:-TILE]
            return out

        return run

    assert "not written" in reason_of(prepare, case=case)
    assert contest(honest, case=case)[0].measured


def test_work_in_the_background_is_refused():
    """A CPU's side stream: a thread that finishes after the call has returned."""
    threads = []

    def prepare(case: Case, inputs: Inputs) -> Callable[[], Tensor]:
        def run() -> Tensor:
            out = torch.empty(ROWS, WIDTH)

            def work() -> None:
                time.sleep(0.02)
                out.copy_(softmax(inputs))

            threads.append(threading.Thread(target=work))
            threads[-1].start()
            return out

        return run

    reason = reason_of(prepare)
    for thread in threads:
        thread.join()
    assert "wrong" in reason


def test_a_changed_input_is_refused():
    def prepare(case: Case, inputs: Inputs) -> Callable[[], Tensor]:
        def run() -> Tensor:
            result = softmax(inputs)
            inputs["x"].mul_(0.5)
            return result

        return run

    assert "changed its input x" in reason_of(prepare)
    allowed = case_of(mutable=frozenset({"x"}))
    assert contest(_in_place_then_back, case=allowed)[0].measured


def _in_place_then_back(case: Case, inputs: Inputs) -> Callable[[], Tensor]:
    def run() -> Tensor:
        result = softmax(inputs)
        inputs["x"].mul_(-1.0).mul_(-1.0)
        return result

    return run


@pytest.mark.parametrize("share", [1.0, 0.75])
def test_inputs_of_zeros_are_refused(share):
    def draw(generator: torch.Generator, device: torch.device) -> Inputs:
        inputs = fresh(generator, device)
        inputs["x"][: int(ROWS * share)] = 0
        return inputs

    with pytest.raises(Refused, match=r"input x is constant|of input x is zero"):
        contest(honest, case=case_of(draw))


def test_a_constant_input_is_refused():
    def draw(generator: torch.Generator, device: torch.device) -> Inputs:
        return {**fresh(generator, device), "x": torch.ones(ROWS, WIDTH)}

    with pytest.raises(Refused, match="input x is constant"):
        contest(honest, case=case_of(draw))


def test_a_contender_that_computes_on_zeros_is_refused():
    def prepare(case: Case, inputs: Inputs) -> Callable[[], Tensor]:
        zeros = {"x": torch.zeros(ROWS, WIDTH), "limits": inputs["limits"]}
        return lambda: softmax(zeros)

    assert "wrong" in reason_of(prepare)


def _fewer_rows(case: Case, inputs: Inputs) -> Callable[[], Tensor]:
    half = {"x": inputs["x"][: ROWS // 2], "limits": inputs["limits"][: ROWS // 2]}
    return lambda: softmax(half)


def _without_the_mask(case: Case, inputs: Inputs) -> Callable[[], Tensor]:
    return lambda: inputs["x"].softmax(-1)


def _mask_built_beforehand(case: Case, inputs: Inputs) -> Callable[[], Tensor]:
    hidden = ~mask(inputs["limits"])
    return lambda: inputs["x"].masked_fill(hidden, float("-inf")).softmax(-1)


@pytest.mark.parametrize("cheat", [_fewer_rows, _without_the_mask, _mask_built_beforehand])
def test_a_peer_with_less_work_is_refused(cheat):
    assert "wrong before timing" in reason_of(cheat)


def test_a_mask_may_be_planned_where_the_case_says_so():
    case = case_of(planned=frozenset({"limits"}))
    assert contest(_mask_built_beforehand, case=case)[0].measured


def test_a_time_below_the_floor_is_refused():
    slow_machine = Floors("cpu", {"float32": 1.0}, 1e15, 1e15)
    slow_machine.measure = lambda dtypes: None
    assert "faster than the machine allows" in reason_of(honest, floors=slow_machine)


def test_the_floor_is_measured_again_before_a_result_is_refused():
    """A neighbour may have slowed the first measurement."""
    floors = Floors("cpu", {"float32": 1.0}, 1.0, 1.0)
    assert contest(honest, floors=floors)[0].measured
    assert floors.flops["float32"] > 1e6


def test_memory_bounds_cold_results_of_a_gpu_only():
    case = Case("copy", "big", "cuda", torch.float32, fresh, softmax, flops=10.0, bytes=100.0)
    floors = Floors("cuda", {"float32": 10.0}, 10.0, 20.0)
    assert floors.seconds(case) == pytest.approx(5.0)
    assert floors.limit(case, "cold") == pytest.approx(5.0)
    assert floors.limit(case, "warm") == pytest.approx(1.0)


def test_failures_and_absences_are_told_apart():
    def broken(case: Case, inputs: Inputs) -> Callable[[], Tensor]:
        raise RuntimeError("no kernel image\nand more")

    def absent(case: Case, inputs: Inputs) -> Callable[[], Tensor]:
        raise Unavailable("it wants another dtype")

    providers = [
        Provider("broken", broken),
        Provider("absent", absent),
        Provider("missing", honest, absent=lambda case: "not installed"),
        Provider("honest", honest),
    ]
    found = {m.provider.name: m for m in Contest(case_of(), providers, FLOORS, REHEARSAL).run()}
    assert found["broken"].reason == "RuntimeError: no kernel image"
    assert not found["broken"].absent
    assert found["absent"].absent
    assert (found["missing"].reason, found["missing"].absent) == ("not installed", True)
    assert found["honest"].measured


def test_contenders_take_turns():
    """Interleaved: in every round each contender has one sample before any has another."""
    order: list[str] = []
    sampled: list[str] = []

    class Recorder(WallClock):
        def sample(self, row: Any) -> Timed:
            timed = super().sample(row)
            sampled.append(order[-1])
            return timed

    def prepare(name: str) -> Callable[[Case, Inputs], Callable[[], Tensor]]:
        def prepared(case: Case, inputs: Inputs) -> Callable[[], Tensor]:
            def run() -> Tensor:
                order.append(name)
                return softmax(inputs)

            return run

        return prepared

    providers = [Provider(name, prepare(name)) for name in "abc"]
    Contest(case_of(), providers, FLOORS, REHEARSAL, Recorder()).run()
    rounds = [set(sampled[i : i + 3]) for i in range(0, len(sampled), 3)]
    assert rounds == [set("abc")] * 2 * REHEARSAL.rounds[0]


def test_fresh_values_land_in_the_same_memory():
    generator = torch.Generator().manual_seed(1)
    inputs = fresh(generator, torch.device("cpu"))
    before = {name: (value.data_ptr(), value.clone()) for name, value in inputs.items()}
    checks.refresh(case_of(planned=frozenset({"limits"})), inputs, generator)
    assert {name: value.data_ptr() for name, value in inputs.items()} == {
        name: address for name, (address, _) in before.items()
    }
    assert not torch.equal(inputs["x"], before["x"][1])
    assert torch.equal(inputs["limits"], before["limits"][1])


@pytest.mark.parametrize(("interrupted", "seconds"), [(False, 5.0), (True, 2.0)])
def test_time_that_another_process_took_is_not_counted(monkeypatch, interrupted, seconds):
    """The call takes 2 s of the processor's time and 5 s in all."""
    wall, own, count = iter([0.0, 5.0]), iter([10.0, 12.0]), iter([7, 7 + interrupted])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(wall))
    monkeypatch.setattr(timing.time, "process_time", lambda: next(own))
    monkeypatch.setattr(timing.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(timing, "_interruptions", lambda: next(count))
    assert WallClock().sample([lambda: torch.zeros(1)]).seconds == seconds


def test_interruptions_are_counted_as_the_kernel_counts_them():
    status = Path("/proc/thread-self/status")
    if not status.exists():
        pytest.skip("only Linux counts them for a thread")
    before = timing._interruptions()
    lines = [line for line in status.read_text().splitlines() if line.startswith("nonvoluntary")]
    assert before <= int(lines[0].split()[1]) <= timing._interruptions()


def test_statistics():
    assert timing.quartiles([4.0, 1.0, 2.0, 3.0, 5.0]) == (2.0, 3.0, 4.0)
    assert timing.quartiles([7.0]) == (7.0, 7.0, 7.0)
    # Both halve in speed in the second half of the run: their ratio does not see it.
    assert timing.ratio([2.0, 2.0, 4.0, 4.0], [1.0, 1.0, 2.0, 2.0]) == 2.0
    assert not timing.settled([1.0, 1.0], 0.1)
    assert timing.settled([1.0, 1.01, 0.99, 1.0, 1.0], 0.02)
    assert not timing.settled([1.0, 2.0, 0.5, 1.5, 1.0], 0.02)
