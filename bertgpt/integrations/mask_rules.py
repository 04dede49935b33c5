"""The mask function that goes with this library's attention in transformers.

What it returns is the additive mask that eager stock code adds to its scores, so that whoever adds
it, or slices it, is right. A mask of a known kind also bears the rule that made it, by which
attention never reads it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils
from transformers.utils.import_utils import is_tracing


@dataclass(frozen=True, eq=False)
class Rule:
    """What a mask says, in the terms of `bertgpt.ops.attention`.

    Attributes:
        causal: no key after the query.
        window: (left, right) places, −1 for unbounded.
        key_lengths: int32 `[B]`, how many keys each row has; None for all of them.
        cu_seqlens: int32, bounds of the sequences that lie end to end in the flattened rows.
        max_seqlen: of those.
    """

    causal: bool
    window: tuple[int, int] = (-1, -1)
    key_lengths: Tensor | None = None
    cu_seqlens: Tensor | None = None
    max_seqlen: int | None = None


def rule_of(mask: Tensor) -> Rule | None:
    """The rule that `mask` was made by; None where it is not known."""
    return getattr(mask, "_bertgpt_rule", None)


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    **kwargs: Any,
) -> Tensor | None:
    """A mask for `attn_implementation="bertgpt"`.

    Args:
        batch_size: B.
        q_length: L.
        kv_length: S.
        q_offset: place of the first query.
        kv_offset: place of the first key.
        mask_function: which keys a query may see, by their places.
        attention_mask: bool `[B, keys so far]`, real tokens.
        dtype: of the mask.
        **kwargs: as stock mask functions take them.

    Returns:
        None where `module.is_causal` says it all (where SDPA's mask function says so); otherwise
        additive `[B, 1, L, S]`, the lowest finite number for what is ruled out.
    """
    allowed = masking_utils.sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        mask_function,
        attention_mask,
        **kwargs,
    )
    if allowed is None:
        return None
    lowest = torch.finfo(dtype).min
    mask = torch.where(allowed, torch.zeros((), dtype=dtype, device=allowed.device), lowest)
    corner = isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length
    if corner and not is_tracing(mask):
        rule = _known(mask_function)
        if rule is not None and attention_mask is not None:
            padding: Any = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
            rule = _with_padding(rule, padding[:, kv_offset : kv_offset + kv_length])
        if rule is not None:
            mask._bertgpt_rule = rule  # type: ignore[attr-defined]
    return mask


def _with_padding(rule: Rule, padding: Tensor) -> Rule | None:
    """With padding after the real tokens; None where some lies before one."""
    lengths = padding.sum(dim=1, dtype=torch.int32)
    places = torch.arange(padding.shape[1], device=padding.device)
    if rule.cu_seqlens is not None or not bool((padding == (places < lengths[:, None])).all()):
        return None
    return replace(rule, key_lengths=lengths)


def _known(function: Callable[..., Any]) -> Rule | None:
    """The rule of a mask function that transformers itself builds; None for any other."""
    if function is masking_utils.causal_mask_function:
        return Rule(causal=True)
    if function is masking_utils.bidirectional_mask_function:
        return Rule(causal=False)
    if _maker(function) != "and_masks":
        return None
    parts = {_maker(part): part for part in _held(function)["mask_functions"]}
    if set(parts) == {"sliding_window_overlay", "causal_mask_function"}:
        width = _held(parts["sliding_window_overlay"])["sliding_window"]
        return Rule(causal=True, window=(width - 1, -1))
    if set(parts) == {"sliding_window_bidirectional_overlay", "bidirectional_mask_function"}:
        width = _held(parts["sliding_window_bidirectional_overlay"])["sliding_window"]
        return Rule(causal=False, window=(width, width))
    if set(parts) == {"packed_sequence_mask_function", "remap_positions_for_packed_sequence"}:
        rule = _known(_held(parts["remap_positions_for_packed_sequence"])["mask_function"])
        ids = _held(parts["packed_sequence_mask_function"])["packed_sequence_mask"]
        return None if rule is None else _packed(rule, ids)
    return None


def _packed(rule: Rule, sequences: Tensor) -> Rule:
    """The rule within each run of one sequence id, along which positions count up by one."""
    starts = torch.ones_like(sequences, dtype=torch.bool)
    starts[:, 1:] = sequences[:, 1:] != sequences[:, :-1]
    bounds = starts.flatten().nonzero().squeeze(1)
    end = torch.tensor([sequences.numel()], device=bounds.device)
    cu_seqlens = torch.cat([bounds, end]).to(torch.int32)
    return replace(rule, cu_seqlens=cu_seqlens, max_seqlen=int(cu_seqlens.diff().max()))


def _maker(function: Any) -> str:
    """The function of `masking_utils` that `function` is, or comes from; "" for any other."""
    if getattr(function, "__module__", None) != masking_utils.__name__:
        return ""
    return str(getattr(function, "__qualname__", "")).partition(".")[0]


def _held(function: Any) -> dict[str, Any]:
    """The variables that a closure holds, by name."""
    cells = function.__closure__ or ()
    return dict(zip(function.__code__.co_freevars, (c.cell_contents for c in cells), strict=True))
