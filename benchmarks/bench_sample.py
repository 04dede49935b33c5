"""Choosing the next token of each row of logits: the likeliest, or drawn under top-k and top-p.

Bound by memory and by latency. Bytes: the logits read once. FLOPs: a comparison of each.

A draw has no peer: another method's token is another token, which cannot be told from a wrong one.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from bertgpt import ops
from bertgpt.benchmarks.case import (
    Case,
    Inputs,
    Provider,
    Run,
    Unavailable,
)

_VOCABULARY = 50257
_DRAWN = {"temperature": 0.8, "top_k": 50, "top_p": 0.9}
_GREEDY = {"temperature": 0.0}


def _draw(
    generator: torch.Generator,
    device: torch.device,
    *,
    rows: int,
    dtype: torch.dtype,
    settings: dict[str, float],
) -> Inputs:
    logits = torch.randn(rows, _VOCABULARY, generator=generator, device=device) * 4.0
    return {
        "logits": logits.to(dtype),
        "sequence_ids": torch.randperm(rows, generator=generator, device=device),
        "steps": torch.randint(1024, (rows,), generator=generator, device=device),
        "settings": settings,
    }


def _call(inputs: Inputs) -> dict[str, Any]:
    rows = {name: inputs[name] for name in ("sequence_ids", "steps")}
    return {"seed": 7, **rows, **inputs["settings"]}


def _expected(inputs: Inputs, dtype: torch.dtype) -> Tensor:
    tokens = ops.sample(inputs["logits"].to(dtype), **_call(inputs), backend="reference")
    return tokens.to(dtype)


def _case(rows: int, settings: dict[str, float], **options: Any) -> Case:
    device = options.get("device", "cuda")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    kind = "top-k 50, top-p 0.9" if settings is _DRAWN else "greedy"
    return Case(
        op="sample",
        name=f"B{rows} V{_VOCABULARY} {kind}",
        device=device,
        dtype=dtype,
        inputs=partial(_draw, rows=rows, dtype=dtype, settings=settings),
        expected=_expected,
        select=lambda inputs, result: result.to(dtype),
        flops=float(rows * _VOCABULARY),
        bytes=float(rows * _VOCABULARY * dtype.itemsize),
        tokens=rows,
        value=options.get("value", 1.0),
    )


def _cases() -> Iterator[Case]:
    for rows, settings in product((1, 8, 64, 256), (_GREEDY, _DRAWN)):
        yield _case(rows, settings, value=5 if rows == 64 else 2)
    yield _case(16, _GREEDY, device="cpu")
    yield _case(4, _DRAWN, device="cpu")


def _ours(backend: str) -> Provider:
    def prepare(case: Case, inputs: Inputs) -> Run:
        logits, call = inputs["logits"], _call(inputs)
        refusals = ops.explain(ops.sample, logits, **call, backend=backend).refusals
        if backend in refusals:
            raise Unavailable(refusals[backend])
        return lambda: ops.sample(logits, **call, backend=backend)

    return Provider(f"bertgpt {backend}", prepare, ours=True)


def _likeliest(logits: Tensor) -> Tensor:
    return logits.argmax(dim=-1)


def _greedy_alone(case: Case) -> str | None:
    return None if "greedy" in case.name else "it draws by bits of its own, so other tokens"


CASES: tuple[Case, ...] = tuple(_cases())
PROVIDERS: tuple[Provider, ...] = (
    *(_ours(backend) for backend in ("cuda", "triton", "torch")),
    Provider("argmax", lambda case, inputs: partial(_likeliest, inputs["logits"]), _greedy_alone),
)


def test_sample(contest: Any) -> None:
    contest()
