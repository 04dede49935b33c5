"""Attention with a trained bias: gradients of q, k, v and of a mask [1, H, S, S] for a whole batch.

Bound by tensor cores. FLOPs: 4 · D for each (query, key) pair forward, 10 · D backward, and 4 · D
for the weights and their gradients that the mask's takes again. Bytes: q, k, v, out, d_out and
three gradients once each, the mask and its gradient once each.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bertgpt import ops, reference
from bertgpt.benchmarks.case import Case, Inputs, Provider, Run, compiled, differentiated, ours

_LEAVES = ("q", "k", "v", "mask")


def _draw(
    generator: torch.Generator,
    device: torch.device,
    *,
    batch: int,
    heads: int,
    length: int,
    dim: int,
    dtype: torch.dtype,
) -> Inputs:
    normal = partial(torch.randn, generator=generator, device=device, dtype=dtype)
    inputs: Inputs = {name: normal(batch, length, heads, dim) for name in ("q", "k", "v", "d_out")}
    return {**inputs, "mask": normal(1, heads, length, length)}


def _call(inputs: Inputs) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    return (inputs["q"], inputs["k"], inputs["v"]), {"mask": inputs["mask"]}


def _expected(inputs: Inputs, dtype: torch.dtype) -> Tensor:
    given = {name: inputs[name].detach().to(dtype) for name in (*_LEAVES, "d_out")}
    args, kwargs = _call(given)
    return _select(
        given, differentiated(lambda: reference.attention(*args, **kwargs), given, _LEAVES)()
    )


def _select(inputs: Inputs, result: Any) -> Tensor:
    """All gradients: the mask's is a sum over the batch."""
    return torch.cat([gradient.flatten() for gradient in result])


def _case(batch: int, heads: int, length: int, dim: int, **options: Any) -> Case:
    device = options.get("device", "cuda")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    rows, pairs = batch * heads * length, batch * heads * length * length
    return Case(
        op="attention_dmask",
        name=f"forward + backward B{batch} H{heads} S{length} D{dim}",
        device=device,
        dtype=dtype,
        inputs=partial(_draw, batch=batch, heads=heads, length=length, dim=dim, dtype=dtype),
        expected=_expected,
        select=_select,
        flops=18.0 * dim * pairs,
        bytes=float((8 * rows * dim + 2 * heads * length * length) * dtype.itemsize),
        tokens=batch * length,
        value=options.get("value", 1.0),
        factor=6.0,
    )


def _cases() -> Iterator[Case]:
    for length, batch in ((128, 64), (512, 16), (1024, 4)):
        yield _case(batch, 12, length, 64, value=7 if length == 512 else 2)
    yield _case(4, 2, 64, 64, device="cpu")


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def _arguments(inputs: Inputs) -> tuple[Tensor, ...]:
    return tuple(inputs[name] for name in _LEAVES)


def _eager(case: Case, inputs: Inputs) -> Run:
    return differentiated(lambda: _sdpa(*_arguments(inputs)), inputs, _LEAVES)


CASES: tuple[Case, ...] = tuple(_cases())
PROVIDERS: tuple[Provider, ...] = (
    *(ours(ops.attention, backend, _call, _LEAVES) for backend in ("triton", "torch")),
    Provider("SDPA", _eager),
    compiled(_sdpa, _arguments, None, _LEAVES),
)


def test_attention_dmask(contest: Any) -> None:
    contest()
