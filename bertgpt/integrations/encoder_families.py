"""Post-norm encoders that are built otherwise than BERT: DistilBERT, ALBERT, MPNet."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from bertgpt.integrations.blocks import Attention, FeedForward, Mask, Parts
from bertgpt.integrations.encoder_blocks import Encoder, Norm, PostNormLayer
from bertgpt.integrations.padding import Packing, Window, attend_padded


class DistilBertLayer(PostNormLayer):
    """Its attention ends with the output projection: dropout and norm are the layer's."""

    def parts(self) -> Parts:
        """Where the layer's weights are."""
        inner, ffn = self.attention, self.ffn
        attention = Attention(
            owners=(inner,),
            projections=(inner.q_lin, inner.k_lin, inner.v_lin),
            out=inner.out_lin,
            weights_dropout=inner.dropout,
            dropping=inner.training,
            head_dim=inner.attention_head_size,
            scale=inner.scaling,
        )
        return Parts(attention, FeedForward((ffn,), ffn.lin1, ffn.activation, ffn.lin2))

    def norms(self) -> tuple[Norm, Norm]:
        """The dropout and the norm after each sub-block."""
        return (None, self.sa_layer_norm), (self.ffn.dropout, self.output_layer_norm)

    def attend_as_stock(self, x: Tensor, mask: Any, kwargs: dict[str, Any]) -> Tensor:
        """Calls the stock modules."""
        return self.sa_layer_norm(self.attention(x, attention_mask=mask, **kwargs)[0] + x)

    def feed_forward_as_stock(self, x: Tensor) -> Tensor:
        """Calls the stock modules."""
        return self.output_layer_norm(self.ffn(x) + x)

    def forward(self, hidden_states: Tensor, attention_mask: Mask = None, **kwargs: Any) -> Tensor:
        """What the stock layer computes, on padded `[B, L, E]` or packed `[T, E]`."""
        return self.run(hidden_states, attention_mask, kwargs)


class AlbertLayer(PostNormLayer):
    """One layer that its group passes through again and again."""

    def parts(self) -> Parts:
        """Where the layer's weights are."""
        inner = self.attention
        attention = Attention(
            owners=(inner,),
            projections=(inner.query, inner.key, inner.value),
            out=inner.dense,
            weights_dropout=inner.attention_dropout,
            dropping=inner.training,
            head_dim=inner.attention_head_size,
            scale=inner.scaling,
        )
        return Parts(attention, FeedForward((), self.ffn, self.activation, self.ffn_output))

    def norms(self) -> tuple[Norm, Norm]:
        """The dropout and the norm after each sub-block."""
        first = self.attention
        return (first.output_dropout, first.LayerNorm), (None, self.full_layer_layer_norm)

    def attend_as_stock(self, x: Tensor, mask: Any, kwargs: dict[str, Any]) -> Tensor:
        """Calls the stock modules."""
        return self.attention(x, mask, **kwargs)[0]

    def feed_forward_as_stock(self, x: Tensor) -> Tensor:
        """Calls the stock modules."""
        return self.full_layer_layer_norm(self.ff_chunk(x) + x)

    def forward(self, hidden_states: Tensor, attention_mask: Mask = None, **kwargs: Any) -> Tensor:
        """What the stock layer computes, on padded `[B, L, E]` or packed `[T, E]`."""
        return self.run(hidden_states, attention_mask, kwargs)


class AlbertEncoder(Encoder):
    """Groups of layers, each used by several."""

    def layers(self) -> Iterable[Any]:
        """Every layer once."""
        return (layer for group in self.albert_layer_groups for layer in group.albert_layers)


@dataclass(frozen=True, eq=False)
class BiasedPacking(Packing):
    """Packed tokens whose scores have a bias by their places, for which they are spread out again.

    Attributes:
        bias: additive `[B, H, L, L]`, −inf for keys that are padding.
    """

    bias: Tensor | None = None

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
        q, k, v = (self.leave(t) for t in (q, k, v))
        return self.enter(attend_padded(q, k, v, self.bias, scale, dropout_p, causal, window))


class MPNetLayer(PostNormLayer):
    """BERT's layer, with a bias on the scores by relative position."""

    def parts(self) -> Parts:
        """Where the layer's weights are."""
        inner = self.attention.attn
        attention = Attention(
            owners=(self.attention, inner),
            projections=(inner.q, inner.k, inner.v),
            out=inner.o,
            weights_dropout=inner.dropout,
            dropping=inner.dropout.training,
            head_dim=inner.attention_head_size,
            scale=inner.attention_head_size**-0.5,
        )
        feed_forward = FeedForward(
            owners=(self.intermediate, self.output),
            inner=self.intermediate.dense,
            activation=self.intermediate.intermediate_act_fn,
            outer=self.output.dense,
        )
        return Parts(attention, feed_forward)

    def norms(self) -> tuple[Norm, Norm]:
        """The dropout and the norm after each sub-block."""
        first, second = self.attention, self.output
        return (first.dropout, first.LayerNorm), (second.dropout, second.LayerNorm)

    def attend_as_stock(self, x: Tensor, mask: Any, kwargs: dict[str, Any]) -> Tensor:
        """Calls the stock modules, with the bias in the mask."""
        return self.attention(x, mask)[0]

    def feed_forward_as_stock(self, x: Tensor) -> Tensor:
        """Calls the stock modules."""
        return self.output(self.intermediate(x), x)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Mask = None,
        position_bias: Tensor | None = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, ...]:
        """What the stock layer computes, on padded `[B, L, E]` or packed `[T, E]`."""
        mask = attention_mask
        if output_attentions or (isinstance(mask, Tensor) and mask.dtype == torch.bool):
            return super().forward(
                hidden_states, mask, position_bias, output_attentions=output_attentions, **kwargs
            )
        if position_bias is not None and not isinstance(mask, Packing):
            mask = position_bias if mask is None else position_bias + mask
        return (self.run(hidden_states, mask, kwargs),)


class MPNetEncoder(Encoder):
    """Computes the bias once, by the padded columns, and hands it on."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        return_dict: bool = False,
        **kwargs: Any,
    ) -> Any:
        """What the stock encoder computes, except that padding comes out as zeros."""
        x, packing = hidden_states, None
        if not (output_attentions or output_hidden_states):
            packing = self.packing(x, attention_mask, kwargs)
        if packing is None:
            return super(Encoder, self).forward(
                x,
                attention_mask,
                output_attentions=output_attentions,
                output_hidden_states=output_hidden_states,
                return_dict=return_dict,
                **kwargs,
            )
        bias = self.compute_position_bias(x)
        keys = packing.batch if packing.keys is None else packing.keys[1]
        assert keys.grid is not None
        padding = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        if keys.grid.indices is not None:
            padding.view(-1)[keys.grid.indices] = False
            bias = bias.masked_fill(padding[:, None, None], -torch.inf)
        biased = BiasedPacking(packing.batch, packing.keys, bias)
        x = packing.enter(x)
        for layer in self.layer:
            x = layer(x, biased)[0]
        hidden = packing.leave(x)
        return BaseModelOutput(last_hidden_state=hidden) if return_dict else (hidden,)
