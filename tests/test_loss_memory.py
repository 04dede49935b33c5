"""No backend but the reference ever holds a [rows, tokens] tensor: measured in fresh processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent / "loss_memory.py"
TOKENS = 50257
LIMIT = 64_000_000

pytestmark = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="peak memory is read from Linux's /proc"
)


def extra_bytes(backend: str, rows: int, width: int) -> int:
    """What a loss and its gradients hold at their peak beyond inputs and gradients."""
    call = [sys.executable, str(SCRIPT), backend, str(rows), str(TOKENS), str(width)]
    return int(subprocess.run(call, check=True, capture_output=True, text=True).stdout)


def test_torch_stays_below_the_limit():
    assert 4096 * TOKENS * 4 > 10 * LIMIT
    assert extra_bytes("torch", 4096, 32) < LIMIT


@pytest.mark.slow
def test_torch_stays_below_the_limit_at_full_width():
    assert extra_bytes("torch", 4096, 768) < LIMIT


def test_the_reference_would_be_caught():
    """A quarter of the rows suffice: 206 MB of scores, and the limit is a quarter of that."""
    assert extra_bytes("reference", 1024, 32) > 1024 * TOKENS * 4 > LIMIT


@pytest.mark.interpreter
def test_the_triton_launchers_stay_below_the_limit():
    assert extra_bytes("triton", 4096, 768) < LIMIT
