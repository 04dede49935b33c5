"""What the launchers of attention, forward and backward, make of one call."""

from dataclasses import dataclass
from typing import Any

import torch
import triton

from bertgpt.kernels.dropout import dropout_arguments


@dataclass(frozen=True)
class Config:
    """Tile shape and launch options of one specialisation of a gradient's kernel."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class AttentionCall:
    """A call as kernels see it.

    Attributes:
        packed: Whether tokens are [T, H, D] with cu_seqlens.
        batch: B, sequences.
        longest_q: No sequence has more queries.
        longest_k: No sequence has more keys.
        indices: key_lengths and both cu_seqlens, contiguous, or None.
        window: (left, right), -1 where nothing is cut off; causal is a right bound of 0.
        natural: Softmax statistics in units of e rather than 2.
        dropout: Seed on the device (None without dropout), the least word that is kept, and the
            factor of what is kept.
        extras: Which column of a table of tiles the call takes: how much it adds to the registers
            of its products, 0, 1 or 2.
        constants: Compile-time arguments that all kernels share.
    """

    packed: bool
    batch: int
    longest_q: int
    longest_k: int
    indices: tuple[torch.Tensor | None, ...]
    window: tuple[int, int]
    natural: bool
    dropout: tuple[torch.Tensor | None, int, float]
    extras: int
    constants: dict[str, Any]

    def strides(self, x: torch.Tensor) -> tuple[int, ...]:
        """Strides of batch, token and head; packed sequences are reached by their first token."""
        return (0, *x.stride()[:2]) if self.packed else x.stride()[:3]

    def row_shape(self, q: torch.Tensor) -> tuple[int, ...]:
        """Shape of one value a query and head: [B, H, L] or [H, T]."""
        *leading, length, heads, _ = q.shape
        return (*leading, heads, length)

    def row_strides(self, q: torch.Tensor) -> tuple[int, int]:
        """Strides of batch and head in a contiguous tensor of `row_shape`."""
        length, heads = q.shape[-3:-1]
        return 0 if self.packed else heads * length, length


# fmt: off
def attention_call(
    q: torch.Tensor, k: torch.Tensor, *,
    mask: torch.Tensor | None, key_lengths: torch.Tensor | None,
    causal: bool, window: tuple[int, int],
    cu_seqlens_q: torch.Tensor | None, cu_seqlens_k: torch.Tensor | None,
    max_seqlen_q: int | None, max_seqlen_k: int | None,
    dropout_p: float, seed: torch.Tensor | None,
) -> AttentionCall:
    """The arguments of `bertgpt.ops.attention`, checked by it, as kernels see them."""
    # fmt: on
    dim, len_q, len_k = q.shape[-1], q.shape[-3], k.shape[-3]
    index_tensors = (key_lengths, cu_seqlens_q, cu_seqlens_k)
    left, right = window[0], 0 if causal else window[1]
    left = -1 if left >= len_k - 1 else left  # reaches the first key from the last query
    right = -1 if right >= len_q - 1 and not causal else right
    additive = mask is not None and mask.dtype != torch.bool
    per_query = mask is not None and mask.stride(2) != 0
    dropout = dropout_arguments(dropout_p, seed, q.device)
    values = (mask is not None) + (additive and per_query) + (dropout[0] is not None)
    # A left bound, as given whatever the lengths, and grouped heads add to those only.
    values += values > 0 and (window[0] >= 0 or q.shape[-2] != k.shape[-2])
    natural = additive or q.dtype == torch.float32
    ieee = q.dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return AttentionCall(
        packed=cu_seqlens_q is not None,
        batch=q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.numel() - 1,
        longest_q=len_q if max_seqlen_q is None else max_seqlen_q,
        longest_k=len_k if max_seqlen_k is None else max_seqlen_k,
        indices=tuple(x if x is None else x.contiguous() for x in index_tensors),
        window=(left, right),
        natural=natural,
        dropout=dropout,
        extras=min(values, 2),
        constants={
            "HEAD_DIM": dim, "BLOCK_D": max(16, triton.next_power_of_2(dim)),
            "HAS_LEFT": left >= 0, "HAS_RIGHT": right >= 0,
            "NATURAL": natural, "IS_ADDITIVE": additive,
            "MASK_PER_QUERY": per_query,
            "PRECISION": "ieee" if ieee else "tf32",
        },
    )  # fmt: skip
