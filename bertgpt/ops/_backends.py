"""The implementations of an op, and what all of one kind refuse: Triton's, the C++ kernels', plain.

Kernels' modules are imported at their first use, so that an op needs neither Triton nor the
extension where another backend runs it.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch

from bertgpt.cuda import extension

_AS_IT_IS = nullcontext()
_MIN_CAPABILITY = (8, 0)  # below, Triton lowers tl.dot to scalar FMAs with kilobytes of spills

Call = Mapping[str, Any]


@dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    Attributes:
        run: Takes the checked arguments by keyword and returns the registered op's outputs; None
            in place of one that was not asked for.
        refusal: Takes the whole call, with `needs_grad` and `backend`, and says in words why it
            cannot run, or None.
        backward: Takes the outputs' gradients, the outputs that were saved, the names of the inputs
            to differentiate by, and the checked arguments by keyword; returns the gradients by
            name, or None for a call that it does not do. None where it has no gradient of its own.
    """

    run: Callable[..., Any]
    refusal: Callable[[Call], str | None] = lambda call: None
    backward: Callable[..., Mapping[str, torch.Tensor] | None] | None = None

    def __call__(self, call: Call) -> Any:
        """The outputs of a checked call."""
        arguments = dict(call)
        arguments.pop("needs_grad", None)
        arguments.pop("backend", None)
        return self.run(**arguments)


class _CudaBackend(Backend):
    """Its `run` takes the call as it is: a dozen arguments by name take as long as a check."""

    def __call__(self, call: Call) -> Any:
        """The outputs of a checked call."""
        return self.run(call)


def triton_backend(
    module: str, run: Callable[..., Any], backward: Callable[..., Any] | None = None
) -> Backend:
    """A backend of `bertgpt.kernels.<module>`, imported at its first use.

    `run` receives that module first, then the call; the module's `unsupported(**call)` refuses.
    `backward` receives `bertgpt.kernels.<module>_backward` first, then what `Backend` says.
    """

    def execute(**call: Any) -> Any:
        with _elsewhere(first_tensor(call)) or _AS_IT_IS:
            return run(_kernels(module), **call)

    def differentiate(*gradients: Any, **call: Any) -> Any:
        assert backward is not None
        with _elsewhere(first_tensor(call)) or _AS_IT_IS:
            return backward(_kernels(f"{module}_backward"), *gradients, **call)

    def refusal(call: Call) -> str | None:
        reason = _no_triton() or _triton_cannot(call, backward is not None)
        return reason or _kernels(module).unsupported(**call)

    return Backend(execute, refusal, differentiate if backward is not None else None)


def cuda_backend(module: str, run: Callable[[Any, Call], Any]) -> Backend:
    """A backend of `bertgpt.cuda.<module>`, the C++ kernels, imported at its first use.

    `run` receives that module and the call; the module's `unsupported(call)` refuses.
    """

    def execute(call: Call) -> Any:
        elsewhere = _elsewhere(first_tensor(call))
        if elsewhere is None:
            return run(_cuda(module), call)
        with elsewhere:
            return run(_cuda(module), call)

    def refusal(call: Call) -> str | None:
        return _cuda_cannot(call) or _cuda(module).unsupported(call)

    return _CudaBackend(execute, refusal)


@cache
def _cuda(module: str) -> ModuleType:
    return importlib.import_module(f"bertgpt.cuda.{module}")


def _cuda_cannot(call: Call) -> str | None:
    """What no C++ kernel of this library does, whichever the op."""
    if (reason := extension.unavailable()) is not None:
        return reason
    if call.get("needs_grad"):
        return "it has no gradient and an input requires one (wrap the call in torch.no_grad())"
    first = first_tensor(call)
    if first.dtype == torch.float64:
        return "float64 is for the torch and reference backends"
    return extension.wrong_device(first)


@cache
def _kernels(module: str) -> ModuleType:
    """`bertgpt.kernels.<module>`; Triton's interpreter is mended first where it is in use."""
    if importlib.import_module("bertgpt.kernels.device").interpreting():
        importlib.import_module("bertgpt.kernels.interpreter").repair_bfloat16()
    return importlib.import_module(f"bertgpt.kernels.{module}")


@cache
def _no_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton, on Linux)"
    return None


def _triton_cannot(call: Call, has_gradient: bool) -> str | None:
    """What no Triton kernel of this library does, whichever the op."""
    first = first_tensor(call)
    if call.get("needs_grad") and not has_gradient:
        return "it has no gradient and an input requires one (wrap the call in torch.no_grad())"
    if first.dtype == torch.float64:
        return "float64 is for the torch and reference backends"
    if first.device.type == "cpu":
        if not importlib.import_module("bertgpt.kernels.device").interpreting():
            return "the tensors are on the CPU (only TRITON_INTERPRET=1 runs Triton there)"
    elif first.device.type != "cuda":
        return f"the tensors are on {first.device}, Triton needs a CUDA device"
    elif extension.capability(first.device) < _MIN_CAPABILITY:
        major, minor = extension.capability(first.device)
        return f"compute capability {major}.{minor} is below 8.0, whose tensor cores it needs"
    return None


def _elsewhere(tensor: torch.Tensor) -> AbstractContextManager[Any] | None:
    """Kernels launch on the current device: makes the tensor's current, None where it is."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return None
    return torch.cuda.device(tensor.get_device())


def first_tensor(call: Call) -> torch.Tensor:
    """The first argument of a checked call, which is a tensor in each op."""
    tensor: torch.Tensor = next(iter(call.values()))
    return tensor


def device_of(call: Call) -> torch.device:
    """The device of a checked call."""
    return first_tensor(call).device
