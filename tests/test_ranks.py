"""Two ranks on gloo, under DDP and FSDP2: the same curve as one rank."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("accelerate")

import ranks

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """The folder in which two ranks have trained."""
    folder = tmp_path_factory.mktemp("ranks")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    path = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-P", *launcher, ROOT / "tests" / "ranks.py", folder],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one rank finds."""
    folder = tmp_path_factory.mktemp("alone")
    return {kind: ranks.run(kind, folder / kind)[1] for kind in ("bert", "gpt")}


def assert_same_curve(found, expected):
    for one, other in zip(found["log"], expected["log"], strict=True):
        assert one["tokens"] == other["tokens"]
        for name in set(one) - {"seconds", "tokens"}:
            assert abs(one[name] - other[name]) <= 1e-5 * max(1, abs(other[name])), (one, other)
    assert found["after"].keys() == expected["after"].keys()
    for name, loss in found["after"].items():
        assert abs(loss - expected["after"][name]) < 1e-5


@pytest.mark.parametrize("kind", ["bert", "gpt"])
@pytest.mark.parametrize("wrapping", ["ddp", "fsdp"])
def test_two_ranks_have_the_curve_of_one(left, alone, wrapping, kind):
    found = json.loads((left / "figures.json").read_text())[f"{wrapping}-{kind}"]
    assert_same_curve(found, alone[kind])


def test_one_rank_goes_on_from_two_sharded_ones(left, alone):
    _, found = ranks.run("gpt", left / "cut", resume=True)
    assert_same_curve(found, alone["gpt"])
