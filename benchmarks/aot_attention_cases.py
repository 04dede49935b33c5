"""Ahead-of-time cases of attention, padded, packed and paged, and of its gradient."""

from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
from aot_case import (
    BF16,
    FP16,
    FP32,
    NAMES,
    NARROW_MMA,
    NO_MMA,
    WIDE_MMA,
    Case,
    Domains,
    matrix_of,
    meta,
    with_tf32,
)


def _attention(
    *,
    backward: bool = False,
    dropout: bool = False,
    dim: int = 64,
    dtype: torch.dtype = BF16,
    packed: bool = False,
    causal: bool = False,
    lengths: bool = False,
    mask: torch.dtype | None = None,
    per_key: bool = False,
    window: tuple[int, int] = (-1, -1),
    kv_heads: int = 12,
    statistics: bool = False,
) -> object:
    from bertgpt.kernels.attention import attention_fwd
    from bertgpt.kernels.attention_backward import attention_bwd

    batch, length, heads = 32, 512, 12
    leading = (batch * length,) if packed else (batch, length)
    cu_seqlens = meta(batch + 1, dtype=torch.int32) if packed else None
    mask_tensor = None
    if mask is not None:
        shape = (batch, 1, 1, length) if per_key else (batch, 1, length, length)
        mask_tensor = meta(*shape, dtype=mask).expand(batch, heads, length, length)
    q = meta(*leading, heads, dim, dtype=dtype)
    k, v = (meta(*leading, kv_heads, dim, dtype=dtype) for _ in range(2))
    call: dict[str, Any] = {
        "mask": mask_tensor,
        "key_lengths": meta(batch, dtype=torch.int32) if lengths else None,
        "causal": causal,
        "window": window,
        "scale": dim**-0.5,
        "cu_seqlens_q": cu_seqlens,
        "cu_seqlens_k": cu_seqlens,
        "max_seqlen_q": length if packed else None,
        "max_seqlen_k": length if packed else None,
        "dropout_p": 0.1 if dropout else 0.0,
        "seed": meta(dtype=torch.int64) if dropout else None,
    }
    if backward:
        rows = (heads, batch * length) if packed else (batch, heads, length)
        return attention_bwd(q, q, meta(*rows, 2, dtype=FP32), q, k, v, **call)
    return attention_fwd(q, k, v, return_lse=statistics, return_stats=statistics, **call)


def _attention_cases() -> Iterator[Case]:
    variants: list[tuple[str, dict[str, Any]]] = [
        ("dense", {}),
        ("causal", {"causal": True}),
        ("key lengths", {"lengths": True}),
        ("packed", {"packed": True}),
        ("packed causal", {"packed": True, "causal": True}),
        ("packed causal GQA 4", {"packed": True, "causal": True, "kv_heads": 3}),
        ("window", {"window": (128, 128)}),
        ("bool mask", {"mask": torch.bool}),
        ("additive key mask", {"mask": FP32, "per_key": True}),
    ]
    for name, options in variants:
        yield _attention_case(name, 64, BF16, options)
    packed_causal: dict[str, Any] = {"packed": True, "causal": True}
    for dim, dtype in product((64, 80, 128, 256), (BF16, FP32)):
        if (dim, dtype) != (64, BF16):
            yield _attention_case("packed causal", dim, dtype, packed_causal)
    for dim, dtype in product((64, 128, 256), (BF16, FP32)):
        if (dim, dtype) != (64, BF16):
            yield _attention_case("bool mask", dim, dtype, {"mask": torch.bool})
    yield _attention_case("packed causal", 64, FP16, packed_causal)
    for dim in (31, 33, 127, 255):  # rows of keys that are no multiple of 16 bytes
        yield _attention_case("packed causal", dim, BF16, packed_causal, NARROW_MMA)
    for dim in (33, 255):
        yield _attention_case("bool mask", dim, FP32, {"mask": torch.bool})
    tf32 = partial(with_tf32, partial(_attention, dtype=FP32, **packed_causal))
    yield Case("attention", "packed causal d64 tf32", tf32, NARROW_MMA)
    for dim, dtype in ((64, BF16), (128, BF16), (256, BF16), (64, FP32)):
        dropped = {**packed_causal, "dropout": True}
        yield _attention_case("packed causal dropout", dim, dtype, dropped)


