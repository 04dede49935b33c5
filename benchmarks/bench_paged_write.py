"""Storing new keys and values in the pages of a cache: one token a sequence, or a whole prompt.

Bound by memory. Bytes: keys and values read once and written once. FLOPs: none to speak of, a
division of each slot.
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
    all_of,
    compiled,
    needs_cuda,
    needs_package,
)

_DIM = 64


def _draw(
    generator: torch.Generator,
    device: torch.device,
    *,
    tokens: int,
    heads: int,
    page: int,
    scattered: bool,
    dtype: torch.dtype,
) -> Inputs:
    """Twice the pages that are needed, in random order; each token its own page if scattered."""
    pages = 2 * tokens if scattered else 2 * -(-tokens // page)
    normal = partial(torch.randn, generator=generator, device=device, dtype=dtype)
    order = torch.randperm(pages, generator=generator, device=device)
    count = torch.arange(tokens, device=device)
    if scattered:
        place = torch.randint(page, (tokens,), generator=generator, device=device)
        slots = order[:tokens] * page + place
    else:
        slots = order[count // page] * page + count % page
    return {
        "k": normal(tokens, heads, _DIM),
        "v": normal(tokens, heads, _DIM),
        "k_pages": normal(pages, heads, page, _DIM),
        "v_pages": normal(pages, heads, page, _DIM),
        "slots": slots,
    }


def _put(
    k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor
) -> tuple[Tensor, ...]:
    """The definition where no slot stands twice; returns the pages."""
    page, place = slots // k_pages.shape[2], slots % k_pages.shape[2]
    k_pages[page, :, place] = k
    v_pages[page, :, place] = v
    return k_pages, v_pages


def _expected(inputs: Inputs, dtype: torch.dtype) -> Tensor:
    """All of the pages: what must not be written counts as well."""
    k, v, k_pages, v_pages = (inputs[name].to(dtype) for name in ("k", "v", "k_pages", "v_pages"))
    return torch.stack(_put(k, v, k_pages.clone(), v_pages.clone(), inputs["slots"]))


def _case(tokens: int, heads: int, page: int, scattered: bool, **options: Any) -> Case:
    device = options.get("device", "cuda")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    kind = f"{tokens} sequences, a token each" if scattered else f"{tokens} tokens in a row"
    return Case(
        op="paged_write",
        name=f"H{heads} {kind}, page {page}",
        device=device,
        dtype=dtype,
        inputs=partial(
            _draw, tokens=tokens, heads=heads, page=page, scattered=scattered, dtype=dtype
        ),
        expected=_expected,
        select=lambda inputs, result: torch.stack(result),
        flops=float(tokens),
        bytes=float(4 * tokens * heads * _DIM * dtype.itemsize),
        tokens=tokens,
        value=options.get("value", 1.0),
        mutable=frozenset({"k_pages", "v_pages"}),
        planned=frozenset({"slots"}),
    )


def _cases() -> Iterator[Case]:
    for heads, tokens in product((12, 16, 25), (1, 64, 256)):
        yield _case(tokens, heads, 16, True, value=7 if (heads, tokens) == (12, 64) else 2)
    for heads, tokens in product((12, 25), (1024, 8192)):
        yield _case(tokens, heads, 16, False, value=7 if (heads, tokens) == (12, 8192) else 2)
    for page in (64, 128):
        yield _case(8192, 12, page, False, value=2)
    yield _case(512, 4, 16, True, device="cpu")
    yield _case(2048, 12, 16, False, device="cpu")


def _arguments(inputs: Inputs) -> tuple[Tensor, ...]:
    return tuple(inputs[name] for name in ("k", "v", "k_pages", "v_pages", "slots"))


def _ours(backend: str) -> Provider:
    def prepare(case: Case, inputs: Inputs) -> Run:
        arguments = _arguments(inputs)
        refusals = ops.explain(ops.paged_write, *arguments, backend=backend).refusals
        if backend in refusals:
            raise Unavailable(refusals[backend])

        def run() -> tuple[Tensor, ...]:
            ops.paged_write(*arguments, backend=backend)
            return arguments[2:4]

        return run

    return Provider(f"bertgpt {backend}", prepare, ours=True)


def _flashinfer(case: Case, inputs: Inputs) -> Run:
    """Each token as a sequence of one page; its indices are made once, as for all layers."""
    import flashinfer

    k, v, k_pages, v_pages, slots = _arguments(inputs)
    page, tokens = k_pages.shape[2], len(slots)
    places, bounds = (slots % page).int(), torch.arange(tokens + 1, device=slots.device).int()
    pages = (slots // page).int()

    def run() -> tuple[Tensor, ...]:
        flashinfer.append_paged_kv_cache(
            k, v, bounds[:-1], places, (k_pages, v_pages), pages, bounds, places + 1, "HND"
        )
        return k_pages, v_pages

    return run


CASES: tuple[Case, ...] = tuple(_cases())
PROVIDERS: tuple[Provider, ...] = (
    *(_ours(backend) for backend in ("cuda", "triton", "torch")),
    Provider("index put", lambda case, inputs: partial(_put, *_arguments(inputs))),
    compiled(_put, _arguments),
    compiled(_put, _arguments, "max-autotune-no-cudagraphs"),
    Provider("FlashInfer", _flashinfer, all_of(needs_cuda, needs_package("flashinfer"))),
)


def test_paged_write(contest: Any) -> None:
    contest()
