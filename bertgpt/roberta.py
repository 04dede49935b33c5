"""RoBERTa, and so XLM-R and CamemBERT: BERT's layers, positions counted past the padding token's.

Sources: Liu et al., "RoBERTa: A Robustly Optimized BERT Pretraining Approach", 2019; Conneau et
    al., "Unsupervised Cross-lingual Representation Learning at Scale", 2020; Martin et al.,
    "CamemBERT: a Tasty French Language Model", 2020.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bertgpt import encoder_heads as heads
from bertgpt import encoder_word_heads as word_heads
from bertgpt.bert_encoder import Encoder, EncoderConfig, EncoderShape, Ids, bert_shape
from bertgpt.checkpoint import KeyTable
from bertgpt.door import Run
from bertgpt.pretrained import PreTrainedModel

__all__ = [
    "CamembertConfig",
    "RobertaConfig",
    "RobertaForMaskedLM",
    "RobertaForMultipleChoice",
    "RobertaForQuestionAnswering",
    "RobertaForSequenceClassification",
    "RobertaForTokenClassification",
    "RobertaModel",
    "RobertaPreTrainedModel",
    "XLMRobertaConfig",
]


@dataclass(init=False, eq=False)
class RobertaConfig(EncoderConfig):
    """RoBERTa's configuration: Hugging Face's keys and defaults."""

    model_type: ClassVar[str] = "roberta"

    vocab_size: int = 50265
    pad_token_id: int | None = 1
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 2


@dataclass(init=False, eq=False)
class XLMRobertaConfig(RobertaConfig):
    """XLM-R's configuration, for the RoBERTa models."""

    model_type: ClassVar[str] = "xlm-roberta"

    vocab_size: int = 30522


@dataclass(init=False, eq=False)
class CamembertConfig(RobertaConfig):
    """CamemBERT's configuration, for the RoBERTa models."""

    model_type: ClassVar[str] = "camembert"

    vocab_size: int = 30522


class RobertaPreTrainedModel(PreTrainedModel):
    """Base of the RoBERTa models."""

    config_class = RobertaConfig
    base_model_prefix = "roberta"


class RobertaModel(Encoder, RobertaPreTrainedModel):
    """RoBERTa's encoder, with (by default) the pooler on each sequence's first token."""

    @staticmethod
    def shape(config: RobertaConfig) -> EncoderShape:
        """BERT's, but for the positions."""
        return replace(bert_shape(config), counted=True)


class _RobertaHead(heads.Head, RobertaPreTrainedModel):
    encoder_class = RobertaModel


class RobertaForMaskedLM(_RobertaHead, word_heads.MaskedLM):
    """Scores of every word for every token, `[B, L, V]` (packed: `[T, V]`)."""

    names: ClassVar[KeyTable] = {"predictions": "lm_head"}
    prediction_names: ClassVar[KeyTable] = {"norm": "layer_norm"}
    prediction_activation = "gelu"
    tied_weights: ClassVar[dict[str, str]] = {
        "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    }


class RobertaForSequenceClassification(_RobertaHead, heads.SequenceClassification):
    """Classes or values of each sequence: logits `[B, num_labels]`. It has a pooler of its own."""

    pooled = False
    names: ClassVar[KeyTable] = {
        "pre_classifier": "classifier.dense",
        "classifier": "classifier.out_proj",
    }

    def _build(self, config: RobertaConfig) -> None:
        self.pre_classifier = nn.Linear(config.hidden_size, config.hidden_size)
        super()._build(config)

    def _pooled(self, run: Run) -> Tensor:
        first_BE = run.batch.first_tokens(run.last)
        return torch.tanh(self.pre_classifier(self.dropout(first_BE)))


class RobertaForTokenClassification(_RobertaHead, heads.TokenClassification):
    """Classes of each token: logits `[B, L, num_labels]` (packed: `[T, num_labels]`)."""


class RobertaForQuestionAnswering(_RobertaHead, heads.QuestionAnswering):
    """Scores of each token as an answer's start and end, `[B, L]` each (packed: `[T]`)."""


class RobertaForMultipleChoice(_RobertaHead, heads.MultipleChoice):
    """One score per choice: logits `[B, choices]` from padded inputs `[B, choices, L]`."""

    dropouts = ("hidden_dropout_prob",)

    def forward(  # type: ignore[override]
        self,
        input_ids: Ids = None,
        token_type_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_choices: int | None = None,
    ) -> Any:
        """As `BertForMultipleChoice.forward`, in stock's order."""
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        flags = (output_attentions, output_hidden_states, return_dict)
        return self.choose(inputs, labels, flags, num_choices)
