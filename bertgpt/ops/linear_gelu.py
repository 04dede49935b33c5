"""`linear_gelu`: GELU(x wᵀ + b), the first half of a Transformer's feed-forward layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bertgpt import portable, reference
from bertgpt.ops import _checks as checks
from bertgpt.ops._autograd import register_backward
from bertgpt.ops._backends import Backend, Call, cuda_backend, triton_backend
from bertgpt.ops._dispatch import Op, check_backend, needs_grad
from bertgpt.portable.linear_gelu import linear_gelu_backward


def linear_gelu(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    *,
    approximate: str = "none",
    backend: str | None = None,
) -> Tensor:
    """A linear layer and its GELU in one pass, without the pre-activation in memory on a GPU.

    Args:
        x: [..., E]; float16, bfloat16, float32 or float64.
        w: [F, E] (nn.Linear layout); x's dtype, or float32 beside half x.
        b: [F], dtype as for w, or None.
        approximate: "none" is the exact z Φ(z) by erf (BERT); "tanh" its tanh form (GPT-2).
        backend: "cuda", "triton", "torch" or "reference"; None takes the first that can.

    Returns:
        [..., F] in x's dtype, contiguous.

    Raises:
        TypeError: A dtype is wrong.
        ValueError: A shape or device is wrong, or the approximation or backend is unknown.
        BackendUnavailable: The backend asked for refuses this call.

    Source: Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016.
    """
    return _OP.repeat(x, w, b, approximate, backend)


def _check(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    *,
    approximate: str = "none",
    backend: str | None = None,
) -> dict[str, Any]:
    check_backend(backend)
    check_approximate(approximate)
    checks.check_rows("x", x)
    (x,) = checks.autocast(x)  # float32 weights may stay beside it
    check_linear("w", w, "b", b, x, "x", x.shape[-1])
    return {
        "x": x, "w": w, "b": b, "approximate": approximate,
        "needs_grad": needs_grad(x, w, b), "backend": backend,
    }  # fmt: skip


def check_approximate(approximate: str) -> None:
    """`approximate` names a form of GELU."""
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate must be 'none' (erf) or 'tanh', not {approximate!r}")


def check_linear(
    w_name: str, w: Any, b_name: str, b: Any, x: Tensor, width_name: str, width: int
) -> None:
    """`w` and `b` are a linear layer over `width` inputs, in a dtype that goes with x."""
    checks.check_tensor(w_name, w, rank=2)
    checks.check_parameter(w_name, w, "x", x)
    if w.shape[1] != width:
        raise ValueError(
            f"{w_name} must be [outputs, inputs] with {width} inputs, as wide as {width_name}, "
            f"not {tuple(w.shape)}"
        )
    if b is not None:
        checks.check_tensor(b_name, b, rank=1)
        checks.check_parameter(b_name, b, "x", x)
        checks.check_shape(b_name, b, w.shape[:1], f"one per output of {w_name}")


def _run(function: Any, **call: Any) -> Tensor:
    return function(**call).contiguous()


def _run_cuda(kernels: Any, call: Call) -> Tensor:
    return kernels.linear_gelu(call["x"], call["w"], call["b"], approximate=call["approximate"])


def _differentiate_torch(
    grads: Sequence[Tensor], saved: Sequence[Tensor], names: Sequence[str], **call: Any
) -> dict[str, Tensor]:
    return linear_gelu_backward(grads[0], names, **call)


def _differentiate_triton(
    kernels: Any,
    grads: Sequence[Tensor],
    saved: Sequence[Tensor],
    names: Sequence[str],
    **call: Any,
) -> dict[str, Tensor]:
    return kernels.linear_gelu_bwd(grads[0], names, **call)


def _fake(call: Call) -> Tensor:
    return call["x"].new_empty((*call["x"].shape[:-1], call["w"].shape[0]))


_OP = Op(
    "linear_gelu(Tensor x, Tensor w, Tensor? b, str approximate, bool needs_grad, str? backend)"
    " -> Tensor",
    check=_check,
    backends={
        "cuda": cuda_backend("linear_gelu", _run_cuda),
        "triton": triton_backend(
            "linear_gelu", lambda kernels, **c: kernels.linear_gelu(**c), _differentiate_triton
        ),
        "torch": Backend(
            lambda **call: _run(portable.linear_gelu, **call), backward=_differentiate_torch
        ),
        "reference": Backend(lambda **call: _run(reference.linear_gelu, **call)),
    },
    fake=_fake,
    differentiable=("x", "w", "b"),
)
register_backward(_OP)


@torch.utils.flop_counter.register_flop_formula(torch.ops.bertgpt.linear_gelu)
def linear_gelu_flops(x: Any, w: Any, *args: Any, **kwargs: Any) -> int:
    """2 · rows · E · F; GELU is not counted."""
    return 2 * math.prod(x[:-1]) * math.prod(w)


@torch.utils.flop_counter.register_flop_formula(torch.ops.bertgpt.linear_gelu_backward)
def linear_gelu_backward_flops(
    grads: Any, saved: Any, wanted: Any, x: Any, w: Any, *args: Any, **kwargs: Any
) -> int:
    """The product again, and one each for the gradients of x and of w that are wanted."""
    return linear_gelu_flops(x, w) * (1 + sum(wanted[:2]))
