"""What a launcher may know of the machine: two integers.

Read through Triton's active driver, so the same launcher compiles for another target when the
ahead-of-time gate installs a driver of that target.
"""

from functools import cache
from typing import Any

import triton
from triton.runtime import driver

_INTERPRETED_CAPABILITY = 90
_INTERPRETED_MULTIPROCESSORS = 4  # few enough that a persistent loop takes several turns in a test


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 when triton was imported)."""
    return bool(triton.knobs.runtime.interpret)


def compute_capability() -> int:
    """The current device's compute capability as an integer: 80, 90, 100, 120; 90 interpreted."""
    if interpreting():
        return _INTERPRETED_CAPABILITY
    return _capability(driver.active, driver.active.get_current_device())


def multiprocessor_count() -> int:
    """The number of streaming multiprocessors of the current device."""
    if interpreting():
        return _INTERPRETED_MULTIPROCESSORS
    return _multiprocessors(driver.active, driver.active.get_current_device())


# Both are asked once of each driver and device: the second takes a millisecond.
@cache
def _capability(active: Any, device: int) -> int:
    return int(active.get_current_target().arch)


@cache
def _multiprocessors(active: Any, device: int) -> int:
    return int(active.utils.get_device_properties(device)["multiprocessor_count"])
