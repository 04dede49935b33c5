"""Whether anything but this library takes part in a call.

Where nothing does, an op runs its backend at once: torch's dispatcher would take several times as
long as a small kernel's launch, to find nothing to do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.autograd import forward_ad, profiler
from torch.nn import Parameter


def watched(tensors: Iterable[Tensor | None]) -> bool:
    """Whether a call must go through its registered operator, because something watches it.

    That is: `torch.compile` or export, `torch.jit.trace`, a profiler, a `TorchDispatchMode` (fake
    tensors, FLOP counters, `make_fx`), a `TorchFunctionMode`, a functorch transform (`vmap`,
    `grad`), or a tensor that is of a subclass, lazily negated or zero, or on no CPU and no CUDA
    device.
    Gradients are the caller's to tell. Autocast is no watcher: the checks apply it themselves.

    Args:
        tensors: The call's tensors; None for one that was not given.
    """
    if (
        torch.compiler.is_compiling()  # first: a compiler must not look at what follows
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._is_tracing()
        or profiler._is_profiler_enabled
    ):
        return True
    for tensor in tensors:
        if tensor is not None:
            plain = type(tensor) is Tensor or type(tensor) is Parameter
            if not plain or tensor.is_neg() or tensor._is_zerotensor():
                return True
            if not (tensor.is_cpu or tensor.is_cuda):
                return True
    return False


def refuse_tangents(op: str, tensors: Mapping[str, Tensor | None]) -> None:
    """Raises RuntimeError where forward-mode derivatives, which no rule here has, would be lost."""
    if forward_ad._current_level < 0:
        return
    for name, tensor in tensors.items():
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise RuntimeError(
                f"{op} has no forward-mode derivative (jvp, dual tensors), which {name} asks for: "
                "take reverse mode, backward() or torch.autograd.grad()"
            )
