"""One call for the ahead-of-time gate to compile, and the meta tensors that it is made of."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NAMES = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}

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


def meta(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def with_tf32(call: Callable[[], object]) -> object:
    """The call under the setting that lets float32 products run on tensor cores."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        return call()
    finally:
        torch.set_float32_matmul_precision(before)


def matrix_of(dtype: torch.dtype, wide: dict[int, str] = WIDE_MMA) -> dict[int, str]:
    return NO_MMA if dtype == FP32 else wide  # fp32 means IEEE products: no tensor cores


# By op: the arguments that its `pick_config` is asked for on a given capability.
Domains = dict[str, Callable[[int], Iterator[tuple[Any, ...]]]]
