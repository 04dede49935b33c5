"""The compiled extension `bertgpt._C`: where it is, why it is not, and what it reports later."""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

HOST_ENGINE = "BERTGPT_HOST_ENGINE"  # path of a build for the host engine, which takes CPU tensors
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
MIN_CAPABILITY = (7, 5)
ACCESS_BYTES = 16
Flags = dict[torch.device, Tensor]
_SHARED_FLAGS: Flags = {}
_FLAGS: ContextVar[Flags] = ContextVar("flags", default=_SHARED_FLAGS)
_MEANINGS = {  # of the bits in csrc/device/error_flag.cuh
    1: "a page id in use lies outside the pool (its keys were skipped)",
    2: "a length is negative, shorter than the shared prefix, or longer than its row of the page "
    "table (it was clamped)",
    4: "a slot lies past the last page (its token was skipped)",
    8: "a row of logits holds NaN, +inf or nothing but -inf (its token is -1)",
    16: "a temperature, top_k, top_p or min_p is out of its range (its row's token is -1)",
}
_INDEX_BITS = 1 | 2 | 4


@cache
def _load() -> ModuleType | str:
    """The extension, or why there is none."""
    path = os.environ.get(HOST_ENGINE)
    try:
        if path is None:
            return importlib.import_module("bertgpt._C")
        spec = importlib.util.spec_from_file_location("_host", path)
        if spec is None or spec.loader is None:
            return f"{HOST_ENGINE} is {path!r}, which is not an extension module"
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    except ImportError as error:
        if path is None and isinstance(error, ModuleNotFoundError):
            return "bertgpt._C is not built (install with nvcc on PATH, or run csrc/build.py)"
        return f"the extension does not load: {error}"


def extension() -> Any:
    """The extension module; only after `unavailable()` has said None."""
    module = _load()
    assert not isinstance(module, str), module
    return module


def unavailable() -> str | None:
    """Why no C++ kernel can run, or None."""
    module = _load()
    return module if isinstance(module, str) else None


def wrong_device(tensor: Tensor) -> str | None:
    """Why the extension at hand does not take tensors where `tensor` lies, or None."""
    if extension().HOST:
        return None if tensor.is_cpu else "the host engine takes CPU tensors alone"
    if not tensor.is_cuda:
        return f"the tensors are on {tensor.device}, it needs a CUDA device"
    if capability(tensor.device) < MIN_CAPABILITY:
        major, minor = capability(tensor.device)
        return f"compute capability {major}.{minor} is below 7.5"
    return None


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of a CUDA device; torch takes as long as a launch to look it up."""
    return torch.cuda.get_device_capability(device)


def stream_of(tensor: Tensor) -> int:
    """The address of torch's current stream where `tensor` lies; 0 for the host engine.

    By the call that Triton and Inductor use: `torch.cuda.current_stream` makes an object first.
    """
    return torch._C._cuda_getCurrentRawStream(tensor.get_device()) if tensor.is_cuda else 0


def error_flag(tensor: Tensor) -> int:
    """The address of the word, where `tensor` lies, in which kernels tell of what they skipped."""
    device, flags = tensor.device, _FLAGS.get()
    flag = flags.get(device)
    if flag is None:
        with torch.inference_mode(False):  # whoever reads it may reset it
            flag = flags[device] = torch.zeros(1, dtype=torch.int32, device=device)
    return flag.data_ptr()


@contextmanager
def own_flags(flags: Flags) -> Iterator[None]:
    """Keeps apart what kernels tell of.

    Kernels launched within raise these flags, of which there comes to be one for each device, and
    `raise_pending` looks at these alone; a launch elsewhere cannot be taken for one of them. A CUDA
    graph goes on raising those that it was captured with.

    Args:
        flags: Each device's flag, an int32 [1]: {} at first, and the same dict whenever what was
            told into it is to be looked at again.
    """
    token = _FLAGS.set(flags)
    try:
        yield
    finally:
        _FLAGS.reset(token)


def raise_pending() -> None:
    """Raises what kernels found wrong in tensors since the last call.

    To be called where the host waits for a device anyway: it reads the flag of each device on which
    a kernel that has one ran, and where there is none it does nothing. All launches of a process
    share the flags, but for those within `own_flags`.

    Raises:
        IndexError: A page id, slot or length was out of range. Nothing outside the tensors was
            read or written, and the device goes on working.
        ValueError: Logits or settings that no token can be drawn by, and no bad index beside them.
    """
    for device, flag in _FLAGS.get().items():
        bits = int(flag)
        if bits:
            flag.zero_()
            found = "; ".join(text for bit, text in _MEANINGS.items() if bits & bit)
            error = IndexError if bits & _INDEX_BITS else ValueError
            raise error(f"on {device}: {found}")


def misaligned(tensor: Tensor) -> bool:
    """Whether a row of `tensor` may start off a multiple of 16 bytes.

    One whose last stride is not 1 is copied before it gets to a kernel, and so is not.
    """
    *outer, last = tensor.stride()
    size = tensor.element_size()
    if not (tensor.data_ptr() % ACCESS_BYTES or math.gcd(*outer) * size % ACCESS_BYTES):
        return False  # whatever the shape
    if last != 1 and tensor.shape[-1] > 1:
        return False
    used = (stride for length, stride in zip(tensor.shape, outer, strict=False) if length > 1)
    return bool(tensor.data_ptr() % ACCESS_BYTES or math.gcd(*used) * size % ACCESS_BYTES)


def misaligned_names(tensors: dict[str, Tensor | None]) -> str | None:
    """The refusal of tensors with rows that 16-byte accesses cannot take, or None.

    A row of each must itself be a multiple of 16 bytes, so that contiguous ones follow the first.
    """
    names = [
        name
        for name, t in tensors.items()
        if t is not None and (t.data_ptr() % ACCESS_BYTES if t.is_contiguous() else misaligned(t))
    ]
    if not names:
        return None
    return f"rows of {' and '.join(names)} do not start at multiples of {ACCESS_BYTES} bytes"
