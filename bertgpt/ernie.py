"""ERNIE: BERT with embeddings of the task at hand beside those of words, positions and types.

Source: Sun et al., "ERNIE 2.0: A Continual Pre-training Framework for Language Understanding",
    2020.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from bertgpt import encoder_heads as heads
from bertgpt import encoder_word_heads as word_heads
from bertgpt.bert import BERT_HEAD_NAMES, BERT_PREDICTION_NAMES
from bertgpt.bert_encoder import (
    ENCODER_ALONE,
    Encoder,
    EncoderConfig,
    EncoderShape,
    Ids,
    bert_shape,
)
from bertgpt.configuration import refuse, require
from bertgpt.pretrained import PreTrainedModel

__all__ = [
    "ErnieConfig",
    "ErnieForMaskedLM",
    "ErnieForMultipleChoice",
    "ErnieForNextSentencePrediction",
    "ErnieForPreTraining",
    "ErnieForQuestionAnswering",
    "ErnieForSequenceClassification",
    "ErnieForTokenClassification",
    "ErnieModel",
    "ErniePreTrainedModel",
]


@dataclass(init=False, eq=False)
class ErnieConfig(EncoderConfig):
    """ERNIE's configuration: Hugging Face's keys and defaults."""

    model_type: ClassVar[str] = "ernie"

    task_type_vocab_size: int = 3
    use_task_id: bool = False


class ErniePreTrainedModel(PreTrainedModel):
    """Base of the ERNIE models."""

    config_class = ErnieConfig
    base_model_prefix = "ernie"


class ErnieModel(Encoder, ErniePreTrainedModel):
    """ERNIE's encoder, with (by default) the pooler on each sequence's first token."""

    @staticmethod
    def shape(config: ErnieConfig) -> EncoderShape:
        """BERT's, with task types where `use_task_id` says so."""
        use = config.use_task_id
        require(isinstance(use, bool), "use_task_id", use, "it must be true or false")
        return replace(bert_shape(config), tasks=config.task_type_vocab_size if use else 0)

    def forward(  # type: ignore[override]
        self,
        input_ids: Ids = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        task_type_ids: Tensor | None = None,
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
        """Encodes padded tensors or a `PackedBatch`; see `BertModel.forward`.

        `task_type_ids` `[B, L]` are by default zeros, and refused where `use_task_id` is False.
        """
        refuse(
            ENCODER_ALONE,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
        )
        places = (position_ids, inputs_embeds, task_type_ids)
        return self.hidden(
            (input_ids, attention_mask, token_type_ids, *places),
            output_attentions,
            output_hidden_states,
            return_dict,
        )


class _ErnieHead(heads.Head, ErniePreTrainedModel):
    encoder_class = ErnieModel
    names = BERT_HEAD_NAMES

    def forward(  # type: ignore[override]
        self,
        input_ids: Ids = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        task_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Scores, and with `labels` their loss; the other arguments are the encoder's."""
        places = (position_ids, inputs_embeds, task_type_ids)
        inputs = (input_ids, attention_mask, token_type_ids, *places)
        return self.answer(inputs, labels, (output_attentions, output_hidden_states, return_dict))


class _ErnieWords(_ErnieHead):
    prediction_names = BERT_PREDICTION_NAMES
    tied_weights: ClassVar[dict[str, str]] = {
        "cls.predictions.decoder.weight": "ernie.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }


class ErnieForMaskedLM(_ErnieWords, word_heads.MaskedLM):
    """Scores of every word for every token, `[B, L, V]` (packed: `[T, V]`)."""

    def forward(  # type: ignore[override]
        self,
        input_ids: Ids = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        task_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: None = None,
        encoder_attention_mask: None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        skip_logits: bool = False,
    ) -> Any:
        """As `BertForMaskedLM.forward`, with task types."""
        refuse(
            ENCODER_ALONE,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
        )
        places = (position_ids, inputs_embeds, task_type_ids)
        inputs = (input_ids, attention_mask, token_type_ids, *places)
        flags = (output_attentions, output_hidden_states, return_dict)
        return self.predict(inputs, labels, flags, skip_logits)


class ErnieForPreTraining(_ErnieWords, word_heads.PreTraining):
    """Masked words and next sentence, both heads of ERNIE's pre-training."""

    def forward(  # type: ignore[override]
        self,
        input_ids: Ids = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        task_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        skip_logits: bool = False,
    ) -> Any:
        """As `BertForPreTraining.forward`, with task types."""
        places = (position_ids, inputs_embeds, task_type_ids)
        inputs = (input_ids, attention_mask, token_type_ids, *places)
        flags = (output_attentions, output_hidden_states, return_dict)
        return self.judge(inputs, labels, next_sentence_label, flags, skip_logits)


class ErnieForNextSentencePrediction(_ErnieHead, heads.NextSentencePrediction):
    """Whether the second segment follows the first: logits `[B, 2]`."""


class ErnieForSequenceClassification(_ErnieHead, heads.SequenceClassification):
    """Classes or values of each sequence: logits `[B, num_labels]`."""


class ErnieForTokenClassification(_ErnieHead, heads.TokenClassification):
    """Classes of each token: logits `[B, L, num_labels]` (packed: `[T, num_labels]`)."""


class ErnieForMultipleChoice(_ErnieHead, heads.MultipleChoice):
    """One score per choice: logits `[B, choices]` from padded inputs `[B, choices, L]`."""

    def forward(  # type: ignore[override]
        self,
        input_ids: Ids = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        task_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_choices: int | None = None,
    ) -> Any:
        """As `BertForMultipleChoice.forward`, with task types."""
        places = (position_ids, inputs_embeds, task_type_ids)
        inputs = (input_ids, attention_mask, token_type_ids, *places)
        flags = (output_attentions, output_hidden_states, return_dict)
        return self.choose(inputs, labels, flags, num_choices)


class ErnieForQuestionAnswering(_ErnieHead, heads.QuestionAnswering):
    """Scores of each token as an answer's start and end, `[B, L]` each (packed: `[T]`)."""

    def forward(  # type: ignore[override]
        self,
        input_ids: Ids = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        task_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Scores, and with both positions `[B]` the mean of their losses."""
        places = (position_ids, inputs_embeds, task_type_ids)
        inputs = (input_ids, attention_mask, token_type_ids, *places)
        flags = (output_attentions, output_hidden_states, return_dict)
        return self.find(inputs, start_positions, end_positions, flags)
