"""BERT: the encoder's configuration and model, and the task heads on it.

Class names, configuration keys, `forward` arguments, outputs and state-dict keys are those of
transformers; inside, tokens travel packed.
"""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from bertgpt import objectives, ops
from bertgpt.bert_encoder import (
    ENCODER_ALONE,
    BertConfig,
    BertModel,
    BertPreTrainedModel,
    Ids,
)
from bertgpt.checkpoint import map_keys
from bertgpt.configuration import refuse, require
from bertgpt.door import Run, leave
from bertgpt.layers import ACTIVATIONS, AddNorm, Dropout
from bertgpt.outputs import LogitsOutput, PreTrainingOutput, QuestionAnsweringOutput
from bertgpt.packing import PackedBatch
from bertgpt.vocabulary import score

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


class PredictionHead(nn.Module):
    """Dense, GELU and LayerNorm, and the decoder that scores every word for what comes out."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.approximate = ACTIVATIONS[config.hidden_act]
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = AddNorm(config.hidden_size, config.layer_norm_eps)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        map_keys(self, {"dense": "transform.dense", "norm": "transform.LayerNorm"})

    def forward(self, x_TE: Tensor) -> Tensor:
        """`[T, E]` → `[T, E]`: what the decoder reads."""
        dense = self.dense
        x_TE = ops.linear_gelu(x_TE, dense.weight, dense.bias, approximate=self.approximate)
        return self.norm(x_TE)


class _Head(BertPreTrainedModel):
    """A task head with one kind of logits: what differs is `_score`."""

    pooled: ClassVar[bool] = True

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=self.pooled)
        self._build(config)
        self.post_init()

    def _build(self, config: BertConfig) -> None:
        """Adds dropout and a classifier of `num_labels` classes."""
        p = config.classifier_dropout
        self.dropout = Dropout(config.hidden_dropout_prob if p is None else p)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def _score(self, run: Run, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Logits in the caller's layout, and the loss."""
        raise TypeError(f"{type(self).__name__} has no scores of its own")

    def _pooled(self, run: Run) -> Tensor:
        return self.bert.pool(run.last, run.batch)

    def forward(
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
    ) -> Any:
        """Scores, and with `labels` their loss; the other arguments are `BertModel`'s."""
        run = self.bert.run(
            (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds),
            output_attentions,
            output_hidden_states,
        )
        logits, loss = self._score(run, labels)
        output = LogitsOutput(loss=loss, logits=logits, hidden_states=run.every_layer)
        return self._finish(output, return_dict)


