"""The host engine's primitives, and the faults that it finds in their use."""

import re
from pathlib import Path

import engine_kernels
import numpy as np
import pytest
from host_engine import BUILD, builder, skip_unless_buildable, under_sanitizer

KERNELS = Path(__file__).resolve().parent / "engine_kernels.cu"
SCRIPT = KERNELS.with_suffix(".py")


def library(sanitizer="plain"):
    skip_unless_buildable()
    return builder().build_host_library(BUILD, KERNELS, sanitizer)


@pytest.mark.parametrize("kernel", engine_kernels.COUNTS)
def test_what_is_right_runs(kernel):
    for seed in range(20):
        y, expected, error = engine_kernels.run(library(), kernel, "none", seed)
        assert error is None
        np.testing.assert_array_equal(y, expected)


def run_script(sanitizer, fault, schedules, *kernels):
    return under_sanitizer(sanitizer, SCRIPT, library(sanitizer), fault, schedules, *kernels)


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_sanitizers_find_nothing_in_what_is_right(sanitizer):
    done = run_script(sanitizer, "none", 2, *engine_kernels.COUNTS)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout == "ran\n"
    assert "Sanitizer" not in done.stderr


@pytest.mark.parametrize(
    ("kernel", "fault", "least"),
    [
        ("reverse", "no barrier", 20),
        ("handover", "no barrier", 5),
        ("rotate", "no barrier", 20),
        ("pipeline", "no wait", 10),
    ],
)
def test_a_missing_wait_shows_as_nan(kernel, fault, least):
    """In so many of 20 schedules at least: memory starts as NaN, and copies come late."""
    found = [np.isnan(engine_kernels.run(library(), kernel, fault, s)[0]).any() for s in range(20)]
    assert sum(found) >= least


def test_a_stage_filled_too_early_is_an_exception():
    """In 8 of 20 schedules at least: the barrier is then phases ahead of who waits for it."""
    errors = [engine_kernels.run(library(), "pipeline", "no reuse wait", s)[2] for s in range(20)]
    found = [error for error in errors if error is not None]
    assert len(found) >= 8
    assert all("for an mbarrier that lacks" in error for error in found)


@pytest.mark.parametrize(
    ("kernel", "fault", "words"),
    [
        ("pipeline", "no wait", r"a block ended before anyone waited for the bulk copy at L"),
        ("pipeline", "too few bytes", r"bulk copies up to L bring 16 bytes more than .* at L"),
        ("pipeline", "too many bytes", r"at L for .* lacks 0 arrivals and 16 bytes, expected at L"),
        ("pipeline", "short copy", r"misaligned 16-byte access at L"),
        ("pipeline", "misaligned", r"misaligned 16-byte access at L"),
        ("pipeline", "no arrive", r"at L for .* lacks 32 arrivals and 0 bytes, expected at L"),
        ("pipeline", "no init", r"L: an mbarrier before its init"),
        ("pipeline", "no fence", r"bulk copy at L goes where .* without gpu_fence_bulk_copies"),
        ("handover", "wrong count", r"wait at L and at L for threads that have returned"),
        ("handover", "unequal counts", r"named barrier 1 is of \d+ threads at L and of \d+ at L"),
        ("rotate", "some blocks", r"wait at L for threads that have returned"),
        ("rotate", "not cooperative", r"L: a grid sync in a launch that is not cooperative"),
    ],
)  # fmt: skip
def test_misuse_is_an_exception_with_its_lines(kernel, fault, words):
    for seed in range(5):
        _, _, error = engine_kernels.run(library(), kernel, fault, seed)
        assert error is not None
        assert re.search(words.replace("L", r"engine_kernels\.cu:\d+"), error), error


@pytest.mark.parametrize(
    ("kernel", "fault"),
    [
        ("message", "plain store"),
        ("message", "relaxed load"),
        ("last_block", "no fence"),
        ("rotate", "no barrier"),
    ],
)
def test_what_orders_nothing_is_a_race_with_its_lines(kernel, fault):
    done = run_script("thread", fault, 1, kernel)
    assert done.returncode != 0
    assert "ThreadSanitizer: data race" in done.stderr
    assert "engine_kernels.cu:" in done.stderr


def test_dynamic_shared_memory_is_as_long_as_the_launch_said():
    done = run_script("address", "too little memory", 1, "reverse")
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
    assert "engine_kernels.cu:" in done.stderr
