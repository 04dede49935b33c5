"""The blocks of decoders as transformers builds them: GPT-2, GPT-Neo, and the first GPT.

Each class here stands before a stock class in a subclass of both (`patched.py`), without state.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache, EncoderDecoderCache

from bertgpt.integrations.blocks import Attention, FeedForward, Mask, Parts, Patched, add_norm
from bertgpt.integrations.encoder_blocks import Norm, PostNormLayer
from bertgpt.integrations.padding import Packing, takes
from bertgpt.integrations.versions import CACHE

UNBOUNDED = (-1, -1)


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
        past: Cache | None = None,
        attention_mask: Mask = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        use_cache: bool | None = False,
        **kwargs: Any,
    ) -> Tensor:
        """What the stock block computes, on padded `[B, L, E]` or packed `[T, E]`."""
        past = kwargs.pop(CACHE, past)
        if encoder_hidden_states is not None:
            return super().forward(
                hidden_states,
                past,
                attention_mask,
                encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
                use_cache=use_cache,
                **kwargs,
            )
        part = self.parts().attention
        x, mask, dropout = self.ln_1(hidden_states), attention_mask, None
        known = takes(mask, kwargs) and isinstance(past, Cache | None)
        if isinstance(mask, Packing) or (known and part.obstacle() is None):
            q, k, v = part.project(x)
            if past is not None:
                k, v = remember(past, k, v, mask, self.attn.layer_idx)
            x, dropout = part.mix(q, k, v, mask), self.attn.resid_dropout
        else:
            others = {CACHE: past, "use_cache": use_cache, **kwargs}
            x = self.attn(x, attention_mask=mask, **others)[0]
        return feed_forward(self, x, hidden_states, dropout, mask)


def feed_forward(
    block: Any, x: Tensor, residual: Tensor, dropout: nn.Module | None, mask: Mask
) -> Tensor:
    """The second half of a pre-norm block: x is what attention gave, `dropout` is still to fall."""
    part = block.parts().feed_forward
    x, residual = add_norm(x, residual, dropout, block.ln_2, return_sum=True)
    if isinstance(mask, Packing) or part.obstacle() is None:
        return block.mlp.dropout(part(x)) + residual
    return block.mlp(x) + residual


def remember(past: Cache, k: Tensor, v: Tensor, mask: Mask, layer: int) -> tuple[Tensor, Tensor]:
    """Puts keys and values into stock's cache; those to attend to, `[B, S, H, D]` or packed."""
    if isinstance(past, EncoderDecoderCache):
        past = past.self_attention_cache
    if isinstance(mask, Packing):  # the cache was empty: these are all there are
        past.update(mask.leave(k).transpose(1, 2), mask.leave(v).transpose(1, 2), layer)
        return k, v
    keys, values = past.update(k.transpose(1, 2), v.transpose(1, 2), layer)
    return keys.transpose(1, 2), values.transpose(1, 2)


class GPTNeoBlock(Patched):
    """GPT-2's block with projections apart, unscaled scores, and a window in every other layer."""

    def parts(self) -> Parts:
        """Where the block's weights are."""
        attn, mlp = self.attn.attention, self.mlp
        local = attn.attention_type == "local"
        attention = Attention(
            owners=(self.attn, attn),
            projections=(attn.q_proj, attn.k_proj, attn.v_proj),
            out=attn.out_proj,
            weights_dropout=attn.attn_dropout,
            dropping=attn.attn_dropout.training,
            head_dim=attn.head_dim,
            scale=1.0,
            causal=True,
            window=(attn.config.window_size - 1, -1) if local else UNBOUNDED,
        )
        return Parts(attention, FeedForward((mlp,), mlp.c_fc, mlp.act, mlp.c_proj))

    def forward(
        self,
        hidden_states: Tensor,
        layer_past: Cache | None = None,
        attention_mask: Mask = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """What the stock block computes, on padded `[B, L, E]` or packed `[T, E]`."""
        if output_attentions:
            return super().forward(
                hidden_states, layer_past, attention_mask, use_cache, output_attentions, **kwargs
            )
        attn, part = self.attn.attention, self.parts().attention
        x, mask = self.ln_1(hidden_states), attention_mask
        known = takes(mask, kwargs) and isinstance(layer_past, Cache | None)
        if isinstance(mask, Packing) or (known and part.obstacle() is None):
            q, k, v = part.project(x)
            if layer_past is not None:
                k, v = remember(layer_past, k, v, mask, attn.layer_id)
            x, dropout = part.mix(q, k, v, mask), attn.resid_dropout
        else:
            x = self.attn(x, layer_past=layer_past, attention_mask=mask, use_cache=use_cache)[0]
            dropout = None
        return feed_forward(self, x, hidden_states, dropout, mask), None


class OpenAIGPTBlock(PostNormLayer):
    """GPT-1's block: a post-norm layer, causal."""

    def parts(self) -> Parts:
        """Where the block's weights are."""
        attn, mlp = self.attn, self.mlp
        head_dim = attn.split_size // attn.n_head
        attention = Attention(
            owners=(attn,),
            projections=(attn.c_attn,),
            out=attn.c_proj,
            weights_dropout=attn.attn_dropout,
            dropping=attn.attn_dropout.training,
            head_dim=head_dim,
            scale=head_dim**-0.5 if attn.scale else 1.0,
            causal=True,
            window=UNBOUNDED,
        )
        return Parts(attention, FeedForward((mlp,), mlp.c_fc, mlp.act, mlp.c_proj))

    def norms(self) -> tuple[Norm, Norm]:
        """The dropout and the norm after each sub-block."""
        return (self.attn.resid_dropout, self.ln_1), (self.mlp.dropout, self.ln_2)

    def attend_as_stock(self, x: Tensor, mask: Any, kwargs: dict[str, Any]) -> Tensor:
        """Calls the stock modules."""
        return self.ln_1(x + self.attn(x, attention_mask=mask)[0])

    def feed_forward_as_stock(self, x: Tensor) -> Tensor:
        """Calls the stock modules."""
        return self.ln_2(x + self.mlp(x))

    def forward(
        self, x: Tensor, attention_mask: Mask = None, output_attentions: bool = False
    ) -> list[Tensor]:
        """What the stock block computes, on padded `[B, L, E]` or packed `[T, E]`."""
        if output_attentions:
            return super().forward(x, attention_mask, output_attentions)
        return [self.run(x, attention_mask, {})]
