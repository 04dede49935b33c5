"""Token states to one vector a sentence: mean over packed tokens, scaled to length 1.

Bound by memory. Bytes: x once, the vectors once. FLOPs: one an element, and 3 an output.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bertgpt import ops, reference
from bertgpt.benchmarks.case import Case, Inputs, Provider, Run, ours
from bertgpt.benchmarks.real_lengths import real_lengths


def _draw(
    generator: torch.Generator,
    device: torch.device,
    *,
    lengths: Sequence[int],
    width: int,
    dtype: torch.dtype,
) -> Inputs:
    cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    states = torch.randn(sum(lengths), width, generator=generator, device=device, dtype=dtype)
    return {"x": states, "cu_seqlens": cu_seqlens}


def _call(inputs: Inputs) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    return (inputs["x"], inputs["cu_seqlens"]), {"normalize": True}


def _expected(inputs: Inputs, dtype: torch.dtype) -> Tensor:
    return reference.pool(inputs["x"].to(dtype), inputs["cu_seqlens"], normalize=True)


def _case(kind: str, count: int, width: int, **options: Any) -> Case:
    device = options.get("device", "cuda")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    lengths = real_lengths(kind, count)
    tokens = sum(lengths)
    return Case(
        op="pool",
        name=f"{kind} B{count}×{width}",
        device=device,
        dtype=dtype,
        inputs=partial(_draw, lengths=lengths, width=width, dtype=dtype),
        expected=_expected,
        flops=float(tokens * width + 3 * count * width),
        bytes=float((tokens + count) * width * dtype.itemsize + 4 * (count + 1)),
        tokens=tokens,
        value=options.get("value", 1.0),
        planned=frozenset({"cu_seqlens"}),
    )


def _cases() -> Iterator[Case]:
    for width in (384, 768):
        yield _case("news paragraphs", 256, width, value=7 if width == 768 else 2)
        yield _case("tweets", 1024, width, value=2)
    yield _case("news paragraphs", 128, 384, device="cpu")


def _segments(case: Case, inputs: Inputs) -> Run:
    """Torch's segment reduction, then its normalisation; in float32, as it takes no other."""
    offsets = inputs["cu_seqlens"].long()

    def run() -> Tensor:
        x = inputs["x"]
        return F.normalize(torch.segment_reduce(x.float(), "mean", offsets=offsets)).to(x.dtype)

    return run


def _nested(case: Case, inputs: Inputs) -> Run:
    """The mean over a jagged tensor's ragged dimension."""
    offsets = inputs["cu_seqlens"].long()

    def run() -> Tensor:
        nested = torch.nested.nested_tensor_from_jagged(inputs["x"], offsets)
        return F.normalize(nested.mean(dim=1))

    return run


CASES: tuple[Case, ...] = tuple(_cases())
PROVIDERS: tuple[Provider, ...] = (
    *(ours(ops.pool, backend, _call) for backend in ("triton", "torch")),
    Provider("segment_reduce", _segments),
    Provider("jagged mean", _nested),
)


def test_pool(contest: Any) -> None:
    contest()
