"""`gelu_ffn`: a Transformer's feed-forward layer, dropout(GELU(x w_inᵀ + b_in) w_outᵀ + b_out)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bertgpt import portable, reference
from bertgpt.ops import _checks as checks
from bertgpt.ops._autograd import register_backward
from bertgpt.ops._backends import Backend, Call, triton_backend
from bertgpt.ops._dispatch import Op, check_backend, needs_grad
from bertgpt.ops.linear_gelu import check_approximate, check_linear
from bertgpt.portable.gelu_ffn import gelu_ffn_backward


def gelu_ffn(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    *,
    approximate: str = "none",
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The feed-forward layer: widen, GELU, narrow, dropout.

    Args:
        x: [..., E]; float16, bfloat16, float32 or float64.
        w_in: [F, E] (nn.Linear layout); x's dtype, or float32 beside half x.
        b_in: [F], dtype as for w_in, or None.
        w_out: [E', F], dtype as for w_in; E' is E in a Transformer.
        b_out: [E'], dtype as for w_in, or None.
        approximate: "none" is the exact z Φ(z) by erf (BERT); "tanh" its tanh form (GPT-2).
        dropout_p: Probability of dropping an element of the output, in [0, 1].
        seed: 64 bits that fix the dropout mask by (row, column), rows flattened; None draws them
            from torch's default generator.
        backend: "cuda", "triton", "torch" or "reference"; None takes the first that can.

    Returns:
        [..., E'] in x's dtype, contiguous.

    Raises:
        TypeError: A dtype is wrong.
        ValueError: A shape, device or probability is wrong, or the approximation or backend is
            unknown.
        BackendUnavailable: The backend asked for refuses this call.

    Source: Vaswani et al., "Attention Is All You Need", 2017, section 3.3, with GELU for ReLU.
    """
    call = _check(
        x, w_in, b_in, w_out, b_out,
        approximate=approximate, dropout_p=dropout_p, seed=seed, backend=backend,
    )  # fmt: skip
    y, _ = _OP(call)
    return y


def _check(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    *,
    approximate: str = "none",
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> dict[str, Any]:
    check_backend(backend)
    check_approximate(approximate)
    dropout_p = checks.check_dropout(dropout_p)
    checks.check_rows("x", x)
    (x,) = checks.autocast(x)  # float32 weights may stay beside it
    check_linear("w_in", w_in, "b_in", b_in, x, "x", x.shape[-1])
    check_linear("w_out", w_out, "b_out", b_out, x, "w_in's outputs", w_in.shape[0])
    grad = needs_grad(x, w_in, b_in, w_out, b_out)
    # A CPU has memory for what goes into the GELU, and would compute it again for long.
    keeps = grad and x.device.type == "cpu" and backend in (None, "torch")
    return {
        "x": x, "w_in": w_in, "b_in": b_in, "w_out": w_out, "b_out": b_out,
        "approximate": approximate, "dropout_p": dropout_p,
        "seed": checks.as_seed(seed, dropout_p),
        "return_inner": keeps, "needs_grad": grad, "backend": backend,
    }  # fmt: skip


Outputs = tuple[Tensor, Tensor | None]  # y, and what goes into the GELU where that is kept


def _run_torch(*, return_inner: bool, **call: Any) -> Outputs:
    result: Any = portable.gelu_ffn(return_inner=return_inner, **call)
    y, inner = result if return_inner else (result, None)
    return y.contiguous(), inner


def _run_reference(*, return_inner: bool, **call: Any) -> Outputs:
    return reference.gelu_ffn(**call).contiguous(), None


def _run_triton(kernels: Any, *, return_inner: bool, **call: Any) -> Outputs:
    return kernels.gelu_ffn(**call), None


def _differentiate_torch(
    grads: Sequence[Tensor],
    saved: Sequence[Tensor],
    names: Sequence[str],
    *,
    return_inner: bool,
    **call: Any,
) -> dict[str, Tensor]:
    return gelu_ffn_backward(grads[0], saved[0], names, **call)


def _differentiate_triton(
    kernels: Any,
    grads: Sequence[Tensor],
    saved: Sequence[Tensor],
    names: Sequence[str],
    *,
    return_inner: bool,
    **call: Any,
) -> dict[str, Tensor]:
    return kernels.gelu_ffn_bwd(grads[0], names, **call)


def _fake(call: Call) -> tuple[Tensor, Tensor]:
    x = call["x"]
    inner = (*x.shape[:-1], call["w_in"].shape[0]) if call["return_inner"] else (0,)
    return x.new_empty((*x.shape[:-1], call["w_out"].shape[0])), x.new_empty(inner)


_OP = Op(
    "gelu_ffn(Tensor x, Tensor w_in, Tensor? b_in, Tensor w_out, Tensor? b_out, str approximate,"
    " float dropout_p, Tensor? seed, bool return_inner, bool needs_grad, str? backend)"
    " -> (Tensor, Tensor)",
    check=_check,
    backends={
        "triton": triton_backend("linear_gelu", _run_triton, _differentiate_triton),
        "torch": Backend(_run_torch, backward=_differentiate_torch),
        "reference": Backend(_run_reference),
    },
    fake=_fake,
    differentiable=("x", "w_in", "b_in", "w_out", "b_out"),
)
register_backward(_OP, saved=(1,))


@torch.utils.flop_counter.register_flop_formula(torch.ops.bertgpt.gelu_ffn)
def gelu_ffn_flops(x: Any, w_in: Any, b_in: Any, w_out: Any, *args: Any, **kwargs: Any) -> int:
    """2 · rows · F · (E + E'): two matrix products; GELU is not counted."""
    return 2 * math.prod(x[:-1]) * (math.prod(w_in) + math.prod(w_out))


@torch.utils.flop_counter.register_flop_formula(torch.ops.bertgpt.gelu_ffn_backward)
def gelu_ffn_backward_flops(
    grads: Any, saved: Any, wanted: Any, x: Any, w_in: Any, b_in: Any, w_out: Any,
    *args: Any, **kwargs: Any,
) -> int:  # fmt: skip
    """x · w_in again, one product between the layers, and one for each of x, w_in and w_out.

    Those of them that are wanted: b_out's gradient, a sum of columns, needs none.
    """  # noqa: D403 - the tensor's name
    x_too, w_in_too, b_in_too, w_out_too, _ = wanted
    inner = x_too or w_in_too or b_in_too
    narrow = (inner or w_out_too) + x_too + w_in_too
    wide = inner + w_out_too
    return 2 * math.prod(x[:-1]) * (narrow * math.prod(w_in) + wide * math.prod(w_out))
