"""The language model on a decoder, whatever its family: scores of each next word, and its loss."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from bertgpt import objectives
from bertgpt.generation import GenerationMixin
from bertgpt.gpt_decoder import Decoder
from bertgpt.layers import Linear
from bertgpt.outputs import LogitsOutput
from bertgpt.packing import pad
from bertgpt.vocabulary import score


class CausalLM(GenerationMixin):
    """A decoder and its scores of the vocabulary, by the word embeddings where these are tied.

    Attributes:
        decoder_class: the family's decoder.
    """

    decoder_class: ClassVar[type[Decoder]]

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.transformer = self.decoder_class(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        """The decoder over the vocabulary."""
        return self.lm_head

    def tie_weights(self) -> None:
        """Shares the word embeddings with the decoder."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.get_input_embeddings().weight

    def scores(
        self,
        inputs: tuple[Any, ...],
        labels: Tensor | None,
        logits_to_keep: int | Tensor,
        skip_logits: bool,
        output_hidden_states: bool | None,
        return_dict: bool | None,
        **refused: Any,
    ) -> Any:
        """What a family's `forward`, which describes the arguments, returns."""
        run = self.transformer.run(inputs, output_hidden_states, **refused)
        if isinstance(logits_to_keep, Tensor) or logits_to_keep:
            if labels is not None or skip_logits or run.batch.grid is None:
                raise ValueError("logits_to_keep goes with a padded batch and no labels")
            last = isinstance(logits_to_keep, int)
            columns = slice(-logits_to_keep, None) if last else logits_to_keep
            logits, loss = self.lm_head(pad(run.last, run.batch)[:, columns]), None
        else:
            if labels is not None:
                labels = objectives.token_labels("labels", labels, run.batch)
                labels = objectives.next_token_labels(labels, run.batch)
            logits, loss = score(run.last, self.lm_head, labels, run.batch, skip_logits)
        output = LogitsOutput(loss=loss, logits=logits, hidden_states=run.every_layer)
        return self._finish(output, return_dict)
