"""The search for configs: each candidate runs the real kernel, and a wrong one cannot win."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Any

import pytest

from bertgpt.benchmarks import bench_add_layer_norm, tune
from bertgpt.benchmarks.case import Provider
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


def test_without_a_space_the_neighbours_are_tried():
    found = list(tune.candidates(_Config(64, 1), None))
    assert found[0] == _Config(64, 1)
    assert set(found[1:4]) == {_Config(128, 1), _Config(32, 1), _Config(64, 2)}
    assert set(found[4:]) == {_Config(128, 2), _Config(32, 2)}


def test_every_kernel_with_configs_is_searched_in_a_case_of_its_op():
    """And a space names fields that the kernel's Config has."""
    kernels = tune.searched()
    assert {"attention", "linear_gelu", "add_layer_norm", "paged_attention", "paged_write"} <= {
        *kernels
    }
    assert set(tune.SPACES) <= set(kernels)
    for kernel in kernels:
        pick = importlib.import_module(f"bertgpt.kernels.{kernel}").pick_config
        config = importlib.import_module(pick.__module__).Config
        assert set(tune.SPACES.get(kernel, {})) <= {field.name for field in fields(config)}
        entries = tune.cases_of(kernel, "cuda")
        assert entries, f"no case runs {kernel}"
        for entry in entries:
            assert any(provider.name == "bertgpt triton" for provider in entry.providers)


def test_the_table_says_what_was_asked_and_what_won():
    winner = tune.Winner("attention", "S512", "90, 64", {"BLOCK_M": 64}, 1e-4, 1.25)
    (line,) = tune.as_table([vars(winner)]).splitlines()
    assert "attention.pick_config(90, 64) → Config(BLOCK_M=64)" in line
    assert "1.25× the present one" in line


def _asking(*questions: str) -> Any:
    module = SimpleNamespace(__name__="kernels", pick_config=lambda what: f"{what} as it is")
    return module, lambda: [module.pick_config(question) for question in questions]


def test_each_question_of_a_call_is_told_apart():
    module, run = _asking("dq", "dkdv", "dq")
    assert tune.asked_and_present(module, run) == {"dq": "dq as it is", "dkdv": "dkdv as it is"}
    base = Provider("bertgpt triton", lambda case, inputs: run)
    fixed = tune._with_config(base, module, "dkdv", "another")
    assert fixed.prepare(None, None)() == ["dq as it is", "another", "dq as it is"]
    assert module.pick_config("dkdv") == "dkdv as it is"


def test_a_call_that_asks_nothing_is_named():
    module, run = _asking()
    with pytest.raises(LookupError, match=r"asks nothing of kernels\.pick_config"):
        tune.asked_and_present(module, run)


def test_beyond_its_budget_the_search_begins_nothing():
    said: list[str] = []
    assert tune.search_all("cpu", True, report=said.append, budget=-1.0) == []
    assert all("beyond the budget" in line for line in said)
    assert {line.split()[3] for line in said} >= {"attention", "add_layer_norm"}


@pytest.mark.interpreter
def test_a_search_tries_each_candidate_on_the_kernel(monkeypatch):
    from bertgpt.kernels import add_layer_norm as kernels

    monkeypatch.setitem(tune.SPACES, "add_layer_norm", {"rows": (2, 4), "num_warps": (4,)})
    case = bench_add_layer_norm._case(6, 384, False, device="cpu")
    base = next(p for p in bench_add_layer_norm.PROVIDERS if p.name == "bertgpt triton")
    original = kernels.pick_config
    (winner,) = tune.search("add_layer_norm", case, base, FLOORS, REHEARSAL)
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
    (winner,) = tune.search("add_layer_norm", case, base, FLOORS, REHEARSAL)
    assert winner.config["chunks"] == 2
