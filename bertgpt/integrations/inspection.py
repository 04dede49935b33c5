"""What of a live model may be read through, and what must be called as it is.

A fused op takes weights, so it passes by the modules that hold them: their hooks would not run and
an adapter's part would be lost. Everything here is asked at each call, since hooks and adapters
come and go after patching.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import Parameter
from transformers.activations import (
    FastGELUActivation,
    GELUActivation,
    GELUTanh,
    NewGELUActivation,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import output_capturing

_GELUS = {
    GELUActivation: "none",
    NewGELUActivation: "tanh",
    GELUTanh: "tanh",
    FastGELUActivation: "tanh",
}
# Hooks that do nothing to the tensors that pass, whatever their shape.
_HARMLESS = ("torch.distributed.",)


def collecting() -> bool:
    """Whether transformers is collecting hidden states or attention weights in this thread."""
    return bool(output_capturing._active_collector.get())


def refuse_head_mask(kwargs: Mapping[str, Any]) -> None:
    """Raises ValueError for a head mask, which stock code of version 5 drops without a word."""
    if kwargs.get("head_mask") is not None:
        raise ValueError(
            "head_mask is ignored by transformers since version 5, and nothing here applies it: "
            "set the output projection's columns of those heads to zero instead"
        )


def obstacle(module: nn.Module) -> str | None:
    """Why `module` must be called, with the shapes that stock code gives it; None if it need not.

    That is: hooks, or a forward of its own on the instance. The hooks that transformers leaves
    behind after `output_hidden_states=True` count only while it collects.
    """
    state = module.__dict__
    if "forward" in state:
        return "its forward is replaced on the instance"
    if state["_backward_hooks"] or state["_backward_pre_hooks"]:
        return "it has backward hooks"
    for name in ("_forward_pre_hooks", "_forward_hooks"):
        if state[name] and not all(_idle(hook) for hook in state[name].values()):
            return "it has forward hooks"
    return None


def _idle(hook: Any) -> bool:
    home = getattr(hook, "__module__", None) or ""
    if home == output_capturing.__name__:
        return not collecting()
    return home.startswith(_HARMLESS)


def first_obstacle(modules: Iterable[nn.Module]) -> str | None:
    """The first obstacle among `modules`, naming the class that has it."""
    for module in modules:
        reason = obstacle(module)
        if reason is not None:
            return f"{type(module).__name__}: {reason}"
    return None


def obstacle_below(module: nn.Module) -> str | None:
    """The first obstacle among the modules inside `module`, at any depth."""
    for child in module._modules.values():  # not `modules()`, which takes ten times as long
        if child is not None:
            reason = obstacle(child) or obstacle_below(child)
            if reason is not None:
                return reason
    return None


def is_linear(module: Any) -> bool:
    """Whether `module` maps each token's features alone, so that packed tokens may go through it.

    Linear layers do, and what adapters and quantisers put in their place: those say so by
    `in_features` and `out_features`.
    """
    return type(module) in (nn.Linear, Conv1D) or (
        isinstance(module, nn.Module)
        and hasattr(module, "in_features")
        and hasattr(module, "out_features")
    )


def weights_of(module: nn.Module, kind: type[nn.Module]) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of a plain `kind` that may be passed by; None for what must be called.

    That is for another class, a weight that is no plain parameter (parametrised, of a tensor
    subclass), or an obstacle.
    """
    if type(module) is not kind or obstacle(module) is not None:
        return None
    own = module._parameters  # not by attributes, which take several times as long
    weight, bias = own.get("weight"), own.get("bias")
    if type(weight) is not Parameter or not (bias is None or type(bias) is Parameter):
        return None
    return weight, bias


def dropout_of(module: nn.Module) -> float | None:
    """The probability that a dropout module drops with now; None if it must be called."""
    if type(module) is not nn.Dropout or obstacle(module) is not None:
        return None
    return module.p if module.training else 0.0


def gelu_of(activation: Any) -> str | None:
    """The form of GELU, "none" or "tanh", that `activation` computes; None for anything else."""
    if isinstance(activation, nn.Module) and obstacle(activation) is not None:
        return None
    return _GELUS.get(type(activation))
