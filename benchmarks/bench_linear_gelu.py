"""The up-projection of a feed-forward block: linear, bias and GELU.

FLOPs: 2 · M · E · F. Bytes: x, w, b and the result once each. The bare matrix product of the same
shapes is a case of its own, so that the price of bias and GELU can be read off.
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
    Unavailable,
    compiled,
    ours,
    some_rows,
)

WIDTHS = ((768, 3072), (1024, 4096), (1600, 6400))


def _draw(
    generator: torch.Generator,
    device: torch.device,
    *,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    approximate: str | None,
) -> Inputs:
    rows, width, inner = shape
    normal = partial(torch.randn, generator=generator, device=device, dtype=dtype)
    return {
        "x": normal(rows, width),
        "w": normal(inner, width) * width**-0.5,
        "b": normal(inner),
        "approximate": approximate,
    }


def _expected(inputs: Inputs, dtype: torch.dtype) -> Tensor:
    x, w, b = some_rows(inputs, inputs["x"]).to(dtype), inputs["w"].to(dtype), inputs["b"].to(dtype)
    if inputs["approximate"] is None:
        return F.linear(x, w)
    return reference.linear_gelu(x, w, b, approximate=inputs["approximate"])


def _case(rows: int, width: int, inner: int, approximate: str | None, **options: Any) -> Case:
    device = options.get("device", "cuda")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    form = {None: "bare", "none": "erf", "tanh": "tanh"}[approximate]
    elements = rows * width + inner * width + inner + rows * inner
    return Case(
        op="linear_gelu",
        name=f"M{rows} {width}→{inner} {form}",
        device=device,
        dtype=dtype,
        inputs=partial(_draw, shape=(rows, width, inner), dtype=dtype, approximate=approximate),
        expected=_expected,
        select=some_rows,
        flops=2.0 * rows * width * inner,
        bytes=float(elements * dtype.itemsize),
        tokens=rows,
        value=options.get("value", 1.0),
    )


def _cases() -> Iterator[Case]:
    forms = ("none", "tanh", None)
    for (width, inner), rows, form in product(WIDTHS, (2048, 4096, 8192, 16384, 32768), forms):
        yield _case(rows, width, inner, form, value=9 if (rows, width) == (16384, 768) else 3)
    for form in forms:
        yield _case(192, 192, 768, form, device="cpu")


def _gelu_only(prepare: Any) -> Any:
    """Contenders that add bias and GELU sit out the bare product."""

    def prepared(case: Case, inputs: Inputs) -> Run:
        if inputs["approximate"] is None:
            raise Unavailable("the bare product has no GELU")
        return prepare(case, inputs)

    return prepared


def _eager(x: Tensor, w: Tensor, b: Tensor, approximate: str) -> Tensor:
    return F.gelu(F.linear(x, w, b), approximate=approximate)


def _arguments(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, str]:
    return inputs["x"], inputs["w"], inputs["b"], inputs["approximate"]


def _call(inputs: Inputs) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, str]]:
    return _arguments(inputs)[:3], {"approximate": inputs["approximate"]}


def _epilogue(case: Case, inputs: Inputs) -> Run:
    """CuBLASLt's GELU epilogue through torch: its GELU is the tanh form."""
    if inputs["approximate"] != "tanh":
        raise Unavailable("cuBLASLt has no erf epilogue")
    if case.device != "cuda":
        raise Unavailable("on a CPU it is no fused call")
    x, w, b = inputs["x"], inputs["w"], inputs["b"]
    return lambda: torch._addmm_activation(b, x, w.t(), use_gelu=True)


def _bare(case: Case, inputs: Inputs) -> Run:
    if inputs["approximate"] is not None:
        raise Unavailable("it is the bare product")
    return lambda: F.linear(inputs["x"], inputs["w"])


_CONTENDERS = (
    *(ours(ops.linear_gelu, backend, _call) for backend in ("cuda", "triton", "torch")),
    Provider("linear, then gelu", lambda case, inputs: partial(_eager, *_arguments(inputs))),
    compiled(_eager, _arguments),
    compiled(_eager, _arguments, "max-autotune-no-cudagraphs"),
    Provider("addmm_activation", _epilogue),
)
CASES: tuple[Case, ...] = tuple(_cases())
PROVIDERS: tuple[Provider, ...] = (
    *(Provider(p.name, _gelu_only(p.prepare), p.absent, p.ours) for p in _CONTENDERS),
    Provider("bare product", _bare),
)


def test_linear_gelu(contest: Any) -> None:
    contest()
