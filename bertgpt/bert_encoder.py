"""The encoder that all families of BERT are: bidirectional attention, post-norm; and BERT's own.

Source: Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for Language
Understanding", 2019.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bertgpt.checkpoint import KeyTable, map_keys
from bertgpt.configuration import PretrainedConfig, check_shapes, refuse, require
from bertgpt.door import Limits, Run, enter, leave, positions
from bertgpt.layers import (
    ACTIVATIONS,
    AddNorm,
    Block,
    Dropout,
    Embeddings,
    FeedForward,
    Linear,
    SelfAttend,
    SelfAttention,
)
from bertgpt.outputs import BaseModelOutput
from bertgpt.packing import PackedBatch
from bertgpt.pretrained import PreTrainedModel

Ids = Tensor | PackedBatch | None
ENCODER_ALONE = "an encoder attends to its own tokens only; leave it out"


@dataclass(init=False, eq=False)
class EncoderConfig(PretrainedConfig):
    """The fields that BERT and the families nearest to it share, with BERT's defaults."""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    use_cache: bool = True
    classifier_dropout: float | None = None
    is_decoder: bool = False
    add_cross_attention: bool = False
    position_embedding_type: str = "absolute"


@dataclass(init=False, eq=False)
class BertConfig(EncoderConfig):
    """BERT's configuration: Hugging Face's keys and defaults."""

    model_type: ClassVar[str] = "bert"


@dataclass(frozen=True)
class EncoderShape:
    """What the encoder needs to know of a family's configuration.

    Attributes:
        inner: F, width inside the feed-forward network.
        eps: of the norms.
        dropout: on the embeddings.
        attention_dropout: on the attention weights.
        added_dropouts: on what attention adds, and on what the feed-forward network adds.
        names: our modules of the model → the checkpoint's.
        layer_names: our modules of a layer → the checkpoint's, or the several that one of ours
            fuses.
        types: token types, 0 for no table.
        tasks: task types, 0 for no table.
        embedding_width: of the embeddings, where they are narrower and projected to E.
        counted: whether a token's position is its number among those that are no padding tokens,
            from one past the padding token's id; if not, it is its column.
    """

    inner: int
    eps: float
    dropout: float
    attention_dropout: float
    added_dropouts: tuple[float, float]
    names: KeyTable
    layer_names: KeyTable
    types: int = 0
    tasks: int = 0
    embedding_width: int | None = None
    counted: bool = False


class EncoderLayer(Block):
    """Attention, then the feed-forward network, each followed by add-and-norm."""

    def __init__(self, config: Any, shape: EncoderShape, layer: int, approximate: str) -> None:
        super().__init__()
        width = config.hidden_size
        after_attention, after_feed_forward = shape.added_dropouts
        self.attention = SelfAttention(
            width, config.num_attention_heads, layer, dropout=shape.attention_dropout
        )
        self.attention_norm = AddNorm(width, shape.eps, after_attention)
        self.feed_forward = FeedForward(width, shape.inner, approximate)
        self.feed_forward_norm = AddNorm(width, shape.eps, after_feed_forward)
        map_keys(self, shape.layer_names)

    def compute(self, x_TE: Tensor, attend: SelfAttend) -> Tensor:
        """`[T, E]` → `[T, E]`."""
        x_TE = self.attention_norm(self.attention(x_TE, attend), x_TE)
        return self.feed_forward_norm(self.feed_forward(x_TE), x_TE)


