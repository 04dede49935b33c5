"""Residual addition and LayerNorm: LayerNorm(x + residual), with and without the sum.

Bound by memory. Bytes: x, residual and the result (and the sum) once each. FLOPs: 8 an element.
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
    compared,
    compiled,
    needs_cuda,
    needs_package,
    ours,
)

_EPS = 1e-12
_COMPARED = 256  # rows


def _draw(
    generator: torch.Generator,
    device: torch.device,
    *,
    rows: int,
    width: int,
    dtype: torch.dtype,
    return_sum: bool,
) -> Inputs:
    normal = partial(torch.randn, generator=generator, device=device, dtype=dtype)
    return {
        "x": normal(rows, width),
        "residual": normal(rows, width),
        "weight": normal(width),
        "bias": normal(width),
        "return_sum": return_sum,
    }


def _part(inputs: Inputs, rows: Tensor) -> Tensor:
    return rows[compared(inputs, len(rows), _COMPARED)]


def _joined(result: Any) -> Tensor:
    """One tensor of the result, and of the sum where it is asked for."""
    return torch.cat(list(result), dim=-1) if isinstance(result, tuple) else result


def _expected(inputs: Inputs, dtype: torch.dtype) -> Tensor:
    x, residual = (_part(inputs, inputs[name]).to(dtype) for name in ("x", "residual"))
    weight, bias = (inputs[name].to(dtype) for name in ("weight", "bias"))
    options = {"eps": _EPS, "return_sum": inputs["return_sum"]}
    return _joined(reference.add_layer_norm(x, residual, weight, bias, **options))


def _select(inputs: Inputs, result: Any) -> Tensor:
    parts = result if isinstance(result, tuple) else (result,)
    return torch.cat([_part(inputs, part) for part in parts], dim=-1)


def _case(rows: int, width: int, return_sum: bool, **options: Any) -> Case:
    device = options.get("device", "cuda")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return Case(
        op="add_layer_norm",
        name=f"{rows}×{width}{' and the sum' if return_sum else ''}",
        device=device,
        dtype=dtype,
        inputs=partial(_draw, rows=rows, width=width, dtype=dtype, return_sum=return_sum),
        expected=_expected,
        select=_select,
        flops=8.0 * rows * width,
        bytes=float((4 if return_sum else 3) * rows * width * dtype.itemsize),
        tokens=rows,
        value=options.get("value", 1.0),
    )


def _cases() -> Iterator[Case]:
    for width, rows in product((768, 1024, 1600), (2048, 8192, 16384, 65536)):
        yield _case(rows, width, width == 1600, value=8 if (rows, width) == (16384, 768) else 3)
    yield _case(256, 384, False, device="cpu")
    yield _case(256, 384, True, device="cpu")


def _eager(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, return_sum: bool) -> Any:
    total = x + residual
    y = F.layer_norm(total, total.shape[-1:], weight, bias, _EPS)
    return (y, total) if return_sum else y


def _arguments(inputs: Inputs) -> tuple[Any, ...]:
    names = ("x", "residual", "weight", "bias", "return_sum")
    return tuple(inputs[name] for name in names)


def _call(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return _arguments(inputs)[:4], {"eps": _EPS, "return_sum": inputs["return_sum"]}


def _liger(case: Case, inputs: Inputs) -> Run:
    """Liger's LayerNorm kernel after torch's addition."""
    from liger_kernel.transformers.functional import liger_layer_norm

    def run() -> Any:
        total = inputs["x"] + inputs["residual"]
        y = liger_layer_norm(total, inputs["weight"], inputs["bias"], _EPS)
        return (y, total) if inputs["return_sum"] else y

    return run


CASES: tuple[Case, ...] = tuple(_cases())
PROVIDERS: tuple[Provider, ...] = (
    *(ours(ops.add_layer_norm, backend, _call) for backend in ("cuda", "triton", "torch")),
    Provider("add, then layer_norm", lambda case, inputs: partial(_eager, *_arguments(inputs))),
    compiled(_eager, _arguments),
    compiled(_eager, _arguments, "max-autotune-no-cudagraphs"),
    Provider("add, then Liger", _liger, all_of(needs_cuda, needs_package("liger_kernel"))),
)


def test_add_layer_norm(contest: Any) -> None:
    contest()
