"""Task heads on an encoder, whatever its family; what a family changes are their class attributes.

Where nothing else is said, `forward` has BERT's arguments in BERT's order.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bertgpt import objectives
from bertgpt.bert_encoder import Encoder, Ids
from bertgpt.checkpoint import KeyTable, map_keys
from bertgpt.configuration import require
from bertgpt.door import Run, leave
from bertgpt.layers import Dropout
from bertgpt.outputs import LogitsOutput, QuestionAnsweringOutput
from bertgpt.packing import PackedBatch
from bertgpt.pretrained import PreTrainedModel

Inputs = tuple[Any, ...]  # the encoder's, in the order of `door.enter`
Flags = tuple[bool | None, bool | None, bool | None]
"""`output_attentions`, `output_hidden_states` and `return_dict`."""


class Head(PreTrainedModel):
    """An encoder and what `_build` adds to it; `answer` is what becomes of its hidden states.

    Attributes:
        encoder_class: the family's encoder.
        pooled: whether the encoder has its pooler.
        dropouts: fields of the configuration; the first that is not None is the dropout of what
            goes into a classifier.
        names: our modules of the head → the checkpoint's.
    """

    encoder_class: ClassVar[type[Encoder]]
    pooled: ClassVar[bool] = True
    dropouts: ClassVar[tuple[str, ...]] = ("classifier_dropout", "hidden_dropout_prob")
    names: ClassVar[KeyTable] = {}

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        setattr(self, self.base_model_prefix, self._encoder(config))
        self._build(config)
        map_keys(self, self.names)
        self.post_init()

    def _encoder(self, config: Any) -> Encoder:
        return self.encoder_class(config, self.pooled)

    def _build(self, config: Any) -> None:
        """Adds dropout and a classifier."""
        self.dropout = self._classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, self._classes(config))

    def _classifier_dropout(self, config: Any) -> Dropout:
        rates = (getattr(config, name) for name in self.dropouts)
        return Dropout(next(rate for rate in rates if rate is not None))

    @staticmethod
    def _classes(config: Any) -> int:
        return config.num_labels

    def _pooled(self, run: Run) -> Tensor:
        """One vector a sequence `[B, E]`, for a classifier."""
        return self.base_model.pool(run.last, run.batch)

    def _score(self, run: Run, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Logits in the caller's layout, and the loss."""
        raise NotImplementedError(f"{type(self).__name__} has no scores of its own")

    def _run(self, inputs: Inputs, flags: Flags) -> Run:
        return self.base_model.run(inputs, *flags[:2])

    def _logits(self, run: Run, logits: Tensor | None, loss: Tensor | None, flags: Flags) -> Any:
        output = LogitsOutput(loss=loss, logits=logits, hidden_states=run.every_layer)
        return self._finish(output, flags[2])

    def answer(self, inputs: Inputs, labels: Tensor | None, flags: Flags) -> Any:
        """What `forward` returns."""
        run = self._run(inputs, flags)
        return self._logits(run, *self._score(run, labels), flags)

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
        """Scores, and with `labels` their loss; the other arguments are the encoder's."""
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        return self.answer(inputs, labels, (output_attentions, output_hidden_states, return_dict))


class NextSentencePrediction(Head):
    """Whether the second segment follows the first: logits `[B, 2]`."""

    def _build(self, config: Any) -> None:
        self.next_sentence = nn.Linear(config.hidden_size, 2)

    def _score(self, run: Run, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        logits = self.next_sentence(self._pooled(run))
        return logits, None if labels is None else objectives.cross_entropy(logits, labels)


class SequenceClassification(Head):
    """Classes or values of each sequence: logits `[B, num_labels]`."""

    def _score(self, run: Run, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        logits = self.classifier(self.dropout(self._pooled(run)))
        if labels is None:
            return logits, None
        return logits, objectives.classification_loss(self.config, logits, labels)


class TokenClassification(Head):
    """Classes of each token: logits `[B, L, num_labels]` (packed: `[T, num_labels]`)."""

    pooled = False

    def _score(self, run: Run, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        logits = self.classifier(self.dropout(run.last))
        loss = None
        if labels is not None:
            labels = objectives.token_labels("labels", labels, run.batch)
            loss = objectives.cross_entropy(logits, labels)
        return leave(logits, run.batch), loss


class MultipleChoice(Head):
    """One score per choice: logits `[B, choices]` from padded inputs `[B, choices, L]`."""

    @staticmethod
    def _classes(config: Any) -> int:
        return 1

    def choose(
        self, inputs: Inputs, labels: Tensor | None, flags: Flags, num_choices: int | None
    ) -> Any:
        """What `forward` returns, of inputs with a dimension of choices after the batch."""
        first = inputs[4] if inputs[0] is None else inputs[0]
        if isinstance(first, Tensor):
            if first.ndim < 3:
                raise ValueError(f"inputs must be [B, choices, L], not {list(first.shape)}")
            num_choices = first.shape[1]
        elif isinstance(first, PackedBatch) and (not num_choices or len(first) % num_choices):
            raise ValueError(
                f"num_choices={num_choices} must divide the PackedBatch's {len(first)} sequences"
            )
        rows = (  # as stock, which takes some of them without that dimension
            value.flatten(0, 1) if isinstance(value, Tensor) and value.ndim > 2 else value
            for value in inputs
        )
        run = self._run(tuple(rows), flags)
        logits = self.classifier(self.dropout(self._pooled(run))).view(-1, num_choices)
        loss = None if labels is None else objectives.cross_entropy(logits, labels)
        return self._logits(run, logits, loss, flags)

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
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        flags = (output_attentions, output_hidden_states, return_dict)
        return self.choose(inputs, labels, flags, num_choices)


class QuestionAnswering(Head):
    """Scores of each token as an answer's start and end, `[B, L]` each (packed: `[T]`).

    Padding scores the lowest finite number, so that no answer is ever found there.
    """

    pooled = False

    def _build(self, config: Any) -> None:
        require(config.num_labels == 2, "num_labels", config.num_labels, "a span has two ends")
        self.qa_outputs = nn.Linear(config.hidden_size, 2)

    def find(self, inputs: Inputs, starts: Tensor | None, ends: Tensor | None, flags: Flags) -> Any:
        """What `forward` returns."""
        run = self._run(inputs, flags)
        logits = self._spans(run.last)
        loss = None
        if starts is not None and ends is not None:
            loss = objectives.span_loss(logits, starts, ends, run.batch)
        scores = leave(logits, run.batch, fill=torch.finfo(logits.dtype).min)
        output = QuestionAnsweringOutput(
            loss=loss,
            start_logits=scores[..., 0].contiguous(),
            end_logits=scores[..., 1].contiguous(),
            hidden_states=run.every_layer,
        )
        return self._finish(output, flags[2])

    def _spans(self, hidden_TE: Tensor) -> Tensor:
        return self.qa_outputs(hidden_TE)

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
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        flags = (output_attentions, output_hidden_states, return_dict)
        return self.find(inputs, start_positions, end_positions, flags)
