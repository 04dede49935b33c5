"""ALBERT: BERT's layers, each group of them used again and again, on narrow embeddings.

Source: Lan et al., "ALBERT: A Lite BERT for Self-supervised Learning of Language Representations",
    2020.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from bertgpt import encoder_heads as heads
from bertgpt import encoder_word_heads as word_heads
from bertgpt.bert_encoder import Encoder, EncoderShape, Ids
from bertgpt.checkpoint import KeyTable
from bertgpt.configuration import PretrainedConfig, require
from bertgpt.door import Run
from bertgpt.outputs import SentenceOrderOutput
from bertgpt.pretrained import PreTrainedModel

__all__ = [
    "AlbertConfig",
    "AlbertForMaskedLM",
    "AlbertForMultipleChoice",
    "AlbertForPreTraining",
    "AlbertForQuestionAnswering",
    "AlbertForSequenceClassification",
    "AlbertForTokenClassification",
    "AlbertModel",
    "AlbertPreTrainedModel",
]

_LAYER_NAMES: KeyTable = {
    "attention.qkv": tuple(f"attention.{part}" for part in ("query", "key", "value")),
    "attention.out": "attention.dense",
    "attention_norm": "attention.LayerNorm",
    "feed_forward.inner": "ffn",
    "feed_forward.outer": "ffn_output",
    "feed_forward_norm": "full_layer_layer_norm",
}


@dataclass(init=False, eq=False)
class AlbertConfig(PretrainedConfig):
    """ALBERT's configuration: Hugging Face's keys and defaults."""

    model_type: ClassVar[str] = "albert"

    vocab_size: int = 30000
    embedding_size: int = 128
    hidden_size: int = 4096
    num_hidden_layers: int = 12
    num_hidden_groups: int = 1
    num_attention_heads: int = 64
    intermediate_size: int = 16384
    inner_group_num: int = 1
    hidden_act: str = "gelu_new"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    classifier_dropout_prob: float = 0.1
    pad_token_id: int | None = 0
    bos_token_id: int | None = 2
    eos_token_id: int | list[int] | None = 3

    @property
    def stored_layers(self) -> Any:
        """Number of layers that have weights of their own."""
        return self.num_hidden_groups * self.inner_group_num


class AlbertPreTrainedModel(PreTrainedModel):
    """Base of the ALBERT models."""

    config_class = AlbertConfig
    base_model_prefix = "albert"


class AlbertModel(Encoder, AlbertPreTrainedModel):
    """ALBERT's encoder, with (by default) the pooler on each sequence's first token."""

    @staticmethod
    def shape(config: AlbertConfig) -> EncoderShape:
        """Nothing of what the feed-forward network adds is dropped."""
        groups, size = config.num_hidden_groups, config.inner_group_num
        layers = {
            f"layers.{group * size + i}": f"encoder.albert_layer_groups.{group}.albert_layers.{i}"
            for group in range(groups)
            for i in range(size)
        }
        return EncoderShape(
            inner=config.intermediate_size,
            eps=config.layer_norm_eps,
            dropout=config.hidden_dropout_prob,
            attention_dropout=config.attention_probs_dropout_prob,
            added_dropouts=(config.hidden_dropout_prob, 0.0),
            names={
                "embeddings_norm": "embeddings.LayerNorm",
                "projection": "encoder.embedding_hidden_mapping_in",
                **layers,
            },
            layer_names=_LAYER_NAMES,
            types=config.type_vocab_size,
            embedding_width=config.embedding_size,
        )

    def passes(self) -> Iterable[nn.Module]:
        """Each group's layers, as many times as there are `num_hidden_layers` to a group."""
        passes, groups = self.config.num_hidden_layers, self.config.num_hidden_groups
        size = self.config.inner_group_num
        starts = [int(i / (passes / groups)) * size for i in range(passes)]
        return [layer for start in starts for layer in self.layers[start : start + size]]

    def forward(  # type: ignore[override]
        self,
        input_ids: Ids = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Encodes padded tensors or a `PackedBatch`; see `BertModel.forward`.

        `inputs_embeds` are `embedding_size` wide.
        """
        return self.hidden(
            (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds),
            output_attentions,
            output_hidden_states,
            return_dict,
        )


class _AlbertHead(heads.Head, AlbertPreTrainedModel):
    encoder_class = AlbertModel
    dropouts = ("classifier_dropout_prob",)


class _AlbertWords(_AlbertHead):
    prediction_names: ClassVar[KeyTable] = {"norm": "LayerNorm"}
    tied_weights: ClassVar[dict[str, str]] = {
        "predictions.decoder.weight": "albert.embeddings.word_embeddings.weight",
        "predictions.decoder.bias": "predictions.bias",
    }


class AlbertForMaskedLM(_AlbertWords, word_heads.MaskedLM):
    """Scores of every word for every token, `[B, L, V]` (packed: `[T, V]`)."""

    def forward(  # type: ignore[override]
        self,
        input_ids: Ids = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        skip_logits: bool = False,
    ) -> Any:
        """As `BertForMaskedLM.forward`."""
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        flags = (output_attentions, output_hidden_states, return_dict)
        return self.predict(inputs, labels, flags, skip_logits)


class AlbertForPreTraining(_AlbertWords, word_heads.PreTraining):
    """Masked words and the order of two sentences, both heads of ALBERT's pre-training."""

    names: ClassVar[KeyTable] = {"next_sentence": "sop_classifier.classifier"}
    output_class = SentenceOrderOutput
    sentence_label = "sentence_order_label"

    def _build(self, config: AlbertConfig) -> None:
        require(config.num_labels == 2, "num_labels", config.num_labels, "an order is one of two")
        super()._build(config)
        self.dropout = self._classifier_dropout(config)

    def _sentences(self, run: Run) -> Tensor:
        return self.next_sentence(self.dropout(self._pooled(run)))

    def forward(  # type: ignore[override]
        self,
        input_ids: Ids = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        sentence_order_label: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        skip_logits: bool = False,
    ) -> Any:
        """As `BertForPreTraining.forward`; 0 is two sentences in order, 1 is two exchanged."""
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        flags = (output_attentions, output_hidden_states, return_dict)
        return self.judge(inputs, labels, sentence_order_label, flags, skip_logits)


class AlbertForSequenceClassification(_AlbertHead, heads.SequenceClassification):
    """Classes or values of each sequence: logits `[B, num_labels]`."""


class AlbertForTokenClassification(_AlbertHead, heads.TokenClassification):
    """Classes of each token: logits `[B, L, num_labels]` (packed: `[T, num_labels]`)."""


class AlbertForMultipleChoice(_AlbertHead, heads.MultipleChoice):
    """One score per choice: logits `[B, choices]` from padded inputs `[B, choices, L]`."""


class AlbertForQuestionAnswering(_AlbertHead, heads.QuestionAnswering):
    """Scores of each token as an answer's start and end, `[B, L]` each (packed: `[T]`)."""