def _attention_backward_cases() -> Iterator[Case]:
    packed_causal: dict[str, Any] = {"packed": True, "causal": True}
    variants: list[tuple[str, int, torch.dtype, dict[str, Any]]] = [
        ("dense", 64, BF16, {}),
        ("window, key lengths", 64, BF16, {"window": (128, 128), "lengths": True}),
        ("packed causal GQA 4", 64, BF16, {**packed_causal, "kv_heads": 3}),
        ("packed causal", 64, FP16, packed_causal),
        ("additive key mask", 64, BF16, {"mask": FP32, "per_key": True}),
        ("bool mask", 33, BF16, {"mask": torch.bool}),
        ("bool mask", 64, FP32, {"mask": torch.bool}),
    ]
    for dim in (64, 128, 256):
        variants += [
            ("packed causal", dim, BF16, packed_causal),
            ("packed causal", dim, FP32, packed_causal),
            ("packed causal dropout", dim, BF16, {**packed_causal, "dropout": True}),
            ("bool mask", dim, BF16, {"mask": torch.bool}),
        ]
    for dim in (31, 33, 255):  # rows that are no multiple of 16 bytes
        variants.append(("packed causal", dim, BF16, packed_causal))
    for name, dim, dtype, options in variants:
        # The widest instruction that some tile has: small tiles leave sm_90's and sm_100's unused.
        wide = dim in (64, 128) and dtype != FP32
        matrix = WIDE_MMA if wide else NARROW_MMA
        yield _attention_case(name, dim, dtype, {**options, "backward": True}, matrix)
    call = partial(_attention, dtype=FP32, backward=True, **packed_causal)
    yield Case("attention_backward", "packed causal d64 tf32", partial(with_tf32, call), NARROW_MMA)


_BOUNDS: dict[str, Any] = {"causal": True, "window": (128, -1), "lengths": True, "kv_heads": 3}
_ALL: dict[str, Any] = {**_BOUNDS, "mask": FP32, "dropout": True}
_PACKED: dict[str, Any] = {"packed": True, "causal": True, "kv_heads": 3, "dropout": True}
_PREFIX: dict[str, Any] = {"causal": True, "lengths": True}


def _combined_cases() -> Iterator[Case]:
    """Calls with all that takes registers, and with the most that a column of tiles bears."""
    sizes: list[tuple[int, torch.dtype]] = [
        (64, BF16), (128, BF16), (256, BF16), (80, FP16), (31, BF16), (255, BF16),
        (64, FP32), (128, FP32), (256, FP32),
    ]  # fmt: skip
    for dim, dtype in sizes:
        matrix = NARROW_MMA if dim in (31, 255) else WIDE_MMA
        options = {**_ALL, "statistics": True}
        yield _attention_case("all at once", dim, dtype, options, matrix)
    columns: list[tuple[str, list[tuple[int, torch.dtype]], dict[str, Any], dict[int, str]]] = [
        ("all at once", sizes, _ALL, NARROW_MMA),
        ("half mask and all others", [(32, FP16), (96, BF16)], {**_ALL, "mask": BF16}, NARROW_MMA),
        ("float32 mask", [(64, BF16), (64, FP32), (128, FP32), (31, BF16)], {"mask": FP32},
         NARROW_MMA),
        ("bool mask, bounds", [(64, BF16), (128, BF16)], {**_BOUNDS, "mask": torch.bool},
         NARROW_MMA),
        ("packed window GQA 4 dropout", [(64, BF16), (256, BF16)],
         {**_PACKED, "window": (128, -1)}, NARROW_MMA),
        ("packed causal GQA 4 dropout", [(64, BF16), (128, BF16)], _PACKED, NARROW_MMA),
        ("key mask, causal", [(80, BF16)], {**_PREFIX, "mask": FP32, "per_key": True}, WIDE_MMA),
        ("bool mask, causal", [(64, BF16), (128, FP16)], {**_PREFIX, "mask": torch.bool}, WIDE_MMA),
        ("bounds", [(64, BF16), (128, BF16)], _BOUNDS, WIDE_MMA),
    ]  # fmt: skip
    for name, sizes, options, matrix in columns:
        for dim, dtype in sizes:
            yield _attention_case(name, dim, dtype, {**options, "backward": True}, matrix)
    for op, option in (("attention", "statistics"), ("attention_backward", "backward")):
        call = partial(_attention, dtype=FP32, **{**_ALL, option: True})
        tf32 = partial(with_tf32, call)
        yield Case(op, "all at once d64 tf32", tf32, NARROW_MMA)


