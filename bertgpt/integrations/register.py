"""`register`: this library's attention in any transformers model, by name."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface
from transformers.utils import output_capturing

from bertgpt import ops
from bertgpt.integrations import mask_rules
from bertgpt.integrations.padding import attend_padded
from bertgpt.integrations.versions import check_version

NAME = "bertgpt"
# Arguments of stock attention functions that change the result and are not done here.
_REFUSED = {
    "softcap": "capped scores",
    "s_aux": "attention sinks",
    "cache": "continuous batching, which takes 'sdpa' or 'paged|eager'",
}


def register() -> str:
    """Makes `attn_implementation="bertgpt"` known to transformers.

    Registers the attention function and its mask function together: one without the other would
    ignore padding. Any model that goes by transformers' attention interface can then be loaded with
    it, or take it by `model.set_attn_implementation("bertgpt")`. Calling again changes nothing.

    Returns:
        The name, "bertgpt".

    Raises:
        RuntimeError: the installed transformers is not a version whose masks are known.
    """
    check_version()
    AttentionMaskInterface.register(NAME, mask_rules.attention_mask)
    AttentionInterface.register(NAME, attention)
    return NAME


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it.

    Args:
        module: the stock attention module; its `is_causal` holds where no mask is given.
        query: `[B, H, L, D]`.
        key: `[B, K, S, D]`, H % K == 0.
        value: like key.
        attention_mask: None, `[B, S]` of real tokens, or `[B, 1, L, S]`, bool or additive; one of
            a known rule is not read.
        dropout: of the attention weights.
        scaling: of the scores; None means 1/√D.
        is_causal: in place of the module's.
        position_bias: additive, broadcastable to `[B, H, L, S]`.
        **kwargs: `cu_seq_lens_q`, `cu_seq_lens_k`, `max_length_q` and `max_length_k` of packed
            rows are honoured where no mask is given; others that would change the result raise.

    Returns:
        `[B, L, H, D]`, and None for the weights, which are never formed.

    Raises:
        ValueError: attention weights, capped scores, sinks or a paged cache are asked for.
    """
    _refuse(kwargs)
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    rule = None if attention_mask is None else mask_rules.rule_of(attention_mask)
    if position_bias is not None:
        mask = _with_bias(attention_mask, position_bias, causal, q, k)
        return attend_padded(q, k, v, mask, scale, dropout, False, None), None
    if attention_mask is None and kwargs.get("cu_seq_lens_q") is not None:
        rule = mask_rules.Rule(causal, cu_seqlens=kwargs["cu_seq_lens_q"])
        bounds = {
            "cu_seqlens_k": kwargs.get("cu_seq_lens_k"),
            "max_seqlen_q": kwargs.get("max_length_q"),
            "max_seqlen_k": kwargs.get("max_length_k"),
        }
        return _packed(q, k, v, rule, scale, dropout, **bounds), None
    if rule is None:
        if attention_mask is not None and attention_mask.ndim == 2:
            attention_mask = attention_mask[:, None, None, :].bool()
        return attend_padded(q, k, v, attention_mask, scale, dropout, causal, None), None
    if rule.cu_seqlens is not None:
        return _packed(q, k, v, rule, scale, dropout, max_seqlen_q=rule.max_seqlen), None
    out: Tensor = ops.attention(
        q,
        k,
        v,
        key_lengths=rule.key_lengths,
        causal=rule.causal,
        window=rule.window,
        scale=scale,
        dropout_p=dropout,
    )
    return out, None


def _packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rule: mask_rules.Rule,
    scale: float,
    dropout: float,
    **bounds: Any,
) -> Tensor:
    """Within each sequence of rows that lie end to end, `[B, L, H, D]`."""
    out: Tensor = ops.attention(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        cu_seqlens_q=rule.cu_seqlens,
        causal=rule.causal,
        window=rule.window,
        scale=scale,
        dropout_p=dropout,
        **bounds,
    )
    return out.view(q.shape)


def _with_bias(mask: Tensor | None, bias: Tensor, causal: bool, q: Tensor, k: Tensor) -> Tensor:
    """The bias, with what the mask or causality rules out."""
    if mask is None:
        if not causal or q.shape[1] == 1:
            return bias
        places = q.new_ones(q.shape[1], k.shape[1]).tril().bool()
        return bias.masked_fill(~places, float("-inf"))
    if mask.ndim == 2:
        mask = mask[:, None, None, :].bool()
    if mask.dtype.is_floating_point:
        return bias + mask
    return bias.masked_fill(~mask, float("-inf"))


def _refuse(kwargs: dict[str, Any]) -> None:
    for name, meaning in _REFUSED.items():
        if kwargs.get(name) is not None:
            raise ValueError(
                f"attn_implementation={NAME!r} does not do {meaning} ({name}); take another"
            )
    collected = output_capturing._active_collector.get() or {}
    if kwargs.get("output_attentions") or any("attentions" in name for name in collected):
        raise ValueError(
            f"attn_implementation={NAME!r} never forms attention weights (output_attentions): "
            "take 'eager' to look at them"
        )
