"""Decoding on a paged cache: one new token a sequence attends to all of its keys.

Bound by memory. Bytes: every key and value once (pages that sequences share once for all of them),
and queries and results. FLOPs: 4 · D · H a key.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
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
    all_of,
    compared,
    needs_cuda,
    needs_package,
    ours,
)

_DENSE_LIMIT = 1 << 30  # bytes of keys beyond which no dense copy is kept for the dense peer


@cache
def _layout(lengths: tuple[int, ...], page: int, shared: int) -> tuple[Tensor, int]:
    """Page table int32 [B, most pages] in a shuffled order, and the number of pages.

    The first `shared` tokens of every sequence lie in the same pages. The order is fixed: the page
    table is something that a contender may plan for.
    """
    generator = torch.Generator().manual_seed(len(lengths) * 1000 + page)
    prefix = shared // page
    own = [-(-length // page) - prefix for length in lengths]
    total = prefix + sum(own)
    order = torch.randperm(total, generator=generator, dtype=torch.int32)
    table = torch.zeros(len(lengths), prefix + max(own), dtype=torch.int32)
    start = prefix
    for row, count in enumerate(own):
        table[row, :prefix] = order[:prefix]
        table[row, prefix : prefix + count] = order[start : start + count]
        start += count
    return table, total


def _draw(
    generator: torch.Generator,
    device: torch.device,
    *,
    lengths: tuple[int, ...],
    heads: int,
    dim: int,
    page: int,
    shared: int,
    dtype: torch.dtype,
) -> Inputs:
    table, pages = _layout(lengths, page, shared)
    normal = partial(torch.randn, generator=generator, device=device, dtype=dtype)
    inputs: Inputs = {
        "q": normal(len(lengths), heads, dim),
        "k_pages": normal(pages, heads, page, dim),
        "v_pages": normal(pages, heads, page, dim),
        "page_table": table.to(device),
        "lengths": torch.tensor(lengths, dtype=torch.int32, device=device),
        "shared": shared,
    }
    dense_bytes = len(lengths) * max(lengths) * heads * dim * dtype.itemsize
    if dense_bytes <= _DENSE_LIMIT:
        for name in ("k", "v"):
            inputs[f"{name}_dense"] = _dense(inputs[f"{name}_pages"], inputs["page_table"])
    return inputs


def _dense(pages: Tensor, table: Tensor) -> Tensor:
    """[P, H, N, D] by table [B, M] → [B, H, M · N, D]."""
    return pages[table.long()].transpose(1, 2).flatten(2, 3).contiguous()


def _sample(inputs: Inputs) -> Tensor:
    """Three sequences."""
    return compared(inputs, inputs["q"].shape[0], 3)


def _expected(inputs: Inputs, dtype: torch.dtype) -> Tensor:
    chosen = _sample(inputs)
    table = inputs["page_table"][chosen]
    used, renumbered = table.unique(return_inverse=True)  # only their pages become float64
    k, v = (inputs[f"{name}_pages"][used.long()].to(dtype) for name in ("k", "v"))
    q, lengths = inputs["q"][chosen].to(dtype), inputs["lengths"][chosen]
    out = reference.paged_attention(q, k, v, renumbered.int(), lengths)
    assert isinstance(out, Tensor)
    return out


def _case(name: str, lengths: Sequence[int], heads: int, page: int, **options: Any) -> Case:
    device, shared = options.get("device", "cuda"), options.get("shared", 0)
    dtype, dim = (torch.bfloat16 if device == "cuda" else torch.float32), 64
    stored = sum(lengths) - shared * (len(lengths) - 1)
    elements = 2 * stored * heads * dim + 2 * len(lengths) * heads * dim
    return Case(
        op="paged_attention",
        name=f"H{heads} B{len(lengths)} {name} page {page}",
        device=device,
        dtype=dtype,
        inputs=partial(
            _draw,
            lengths=tuple(lengths),
            heads=heads,
            dim=dim,
            page=page,
            shared=shared,
            dtype=dtype,
        ),
        expected=_expected,
        select=lambda inputs, result: result[_sample(inputs)],
        flops=4.0 * dim * heads * sum(lengths),
        bytes=float(elements * dtype.itemsize),
        tokens=len(lengths),
        value=options.get("value", 1.0),
        planned=frozenset({"page_table", "lengths"}),
        sets=options.get("sets"),
    )


def skewed_lengths(count: int, longest: int) -> list[int]:
    """A few long sequences among many short ones: lengths fall with the square of the rank."""
    return [max(round(longest * (1 - i / count) ** 2), 1) for i in range(count)]


def _cases() -> Iterator[Case]:
    for batch, context in product((1, 8, 64, 256), (128, 1024, 4096, 32768)):
        if batch * context <= 2 << 20:
            value = 9 if (batch, context) in ((1, 1024), (64, 4096)) else 4
            yield _case(f"context {context}", [context] * batch, 12, 16, value=value)
    for page in (64, 128):
        yield _case("context 4096", [4096] * 64, 12, page, value=6)
    for heads, (batch, context) in product((16, 25), ((1, 1024), (64, 4096), (256, 1024))):
        value = 5 if batch == 64 else 2
        yield _case(f"context {context}", [context] * batch, heads, 16, value=value)
    for batch in (64, 256):
        lengths = skewed_lengths(batch, 8192)
        yield _case("skewed to 8192", lengths, 12, 16, value=7)
    for page in (64, 128):
        yield _case("skewed to 8192", skewed_lengths(64, 8192), 12, page, value=3)
    prefix = [32768 + 128] * 256
    yield _case("context 32896, 32768 shared", prefix, 12, 16, shared=32768, value=7)
    # What sharing saves. One set of inputs is 26 GB, which no cache holds from call to call.
    yield _case("context 32896", prefix, 12, 16, value=4, sets=1)
    yield _case("context 256", [256] * 2, 4, 16, device="cpu")
    yield _case("skewed to 512", skewed_lengths(4, 512), 2, 16, device="cpu")
    yield _case("context 192, 128 shared", [192] * 4, 2, 16, device="cpu", shared=128)


def _call(inputs: Inputs) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    names = ("q", "k_pages", "v_pages", "page_table", "lengths")
    return tuple(inputs[name] for name in names), {}


def _spans(inputs: Inputs, first: int) -> tuple[Tensor, Tensor, Tensor]:
    """FlashInfer's three tables of each sequence's pages from its `first` page on."""
    page = inputs["k_pages"].shape[2]
    counts = (inputs["lengths"] + page - 1) // page - first
    rows = zip(inputs["page_table"], counts.tolist(), strict=True)
    indices = torch.cat([row[first : first + count] for row, count in rows])
    bounds = F.pad(counts.cumsum(0), (1, 0)).int()
    return bounds, indices, inputs["lengths"] - (first + counts - 1) * page


def _workspace(inputs: Inputs) -> Tensor:
    return torch.empty(128 << 20, dtype=torch.uint8, device=inputs["q"].device)


def _flashinfer(case: Case, inputs: Inputs) -> Run:
    """Planned once, as a model does for all of its layers: the plan is not timed."""
    import flashinfer

    _, heads, page, dim = inputs["k_pages"].shape
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(_workspace(inputs), "HND")
    types = dict.fromkeys(("q_data_type", "kv_data_type"), case.dtype)
    wrapper.plan(*_spans(inputs, 0), heads, heads, dim, page, **types)
    return lambda: wrapper.run(inputs["q"], (inputs["k_pages"], inputs["v_pages"]))


def _flashinfer_cascade(case: Case, inputs: Inputs) -> Run:
    """Its method for shared prefixes: the prefix once for all, then each one's own pages."""
    import flashinfer

    _, heads, page, dim = inputs["k_pages"].shape
    prefix, count = inputs["shared"] // page, len(inputs["q"])
    if prefix == 0:
        raise Unavailable("there is no shared prefix")
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(2, _workspace(inputs), "HND")
    like = inputs["lengths"].new_tensor
    common = like([0, prefix]), inputs["page_table"][0, :prefix].contiguous(), like([page])
    queries = [like([0, count]), torch.arange(count + 1, device=like([0]).device).int()]
    levels = (list(pair) for pair in zip(common, _spans(inputs, prefix), strict=True))
    types = dict.fromkeys(("q_data_type", "kv_data_type"), case.dtype)
    wrapper.plan(queries, *levels, heads, heads, dim, page, **types)
    return lambda: wrapper.run(inputs["q"], (inputs["k_pages"], inputs["v_pages"]))


