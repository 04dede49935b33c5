"""The figures that the page on fine-tuning quotes are those of the committed results."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RUNS = json.loads((ROOT / "benchmarks/results/against_stock/finetune_cpu.json").read_text("utf-8"))
PAGE = (ROOT / "docs/finetuning.md").read_text("utf-8")
METRICS = {"topics": "accuracy", "sentiment": "accuracy", "tags": "span_f1", "answers": "f1"}
BASELINES = {run["contest"]: run["baseline"][METRICS[run["contest"]]] for run in RUNS}


def figures(name, contender):
    runs = [run for run in RUNS if (run["contest"], run["contender"]) == (name, contender)]
    return [run["after"][METRICS[name]] for run in runs]


@pytest.mark.parametrize("name", METRICS)
def test_quoted(name):
    (row,) = re.findall(
        rf"^\| {name} \| [a-zA-Z][^|]*\| (0\.\d+) \| ([^|]+) \|([^|]+) \|", PAGE, re.M
    )
    baseline, ours, stock = row
    assert float(baseline) == pytest.approx(BASELINES[name], abs=5e-4)
    for quoted, contender in ((ours, "ours"), (stock, "stock")):
        assert [float(x) for x in quoted.split(",")] == pytest.approx(
            figures(name, contender), abs=5e-4
        )


@pytest.mark.parametrize("name", METRICS)
def test_above_the_baseline_and_like_stock(name):
    ours, stock = figures(name, "ours"), figures(name, "stock")
    assert min(ours) > 1.2 * BASELINES[name]
    spread = max(stock) - min(stock)
    assert abs(sum(ours) / len(ours) - sum(stock) / len(stock)) <= spread
    if name == "topics":
        assert min(ours) >= 0.95
