"""Launcher of `csrc/sample.cuh`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bertgpt.cuda.extension import DTYPES, error_flag, extension, stream_of

MAX_ROWS = 2**31 - 1  # the grid's


def unsupported(call: Mapping[str, Any]) -> str | None:
    """Why this kernel can't take a call that the common checks let through, or None."""
    rows, _ = call["logits"].shape
    if rows > MAX_ROWS:
        return f"{rows} rows are above {MAX_ROWS}"
    return None


def sample(
    logits: Tensor,
    *,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    sequence_ids: Tensor,
    steps: Tensor,
) -> Tensor:
    """Draws each row's token; arguments as the op checked them.

    Args:
        logits: [B, V], any strides.
        temperature: float32, like all settings [B] on the device, or 0-dim on the device or the
            CPU; what lies on the device is read there.
        top_k: int64.
        top_p: float32.
        min_p: float32.
        seed: int64.
        sequence_ids: int64.
        steps: int64, of which the low 32 bits count.

    Returns:
        int64 [B]; −1 where a row has no softmax or a setting is out of range, which is told of by
        `extension.raise_pending`.
    """
    rows, vocabulary = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    tokens = logits.new_empty(rows, dtype=torch.int64)
    arguments: list[float] = []
    kept = []  # copies, until the launch
    for setting in (temperature, top_p, min_p, top_k, seed, sequence_ids, steps):
        if setting.dim() == 0:
            if setting.is_cpu:
                arguments += (0, setting.item())
                continue
            setting = setting.expand(rows)
        if not setting.is_contiguous():
            setting = setting.contiguous()
            kept.append(setting)
        arguments += (setting.data_ptr(), 0)
    extension().sample(
        logits.data_ptr(), tokens.data_ptr(), error_flag(logits), *arguments, rows,
        logits.stride(0), vocabulary, DTYPES[logits.dtype], stream_of(logits),
    )  # fmt: skip
    return tokens
