"""Heads over the vocabulary on an encoder: masked words, alone or beside pairs of sentences."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bertgpt import objectives, ops
from bertgpt.bert_encoder import ENCODER_ALONE, Ids
from bertgpt.checkpoint import KeyTable, map_keys
from bertgpt.configuration import refuse
from bertgpt.door import Run
from bertgpt.encoder_heads import Flags, Head, Inputs
from bertgpt.layers import ACTIVATIONS, AddNorm
from bertgpt.outputs import PreTrainingOutput, SentenceOrderOutput
from bertgpt.vocabulary import score


class PredictionHead(nn.Module):
    """Dense, GELU and LayerNorm, and the decoder that scores every word for what comes out.

    Args:
        width: E, of what comes in.
        words: the word embeddings, whose shape the decoder has.
        eps: of the norm.
        approximate: of the GELU.
        own_bias: whether the checkpoint keeps the decoder's bias here, too.
        names: our modules → the checkpoint's.
    """

    def __init__(
        self,
        width: int,
        words: nn.Embedding,
        eps: float,
        approximate: str,
        own_bias: bool,
        names: KeyTable,
    ) -> None:
        super().__init__()
        count, narrow = words.weight.shape
        self.approximate = approximate
        self.bias = nn.Parameter(torch.zeros(count)) if own_bias else None
        self.dense = nn.Linear(width, narrow)
        self.norm = AddNorm(narrow, eps)
        self.decoder = nn.Linear(narrow, count)
        map_keys(self, names)

    def forward(self, x_TE: Tensor) -> Tensor:
        """`[T, E]` → what the decoder reads."""
        dense = self.dense
        x_TE = ops.linear_gelu(x_TE, dense.weight, dense.bias, approximate=self.approximate)
        return self.norm(x_TE)


class MaskedLM(Head):
    """Scores of every word for every token, `[B, L, V]` (packed: `[T, V]`).

    Attributes:
        own_bias: as in `PredictionHead`.
        prediction_names: its `names`.
        prediction_activation: its activation, where that is not the encoder's.
    """

    pooled = False
    own_bias: ClassVar[bool] = True
    prediction_names: ClassVar[KeyTable] = {}
    prediction_activation: ClassVar[str | None] = None

    def _build(self, config: Any) -> None:
        encoder = self.base_model
        activation = self.prediction_activation or getattr(config, encoder.activation_field)
        self.predictions = PredictionHead(
            config.hidden_size,
            encoder.get_input_embeddings(),
            encoder.embeddings_norm.eps,
            ACTIVATIONS[activation],
            self.own_bias,
            self.prediction_names,
        )

    def _words(
        self, run: Run, labels: Tensor | None, skip_logits: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Scores of every word for every token, or None, and the loss."""
        head = self.predictions
        if labels is not None:
            labels = objectives.token_labels("labels", labels, run.batch)
        return score(head(run.last), head.decoder, labels, run.batch, skip_logits)

    def get_output_embeddings(self) -> nn.Linear:
        """The decoder over the vocabulary."""
        return self.predictions.decoder

    def tie_weights(self) -> None:
        """Shares the word embeddings with the decoder, and its bias with the head."""
        if self.config.tie_word_embeddings:
            head = self.predictions
            head.decoder.weight = self.get_input_embeddings().weight
            if head.bias is not None:
                head.decoder.bias = head.bias

    def predict(
        self, inputs: Inputs, labels: Tensor | None, flags: Flags, skip_logits: bool
    ) -> Any:
        """What `forward` returns."""
        run = self._run(inputs, flags)
        return self._logits(run, *self._words(run, labels, skip_logits), flags)

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
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        flags = (output_attentions, output_hidden_states, return_dict)
        return self.predict(inputs, labels, flags, skip_logits)


class PreTraining(MaskedLM):
    """Masked words and next sentence, both heads of BERT's pre-training.

    Attributes:
        output_class: what comes out, its sentences' scores under the family's name.
        sentence_label: what the family calls the sentences' label.
    """

    pooled = True
    output_class: ClassVar[type[PreTrainingOutput | SentenceOrderOutput]] = PreTrainingOutput
    sentence_label: ClassVar[str] = "next_sentence_label"

    def _build(self, config: Any) -> None:
        super()._build(config)
        self.next_sentence = nn.Linear(config.hidden_size, 2)

    def _sentences(self, run: Run) -> Tensor:
        return self.next_sentence(self._pooled(run))

    def judge(
        self,
        inputs: Inputs,
        labels: Tensor | None,
        sentence_labels: Tensor | None,
        flags: Flags,
        skip_logits: bool,
    ) -> Any:
        """What `forward` returns."""
        run = self._run(inputs, flags)
        if sentence_labels is None:
            labels = None  # as transformers: no loss without both
        words, loss = self._words(run, labels, skip_logits)
        sentences = self._sentences(run)
        if loss is not None and sentence_labels is not None:
            loss = loss + objectives.cross_entropy(sentences, sentence_labels, self.sentence_label)
        return self._finish(self.output_class(loss, words, sentences, run.every_layer), flags[2])

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

        `skip_logits` is as in the head for words alone, and leaves `prediction_logits` out.
        """
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        flags = (output_attentions, output_hidden_states, return_dict)
        return self.judge(inputs, labels, next_sentence_label, flags, skip_logits)
