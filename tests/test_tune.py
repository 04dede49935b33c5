"""The search for configs: each candidate runs the real kernel, and a wrong one cannot win."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from bertgpt.benchmarks import bench_add_layer_norm, tune
from bertgpt.benchmarks.floors import Floors
from bertgpt.benchmarks.harness import REHEARSAL

FLOORS = Floors("cpu", {"float32": 1e15}, 1e15, 1e15)


@dataclass(frozen=True)
class _Config:
    block: int
    warps: int


def test_candidates_are_the_present_config_and_every_other_combination():
    space = {"block": (64, 128), "warps": (4, 8), "unknown": (1, 2)}
    found = list(tune.candidates(_Config(64, 8), space))
    assert found[0] == _Config(64, 8)
    assert len(found) == len(set(found)) == 4


def test_the_table_says_what_was_asked_and_what_won():
    winner = tune.Winner("attention", "S512", "90, 64", {"BLOCK_M": 64}, 1e-4, 1.25)
    (line,) = tune.as_table([vars(winner)]).splitlines()
    assert "pick_config(90, 64) → Config(BLOCK_M=64)" in line
    assert "1.25× the present one" in line


@pytest.mark.interpreter
def test_a_search_tries_each_candidate_on_the_kernel(monkeypatch):
    from bertgpt.kernels import add_layer_norm as kernels

    monkeypatch.setitem(tune.SPACES, "add_layer_norm", {"rows": (2, 4), "num_warps": (4,)})
    case = bench_add_layer_norm._case(6, 384, False, device="cpu")
    base = next(p for p in bench_add_layer_norm.PROVIDERS if p.name == "bertgpt triton")
    original = kernels.pick_config
    winner = tune.search(case, base, FLOORS, REHEARSAL)
    assert kernels.pick_config is original
    assert winner.config["rows"] in (2, 4)
    assert winner.asked == "90, 384"
    assert winner.gain > 0


@pytest.mark.interpreter
def test_a_candidate_that_is_wrong_does_not_win(monkeypatch):
    """A config that covers only part of a row leaves the rest unwritten."""
    monkeypatch.setitem(tune.SPACES, "add_layer_norm", {"chunks": (1,)})
    case = bench_add_layer_norm._case(6, 384, False, device="cpu")
    base = next(p for p in bench_add_layer_norm.PROVIDERS if p.name == "bertgpt triton")
    winner = tune.search(case, base, FLOORS, REHEARSAL)
    assert winner.config["chunks"] == 2
