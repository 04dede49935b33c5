"""Decoders as transformers builds them: GPT-2.

Each class here stands before a stock class in a subclass of both (`patched.py`), without state.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from bertgpt.integrations.blocks import Attention, FeedForward, Mask, Parts, Patched, add_norm
from bertgpt.integrations.inspection import collecting, first_obstacle
from bertgpt.integrations.padding import Packing, may_pack, takes


class GPT2Block(Patched):
    """Attention and the feed-forward network, each on normed input."""

    def refusal(self) -> str | None:
        """Cross-attention is stock's."""
        return "it has cross-attention" if hasattr(self, "crossattention") else None

    def parts(self) -> Parts:
        """Where the block's weights are."""
        attn, mlp = self.attn, self.mlp
        attention = Attention(
            owners=(attn,),
            projections=(attn.c_attn,),
            out=attn.c_proj,
            weights_dropout=attn.attn_dropout,
            dropping=attn.training,
            head_dim=attn.head_dim,
            scale=attn.scaling,
            causal=attn.is_causal,
        )
        return Parts(attention, FeedForward((mlp,), mlp.c_fc, mlp.act, mlp.c_proj))

    def forward(
        self,
        hidden_states: Tensor,
        past_key_values: Cache | None = None,
        attention_mask: Mask = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        use_cache: bool | None = False,
        **kwargs: Any,
    ) -> Tensor:
        """What the stock block computes, on padded `[B, L, E]` or packed `[T, E]`."""
        if encoder_hidden_states is not None:
            return super().forward(
                hidden_states,
                past_key_values,
                attention_mask,
                encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
                use_cache=use_cache,
                **kwargs,
            )
        attention, feed_forward = self.parts()
        residual, packed = hidden_states, isinstance(attention_mask, Packing)
        x = self.ln_1(residual)
        if packed or (takes(attention_mask, kwargs) and attention.obstacle() is None):
            q, k, v = attention.project(x)
            if past_key_values is not None:
                k, v = _remember(past_key_values, k, v, attention_mask, self.attn.layer_idx)
            x, dropout = attention.mix(q, k, v, attention_mask), self.attn.resid_dropout
        else:
            x, dropout = (
                self.attn(
                    x,
                    past_key_values=past_key_values,
                    attention_mask=attention_mask,
                    use_cache=use_cache,
                    **kwargs,
                )[0],
                None,
            )
        x, residual = add_norm(x, residual, dropout, self.ln_2, return_sum=True)
        if packed or feed_forward.obstacle() is None:
            return self.mlp.dropout(feed_forward(x)) + residual
        return self.mlp(x) + residual


def _remember(past: Cache, k: Tensor, v: Tensor, mask: Mask, layer: int) -> tuple[Tensor, Tensor]:
    """Puts keys and values into stock's cache; those to attend to, `[B, S, H, D]` or packed."""
    if isinstance(past, EncoderDecoderCache):
        past = past.self_attention_cache
    if isinstance(mask, Packing):  # the cache was empty: these are all there are
        past.update(mask.leave(k).transpose(1, 2), mask.leave(v).transpose(1, 2), layer)
        return k, v
    keys, values = past.update(k.transpose(1, 2), v.transpose(1, 2), layer)
    return keys.transpose(1, 2), values.transpose(1, 2)


class GPT2Model(Patched):
    """The decoder without a head: takes padding out before the first block."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the stock model computes, except that padding comes out as zeros.

        Where something looks at the blocks in between, where a block is stock, where the cache
        holds tokens already, and in graphs of fixed shapes, the tokens go through padded.
        """
        # First: a compiler must not look at what follows.
        if not torch.compiler.is_compiling():
            call = inspect.signature(super().forward).bind(*args, **kwargs)
            call.apply_defaults()
            output = self._forward_packed(**call.arguments)
            if output is not None:
                return output
        return super().forward(*args, **kwargs)

    def _forward_packed(
        self,
        input_ids: Tensor | None,
        past_key_values: Cache | None,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        use_cache: bool | None,
        kwargs: dict[str, Any],
        **rest: Any,
    ) -> Any:
        """The output where the tokens can go packed; None where they cannot."""
        padded = input_ids if inputs_embeds is None else inputs_embeds
        if padded is None or (input_ids is not None and inputs_embeds is not None):
            return None  # for stock code to refuse
        return_dict = kwargs.get("return_dict")
        if any(v is not None for v in rest.values()) or not _plain(kwargs) or collecting():
            return None
        if not self._may_pack(padded, attention_mask, past_key_values):
            return None
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if self.gradient_checkpointing and self.training:
            use_cache, past_key_values = False, None
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        assert attention_mask is not None
        packing = Packing.of(padded, attention_mask != 0, column_0=False)
        x = packing.enter(self._embed(padded, position_ids, token_type_ids))
        for block in self.h:
            x = block(x, past_key_values, packing)
        output = BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=packing.leave(self.ln_f(x)),
            past_key_values=past_key_values if use_cache else None,
        )
        if return_dict is None:
            return_dict = getattr(self.config, "return_dict", True)
        return output if return_dict else output.to_tuple()

    def _may_pack(self, padded: Tensor, mask: Any, past: Cache | None) -> bool:
        if not isinstance(mask, Tensor) or mask.shape != padded.shape[:2] or not may_pack(padded):
            return False
        if past is not None and (not isinstance(past, Cache) or bool(past.get_seq_length())):
            return False
        if any(not isinstance(block, GPT2Block) or block.obstacles() for block in self.h):
            return False
        if first_obstacle((*self.h.modules(), self.ln_f)):
            return False
        return not bool(mask.all())

    def _embed(self, padded: Tensor, positions: Tensor | None, types: Tensor | None) -> Tensor:
        """Embeddings `[B, L, E]`: padded, since they cost no products and may have hooks."""
        if positions is None:
            positions = torch.arange(padded.shape[1], device=padded.device)[None]
        x = (self.wte(padded) if padded.ndim == 2 else padded) + self.wpe(positions)
        if types is not None:
            x = x + self.wte(types.view(-1, padded.shape[1]))
        return self.drop(x)


def _plain(kwargs: dict[str, Any]) -> bool:
    """Whether stock's free arguments ask for nothing but a kind of output."""
    asked = {name for name, value in kwargs.items() if value not in (None, False)}
    return asked <= {"return_dict"}
