"""Ahead-of-time cases of the ops that work row by row, and of their gradients."""

from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
from aot_case import (
    BF16,
    FP16,
    FP32,
    NO_MMA,
    WIDE_MMA,
    Case,
    Domains,
    meta,
    with_tf32,
)


def _linear_gelu(
    *, tokens: int, width: int = 768, dtype: torch.dtype = BF16, approximate: str = "none"
) -> object:
    from bertgpt.kernels.linear_gelu import linear_gelu

    return linear_gelu(
        meta(tokens, width, dtype=dtype),
        meta(4 * width, width, dtype=dtype),
        meta(4 * width, dtype=dtype),
        approximate=approximate,
    )


def _gelu_ffn_bwd(
    *, tokens: int, width: int = 768, dtype: torch.dtype = BF16, approximate: str = "none"
) -> object:
    from bertgpt.kernels.linear_gelu_backward import gelu_ffn_bwd

    x, grad = (meta(tokens, width, dtype=dtype) for _ in range(2))
    w_in, w_out = meta(4 * width, width, dtype=dtype), meta(width, 4 * width, dtype=dtype)
    return gelu_ffn_bwd(
        grad, ("x",), x=x, w_in=w_in, b_in=None, w_out=w_out, b_out=None, approximate=approximate,
        dropout_p=0.1, seed=torch.empty((), dtype=torch.int64, device="meta"),
    )  # fmt: skip


def _linear_gelu_bwd(*, dtype: torch.dtype = BF16, approximate: str) -> object:
    from bertgpt.kernels.linear_gelu_backward import linear_gelu_bwd

    x, w, grad = (meta(n, m, dtype=dtype) for n, m in ((16384, 768), (3072, 768), (16384, 3072)))
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
            partial(with_tf32, partial(_linear_gelu, tokens=tokens, dtype=FP32)),
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
    parameter = partial(meta, dtype=weight_dtype or dtype)
    call = {
        "hidden": meta(tokens, width, dtype=dtype),
        "weight": parameter(vocabulary, width),
        "bias": parameter(vocabulary) if bias else None,
        "labels": meta(tokens, dtype=torch.int64),
        "ignore_index": -100,
    }
    if not backward:
        return row_losses(**call)
    loss = meta(tokens, dtype=FP32)
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
            yield Case(op, f"{width} tf32", partial(with_tf32, call), WIDE_MMA)


def _linear_gelu_bwd_cases() -> Iterator[Case]:
    op = "linear_gelu_backward"
    for form, approximate in (("erf", "none"), ("tanh", "tanh")):
        for tokens in (16, 512, 16384):
            call = partial(_gelu_ffn_bwd, tokens=tokens, approximate=approximate)
            yield Case(op, f"ffn {tokens}×768 {form} bf16", call, WIDE_MMA)
        yield Case(op, f"{form} bf16", partial(_linear_gelu_bwd, approximate=approximate), NO_MMA)
    for tokens in (16, 512, 16384):
        call = partial(_gelu_ffn_bwd, tokens=tokens, dtype=FP32)
        yield Case(op, f"ffn {tokens}×768 erf tf32", partial(with_tf32, call), WIDE_MMA)
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
        meta(16384, width, dtype=dtype),
        meta(16384, width, dtype=dtype) if residual else None,
        meta(width, dtype=dtype),
        meta(width, dtype=dtype),
        eps=1e-12,
        dropout_p=dropout_p,
        seed=torch.empty((), dtype=torch.int64, device="meta"),
        return_sum=return_sum,
    )


def _add_layer_norm_bwd(
    *, width: int, dtype: torch.dtype = BF16, dropout_p: float = 0.1, with_sum: bool = False
) -> object:
    from bertgpt.kernels.add_layer_norm_backward import add_layer_norm_bwd

    x, residual, dy, dsum = (meta(16384, width, dtype=dtype) for _ in range(4))
    weight, bias = (meta(width, dtype=dtype) for _ in range(2))
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


def _sample(*, dtype: torch.dtype) -> object:
    from bertgpt.kernels.sample import sample

    rows = 64
    real, whole = (meta(rows, dtype=kind) for kind in (FP32, torch.int64))
    return sample(
        meta(rows, 50257, dtype=dtype), temperature=real, top_k=whole, top_p=real, min_p=real,
        seed=whole, sequence_ids=whole, steps=whole,
    )  # fmt: skip


def _sample_cases() -> Iterator[Case]:
    for dtype, name in ((BF16, "bf16"), (FP16, "fp16"), (FP32, "fp32")):
        yield Case("sample", f"50257 {name}", partial(_sample, dtype=dtype), NO_MMA)


def _sample_domain(capability: int) -> Iterator[tuple[Any, ...]]:
    yield (capability,)


def _pool(*, width: int, pooling: str, dtype: torch.dtype = BF16) -> object:
    from bertgpt.kernels.pool import pool

    boundaries = meta(129, dtype=torch.int32)
    return pool(meta(16384, width, dtype=dtype), boundaries, pooling=pooling, normalize=True)


def _pool_cases() -> Iterator[Case]:
    for width, pooling in product((1, 384, 768, 1024, 1600, 8192), ("cls", "mean", "max")):
        call = partial(_pool, width=width, pooling=pooling)
        yield Case("pool", f"{width} {pooling} bf16", call, NO_MMA)
    for pooling in ("mean", "max"):
        call = partial(_pool, width=768, pooling=pooling, dtype=FP32)
        yield Case("pool", f"768 {pooling} fp32", call, NO_MMA)


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


def _pool_domain(capability: int) -> Iterator[tuple[Any, ...]]:
    for width in (1, 384, 768, 1024, 1600, 8192):
        yield capability, width


def _add_layer_norm_backward_domain(capability: int) -> Iterator[tuple[Any, ...]]:
    for width in _WIDTHS[:-2]:
        yield capability, width


CASES: tuple[Case, ...] = (
    *_linear_gelu_cases(),
    *_linear_gelu_bwd_cases(),
    *_linear_cross_entropy_cases(),
    *_add_layer_norm_cases(),
    *_add_layer_norm_bwd_cases(),
    *_sample_cases(),
    *_pool_cases(),
)

DOMAINS: Domains = {
    "linear_gelu": _linear_gelu_domain,
    "linear_cross_entropy": _linear_cross_entropy_domain,
    "linear_cross_entropy_backward": _linear_cross_entropy_backward_domain,
    "add_layer_norm": _add_layer_norm_domain,
    "add_layer_norm_backward": _add_layer_norm_backward_domain,
    "sample": _sample_domain,
    "pool": _pool_domain,
}
