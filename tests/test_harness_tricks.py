"""Tricks of a contender that knows the harness: each is refused, though its checked results hold.

Most cheat only while they are timed; they are told when, which is more than a kernel could know.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from contests import ROWS, TILE, WIDTH, Watched, case_of, contest, fresh, honest, reason_of, softmax
from torch import Tensor

from bertgpt.benchmarks.case import SEED, Case, Inputs, compared

Prepared = Callable[[], Any]


def test_a_result_that_is_wrong_only_while_timed_is_refused():
    def prepare(case: Case, inputs: Inputs) -> Prepared:
        return lambda: torch.full((ROWS, WIDTH), 0.5) if Watched.timing else softmax(inputs)

    assert "wrong while timed cold" in reason_of(prepare, clock=Watched())


def test_a_buffer_that_is_not_written_while_timed_is_refused():
    """It holds the right result from an earlier call: it is NaN before a round that is kept."""

    def prepare(case: Case, inputs: Inputs) -> Prepared:
        buffer = torch.empty(ROWS, WIDTH)
        return lambda: buffer if Watched.timing else buffer.copy_(softmax(inputs))

    assert "wrong while timed cold: NaN" in reason_of(prepare, clock=Watched())


def test_a_result_kept_by_the_version_of_its_input_is_refused():
    """New values do not raise a tensor's version."""

    def prepare(case: Case, inputs: Inputs) -> Prepared:
        known: dict[tuple[int, int], Tensor] = {}

        def run() -> Tensor:
            key = (inputs["x"]._version, inputs["limits"]._version)
            if key not in known:
                known[key] = softmax(inputs)
            return known[key].clone()

        return run

    assert "wrong before timing" in reason_of(prepare)


def test_an_input_zeroed_while_timed_is_refused():
    """Zeros are cheaper; its result is right for them."""

    def prepare(case: Case, inputs: Inputs) -> Prepared:
        def run() -> Tensor:
            if Watched.timing:
                inputs["x"].zero_()
            return softmax(inputs)

        return run

    assert "input x was changed while timed cold" in reason_of(prepare, clock=Watched())


def test_a_set_zeroed_after_its_turn_is_refused():
    """No result of it is kept any more: all sets are looked at when the rounds are over."""
    sets: list[Inputs] = []
    timed = 0

    def prepare(case: Case, inputs: Inputs) -> Prepared:
        sets.append(inputs)

        def run() -> Tensor:
            nonlocal timed
            timed += Watched.timing
            if Watched.timing and timed == 2:
                sets[0]["x"].zero_()
            return softmax(inputs)

        return run

    assert "input x was changed while all were timed cold" in reason_of(prepare, clock=Watched())


def test_a_write_in_place_that_an_earlier_call_has_done_is_refused():
    """The place is renewed before a round that is kept, else nothing would tell."""

    def draw(generator: torch.Generator, device: torch.device) -> Inputs:
        return {**fresh(generator, device), "out": torch.randn(ROWS, WIDTH, generator=generator)}

    def lazy(case: Case, inputs: Inputs) -> Prepared:
        return lambda: inputs["out"] if Watched.timing else inputs["out"].copy_(softmax(inputs))

    def diligent(case: Case, inputs: Inputs) -> Prepared:
        return lambda: inputs["out"].copy_(softmax(inputs))

    case = case_of(draw, mutable=frozenset({"out"}))
    assert "wrong while timed cold" in reason_of(lazy, case=case, clock=Watched())
    assert contest(diligent, case=case)[0].measured


def test_rows_left_out_in_the_middle_are_refused():
    """Of large results a part is compared, and no contender knows which."""

    def rows(inputs: Inputs) -> Tensor:
        return compared(inputs, ROWS, TILE)

    case = replace(
        case_of(),
        expected=lambda inputs, dtype: softmax(inputs, dtype)[rows(inputs)],
        select=lambda inputs, result: result[rows(inputs)],
    )

    def ends_alone(case: Case, inputs: Inputs) -> Prepared:
        assert SEED not in inputs

        def run() -> Tensor:
            out = torch.full((ROWS, WIDTH), 1 / WIDTH)
            out[:TILE], out[-TILE:] = softmax(inputs)[:TILE], softmax(inputs)[-TILE:]
            return out

        return run

    assert "wrong before timing" in reason_of(ends_alone, case=case)
    assert contest(honest, case=case)[0].measured


def test_the_compared_part_holds_the_last_and_changes_with_the_seed():
    inputs = {"x": torch.zeros(1)}
    chosen = [compared({**inputs, SEED: seed}, 1000, 8).tolist() for seed in range(9)]
    assert all(part == sorted(set(part)) and len(part) == 8 and part[-1] == 999 for part in chosen)
    assert len({tuple(part) for part in chosen}) == 9
    assert compared(inputs, 5, 8).tolist() == [0, 1, 2, 3, 4]
    assert compared(inputs, 5, 1).tolist() == [4]


@pytest.mark.parametrize("where", ["prepare", "run"])
def test_a_setting_changed_for_everybody_is_refused_and_set_back(where):
    threads = torch.get_num_threads()

    def prepare(case: Case, inputs: Inputs) -> Prepared:
        def run() -> Tensor:
            torch.set_num_threads(threads + 1)
            return softmax(inputs)

        if where == "prepare":
            run()
            return lambda: softmax(inputs)
        return run

    assert "changed a setting of torch for everybody: threads" in reason_of(prepare)
    assert torch.get_num_threads() == threads


class _Later(Tensor):
    """Computes when it is copied, after the clock has stopped."""

    work: Callable[[], Tensor]

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        values = [item.work() if isinstance(item, _Later) else item for item in args]
        return function(*values, **(kwargs or {}))


def test_a_result_that_is_computed_when_it_is_read_is_refused():
    def prepare(case: Case, inputs: Inputs) -> Prepared:
        def run() -> Tensor:
            promise = torch.empty(0).as_subclass(_Later)
            promise.work = lambda: softmax(inputs)
            return promise

        return run

    assert "a _Later, not a plain tensor" in reason_of(prepare)
