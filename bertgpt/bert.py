"""BERT: the encoder of `bert_encoder` and the heads of `encoder_heads`, under transformers' names.

Configuration keys, `forward` arguments, outputs and state-dict keys are those of transformers;
inside, tokens travel packed.
"""

from __future__ import annotations

from typing import ClassVar

from bertgpt import encoder_heads as heads
from bertgpt import encoder_word_heads as word_heads
from bertgpt.bert_encoder import BertConfig, BertModel, BertPreTrainedModel
from bertgpt.checkpoint import KeyTable

__all__ = [
    "BertConfig",
    "BertForMaskedLM",
    "BertForMultipleChoice",
    "BertForNextSentencePrediction",
    "BertForPreTraining",
    "BertForQuestionAnswering",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertModel",
    "BertPreTrainedModel",
]

BERT_HEAD_NAMES: KeyTable = {
    "predictions": "cls.predictions",
    "next_sentence": "cls.seq_relationship",
}
BERT_PREDICTION_NAMES: KeyTable = {"dense": "transform.dense", "norm": "transform.LayerNorm"}


class _BertHead(heads.Head, BertPreTrainedModel):
    encoder_class = BertModel
    names = BERT_HEAD_NAMES


class _BertWords(_BertHead):
    prediction_names = BERT_PREDICTION_NAMES
    tied_weights: ClassVar[dict[str, str]] = {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }


class BertForMaskedLM(_BertWords, word_heads.MaskedLM):
    """Scores of every word for every token, `[B, L, V]` (packed: `[T, V]`)."""


class BertForPreTraining(_BertWords, word_heads.PreTraining):
    """Masked words and next sentence, both heads of BERT's pre-training."""


class BertForNextSentencePrediction(_BertHead, heads.NextSentencePrediction):
    """Whether the second segment follows the first: logits `[B, 2]`."""


class BertForSequenceClassification(_BertHead, heads.SequenceClassification):
    """Classes or values of each sequence: logits `[B, num_labels]`."""


class BertForTokenClassification(_BertHead, heads.TokenClassification):
    """Classes of each token: logits `[B, L, num_labels]` (packed: `[T, num_labels]`)."""


class BertForMultipleChoice(_BertHead, heads.MultipleChoice):
    """One score per choice: logits `[B, choices]` from padded inputs `[B, choices, L]`."""


class BertForQuestionAnswering(_BertHead, heads.QuestionAnswering):
    """Scores of each token as an answer's start and end, `[B, L]` each (packed: `[T]`)."""
