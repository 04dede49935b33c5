"""Post-norm encoders as transformers builds them: BERT and what shares its layers.

Each class here stands before a stock class in a subclass of both (`patched.py`). It keeps no state:
a patched layer is the stock layer, module for module, with another way through.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from bertgpt.integrations.blocks import Attention, FeedForward, Mask, Parts, Patched, add_norm
from bertgpt.integrations.inspection import collecting, obstacle_below, refuse_head_mask
from bertgpt.integrations.padding import Packing, key_padding, may_pack, takes
from bertgpt.integrations.versions import CACHE

Norm = tuple[nn.Module | None, nn.Module]


class PostNormLayer(Patched):
    """Attention, then the feed-forward network, each followed by add-and-norm."""

    def parts(self) -> Parts:
        """Where the layer's weights are."""
        raise NotImplementedError

    def norms(self) -> tuple[Norm, Norm]:
        """The dropout and the norm after each of the two."""
        raise NotImplementedError

    def attend_as_stock(self, x: Tensor, mask: Any, kwargs: dict[str, Any]) -> Tensor:
        """Attention, its add-and-norm included, by the stock modules' own forward."""
        raise NotImplementedError

    def feed_forward_as_stock(self, x: Tensor) -> Tensor:
        """The feed-forward network and its add-and-norm likewise."""
        raise NotImplementedError

    def run(self, x: Tensor, mask: Mask, kwargs: dict[str, Any]) -> Tensor:
        """What the stock layer computes, on padded `[B, L, E]` or packed `[T, E]`."""
        attention, feed_forward = self.parts()
        after_attention, after_feed_forward = self.norms()
        packed = isinstance(mask, Packing)
        if packed or (takes(mask, kwargs) and attention.obstacle() is None):
            mixed = attention.mix(*attention.project(x), mask)
            x = add_norm(mixed, x, *after_attention)[0]
        else:
            x = self.attend_as_stock(x, mask, kwargs)
        if packed or feed_forward.obstacle() is None:
            return add_norm(feed_forward(x), x, *after_feed_forward)[0]
        return self.feed_forward_as_stock(x)


class BertLayer(PostNormLayer):
    """Of BERT, RoBERTa, XLM-R, CamemBERT, ELECTRA and ERNIE."""

    def refusal(self) -> str | None:
        """A decoder has a cache, and may have cross-attention."""
        return "it is a decoder's layer (config.is_decoder)" if self.is_decoder else None

    def parts(self) -> Parts:
        """Where the layer's weights are."""
        # Not by attributes, which take several times as long, at each call of each layer.
        own = self._modules
        outer, intermediate, output = own["attention"], own["intermediate"], own["output"]
        inner, attended = outer._modules["self"], outer._modules["output"]
        part = inner._modules
        attention = Attention(
            owners=(outer, inner, attended),
            projections=(part["query"], part["key"], part["value"]),
            out=attended._modules["dense"],
            weights_dropout=part["dropout"],
            dropping=inner.training,
            head_dim=inner.attention_head_size,
            scale=inner.scaling,
        )
        feed_forward = FeedForward(
            owners=(intermediate, output),
            inner=intermediate._modules["dense"],
            activation=intermediate.intermediate_act_fn,
            outer=output._modules["dense"],
        )
        return Parts(attention, feed_forward)

    def norms(self) -> tuple[Norm, Norm]:
        """The dropout and the norm after each sub-block."""
        first, second = self.attention._modules["output"]._modules, self.output._modules
        return (first["dropout"], first["LayerNorm"]), (second["dropout"], second["LayerNorm"])

    def attend_as_stock(self, x: Tensor, mask: Any, kwargs: dict[str, Any]) -> Tensor:
        """Calls the stock modules."""
        return self.attention(x, mask, **kwargs)[0]

    def feed_forward_as_stock(self, x: Tensor) -> Tensor:
        """Calls the stock modules."""
        return self.output(self.intermediate(x), x)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Mask = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """What the stock layer computes, on padded `[B, L, E]` or packed `[T, E]`."""
        past = kwargs.pop(CACHE, past)
        if encoder_hidden_states is None and past is None:
            return self.run(hidden_states, attention_mask, kwargs)
        return super().forward(
            hidden_states,
            attention_mask,
            encoder_hidden_states,
            encoder_attention_mask,
            past,
            **kwargs,
        )


class Encoder(Patched):
    """A stack of layers that hands one mask to each: padding is taken out before the first."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """What the stock encoder computes, except that padding comes out as zeros.

        Column 0 is exact under any padding. Where something looks at the layers in between (hooks,
        `output_hidden_states`, `output_attentions`), where a layer is stock, or a mask says more
        than what is padding, and in graphs of fixed shapes, the tokens go through padded.
        """
        refuse_head_mask(kwargs)
        packing = None
        if not any(value is not None for value in args):
            packing = self.packing(hidden_states, attention_mask, kwargs)
        if packing is None:
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        output = super().forward(packing.enter(hidden_states), packing, **kwargs)
        output["last_hidden_state"] = packing.leave(output["last_hidden_state"])
        return output

    def packing(self, hidden: Tensor, mask: Any, kwargs: dict[str, Any]) -> Packing | None:
        """The tokens that go through the layers packed; None where all go padded."""
        if mask is None or not may_pack(hidden) or collecting():
            return None
        if any(kwargs.get(name) is not None for name in ("encoder_hidden_states", CACHE)):
            return None
        if obstacle_below(self):
            return None
        for layer in self.layers():
            if not isinstance(layer, PostNormLayer) or layer.obstacles():
                return None
        keep = key_padding(mask, hidden)
        return None if keep is None else Packing.of(hidden, keep, column_0=True)

    def layers(self) -> Iterable[Any]:
        """Every layer once."""
        return self.layer
