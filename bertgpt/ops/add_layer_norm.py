"""`add_layer_norm`: LayerNorm(dropout(x) + residual), a Transformer's block boundary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bertgpt import portable, reference
from bertgpt.ops import _checks as checks
from bertgpt.ops._autograd import register_backward
from bertgpt.ops._backends import Backend, Call, cuda_backend, triton_backend
from bertgpt.ops._dispatch import Op, check_backend, needs_grad
from bertgpt.portable.add_layer_norm import add_layer_norm_backward


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    *,
    eps: float = 1e-12,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_sum: bool = False,
    backend: str | None = None,
) -> Any:
    """Dropout, residual sum and layer norm in one pass over the rows.

    Args:
        x: [..., E]; float16, bfloat16, float32 or float64.
        residual: Shaped like x, in its dtype, or None.
        weight: [E]; x's dtype, or float32 beside half x.
        bias: [E], dtype as for weight, or None.
        eps: Added to the variance; not negative.
        dropout_p: Probability of dropping an element of x, in [0, 1].
        seed: 64 bits that fix the dropout mask by (row, column), rows flattened; None draws them
            from torch's default generator.
        return_sum: Also return dropout(x) + residual (what a pre-norm block carries on).
        backend: "cuda", "triton", "torch" or "reference"; None takes the first that can.

    Returns:
        [..., E] in x's dtype, contiguous; with `return_sum` also the sum, alike. Under autocast x
        and residual, and so the results, take autocast's dtype.

    Raises:
        TypeError: A dtype is wrong.
        ValueError: A shape, device, probability or eps is wrong, or the backend is unknown.
        BackendUnavailable: The backend asked for refuses this call.

    Source: Ba, Kiros and Hinton, "Layer Normalization", 2016, equations 3 and 4.
    """
    y, total = _OP.repeat(x, residual, weight, bias, eps, dropout_p, seed, return_sum, backend)
    return (y, total) if return_sum else y


def _check(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    *,
    eps: float = 1e-12,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_sum: bool = False,
    backend: str | None = None,
) -> dict[str, Any]:
    check_backend(backend)
    dropout_p = checks.check_dropout(dropout_p)
    eps = checks.check_number("eps", eps)
    if not eps >= 0.0:
        raise ValueError(f"eps must not be negative, it is {eps}")
    checks.check_rows("x", x)
    if residual is not None:
        checks.check_tensor("residual", residual)
    x, residual = checks.autocast(x, residual)
    if residual is not None:
        checks.check_like("residual", residual, "x", x)
        checks.check_shape("residual", residual, x.shape, "x's shape")
    columns = x.shape[-1:]
    _check_columns("weight", weight, x, columns)
    if bias is not None:
        _check_columns("bias", bias, x, columns)
    return {
        "x": x, "residual": residual, "weight": weight, "bias": bias, "eps": float(eps),
        "dropout_p": dropout_p, "seed": checks.as_seed(seed, dropout_p),
        "return_sum": checks.check_flag("return_sum", return_sum),
        "needs_grad": needs_grad(x, residual, weight, bias), "backend": backend,
    }  # fmt: skip


def _check_columns(name: str, parameter: Tensor, x: Tensor, columns: tuple[int, ...]) -> None:
    checks.check_tensor(name, parameter, rank=1)
    checks.check_parameter(name, parameter, "x", x)
    checks.check_shape(name, parameter, columns, "one per column of x")


def _run(function: Any, **call: Any) -> tuple[Tensor, Tensor]:
    x = call["x"]
    if not call["return_sum"]:
        return function(**call).contiguous(), x.new_empty(0)
    y, total = function(**call)
    if total is x:  # nothing dropped or added, and an operator must not return its argument
        total = x.clone(memory_format=torch.contiguous_format)
    return y.contiguous(), total.contiguous()


def _run_cuda(kernels: Any, call: Call) -> tuple[Tensor, Tensor | None]:
    return kernels.add_layer_norm(
        call["x"], call["residual"], call["weight"], call["bias"], eps=call["eps"],
        dropout_p=call["dropout_p"], seed=call["seed"], return_sum=call["return_sum"],
    )  # fmt: skip


def _differentiate_torch(
    grads: Sequence[Tensor],
    saved: Sequence[Tensor],
    names: Sequence[str],
    *,
    return_sum: bool,
    **call: Any,
) -> dict[str, Tensor]:
    grad_y, grad_sum = grads
    return add_layer_norm_backward(grad_y, grad_sum if return_sum else None, names, **call)


def _differentiate_triton(
    kernels: Any,
    grads: Sequence[Tensor],
    saved: Sequence[Tensor],
    names: Sequence[str],
    *,
    return_sum: bool,
    **call: Any,
) -> dict[str, Tensor]:
    grad_y, grad_sum = grads
    return kernels.add_layer_norm_bwd(grad_y, grad_sum if return_sum else None, **call)


def _fake(call: Call) -> tuple[Tensor, Tensor]:
    x = call["x"]
    return x.new_empty(x.shape), x.new_empty(x.shape if call["return_sum"] else 0)


_OP = Op(
    "add_layer_norm(Tensor x, Tensor? residual, Tensor weight, Tensor? bias, float eps,"
    " float dropout_p, Tensor? seed, bool return_sum, bool needs_grad, str? backend)"
    " -> (Tensor, Tensor)",
    check=_check,
    backends={
        "cuda": cuda_backend("add_layer_norm", _run_cuda),
        "triton": triton_backend(
            "add_layer_norm",
            lambda kernels, **c: kernels.add_layer_norm(**c),
            _differentiate_triton,
        ),
        "torch": Backend(
            lambda **call: _run(portable.add_layer_norm, **call), backward=_differentiate_torch
        ),
        "reference": Backend(lambda **call: _run(reference.add_layer_norm, **call)),
    },
    fake=_fake,
    differentiable=("x", "residual", "weight", "bias"),
)
register_backward(_OP, outputs=2)
