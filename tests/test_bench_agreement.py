"""Two runs of the CPU suite on one machine agree on every ratio. Minutes: not in `make test`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bertgpt.benchmarks import results, suite

ROOT = Path(__file__).resolve().parent.parent
WITHIN = 0.15


def _ratios(folder: Path) -> dict[tuple[str, ...], float]:
    """Every contender's speed against ours by default, by case, cache and name."""
    command = [sys.executable, "-P", "-c", "from bertgpt.cli import main; main()", "bench"]
    done = subprocess.run(
        [*command, "--device", "cpu", "--out", str(folder)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    _, rows = results.read(folder / "results.json")
    found = {}
    for group in suite.by_case(rows):
        mine = results.by_default(group)
        if mine is None:  # the bare product: no case of ours
            continue
        for row in group:
            if row.samples and row is not mine:
                key = (row.op, row.case, row.cache, row.provider)
                found[key] = results.speed_ratio(row, mine)
    return found


@pytest.mark.slow
def test_two_runs_agree_on_every_ratio(tmp_path):
    first, second = _ratios(tmp_path / "first"), _ratios(tmp_path / "second")
    assert first.keys() == second.keys()
    assert len(first) > 30
    apart = {key: first[key] / second[key] for key in first}
    wide = {key: ratio for key, ratio in apart.items() if abs(ratio - 1) > WITHIN}
    assert not wide, wide
