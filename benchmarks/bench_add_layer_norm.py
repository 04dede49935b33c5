"""Residual addition and LayerNorm: LayerNorm(x + residual), with and without the sum; gradients.

Bound by memory. Bytes: x, residual and the result (and the sum) once each; backward x, residual,
the result's gradient and that of x, which is the residual's too. FLOPs: 8 an element, 20 backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bertgpt import ops, reference
from bertgpt.benchmarks.case import (
    Case,
    Inputs,
    Provider,
    Run,
    all_of,
    compiled,
    differentiated,
    needs_cuda,
    needs_package,
    ours,
    some_rows,
)

_EPS = 1e-12
_TENSORS = ("x", "residual", "weight", "bias")


def _draw(
    generator: torch.Generator,
    device: torch.device,
    *,
    rows: int,
    width: int,
    dtype: torch.dtype,
    return_sum: bool,
    backward: bool,
) -> Inputs:
    normal = partial(torch.randn, generator=generator, device=device, dtype=dtype)
    inputs: Inputs = {
        "x": normal(rows, width),
        "residual": normal(rows, width),
        "weight": normal(width),
        "bias": normal(width),
        "return_sum": return_sum,
    }
    if backward:
        inputs["d_out"] = normal(rows, width)
    return inputs


def _arguments(inputs: Inputs) -> tuple[Any, ...]:
    return (*(inputs[name] for name in _TENSORS), inputs["return_sum"])


def _call(inputs: Inputs) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    return _arguments(inputs)[:4], {"eps": _EPS, "return_sum": inputs["return_sum"]}


def _run(function: Any, inputs: Inputs) -> Run:
    """`function` by the op's signature, with gradients where `d_out` is given."""
    args, kwargs = _call(inputs)
    return differentiated(lambda: function(*args, **kwargs), inputs, _TENSORS)


def _expected(inputs: Inputs, dtype: torch.dtype) -> Tensor:
    """Some rows; backward all of them, since those of weight and bias are sums over rows."""
    given = {name: inputs[name].detach().to(dtype) for name in _TENSORS}
    given["return_sum"] = inputs["return_sum"]
    if "d_out" in inputs:
        given["d_out"] = inputs["d_out"].to(dtype)
        return _select(inputs, _run(reference.add_layer_norm, given)())
    given |= {name: some_rows(inputs, given[name]) for name in ("x", "residual")}
    result = _run(reference.add_layer_norm, given)()
    return torch.cat(list(result), dim=-1) if isinstance(result, tuple) else result


def _select(inputs: Inputs, result: Any) -> Tensor:
    if "d_out" in inputs:
        d_x, d_residual, d_weight, d_bias = result
        rows = [some_rows(inputs, d_x), some_rows(inputs, d_residual)]
        return torch.cat([*rows, torch.stack([d_weight, d_bias])])
    parts = result if isinstance(result, tuple) else (result,)
    return torch.cat([some_rows(inputs, part) for part in parts], dim=-1)


def _case(rows: int, width: int, return_sum: bool, **options: Any) -> Case:
    device, backward = options.get("device", "cuda"), options.get("backward", False)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    kind = f"{'forward + backward ' if backward else ''}{rows}×{width}"
    shape = {"rows": rows, "width": width, "return_sum": return_sum, "backward": backward}
    return Case(
        op="add_layer_norm",
        name=f"{kind}{' and the sum' if return_sum else ''}",
        device=device,
        dtype=dtype,
        inputs=partial(_draw, dtype=dtype, **shape),
        expected=_expected,
        select=_select,
        flops=(20.0 if backward else 8.0) * rows * width,
        bytes=float((4 if return_sum or backward else 3) * rows * width * dtype.itemsize),
        tokens=rows,
        value=options.get("value", 1.0),
        factor=6.0 if backward else 4.0,
    )


def _cases() -> Iterator[Case]:
    for width, rows in product((768, 1024, 1600), (2048, 8192, 16384, 65536)):
        yield _case(rows, width, width == 1600, value=8 if (rows, width) == (16384, 768) else 3)
    for width, rows in product((768, 1024, 1600), (8192, 65536)):
        yield _case(rows, width, False, backward=True, value=2)
    yield _case(1024, 384, False, device="cpu")
    yield _case(1024, 384, True, device="cpu")
    yield _case(1024, 384, False, device="cpu", backward=True)


def _eager(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, *, eps: float, return_sum: bool
) -> Any:
    total = x + residual
    y = F.layer_norm(total, total.shape[-1:], weight, bias, eps)
    return (y, total) if return_sum else y


def _positional(*arguments: Any) -> Any:
    return _eager(*arguments[:4], eps=_EPS, return_sum=arguments[4])


def _liger(case: Case, inputs: Inputs) -> Run:
    """Liger's LayerNorm kernel after torch's addition."""
    from liger_kernel.transformers.functional import liger_layer_norm

    def call(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, **options: Any) -> Any:
        total = x + residual
        y = liger_layer_norm(total, weight, bias, options["eps"])
        return (y, total) if options["return_sum"] else y

    return _run(call, inputs)


CASES: tuple[Case, ...] = tuple(_cases())
PROVIDERS: tuple[Provider, ...] = (
    *(ours(ops.add_layer_norm, b, _call, _TENSORS) for b in ("cuda", "triton", "torch")),
    Provider("add, then layer_norm", lambda case, inputs: _run(_eager, inputs)),
    compiled(_positional, _arguments, None, _TENSORS),
    compiled(_positional, _arguments, "max-autotune-no-cudagraphs", _TENSORS),
    Provider("add, then Liger", _liger, all_of(needs_cuda, needs_package("liger_kernel"))),
)


def test_add_layer_norm(contest: Any) -> None:
    contest()