def _attention_dmask(
    *,
    dim: int,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    dropout: bool = False,
    causal: bool = False,
    lengths: bool = False,
    kv_heads: int = 12,
) -> object:
    from bertgpt.kernels.attention_call import attention_call
    from bertgpt.kernels.attention_dmask import attention_dmask

    batch, length, heads = 32, 512, 12
    q = meta(batch, length, heads, dim, dtype=dtype)
    k, v = (meta(batch, length, kv_heads, dim, dtype=dtype) for _ in range(2))
    mask = meta(*shape, dtype=FP32).expand(batch, heads, length, length)
    rows = (batch, heads, length)
    call = attention_call(
        q, k, mask=mask,
        key_lengths=meta(batch, dtype=torch.int32) if lengths else None,
        causal=causal, window=(-1, -1), cu_seqlens_q=None, cu_seqlens_k=None,
        max_seqlen_q=None, max_seqlen_k=None,
        dropout_p=0.1 if dropout else 0.0, seed=meta(dtype=torch.int64) if dropout else None,
    )  # fmt: skip
    statistics = meta(*rows, 2, dtype=FP32), meta(*rows, dtype=FP32)
    aligned = dim * dtype.itemsize % 16 == 0
    return attention_dmask(q, k, v, mask, q, *statistics, shape, dim**-0.5, call, aligned)


def _attention_dmask_cases() -> Iterator[Case]:
    per_pair, per_key = (1, 12, 512, 512), (32, 1, 1, 512)
    others: dict[str, Any] = {"causal": True, "lengths": True, "dropout": True, "kv_heads": 3}
    sizes = (*product((64, 128, 256), (BF16, FP32)), (31, BF16), (255, BF16))
    variants: list[tuple[str, int, torch.dtype, dict[str, Any]]] = [
        ("mask of pairs", dim, dtype, {"shape": per_pair}) for dim, dtype in sizes
    ]
    variants.append(("mask of keys", 64, BF16, {"shape": per_key}))
    for dim in (64, 128, 256):
        variants.append(("mask of pairs, all others", dim, BF16, {"shape": per_pair, **others}))
    for name, dim, dtype, options in variants:
        matrix = WIDE_MMA if dim in (64, 128) else NARROW_MMA
        call = partial(_attention_dmask, dim=dim, dtype=dtype, **options)
        label = f"{name} d{dim} {NAMES[dtype]}"
        yield Case("attention_dmask", label, call, matrix_of(dtype, matrix))


def _attention_case(
    name: str,
    dim: int,
    dtype: torch.dtype,
    options: dict[str, Any],
    matrix: dict[int, str] = WIDE_MMA,
) -> Case:
    return Case(
        "attention_backward" if options.get("backward") else "attention",
        f"{name} d{dim} {NAMES[dtype]}",
        partial(_attention, dim=dim, dtype=dtype, **options),
        matrix_of(dtype, matrix),
    )


def _paged_write(
    *, dim: int = 64, tokens: int = 256, kv_heads: int = 12, dtype: torch.dtype = BF16
) -> object:
    from bertgpt.kernels.paged_write import paged_write

    pages = (1024, kv_heads, 64, dim)
    return paged_write(
        meta(tokens, kv_heads, dim, dtype=dtype),
        meta(tokens, kv_heads, dim, dtype=dtype),
        meta(*pages, dtype=dtype),
        meta(*pages, dtype=dtype),
        meta(tokens, dtype=torch.int64),
    )


def _paged_write_cases() -> Iterator[Case]:
    dims = ((16, BF16), (32, BF16), (64, BF16), (128, BF16), (256, BF16), (256, FP32))
    for (dim, dtype), tokens in product(dims, (256, 16384)):
        yield Case(
            "paged_write",
            f"{tokens} tokens d{dim} {NAMES[dtype]}",
            partial(_paged_write, dim=dim, tokens=tokens, dtype=dtype),
            NO_MMA,
        )


_MAX_KEYS = 16384