def _flash3(case: Case, inputs: Inputs) -> Run:
    """FlashAttention 3 on views of the pages in its own order of dimensions."""
    from flash_attn_interface import flash_attn_with_kvcache

    k, v = (inputs[f"{name}_pages"].transpose(1, 2) for name in ("k", "v"))

    def run() -> Tensor:
        options = {"cache_seqlens": inputs["lengths"], "page_table": inputs["page_table"]}
        out = flash_attn_with_kvcache(inputs["q"][:, None], k, v, **options)
        return (out[0] if isinstance(out, tuple) else out)[:, 0]

    return run


def _dense_sdpa(case: Case, inputs: Inputs) -> Run:
    """SDPA on a dense cache that stands ready, with a mask for the lengths."""
    if "k_dense" not in inputs:
        raise Unavailable("a dense cache of this case would be too large")

    def run() -> Tensor:
        keys = inputs["k_dense"].shape[2]
        positions = torch.arange(keys, device=inputs["q"].device)
        mask = (positions < inputs["lengths"][:, None])[:, None, None]
        q = inputs["q"][:, :, None]
        return F.scaled_dot_product_attention(q, inputs["k_dense"], inputs["v_dense"], mask)[
            :, :, 0
        ]

    return run


def _too_large(case: Case) -> str | None:
    return None if case.bytes < 8 << 30 else "it gathers all keys, which are too many here"


CASES: tuple[Case, ...] = tuple(_cases())
PROVIDERS: tuple[Provider, ...] = (
    *(ours(ops.paged_attention, backend, _call) for backend in ("cuda", "triton")),
    replace(ours(ops.paged_attention, "torch", _call), absent=_too_large),
    Provider("FlashInfer", _flashinfer, all_of(needs_cuda, needs_package("flashinfer"))),
    Provider(
        "FlashInfer cascade",
        _flashinfer_cascade,
        all_of(needs_cuda, needs_package("flashinfer")),
    ),
    Provider(
        "FlashAttention 3", _flash3, all_of(needs_cuda, needs_package("flash_attn_interface"))
    ),
    Provider("SDPA on a dense cache", _dense_sdpa),
)


def test_paged_attention(contest: Any) -> None:
    contest()
