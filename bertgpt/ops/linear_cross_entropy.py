"""`linear_cross_entropy`: the loss of a vocabulary projection, without its scores in memory.

The registered operator gives each row's loss, and the log-sum-exp that its gradient reads; the
reduction is plain PyTorch behind it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from bertgpt.ops import _checks as checks
from bertgpt.ops._autograd import register_backward
from bertgpt.ops._backends import Backend, Call, triton_backend
from bertgpt.ops._dispatch import Op, check_backend, needs_grad
from bertgpt.ops.linear_gelu import check_linear
from bertgpt.portable import linear_cross_entropy as portable
from bertgpt.reference.linear_cross_entropy import reduced, row_losses

REDUCTIONS = ("mean", "sum", "none")


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Cross-entropy of hidden · weightᵀ + bias against labels, the scores never whole in memory.

    Args:
        hidden: [..., E]; float16, bfloat16, float32 or float64.
        weight: [V, E] (nn.Linear layout); hidden's dtype, or float32 beside half hidden.
        bias: [V], dtype as for weight, or None. A bias of −inf rules its token out.
        labels: [...], int32 or int64: in [0, V), or ignore_index.
        ignore_index: The label of rows that count for nothing, whatever they hold.
        reduction: "mean" over the rows that count (0 where none does), "sum", or "none".
        backend: "triton", "torch" or "reference"; None takes the first that can.

    Returns:
        A scalar, or [...] for "none" with zeros at ignored rows; float32 (float64 of float64).

    Raises:
        TypeError: A dtype is wrong, or ignore_index is no integer.
        ValueError: A shape, device, reduction or backend is wrong.
        IndexError: A label is outside [0, V) and not ignore_index: on a CPU before anything runs,
            on a GPU only under `bertgpt.strict()`; elsewhere such a row's loss is NaN.
        BackendUnavailable: The backend asked for refuses this call.

    Source: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", 2024.
    """
    call = _check(
        hidden, weight, bias, labels,
        ignore_index=ignore_index, reduction=reduction, backend=backend,
    )  # fmt: skip
    losses, _ = _OP(call)
    return reduced(losses, call["labels"] != ignore_index, reduction)


def _check(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str | None = None,
) -> dict[str, Any]:
    check_backend(backend)
    if reduction not in REDUCTIONS:
        known = ", ".join(map(repr, REDUCTIONS))
        raise ValueError(f"reduction must be one of {known}, not {reduction!r}")
    if not isinstance(ignore_index, int) or isinstance(ignore_index, bool):
        raise TypeError(f"ignore_index must be an int, not {ignore_index!r}")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index must fit 64 bits, not {ignore_index}")
    checks.check_rows("hidden", hidden)
    (hidden,) = checks.autocast(hidden)  # float32 weights may stay beside it
    check_linear("weight", weight, "bias", bias, hidden, "hidden", hidden.shape[-1])
    checks.check_index("labels", labels, hidden.dim() - 1)
    checks.check_shape("labels", labels, hidden.shape[:-1], "one per row of hidden")
    checks.check_device("labels", labels, "hidden", hidden)
    if not -(2**31) <= ignore_index < 2**31:
        labels = labels.long()  # a comparison in int32 would wrap it
    return {
        "hidden": hidden, "weight": weight, "bias": bias, "labels": labels,
        "ignore_index": ignore_index, "needs_grad": needs_grad(hidden, weight, bias),
        "backend": backend,
    }  # fmt: skip


def _check_values(call: Call) -> None:
    labels, tokens, ignored = call["labels"], call["weight"].shape[0], call["ignore_index"]
    wrong = labels[((labels < 0) | (labels >= tokens)) & (labels != ignored)]
    if wrong.numel():
        raise IndexError(
            f"labels holds {int(wrong[0])}, which is neither one of the {tokens} tokens from 0 on "
            f"nor ignore_index = {ignored}"
        )


def _fake(call: Call) -> tuple[Tensor, Tensor]:
    shape, dtype = call["labels"].shape, torch.promote_types(call["hidden"].dtype, torch.float32)
    return call["hidden"].new_empty(shape, dtype=dtype), call["hidden"].new_empty(
        shape, dtype=dtype
    )


def _differentiate(
    function: Any,
    grads: Sequence[Tensor],
    saved: Sequence[Tensor],
    names: Sequence[str],
    **call: Any,
) -> Mapping[str, Tensor]:
    (grad,), (lse,) = grads, saved
    return function(grad, lse, names, **call)


_OP = Op(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels,"
    " int ignore_index, bool needs_grad, str? backend) -> (Tensor, Tensor)",
    check=_check,
    check_values=_check_values,
    backends={
        "triton": triton_backend(
            "linear_cross_entropy",
            lambda kernels, **c: kernels.row_losses(**c),
            lambda kernels, *g, **c: _differentiate(kernels.row_losses_backward, *g, **c),
        ),
        "torch": Backend(
            lambda **c: portable.row_losses(**c),
            backward=lambda *g, **c: _differentiate(portable.row_losses_backward, *g, **c),
        ),
        "reference": Backend(lambda **c: row_losses(**c)),
    },
    fake=_fake,
    differentiable=("hidden", "weight", "bias"),
)
register_backward(_OP, saved=(1,))


@register_flop_formula(torch.ops.bertgpt.linear_cross_entropy)
def linear_cross_entropy_flops(hidden: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    """2 · rows · V · E, as if no row were ignored."""
    return 2 * math.prod(hidden[:-1]) * math.prod(weight)


@register_flop_formula(torch.ops.bertgpt.linear_cross_entropy_backward)
def linear_cross_entropy_backward_flops(
    grads: Any, saved: Any, wanted: Any, hidden: Any, weight: Any, *args: Any, **kwargs: Any
) -> int:
    """The scores again, and two products more."""
    return 3 * linear_cross_entropy_flops(hidden, weight)