class Encoder(PreTrainedModel):
    """An encoder without a head; a family is a configuration and its `EncoderShape`.

    Args:
        config: the model's configuration.
        add_pooling_layer: whether to add the pooler, on each sequence's first token.

    Attributes:
        activation_field: the configuration's field that names the activation.

    Raises:
        ValueError: the config asks for something else than a bidirectional encoder with absolute
            positions and a GELU, or for attention weights.
    """

    activation_field: ClassVar[str] = "hidden_act"

    def __init__(self, config: Any, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        width, field = config.hidden_size, self.activation_field
        check_shapes(config, width, config.num_attention_heads, field)
        causal = getattr(config, "is_decoder", False)
        require(not causal, "is_decoder", True, "use GPT2LMHeadModel to generate")
        kind = getattr(config, "position_embedding_type", "absolute")
        require(kind == "absolute", "position_embedding_type", kind, "use absolute positions")
        shape = self.shape(config)
        approximate = ACTIVATIONS[getattr(config, field)]
        words, places = config.vocab_size, config.max_position_embeddings
        padding, narrow = config.pad_token_id, shape.embedding_width or width
        _check_padding(padding, words, places, shape.counted)
        counted = padding if shape.counted else None
        self.limits = Limits(words, places, shape.types, narrow, shape.tasks, counted)
        self.embeddings = Embeddings(
            words, places, shape.types, narrow, padding, shape.tasks, counted
        )
        self.embeddings_norm = AddNorm(narrow, shape.eps)
        self.embeddings_dropout = Dropout(shape.dropout)
        self.projection = Linear(narrow, width) if shape.embedding_width else None
        self.layers = nn.ModuleList(
            EncoderLayer(config, shape, i, approximate) for i in range(config.stored_layers)
        )
        self.pooler = nn.Linear(width, width) if add_pooling_layer else None
        map_keys(self, shape.names)
        self.post_init()

    @staticmethod
    def shape(config: Any) -> EncoderShape:
        """The family's shape."""
        raise NotImplementedError("a family says what its shape is")

    def passes(self) -> Iterable[nn.Module]:
        """The layers in the order in which tokens pass through them."""
        return self.layers

    def encode(self, batch: PackedBatch, every_layer: bool = False) -> tuple[Tensor, ...]:
        """Hidden states `[T, E]`: the last layer's, or the embeddings' and each layer's."""
        places = positions(batch, self.limits)
        terms = self.embeddings(batch.values, places, batch.token_type_ids, batch.task_type_ids)
        x_TE = self.embeddings_dropout(self.embeddings_norm(*terms))
        if self.projection is not None:
            x_TE = self.projection(x_TE)
        attend, states = SelfAttend(batch), []
        for layer in self.passes():
            if every_layer:
                states.append(x_TE)
            x_TE = layer(x_TE, attend)
        return (*states, x_TE)

    def pool(self, hidden_TE: Tensor, batch: PackedBatch) -> Tensor:
        """tanh(W · first token + b), `[B, E]`; of an empty sequence, tanh(b)."""
        assert self.pooler is not None
        return torch.tanh(self.pooler(batch.first_tokens(hidden_TE)))

    def forward(
        self,
        input_ids: Ids = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: None = None,
        encoder_attention_mask: None = None,
        past_key_values: None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Encodes padded tensors or a `PackedBatch`.

        Args:
            input_ids: token ids `[B, L]`, or a `PackedBatch`, which then comes alone.
            attention_mask: `[B, L]`, nonzero for real tokens; padding may be anywhere.
            token_type_ids: segment ids `[B, L]`, by default zeros.
            position_ids: `[B, L]`, by default each token's column.
            inputs_embeds: `[B, L, E]` in place of `input_ids`.
            encoder_hidden_states: refused, as is `encoder_attention_mask`.
            encoder_attention_mask: refused.
            past_key_values: refused.
            use_cache: refused when True.
            output_attentions: refused when True.
            output_hidden_states: also return the embeddings and every layer's output.
            return_dict: False for a tuple.

        Returns:
            `last_hidden_state` `[B, L, E]` with zeros at padding, or `[T, E]` for a packed batch;
            `pooler_output` `[B, E]`; `hidden_states` if asked for.

        Raises:
            TypeError: ids that are no integers.
            ValueError: shapes that disagree, a sequence longer than the position table, or an
                argument that is refused.
            IndexError: an id outside its table.
        """
        refuse(
            ENCODER_ALONE,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
        )
        return self.hidden(
            (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds),
            output_attentions,
            output_hidden_states,
            return_dict,
        )

    def hidden(
        self,
        inputs: tuple[Any, ...],
        output_attentions: bool | None,
        output_hidden_states: bool | None,
        return_dict: bool | None,
    ) -> Any:
        """What a family's `forward` returns, from its inputs in the order of `door.enter`."""
        run = self.run(inputs, output_attentions, output_hidden_states)
        output = BaseModelOutput(
            last_hidden_state=leave(run.last, run.batch),
            pooler_output=None if self.pooler is None else self.pool(run.last, run.batch),
            hidden_states=run.every_layer,
        )
        return self._finish(output, return_dict)

    def run(
        self,
        inputs: tuple[Any, ...],
        output_attentions: bool | None,
        output_hidden_states: bool | None,
    ) -> Run:
        """What `forward` computes, still packed, for a head to go on from."""
        refuse(
            "fused attention never forms the weights; use transformers to look at them",
            output_attentions=output_attentions,
        )
        batch = enter(self.limits, *inputs)
        every_layer = self._wants_layers(output_hidden_states)
        return Run.of(batch, self.encode(batch, every_layer), every_layer)


def _check_padding(padding: int | None, words: int, places: int, counted: bool) -> None:
    """The padding token has an embedding; where others are counted past it, a place as well.

    Raises:
        ValueError: it has not.
    """
    if counted:
        known = padding is not None and 0 <= padding < min(words, places)
        require(known, "pad_token_id", padding, f"positions count from it on, up to {places}")
    else:
        known = padding is None or -words <= padding < words
        require(known, "pad_token_id", padding, f"the vocabulary has {words}")


BERT_LAYER_NAMES: KeyTable = {
    "attention.qkv": tuple(f"attention.self.{part}" for part in ("query", "key", "value")),
    "attention.out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "feed_forward.inner": "intermediate.dense",
    "feed_forward.outer": "output.dense",
    "feed_forward_norm": "output.LayerNorm",
}
BERT_NAMES: KeyTable = {
    "embeddings_norm": "embeddings.LayerNorm",
    "layers": "encoder.layer",
    "pooler": "pooler.dense",
}


def bert_shape(config: EncoderConfig) -> EncoderShape:
    """BERT's shape, from which its nearest families differ in a field."""
    return EncoderShape(
        inner=config.intermediate_size,
        eps=config.layer_norm_eps,
        dropout=config.hidden_dropout_prob,
        attention_dropout=config.attention_probs_dropout_prob,
        added_dropouts=(config.hidden_dropout_prob, config.hidden_dropout_prob),
        names=BERT_NAMES,
        layer_names=BERT_LAYER_NAMES,
        types=config.type_vocab_size,
    )


class BertPreTrainedModel(PreTrainedModel):
    """Base of the BERT models."""

    config_class = BertConfig
    base_model_prefix = "bert"


class BertModel(Encoder, BertPreTrainedModel):
    """BERT's encoder, with (by default) the pooler on each sequence's first token."""

    shape = staticmethod(bert_shape)
