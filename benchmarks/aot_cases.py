"""The calls that the ahead-of-time gate compiles: every config that can be picked, by real shapes.

Tensors are on the meta device: they have shapes, strides and dtypes, and no memory. A case names
one call of a launcher; `DOMAINS` lists what each `pick_config` may be asked, so that the gate can
tell whether some config is reached by no case.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
_NAMES = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}

# The matrix instruction each architecture should use for a whole tile.
WIDE_MMA = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
NARROW_MMA = dict.fromkeys(WIDE_MMA, "HMMA")  # tiles of 16 or 32 rows: below a warpgroup's 64
NO_MMA: dict[int, str] = {}


@dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
        op: the module of `bertgpt.kernels` whose launcher it calls.
        name: what is particular to it.
        call: calls the launcher.
        matrix: by capability, the matrix instruction that its main kernel must contain.
    """

    op: str
    name: str
    call: Callable[[], object]
    matrix: dict[int, str]


def _meta(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _matrix(dtype: torch.dtype, wide: dict[int, str] = WIDE_MMA) -> dict[int, str]:
    return NO_MMA if dtype == FP32 else wide  # fp32 means IEEE products: no tensor cores


def _attention(
    *,
    dim: int = 64,
    dtype: torch.dtype = BF16,
    packed: bool = False,
    causal: bool = False,
    lengths: bool = False,
    mask: torch.dtype | None = None,
    per_key: bool = False,
    window: tuple[int, int] = (-1, -1),
    kv_heads: int = 12,
) -> object:
    from bertgpt.kernels.attention import attention_fwd

    batch, length, heads = 32, 512, 12
    leading = (batch * length,) if packed else (batch, length)
    cu_seqlens = _meta(batch + 1, dtype=torch.int32) if packed else None
    mask_tensor = None
    if mask is not None:
        shape = (batch, 1, 1, length) if per_key else (batch, 1, length, length)
        mask_tensor = _meta(*shape, dtype=mask).expand(batch, heads, length, length)
    return attention_fwd(
        _meta(*leading, heads, dim, dtype=dtype),
        _meta(*leading, kv_heads, dim, dtype=dtype),
        _meta(*leading, kv_heads, dim, dtype=dtype),
        mask=mask_tensor,
        key_lengths=_meta(batch, dtype=torch.int32) if lengths else None,
        causal=causal,
        window=window,
        scale=dim**-0.5,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=length if packed else None,
        max_seqlen_k=length if packed else None,
        return_lse=False,
    )


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
    for dim, dtype in product((32, 64, 80, 128, 256), (BF16, FP16, FP32)):
        if (dtype == BF16 and dim == 64) or (dtype == FP16 and dim != 64):
            continue
        yield _attention_case("packed causal", dim, dtype, {"packed": True, "causal": True})
    for dim, dtype in product((128, 256), (BF16, FP32)):
        yield _attention_case("bool mask", dim, dtype, {"mask": torch.bool})


def _attention_case(name: str, dim: int, dtype: torch.dtype, options: dict[str, Any]) -> Case:
    return Case(
        "attention",
        f"{name} d{dim} {_NAMES[dtype]}",
        partial(_attention, dim=dim, dtype=dtype, **options),
        _matrix(dtype),
    )


def _linear_gelu(
    *, tokens: int, width: int = 768, dtype: torch.dtype = BF16, approximate: str = "none"
) -> object:
    from bertgpt.kernels.linear_gelu import linear_gelu

    return linear_gelu(
        _meta(tokens, width, dtype=dtype),
        _meta(4 * width, width, dtype=dtype),
        _meta(4 * width, dtype=dtype),
        approximate=approximate,
    )


def _linear_gelu_cases() -> Iterator[Case]:
    for tokens, approximate in product((16, 512, 16384), ("none", "tanh")):
        yield Case(
            "linear_gelu",
            f"{tokens}×768 {'erf' if approximate == 'none' else 'tanh'} bf16",
            partial(_linear_gelu, tokens=tokens, approximate=approximate),
            WIDE_MMA,
        )
    for dtype in (FP16, FP32):
        yield Case(
            "linear_gelu",
            f"16384×768 erf {_NAMES[dtype]}",
            partial(_linear_gelu, tokens=16384, dtype=dtype),
            _matrix(dtype),
        )
    yield Case(
        "linear_gelu",
        "16384×1001 erf bf16",
        partial(_linear_gelu, tokens=16384, width=1001),
        WIDE_MMA,
    )


CASES: tuple[Case, ...] = (*_attention_cases(), *_linear_gelu_cases())


def _attention_domain(capability: int) -> Iterator[tuple[Any, ...]]:
    for dim, dtype_bytes, masked in product((16, 32, 64, 80, 128, 256), (2, 4), (False, True)):
        yield capability, dim, dtype_bytes, masked


def _linear_gelu_domain(capability: int) -> Iterator[tuple[Any, ...]]:
    for ieee, tokens in product((False, True), (1, 16, 64, 65, 512, 2048, 16384)):
        yield capability, 4 if ieee else 2, ieee, tokens, 3072, 132


# By op: the arguments that its `pick_config` is asked for on a given capability.
DOMAINS: dict[str, Callable[[int], Iterator[tuple[Any, ...]]]] = {
    "attention": _attention_domain,
    "linear_gelu": _linear_gelu_domain,
}
