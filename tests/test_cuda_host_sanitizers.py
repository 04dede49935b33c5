"""The C++ kernels under AddressSanitizer with UndefinedBehaviorSanitizer, and ThreadSanitizer."""

from pathlib import Path

import pytest
from host_engine import BUILD, builder, changed, skip_unless_buildable, under_sanitizer

SMOKE = Path(__file__).resolve().parent / "host_smoke.py"


def run(sanitizer, change=None, arch=900):
    """The smoke run's process under a sanitizer, with an architecture's code."""
    skip_unless_buildable()
    module = builder().build_host(BUILD, sanitizer, change, arch)
    return under_sanitizer(sanitizer, SMOKE, module, 2 if sanitizer == "address" else 1)


@pytest.mark.parametrize("arch", [900, 800])
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
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
