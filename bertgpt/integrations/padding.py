"""Padding taken out at a stock encoder's door, and attention under the masks that stock code makes.

A stock layer hands its mask on untouched. Where the mask only says which tokens are padding, a
`Packing` goes through the layers in its place, and the hidden states go packed, `[T, E]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils.import_utils import is_tracing

from bertgpt import ops, portable
from bertgpt.ops._watched import alone
from bertgpt.packing import PackedBatch, pad, unpad

Window = tuple[int, int] | None


@dataclass(frozen=True, eq=False)
class Packing:
    """The tokens of a padded batch that go through the layers.

    Attributes:
        batch: the tokens, with the padded cells they came from.
        keys: which of their rows `[T']` are attended to, and their own boundaries; None for all.
    """

    batch: PackedBatch
    keys: tuple[Tensor, PackedBatch] | None = None

    @classmethod
    def of(cls, hidden_BLE: Tensor, keep_BL: Tensor, column_0: bool) -> Packing:
        """Of the cells that `keep_BL` holds.

        Args:
            hidden_BLE: anything `[B, L, ...]`; only its shape and device count.
            keep_BL: bool, real tokens.
            column_0: keep the first column too, as queries only: stock heads read it, and under
                padding on the left it holds what a padding token makes of the real ones.
        """
        cells = hidden_BLE[..., 0] if hidden_BLE.ndim > 2 else hidden_BLE
        if not column_0 or bool(keep_BL[:, 0].all()):
            return cls(unpad(cells, keep_BL))
        queries = keep_BL.clone()
        queries[:, 0] = True
        batch = unpad(cells, queries)
        assert batch.grid is not None
        rows = batch.grid.select(keep_BL).nonzero().squeeze(1)
        return cls(batch, (rows, unpad(cells, keep_BL)))

    def enter(self, padded: Tensor) -> Tensor:
        """`[B, L, ...]` → `[T, ...]`."""
        assert self.batch.grid is not None
        return self.batch.grid.select(padded)

    def leave(self, packed: Tensor) -> Tensor:
        """`[T, ...]` → `[B, L, ...]`, zeros at padding."""
        return pad(packed, self.batch)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        dropout_p: float,
        causal: bool,
        window: Window,
    ) -> Tensor:
        """Attention within each sequence, `[T, H, D]`."""
        keys = self.batch
        if self.keys is not None:
            rows, keys = self.keys
            k, v = k[rows], v[rows]
        out: Tensor = ops.attention(
            q,
            k,
            v,
            causal=causal,
            window=window,
            scale=scale,
            cu_seqlens_q=self.batch.cu_seqlens,
            cu_seqlens_k=keys.cu_seqlens,
            max_seqlen_q=self.batch.max_seqlen,
            max_seqlen_k=keys.max_seqlen,
            dropout_p=dropout_p,
        )
        return out


def may_pack(hidden: Tensor) -> bool:
    """Whether the number of real tokens may be asked for: not in a graph whose shapes are fixed."""
    return not is_tracing(hidden) and hidden.device.type != "meta"


def key_padding(mask: Any, hidden_BLE: Tensor) -> Tensor | None:
    """The real tokens `[B, L]` where `mask` says no more than that; None where it says more.

    Args:
        mask: what stock code hands to a bidirectional layer: `[B, L]`, or `[B, 1, L, L]` in bool
            (True attends) or additive floats.
        hidden_BLE: the hidden states that it masks.
    """
    rows, columns = hidden_BLE.shape[:2]
    if not isinstance(mask, Tensor):
        return None
    if mask.ndim == 2 and mask.shape == (rows, columns):
        return mask != 0
    if mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[3] != columns:
        return None
    allowed, uniform = mask, torch.ones((), dtype=torch.bool, device=mask.device)
    if mask.dtype != torch.bool:
        allowed = mask == 0
        uniform = (allowed | (mask <= torch.finfo(mask.dtype).min)).all()
    keep = allowed[:, 0, :1]
    uniform = uniform & (allowed[:, 0] == keep).all()
    return keep[:, 0].expand(rows, columns) if bool(uniform) else None


# What may ride along with a mask and changes what it means.
_RIDERS = ("is_causal", "cache", "cu_seq_lens_q", "cu_seq_lens_k")


def takes(mask: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether the mask and the arguments beside it are what `attend_padded` goes by."""
    known = mask is None or (isinstance(mask, Tensor) and mask.ndim == 4)
    return known and all(kwargs.get(name) is None for name in _RIDERS)


def attend_padded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    dropout_p: float,
    causal: bool,
    window: Window,
) -> Tensor:
    """Attention of padded tokens as stock's SDPA path means it.

    Args:
        q: `[B, L, H, D]`.
        k: `[B, S, K, D]`, a cache's slots included.
        v: like k.
        mask: `[B or 1, H or 1, L, S]`, bool or additive; None for none at all.
        scale: of the scores.
        dropout_p: of the attention weights.
        causal: what holds where there is no mask: every query sees the keys up to its own place,
            which is counted from the first key; a lone query sees them all.
        window: of places seen; given, causality holds beside a mask too, as the op means it.
    """
    if window is None:
        causal = causal and mask is None and q.shape[1] > 1
        if causal and k.shape[1] > q.shape[1]:  # the empty slots of a static cache
            k, v = k[:, : q.shape[1]], v[:, : q.shape[1]]
    if mask is None and dropout_p == 0.0 and alone(q, k, v):
        mixed: Any = portable.attention(q, k, v, causal=causal, window=window, scale=scale)
        return mixed
    out: Tensor = ops.attention(
        q, k, v, mask=mask, causal=causal, window=window, scale=scale, dropout_p=dropout_p
    )
    return out
