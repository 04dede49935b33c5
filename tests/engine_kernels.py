"""Runs kernels of engine_kernels.cu on the host engine; no torch, so that sanitizers take it too.

python tests/engine_kernels.py LIBRARY FAULT SCHEDULES KERNEL...
"""

import ctypes
import sys
from pathlib import Path

import numpy as np

COUNTS = {"reverse": 64, "pipeline": 640, "handover": 32, "message": 64, "last_block": 160,
          "rotate": 160}  # fmt: skip
FAULTS = (
    "none", "no barrier", "no wait", "no reuse wait", "too few bytes", "too many bytes",
    "short copy", "misaligned", "no arrive", "no init", "no fence", "wrong count",
    "unequal counts", "plain store", "relaxed load", "some blocks", "not cooperative",
    "too little memory",
)  # fmt: skip


class Args(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "y", "scratch", "words")),
        ("count", ctypes.c_int),
        ("fault", ctypes.c_int),
    ]


def run(library: Path, kernel: str, fault: str, schedule: int):
    """The kernel's output, what it should be, and the engine's error or None."""
    lib = ctypes.CDLL(str(library))
    lib.run.restype = ctypes.c_char_p
    lib.run.argtypes = [ctypes.c_char_p, Args]
    lib.set_schedule.argtypes = [ctypes.c_uint64]
    lib.set_schedule(schedule)
    count = COUNTS[kernel]
    x = aligned(count)
    x[:] = np.arange(1, count + 1)
    y, scratch = np.zeros(count, np.float32), np.full(count, np.nan, np.float32)
    words = np.zeros(2, np.int32)
    arrays = (x, y, scratch, words)
    args = Args(*(array.ctypes.data for array in arrays), count, FAULTS.index(fault))
    error = lib.run(kernel.encode(), args)
    expected = {"reverse": x[::-1], "pipeline": 2 * x}.get(kernel, x)
    if kernel == "message":
        y, expected = y[:32], expected[:32]
    return y, expected, error and error.decode()


def aligned(count: int):
    """float32 zeros that start at a multiple of 16 bytes."""
    room = np.zeros(count + 4, np.float32)
    start = -room.ctypes.data % 16 // 4
    return room[start : start + count]


def main(library: str, fault: str, schedules: str, *kernels: str) -> None:
    for kernel in kernels:
        for schedule in range(int(schedules)):
            y, expected, error = run(Path(library), kernel, fault, schedule)
            assert error is None, error
            assert np.array_equal(y, expected), y
    print("ran")


if __name__ == "__main__":
    main(*sys.argv[1:])