def _paged_attention(
    *,
    dim: int = 64,
    dtype: torch.dtype = BF16,
    chunk: int = 1,
    kv_heads: int = 12,
    heads: int = 12,
    page: int = 64,
    window: tuple[int, int] | None = None,
) -> object:
    from bertgpt.kernels.paged_attention import paged_attention

    batch = 64
    return paged_attention(
        meta(batch * chunk, heads, dim, dtype=dtype),
        meta(4096, kv_heads, page, dim, dtype=dtype),
        meta(4096, kv_heads, page, dim, dtype=dtype),
        meta(batch, _MAX_KEYS // page, dtype=torch.int32),
        meta(batch, dtype=torch.int32),
        cu_seqlens_q=meta(batch + 1, dtype=torch.int32) if chunk > 1 else None,
        max_seqlen_q=chunk,
        causal=True,
        window=window,
        scale=None,
        return_lse=False,
    )


def _paged_attention_cases() -> Iterator[Case]:
    for dim, dtype in product((64, 128, 256), (BF16, FP32)):
        yield _paged_case("decode", dim, dtype, NARROW_MMA, {})
    yield _paged_case("decode GQA 4", 64, BF16, NARROW_MMA, {"kv_heads": 3})
    for dim, dtype in product((64, 128, 256), (BF16, FP32)):
        shared = {"heads": 24, "kv_heads": 1}
        yield _paged_case("decode MQA 24", dim, dtype, NARROW_MMA, shared)
    yield _paged_case("decode", 33, BF16, NARROW_MMA, {})
    yield _paged_case("decode page 16", 64, BF16, NARROW_MMA, {"page": 16})
    yield _paged_case("decode window", 64, BF16, NARROW_MMA, {"window": (256, -1)})
    for dim, dtype in product((64, 128, 256), (BF16, FP32)):
        yield _paged_case("chunk 64", dim, dtype, WIDE_MMA, {"chunk": 64})
    for dim, dtype in product((64, 128, 256), (BF16, FP32)):
        yield _paged_case("chunk 512", dim, dtype, WIDE_MMA, {"chunk": 512})


def _paged_case(
    name: str, dim: int, dtype: torch.dtype, matrix: dict[int, str], options: dict[str, Any]
) -> Case:
    return Case(
        "paged_attention",
        f"{name} d{dim} {NAMES[dtype]}",
        partial(_paged_attention, dim=dim, dtype=dtype, **options),
        matrix_of(dtype, matrix),
    )


def _attention_domain(capability: int) -> Iterator[tuple[Any, ...]]:
    dims, extras = (16, 64, 80, 128, 256), (0, 1, 2)
    for call in product(dims, (2, 4), extras, (False, True)):  # the last: aligned
        yield capability, *call


def _attention_backward_domain(capability: int) -> Iterator[tuple[Any, ...]]:
    for gradient, arguments in product(("dq", "dkdv"), _attention_domain(capability)):
        yield gradient, *arguments


def _attention_dmask_domain(capability: int) -> Iterator[tuple[Any, ...]]:
    for dim, dtype_bytes, aligned in product((16, 64, 80, 128, 256), (2, 4), (False, True)):
        yield capability, dim, dtype_bytes, aligned


def _paged_write_domain(capability: int) -> Iterator[tuple[Any, ...]]:
    for tokens, dim, dtype_bytes in product((1, 256, 16384), (16, 64, 80, 128, 256), (2, 4)):
        yield capability, tokens, 12, dim, dtype_bytes


def _paged_attention_domain(capability: int) -> Iterator[tuple[Any, ...]]:
    for dim, dtype_bytes, rows in product((64, 80, 128, 256), (2, 4), (1, 4, 24, 64, 512)):
        yield capability, dim, dtype_bytes, rows, _MAX_KEYS


CASES: tuple[Case, ...] = (
    *_attention_cases(),
    *_attention_backward_cases(),
    *_combined_cases(),
    *_attention_dmask_cases(),
    *_paged_write_cases(),
    *_paged_attention_cases(),
)

DOMAINS: Domains = {
    "attention": _attention_domain,
    "attention_backward": _attention_backward_domain,
    "attention_dmask": _attention_dmask_domain,
    "paged_write": _paged_write_domain,
    "paged_attention": _paged_attention_domain,
}
