"""The C++ kernels under AddressSanitizer with UndefinedBehaviorSanitizer, and ThreadSanitizer."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from host_engine import BUILD, builder, changed, skip_unless_buildable

SMOKE = Path(__file__).resolve().parent / "host_smoke.py"
LIBRARIES = {"address": "libasan.so", "thread": "libtsan.so"}


def run(sanitizer, change=None, arch=900):
    """The smoke run's process under a sanitizer, with an architecture's code."""
    skip_unless_buildable()
    found = subprocess.run(
        ["g++", f"-print-file-name={LIBRARIES[sanitizer]}"], capture_output=True, text=True
    ).stdout.strip()
    if not Path(found).is_absolute():
        pytest.skip(f"g++ has no {LIBRARIES[sanitizer]}")
    module = builder().build_host(BUILD, sanitizer, change, arch)
    environment = {
        **os.environ,
        "LD_PRELOAD": found,
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "TSAN_OPTIONS": "halt_on_error=1",
        "PYTHONMALLOC": "malloc",
    }
    # ThreadSanitizer wants its usual addresses free.
    script = [sys.executable, str(SMOKE), str(module), "2" if sanitizer == "address" else "1"]
    command = ["setarch", os.uname().machine, "-R", *script]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("arch", [900, 800])
@pytest.mark.parametrize("sanitizer", LIBRARIES)
def test_nothing_is_found(sanitizer, arch):
    done = run(sanitizer, arch=arch)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "all paths ran" in done.stdout
    assert "Sanitizer" not in done.stderr


def test_a_store_out_of_bounds_is_named(tmp_path):
    change = changed(
        "past-row", "paged_write.cuh",
        "place * a.k_page_slot_stride;", "(place + 1) * a.k_page_slot_stride;",
        ("paged_write.cu",), tmp_path,
    )  # fmt: skip
    done = run("address", change)
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
    assert "paged_write.cuh" in done.stderr


def test_a_missing_barrier_is_named(tmp_path):
    change = changed(
        "no-barrier", "add_layer_norm.cuh",
        "partial[threadIdx.x / 32] = value;\n  __syncthreads();",
        "partial[threadIdx.x / 32] = value;",
        ("add_layer_norm.cu",), tmp_path,
    )  # fmt: skip
    done = run("thread", change)
    assert done.returncode != 0
    assert "ThreadSanitizer: data race" in done.stderr
    assert "add_layer_norm.cuh" in done.stderr