class _TiedHead(_Head):
    """A head whose decoder is the word embeddings."""

    tied_weights: ClassVar[dict[str, str]] = {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }

    def _build(self, config: BertConfig) -> None:
        self.cls = nn.ModuleDict({"predictions": PredictionHead(config)})

    @property
    def _predictions(self) -> PredictionHead:
        return cast(PredictionHead, self.cls["predictions"])

    def _words(
        self, run: Run, labels: Tensor | None, skip_logits: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Scores of every word for every token, or None, and the loss."""
        head = self._predictions
        if labels is not None:
            labels = objectives.token_labels("labels", labels, run.batch)
        return score(head(run.last), head.decoder, labels, run.batch, skip_logits)

    def get_output_embeddings(self) -> nn.Linear:
        """The decoder over the vocabulary."""
        return self._predictions.decoder

    def tie_weights(self) -> None:
        """Shares the word embeddings with the decoder, and its bias with the head."""
        if self.config.tie_word_embeddings:
            head = self._predictions
            head.decoder.weight = self.get_input_embeddings().weight
            head.decoder.bias = head.bias


class BertForMaskedLM(_TiedHead):
    """Scores of every word for every token, `[B, L, V]` (packed: `[T, V]`)."""

    pooled = False

    def forward(  # type: ignore[override]
        self,
        input_ids: Ids = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
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
        """As the other heads; both `encoder_` arguments are refused.

        With `skip_logits` the loss alone comes back, in a fraction of the memory: only labelled
        tokens are scored, and their scores are never whole in memory.
        """
        refuse(
            ENCODER_ALONE,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
        )
        run = self.bert.run(
            (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds),
            output_attentions,
            output_hidden_states,
        )
        logits, loss = self._words(run, labels, skip_logits)
        output = LogitsOutput(loss=loss, logits=logits, hidden_states=run.every_layer)
        return self._finish(output, return_dict)


class BertForNextSentencePrediction(_Head):
    """Whether the second segment follows the first: logits `[B, 2]`."""

    def _build(self, config: BertConfig) -> None:
        self.cls = nn.ModuleDict({"seq_relationship": nn.Linear(config.hidden_size, 2)})

    def _score(self, run: Run, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        logits = self.cls["seq_relationship"](self._pooled(run))
        loss = None if labels is None else objectives.cross_entropy(logits, labels)
        return logits, loss


class BertForSequenceClassification(_Head):
    """Classes or values of each sequence: logits `[B, num_labels]`."""

    def _score(self, run: Run, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        logits = self.classifier(self.dropout(self._pooled(run)))
        if labels is None:
            return logits, None
        return logits, objectives.classification_loss(self.config, logits, labels)


class BertForTokenClassification(_Head):
    """Classes of each token: logits `[B, L, num_labels]` (packed: `[T, num_labels]`)."""

    pooled = False

    def _score(self, run: Run, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        logits = self.classifier(self.dropout(run.last))
        return leave(logits, run.batch), _token_loss(logits, labels, run.batch)


class BertForMultipleChoice(_Head):
    """One score per choice: logits `[B, choices]` from padded inputs `[B, choices, L]`."""

    def _build(self, config: BertConfig) -> None:
        super()._build(config)
        self.classifier = nn.Linear(config.hidden_size, 1)

    def forward(
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
        num_choices: int | None = None,
    ) -> Any:
        """As the other heads, with a dimension of choices after the batch.

        A `PackedBatch` holds each example's choices one after the other; `num_choices` says how
        many there are.
        """
        first = inputs_embeds if input_ids is None else input_ids
        if isinstance(first, Tensor):
            if first.ndim < 3:
                raise ValueError(f"inputs must be [B, choices, L], not {list(first.shape)}")
            num_choices = first.shape[1]
        elif isinstance(first, PackedBatch) and (not num_choices or len(first) % num_choices):
            raise ValueError(
                f"num_choices={num_choices} must divide the PackedBatch's {len(first)} sequences"
            )
        rows: list[Any] = [
            value.flatten(0, 1) if isinstance(value, Tensor) else value
            for value in (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        ]
        run = self.bert.run(tuple(rows), output_attentions, output_hidden_states)
        logits = self.classifier(self.dropout(self._pooled(run))).view(-1, num_choices)
        loss = None if labels is None else objectives.cross_entropy(logits, labels)
        output = LogitsOutput(loss=loss, logits=logits, hidden_states=run.every_layer)
        return self._finish(output, return_dict)


class BertForPreTraining(_TiedHead):
    """Masked words and next sentence, both heads of BERT's pre-training."""

    def _build(self, config: BertConfig) -> None:
        super()._build(config)
        self.cls["seq_relationship"] = nn.Linear(config.hidden_size, 2)

    def forward(  # type: ignore[override]
        self,
        input_ids: Ids = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        skip_logits: bool = False,
    ) -> Any:
        """Both heads' scores; with `labels` and `next_sentence_label`, the sum of their losses.

        `skip_logits` is as in `BertForMaskedLM`, and leaves `prediction_logits` out.
        """
        run = self.bert.run(
            (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds),
            output_attentions,
            output_hidden_states,
        )
        if next_sentence_label is None:
            labels = None  # as transformers: no loss without both
        words, loss = self._words(run, labels, skip_logits)
        following = self.cls["seq_relationship"](self._pooled(run))
        if loss is not None and next_sentence_label is not None:
            loss = loss + objectives.cross_entropy(
                following, next_sentence_label, "next_sentence_label"
            )
        output = PreTrainingOutput(
            loss=loss,
            prediction_logits=words,
            seq_relationship_logits=following,
            hidden_states=run.every_layer,
        )
        return self._finish(output, return_dict)


class BertForQuestionAnswering(_Head):
    """Scores of each token as an answer's start and end, `[B, L]` each (packed: `[T]`).

    Padding scores the lowest finite number, so that no answer is ever found there.
    """

    pooled = False

    def _build(self, config: BertConfig) -> None:
        require(config.num_labels == 2, "num_labels", config.num_labels, "a span has two ends")
        self.qa_outputs = nn.Linear(config.hidden_size, 2)

    def forward(  # type: ignore[override]
        self,
        input_ids: Ids = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Scores, and with both positions `[B]` the mean of their losses."""
        run = self.bert.run(
            (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds),
            output_attentions,
            output_hidden_states,
        )
        logits = self.qa_outputs(run.last)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = objectives.span_loss(logits, start_positions, end_positions, run.batch)
        scores = leave(logits, run.batch, fill=torch.finfo(logits.dtype).min)
        output = QuestionAnsweringOutput(
            loss=loss,
            start_logits=scores[..., 0].contiguous(),
            end_logits=scores[..., 1].contiguous(),
            hidden_states=run.every_layer,
        )
        return self._finish(output, return_dict)


def _token_loss(logits: Tensor, labels: Tensor | None, batch: PackedBatch) -> Tensor | None:
    if labels is None:
        return None
    return objectives.cross_entropy(logits, objectives.token_labels("labels", labels, batch))
