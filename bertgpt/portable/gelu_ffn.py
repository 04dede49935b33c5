"""The feed-forward layer on the GEMMs and GELU at hand."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from bertgpt.philox import dropout_rows
from bertgpt.portable.linear_gelu import gelu, gelu_backward
from bertgpt.portable.products import linear, linear_backward


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
    return_inner: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """What `bertgpt.ops.gelu_ffn` computes; the arguments are described there.

    With `return_inner` also what goes into the GELU, which `gelu_ffn_backward` reads.
    """
    inner = linear(x, w_in.to(x.dtype), None if b_in is None else b_in.to(x.dtype))
    b_out = None if b_out is None else b_out.to(x.dtype)
    y = dropout_rows(linear(gelu(inner, approximate), w_out.to(x.dtype), b_out), dropout_p, seed)
    return (y, inner) if return_inner else y


def gelu_ffn_backward(
    grad: Tensor,
    inner: Tensor,
    wanted: Collection[str],
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    *,
    approximate: str = "none",
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> dict[str, Tensor]:
    """Gradients by name of the inputs that are wanted; `inner` is what `gelu_ffn` gave, or empty.

    Saved, because to compute it again would cost a sixth of the layer's products.
    """
    if inner.shape[:-1] != x.shape[:-1]:
        inner = linear(x, w_in.to(x.dtype), None if b_in is None else b_in.to(x.dtype))
    grad = dropout_rows(grad, dropout_p, seed)
    outer = {"x", *_named(wanted, "_out")}
    made = linear_backward(grad, gelu(inner, approximate), w_out, outer)
    into_gelu = gelu_backward(made.pop("x"), inner, approximate)
    by_name = {f"{name}_out": gradient for name, gradient in made.items()}
    made = linear_backward(into_gelu, x, w_in, {*_named(wanted, "_in"), *({"x"} & {*wanted})})
    return by_name | {n if n == "x" else f"{n}_in": gradient for n, gradient in made.items()}


def _named(wanted: Collection[str], end: str) -> list[str]:
    return [name.removesuffix(end) for name in wanted if name.endswith(end)]
