"""A model's first layer: word, position and type embeddings summed, then LayerNorm.

The lookups are torch's, the sum and the norm one op; the backends are that op's. Bound by memory.
Bytes: ids once, each table's distinct rows once, the result once. FLOPs: 10 an element.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bertgpt import ops
from bertgpt.benchmarks.case import (
    Case,
    Inputs,
    Provider,
    Run,
    Unavailable,
    all_of,
    compiled,
    needs_cuda,
    needs_package,
    some_rows,
)
from bertgpt.layers import Embeddings

_EPS = 1e-12
_WORDS, _POSITIONS, _TYPES = 30522, 512, 2
_NAMES = ("ids", "places", "types", "words", "positions", "kinds", "weight", "bias")


def _draw(
    generator: torch.Generator,
    device: torch.device,
    *,
    rows: int,
    width: int,
    dtype: torch.dtype,
) -> Inputs:
    normal = partial(torch.randn, generator=generator, device=device, dtype=dtype)
    index = partial(torch.randint, size=(rows,), generator=generator, device=device)
    return {
        "ids": index(_WORDS),
        "places": index(_POSITIONS),
        "types": index(_TYPES),
        "words": normal(_WORDS, width),
        "positions": normal(_POSITIONS, width),
        "kinds": normal(_TYPES, width),
        "weight": normal(width),
        "bias": normal(width),
    }


def _eager(
    ids: Tensor,
    places: Tensor,
    types: Tensor,
    words: Tensor,
    positions: Tensor,
    kinds: Tensor,
    weight: Tensor,
    bias: Tensor,
) -> Tensor:
    total = F.embedding(ids, words) + F.embedding(types, kinds) + F.embedding(places, positions)
    return F.layer_norm(total, total.shape[-1:], weight, bias, _EPS)


def _expected(inputs: Inputs, dtype: torch.dtype) -> Tensor:
    indices = [some_rows(inputs, inputs[name]) for name in _NAMES[:3]]
    return _eager(*indices, *(inputs[name].to(dtype) for name in _NAMES[3:]))


def _case(rows: int, width: int, **options: Any) -> Case:
    device = options.get("device", "cuda")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    distinct = _WORDS * (1 - (1 - 1 / _WORDS) ** rows)
    read = distinct + min(rows, _POSITIONS) + _TYPES + 2
    return Case(
        op="embeddings",
        name=f"{rows}×{width}",
        device=device,
        dtype=dtype,
        inputs=partial(_draw, rows=rows, width=width, dtype=dtype),
        expected=_expected,
        select=some_rows,
        flops=10.0 * rows * width,
        bytes=(read + rows) * width * dtype.itemsize + 3.0 * rows * torch.int64.itemsize,
        tokens=rows,
        value=options.get("value", 1.0),
    )


def _cases() -> Iterator[Case]:
    for width, rows in product((768, 1024, 1600), (2048, 16384, 65536)):
        yield _case(rows, width, value=6 if (rows, width) == (16384, 768) else 2)
    yield _case(1024, 384, device="cpu")


def _arguments(inputs: Inputs) -> tuple[Tensor, ...]:
    return tuple(inputs[name] for name in _NAMES)


def _ours(backend: str) -> Provider:
    """The models' own layer on the case's tables."""

    def prepare(case: Case, inputs: Inputs) -> Run:
        with torch.device("meta"):
            layer = Embeddings(_WORDS, _POSITIONS, _TYPES, inputs["words"].shape[1], None)
        tables = {"word": "words", "position": "positions", "token_type": "kinds"}
        for name, table in tables.items():
            weight = nn.Parameter(inputs[table], requires_grad=False)
            getattr(layer, f"{name}_embeddings").weight = weight
        terms = layer(*(inputs[name] for name in _NAMES[:3]))
        norm = partial(
            ops.add_layer_norm, weight=inputs["weight"], bias=inputs["bias"], eps=_EPS,
            backend=backend,
        )  # fmt: skip
        refusals = ops.explain(norm.func, *terms, **norm.keywords).refusals
        if backend in refusals:
            raise Unavailable(refusals[backend])
        return lambda: norm(*layer(*(inputs[name] for name in _NAMES[:3])))

    return Provider(f"bertgpt {backend}", prepare, ours=True)


def _liger(case: Case, inputs: Inputs) -> Run:
    """Liger's LayerNorm kernel after torch's lookups."""
    from liger_kernel.transformers.functional import liger_layer_norm

    def run() -> Tensor:
        words, types, places = (
            F.embedding(inputs[index], inputs[table])
            for index, table in (("ids", "words"), ("types", "kinds"), ("places", "positions"))
        )
        return liger_layer_norm(words + types + places, inputs["weight"], inputs["bias"], _EPS)

    return run


CASES: tuple[Case, ...] = tuple(_cases())
PROVIDERS: tuple[Provider, ...] = (
    *(_ours(backend) for backend in ("cuda", "triton", "torch")),
    Provider("lookups, then layer_norm", lambda case, inputs: partial(_eager, *_arguments(inputs))),
    compiled(_eager, _arguments),
    compiled(_eager, _arguments, "max-autotune-no-cudagraphs"),
    Provider("lookups, then Liger", _liger, all_of(needs_cuda, needs_package("liger_kernel"))),
)


def test_embeddings(contest: Any) -> None:
    contest()
