"""BERT's configuration and its encoder: bidirectional attention, post-norm layers.

Source: Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for Language
Understanding", 2019.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bertgpt.checkpoint import KeyTable, map_keys
from bertgpt.configuration import PretrainedConfig, check_shapes, refuse, require
from bertgpt.door import Limits, Run, enter, leave
from bertgpt.layers import (
    ACTIVATIONS,
    AddNorm,
    Block,
    Dropout,
    Embeddings,
    FeedForward,
    SelfAttend,
    SelfAttention,
)
from bertgpt.outputs import BaseModelOutput
from bertgpt.packing import PackedBatch
from bertgpt.pretrained import PreTrainedModel

Ids = Tensor | PackedBatch | None
ENCODER_ALONE = "an encoder attends to its own tokens only; leave it out"


@dataclass(init=False, eq=False)
class BertConfig(PretrainedConfig):
    """BERT's configuration: Hugging Face's keys and defaults."""

    model_type: ClassVar[str] = "bert"

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


class BertLayer(Block):
    """Attention, then the feed-forward network, each followed by add-and-norm."""

    def __init__(self, config: BertConfig, layer: int) -> None:
        super().__init__()
        width, eps, dropout = config.hidden_size, config.layer_norm_eps, config.hidden_dropout_prob
        self.attention = SelfAttention(
            width,
            config.num_attention_heads,
            layer,
            dropout=config.attention_probs_dropout_prob,
        )
        self.attention_norm = AddNorm(width, eps, dropout)
        self.feed_forward = FeedForward(
            width, config.intermediate_size, ACTIVATIONS[config.hidden_act]
        )
        self.feed_forward_norm = AddNorm(width, eps, dropout)
        qkv = ("attention.self.query", "attention.self.key", "attention.self.value")
        table: KeyTable = {
            "attention.qkv": qkv,
            "attention.out": "attention.output.dense",
            "attention_norm": "attention.output.LayerNorm",
            "feed_forward.inner": "intermediate.dense",
            "feed_forward.outer": "output.dense",
            "feed_forward_norm": "output.LayerNorm",
        }
        map_keys(self, table)

    def compute(self, x_TE: Tensor, attend: SelfAttend) -> Tensor:
        """`[T, E]` → `[T, E]`."""
        x_TE = self.attention_norm(self.attention(x_TE, attend), x_TE)
        return self.feed_forward_norm(self.feed_forward(x_TE), x_TE)


class BertPreTrainedModel(PreTrainedModel):
    """Base of the BERT models."""

    config_class = BertConfig
    base_model_prefix = "bert"


class BertModel(BertPreTrainedModel):
    """The encoder, with (by default) the pooler on each sequence's first token.

    Args:
        config: the model's shape.
        add_pooling_layer: whether to add the pooler.

    Raises:
        ValueError: the config asks for something else than a bidirectional encoder with absolute
            positions and a GELU, or for attention weights.
    """

    def __init__(self, config: BertConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        check_shapes(config, config.hidden_size, config.num_attention_heads, "hidden_act")
        require(not config.is_decoder, "is_decoder", True, "use GPT2LMHeadModel to generate")
        kind = config.position_embedding_type
        require(kind == "absolute", "position_embedding_type", kind, "use absolute positions")
        width = config.hidden_size
        self.limits = Limits(
            config.vocab_size, config.max_position_embeddings, config.type_vocab_size, width
        )
        self.embeddings = Embeddings(
            config.vocab_size,
            config.max_position_embeddings,
            config.type_vocab_size,
            width,
            config.pad_token_id,
        )
        self.embeddings_norm = AddNorm(width, config.layer_norm_eps)
        self.embeddings_dropout = Dropout(config.hidden_dropout_prob)
        self.layers = nn.ModuleList(BertLayer(config, i) for i in range(config.num_hidden_layers))
        self.pooler = nn.Linear(width, width) if add_pooling_layer else None
        table = {
            "embeddings_norm": "embeddings.LayerNorm",
            "layers": "encoder.layer",
            "pooler": "pooler.dense",
        }
        map_keys(self, table)
        self.post_init()

    def encode(self, batch: PackedBatch, every_layer: bool = False) -> tuple[Tensor, ...]:
        """Hidden states `[T, E]`: the last layer's, or the embeddings' and each layer's."""
        x_TE = self.embeddings_norm(
            *self.embeddings(batch.values, batch.positions(), batch.token_type_ids)
        )
        x_TE = self.embeddings_dropout(x_TE)
        attend, states = SelfAttend(batch), []
        for layer in self.layers:
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
        run = self.run(
            (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds),
            output_attentions,
            output_hidden_states,
        )
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
