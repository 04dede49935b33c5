"""Whether anything but this library takes part in a call.

Where nothing does, an op runs its backend at once: torch's dispatcher would take several times as
long as a small kernel's launch, to find nothing to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _is_tracing, _len_torch_dispatch_stack, _len_torch_function_stack
from torch._C._functorch import TransformType, get_interpreter_stack, peek_interpreter_stack
from torch.autograd import forward_ad, profiler
from torch.compiler import is_compiling
from torch.nn import Parameter


def watched(tensors: Sequence[Any]) -> bool:
    """Whether a call must go through its registered operator, because something watches it.

    That is: `torch.compile` or export, `torch.jit.trace`, a profiler, a `TorchDispatchMode` (fake
    tensors, FLOP counters, `make_fx`), a `TorchFunctionMode`, a functorch transform (`vmap`,
    `grad`), or a tensor that is of a subclass, lazily negated or zero, or on no CPU and no CUDA
    device.
    Gradients are the caller's to tell. Autocast is no watcher: the checks apply it themselves.

    Args:
        tensors: The call's tensors, in places that may hold something else.
    """
    if (
        is_compiling()  # first: a compiler must not look at what follows
        or _len_torch_dispatch_stack()
        or _len_torch_function_stack()
        or peek_interpreter_stack() is not None
        or _is_tracing()
        or profiler._is_profiler_enabled
    ):
        return True
    for tensor in tensors:
        kind = type(tensor)
        if kind is Tensor or kind is Parameter:
            if tensor.is_neg() or tensor._is_zerotensor():
                return True
        elif isinstance(tensor, Tensor):
            return True
    first = tensors[0]  # the others lie where it does, or the check will say so
    return isinstance(first, Tensor) and not (first.is_cpu or first.is_cuda)


def alone(x: Tensor, *others: Tensor | None) -> bool:
    """Whether a call on x and others is the torch backend's: inference on a CPU in one dtype.

    And nothing watches it, nor does autocast apply. Who knows that the shapes fit, and asks for no
    dropout, may then call `bertgpt.portable`, which takes a fraction of an op's time where there
    are few tokens. Several dtypes are the op's to convert or to refuse.
    """
    return (
        not watched((x,))
        and x.is_cpu
        and not torch.is_grad_enabled()
        and not torch._C._is_any_autocast_enabled()
        and not tangents()
        and all(other is None or other.dtype == x.dtype for other in others)
    )


def tangents() -> bool:
    """Whether forward-mode derivatives may be asked for."""
    return forward_ad._current_level >= 0


def refuse_tangents(op: str, names: Sequence[str], tensors: Sequence[Tensor | None]) -> None:
    """Raises RuntimeError where forward-mode derivatives, which no rule here has, would be lost."""
    if not tangents():
        return
    for name, tensor in zip(names, tensors, strict=True):
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise RuntimeError(
                f"{op} has no forward-mode derivative (jvp, dual tensors), which {name} asks for: "
                "take reverse mode, backward() or torch.autograd.grad()"
            )


def refuse_functional_gradients(op: str) -> None:
    """Raises RuntimeError inside torch.func.grad and its like, which no rule here can serve."""
    if is_compiling():  # a compiler cannot look at the levels
        return
    if any(level.key() == TransformType.Grad for level in get_interpreter_stack() or ()):
        raise RuntimeError(
            f"{op} has no gradient inside torch.func.grad, vjp or jacrev: take backward() or "
            "torch.autograd.grad()"
        )
