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


def _with_tf32(call: Callable[[], object]) -> object:
    """The call under the setting that lets float32 products run on tensor cores."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        return call()
    finally:
        torch.set_float32_matmul_precision(before)


def _matrix(dtype: torch.dtype, wide: dict[int, str] = WIDE_MMA) -> dict[int, str]:
    return NO_MMA if dtype == FP32 else wide  # fp32 means IEEE products: no tensor cores


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
) -> object:
    from bertgpt.kernels.attention import attention_fwd
    from bertgpt.kernels.attention_backward import attention_bwd

    batch, length, heads = 32, 512, 12
    leading = (batch * length,) if packed else (batch, length)
    cu_seqlens = _meta(batch + 1, dtype=torch.int32) if packed else None
    mask_tensor = None
    if mask is not None:
        shape = (batch, 1, 1, length) if per_key else (batch, 1, length, length)
        mask_tensor = _meta(*shape, dtype=mask).expand(batch, heads, length, length)
    q = _meta(*leading, heads, dim, dtype=dtype)
    k, v = (_meta(*leading, kv_heads, dim, dtype=dtype) for _ in range(2))
    call: dict[str, Any] = {
        "mask": mask_tensor,
        "key_lengths": _meta(batch, dtype=torch.int32) if lengths else None,
        "causal": causal,
        "window": window,
        "scale": dim**-0.5,
        "cu_seqlens_q": cu_seqlens,
        "cu_seqlens_k": cu_seqlens,
        "max_seqlen_q": length if packed else None,
        "max_seqlen_k": length if packed else None,
        "dropout_p": 0.1 if dropout else 0.0,
        "seed": _meta(dtype=torch.int64) if dropout else None,
    }
    if backward:
        rows = (heads, batch * length) if packed else (batch, heads, length)
        return attention_bwd(q, q, _meta(*rows, 2, dtype=FP32), q, k, v, **call)
    return attention_fwd(q, k, v, return_lse=False, return_stats=False, **call)


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
    tf32 = partial(_with_tf32, partial(_attention, dtype=FP32, **packed_causal))
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
    yield Case(
        "attention_backward", "packed causal d64 tf32", partial(_with_tf32, call), NARROW_MMA
    )


def _attention_case(
    name: str,
    dim: int,
    dtype: torch.dtype,
    options: dict[str, Any],
    matrix: dict[int, str] = WIDE_MMA,
) -> Case:
    return Case(
        "attention_backward" if options.get("backward") else "attention",
        f"{name} d{dim} {_NAMES[dtype]}",
        partial(_attention, dim=dim, dtype=dtype, **options),
        _matrix(dtype, matrix),
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


def _gelu_ffn_bwd(
    *, tokens: int, width: int = 768, dtype: torch.dtype = BF16, approximate: str = "none"
) -> object:
    from bertgpt.kernels.linear_gelu_backward import gelu_ffn_bwd

    x, grad = (_meta(tokens, width, dtype=dtype) for _ in range(2))
    w_in, w_out = _meta(4 * width, width, dtype=dtype), _meta(width, 4 * width, dtype=dtype)
    return gelu_ffn_bwd(
        grad, ("x",), x=x, w_in=w_in, b_in=None, w_out=w_out, b_out=None, approximate=approximate,
        dropout_p=0.1, seed=torch.empty((), dtype=torch.int64, device="meta"),
    )  # fmt: skip


def _linear_gelu_bwd(*, dtype: torch.dtype = BF16, approximate: str) -> object:
    from bertgpt.kernels.linear_gelu_backward import linear_gelu_bwd

    x, w, grad = (_meta(n, m, dtype=dtype) for n, m in ((16384, 768), (3072, 768), (16384, 3072)))
    return linear_gelu_bwd(grad, ("x",), x=x, w=w, b=None, approximate=approximate)


def _linear_gelu_cases() -> Iterator[Case]:
    for tokens, approximate in product((16, 512, 16384), ("none", "tanh")):
        yield Case(
            "linear_gelu",
            f"{tokens}×768 {'erf' if approximate == 'none' else 'tanh'} bf16",
            partial(_linear_gelu, tokens=tokens, approximate=approximate),
            WIDE_MMA,
        )
    call = partial(_linear_gelu, tokens=16384, dtype=FP32)
    yield Case("linear_gelu", "16384×768 erf fp32", call, NO_MMA)
    for tokens in (16, 512, 16384):
        yield Case(
            "linear_gelu",
            f"{tokens}×768 erf tf32",
            partial(_with_tf32, partial(_linear_gelu, tokens=tokens, dtype=FP32)),
            WIDE_MMA,
        )
    yield Case(
        "linear_gelu",
        "16384×1001 erf bf16",
        partial(_linear_gelu, tokens=16384, width=1001),
        WIDE_MMA,
    )


def _linear_cross_entropy(
    *,
    backward: bool = False,
    width: int = 768,
    dtype: torch.dtype = BF16,
    weight_dtype: torch.dtype | None = None,
    bias: bool = True,
    vocabulary: int = 2048,
) -> object:
    from bertgpt.kernels.linear_cross_entropy import row_losses
    from bertgpt.kernels.linear_cross_entropy_backward import row_losses_backward

    tokens = 2048  # with as many words one slab of the backward pass
    parameter = partial(_meta, dtype=weight_dtype or dtype)
    call = {
        "hidden": _meta(tokens, width, dtype=dtype),
        "weight": parameter(vocabulary, width),
        "bias": parameter(vocabulary) if bias else None,
        "labels": _meta(tokens, dtype=torch.int64),
        "ignore_index": -100,
    }
    if not backward:
        return row_losses(**call)
    loss = _meta(tokens, dtype=FP32)
    return row_losses_backward(loss, loss, ("hidden", "weight", "bias"), **call)


def _linear_cross_entropy_cases() -> Iterator[Case]:
    variants: list[tuple[str, dict[str, Any], dict[int, str]]] = [
        ("768 bf16", {}, WIDE_MMA),
        ("768 bf16 no bias", {"bias": False}, WIDE_MMA),
        ("768 bf16, fp32 weights", {"weight_dtype": FP32}, WIDE_MMA),
        ("768 bf16, V 2042", {"vocabulary": 2042}, WIDE_MMA),
        ("768 fp16", {"dtype": FP16}, WIDE_MMA),
        ("768 fp32", {"dtype": FP32}, NO_MMA),
        ("1001 bf16", {"width": 1001}, WIDE_MMA),
        ("1001 fp32", {"width": 1001, "dtype": FP32}, NO_MMA),
    ]
    for backward in (False, True):
        op = f"linear_cross_entropy{'_backward' if backward else ''}"
        for name, options, matrix in variants:
            call = partial(_linear_cross_entropy, backward=backward, **options)
            yield Case(op, name, call, matrix)
        for width in (768, 1001):
            call = partial(_linear_cross_entropy, backward=backward, width=width, dtype=FP32)
            yield Case(op, f"{width} tf32", partial(_with_tf32, call), WIDE_MMA)


def _linear_gelu_bwd_cases() -> Iterator[Case]:
    op = "linear_gelu_backward"
    for form, approximate in (("erf", "none"), ("tanh", "tanh")):
        for tokens in (16, 512, 16384):
            call = partial(_gelu_ffn_bwd, tokens=tokens, approximate=approximate)
            yield Case(op, f"ffn {tokens}×768 {form} bf16", call, WIDE_MMA)
        yield Case(op, f"{form} bf16", partial(_linear_gelu_bwd, approximate=approximate), NO_MMA)
    for tokens in (16, 512, 16384):
        call = partial(_gelu_ffn_bwd, tokens=tokens, dtype=FP32)
        yield Case(op, f"ffn {tokens}×768 erf tf32", partial(_with_tf32, call), WIDE_MMA)
    yield Case(op, "ffn 16384×768 erf fp32", call, NO_MMA)
    odd = partial(_gelu_ffn_bwd, tokens=16384, width=1001)
    yield Case(op, "ffn 16384×1001 erf bf16", odd, WIDE_MMA)
    plain = partial(_linear_gelu_bwd, dtype=FP32, approximate="none")
    yield Case(op, "erf fp32", plain, NO_MMA)


def _add_layer_norm(
    *,
    width: int,
    dtype: torch.dtype = BF16,
    residual: bool = True,
    return_sum: bool = False,
    dropout_p: float = 0.0,
) -> object:
    from bertgpt.kernels.add_layer_norm import add_layer_norm

    return add_layer_norm(
        _meta(16384, width, dtype=dtype),
        _meta(16384, width, dtype=dtype) if residual else None,
        _meta(width, dtype=dtype),
        _meta(width, dtype=dtype),
        eps=1e-12,
        dropout_p=dropout_p,
        seed=torch.empty((), dtype=torch.int64, device="meta"),
        return_sum=return_sum,
    )


def _add_layer_norm_bwd(
    *, width: int, dtype: torch.dtype = BF16, dropout_p: float = 0.1, with_sum: bool = False
) -> object:
    from bertgpt.kernels.add_layer_norm_backward import add_layer_norm_bwd

    x, residual, dy, dsum = (_meta(16384, width, dtype=dtype) for _ in range(4))
    weight, bias = (_meta(width, dtype=dtype) for _ in range(2))
    seed = torch.empty((), dtype=torch.int64, device="meta")
    return add_layer_norm_bwd(
        dy, dsum if with_sum else None, x=x, residual=residual, weight=weight, bias=bias,
        eps=1e-12, dropout_p=dropout_p, seed=seed,
    )  # fmt: skip


_WIDTHS = (1, 64, 128, 384, 768, 1024, 1600, 4096, 8192, 16384)


def _add_layer_norm_cases() -> Iterator[Case]:
    for width in _WIDTHS:
        yield _add_layer_norm_case(f"{width} bf16", {"width": width})
    yield _add_layer_norm_case("768 fp32", {"width": 768, "dtype": FP32})
    yield _add_layer_norm_case("768 bf16 with sum", {"width": 768, "return_sum": True})
    yield _add_layer_norm_case("768 bf16 no residual", {"width": 768, "residual": False})
    for width in (768, 16384):
        options = {"width": width, "dropout_p": 0.1}
        yield _add_layer_norm_case(f"{width} bf16 dropout", options)


def _add_layer_norm_bwd_cases() -> Iterator[Case]:
    op = "add_layer_norm_backward"
    for width in _WIDTHS[:-2]:
        call = partial(_add_layer_norm_bwd, width=width)
        yield Case(op, f"{width} bf16 dropout", call, NO_MMA)
    plain = partial(_add_layer_norm_bwd, width=768, dropout_p=0.0)
    yield Case(op, "768 bf16", plain, NO_MMA)
    yield Case(op, "768 bf16 with sum", partial(plain, with_sum=True), NO_MMA)
    yield Case(op, "768 fp32", partial(plain, dtype=FP32), NO_MMA)


def _add_layer_norm_case(name: str, options: dict[str, Any]) -> Case:
    return Case("add_layer_norm", name, partial(_add_layer_norm, **options), NO_MMA)


def _paged_write(
    *, dim: int = 64, tokens: int = 256, kv_heads: int = 12, dtype: torch.dtype = BF16
) -> object:
    from bertgpt.kernels.paged_write import paged_write

    pages = (1024, kv_heads, 64, dim)
    return paged_write(
        _meta(tokens, kv_heads, dim, dtype=dtype),
        _meta(tokens, kv_heads, dim, dtype=dtype),
        _meta(*pages, dtype=dtype),
        _meta(*pages, dtype=dtype),
        _meta(tokens, dtype=torch.int64),
    )


def _paged_write_cases() -> Iterator[Case]:
    dims = ((16, BF16), (32, BF16), (64, BF16), (128, BF16), (256, BF16), (256, FP32))
    for (dim, dtype), tokens in product(dims, (256, 16384)):
        yield Case(
            "paged_write",
            f"{tokens} tokens d{dim} {_NAMES[dtype]}",
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
        _meta(batch * chunk, heads, dim, dtype=dtype),
        _meta(4096, kv_heads, page, dim, dtype=dtype),
        _meta(4096, kv_heads, page, dim, dtype=dtype),
        _meta(batch, _MAX_KEYS // page, dtype=torch.int32),
        _meta(batch, dtype=torch.int32),
        cu_seqlens_q=_meta(batch + 1, dtype=torch.int32) if chunk > 1 else None,
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
        f"{name} d{dim} {_NAMES[dtype]}",
        partial(_paged_attention, dim=dim, dtype=dtype, **options),
        _matrix(dtype, matrix),
    )


CASES: tuple[Case, ...] = (
    *_attention_cases(),
    *_attention_backward_cases(),
    *_linear_gelu_cases(),
    *_linear_cross_entropy_cases(),
    *_linear_gelu_bwd_cases(),
    *_add_layer_norm_cases(),
    *_add_layer_norm_bwd_cases(),
    *_paged_write_cases(),
    *_paged_attention_cases(),
)


def _attention_domain(capability: int) -> Iterator[tuple[Any, ...]]:
    flags = (False, True)
    for dim, dtype_bytes, masked, aligned in product((16, 64, 80, 128, 256), (2, 4), flags, flags):
        yield capability, dim, dtype_bytes, masked, aligned


def _attention_backward_domain(capability: int) -> Iterator[tuple[Any, ...]]:
    for gradient, arguments in product(("dq", "dkdv"), _attention_domain(capability)):
        yield gradient, *arguments


def _linear_gelu_domain(capability: int) -> Iterator[tuple[Any, ...]]:
    tokens = (1, 16, 64, 65, 512, 2048, 16384)
    for (dtype_bytes, ieee), m, aligned in product(
        ((2, False), (4, False), (4, True)), tokens, (False, True)
    ):
        yield capability, dtype_bytes, ieee, m, 3072, 132, aligned


def _linear_cross_entropy_domain(capability: int) -> Iterator[tuple[Any, ...]]:
    for (dtype_bytes, ieee), aligned in product(((2, False), (4, False), (4, True)), (False, True)):
        yield capability, dtype_bytes, ieee, aligned


def _linear_cross_entropy_backward_domain(capability: int) -> Iterator[tuple[Any, ...]]:
    for arguments, adds in product(_linear_cross_entropy_domain(capability), (False, True)):
        yield *arguments, adds


def _add_layer_norm_domain(capability: int) -> Iterator[tuple[Any, ...]]:
    for width in _WIDTHS:
        yield capability, width


def _add_layer_norm_backward_domain(capability: int) -> Iterator[tuple[Any, ...]]:
    for width in _WIDTHS[:-2]:
        yield capability, width


def _paged_write_domain(capability: int) -> Iterator[tuple[Any, ...]]:
    for tokens, dim, dtype_bytes in product((1, 256, 16384), (16, 64, 80, 128, 256), (2, 4)):
        yield capability, tokens, 12, dim, dtype_bytes


def _paged_attention_domain(capability: int) -> Iterator[tuple[Any, ...]]:
    for dim, dtype_bytes, rows in product((64, 80, 128, 256), (2, 4), (1, 4, 24, 64, 512)):
        yield capability, dim, dtype_bytes, rows, _MAX_KEYS


# By op: the arguments that its `pick_config` is asked for on a given capability.
DOMAINS: dict[str, Callable[[int], Iterator[tuple[Any, ...]]]] = {
    "attention": _attention_domain,
    "attention_backward": _attention_backward_domain,
    "linear_gelu": _linear_gelu_domain,
    "linear_cross_entropy": _linear_cross_entropy_domain,
    "linear_cross_entropy_backward": _linear_cross_entropy_backward_domain,
    "add_layer_norm": _add_layer_norm_domain,
    "add_layer_norm_backward": _add_layer_norm_backward_domain,
    "paged_write": _paged_write_domain,
    "paged_attention": _paged_attention_domain,
}
