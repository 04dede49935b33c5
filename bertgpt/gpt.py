"""GPT-2: the decoder's configuration and model, the language model and the classifier on it.

Class names, configuration keys, `forward` arguments, outputs and state-dict keys are those of
transformers; inside, tokens travel packed.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bertgpt import objectives
from bertgpt.causal_lm import CausalLM
from bertgpt.gpt_decoder import GPT2Config, GPT2Model, GPT2PreTrainedModel, Ids
from bertgpt.outputs import LogitsOutput
from bertgpt.packing import PackedBatch

__all__ = [
    "GPT2Config",
    "GPT2ForSequenceClassification",
    "GPT2LMHeadModel",
    "GPT2Model",
    "GPT2PreTrainedModel",
]


class GPT2LMHeadModel(CausalLM, GPT2PreTrainedModel):
    """The language model: scores of each next word, by the word embeddings."""

    tied_weights: ClassVar[dict[str, str]] = {"lm_head.weight": "transformer.wte.weight"}
    decoder_class = GPT2Model

    def forward(
        self,
        input_ids: Ids = None,
        past_key_values: None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: None = None,
        encoder_attention_mask: None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        skip_logits: bool = False,
    ) -> Any:
        """Scores `[B, L, V]` (packed: `[T, V]`); the other arguments are `GPT2Model`'s.

        Args:
            input_ids: as in `GPT2Model.forward`, like all that is not named here.
            past_key_values: refused.
            attention_mask: `[B, L]`.
            token_type_ids: `[B, L]`.
            position_ids: `[B, L]`.
            inputs_embeds: `[B, L, E]`.
            encoder_hidden_states: refused.
            encoder_attention_mask: refused.
            labels: the input ids, −100 where there is nothing to predict; each token is scored
                against the next one's label.
            use_cache: refused when True.
            logits_to_keep: score only the last so many columns of a padded batch, or these columns;
                0 for all.
            output_attentions: refused when True.
            output_hidden_states: also return every layer's output.
            return_dict: False for a tuple.
            skip_logits: give the loss alone, whose scores are then never whole in memory.

        Raises:
            ValueError: as in `GPT2Model.forward`; `logits_to_keep` beside labels or a
                `PackedBatch`; `skip_logits` without labels.
        """
        return self.scores(
            (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds),
            labels,
            logits_to_keep,
            skip_logits,
            output_hidden_states,
            return_dict,
            past_key_values=past_key_values,
            use_cache=use_cache,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            output_attentions=output_attentions,
        )


class GPT2ForSequenceClassification(GPT2PreTrainedModel):
    """Classes of each sequence, read off its last token that is not padding.

    Tokens equal to `config.pad_token_id` count as padding, as in transformers; without one, the
    last token is taken, which padded tensors allow for one sequence only.
    """

    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config)
        self.transformer = GPT2Model(config)
        self.score = nn.Linear(config.n_embd, config.num_labels, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Ids = None,
        past_key_values: None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Scores `[B, num_labels]`, with `labels` their loss; the rest is `GPT2Model`'s."""
        run = self.transformer.run(
            (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds),
            output_hidden_states,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_attentions=output_attentions,
        )
        last = self._last_tokens(run.batch)
        logits = self.score(run.batch.take(run.last, last))
        loss = None
        if labels is not None:
            loss = objectives.classification_loss(self.config, logits, labels)
        output = LogitsOutput(loss=loss, logits=logits, hidden_states=run.every_layer)
        return self._finish(output, return_dict)

    def _last_tokens(self, batch: PackedBatch) -> Tensor:
        """Row of each sequence's last token that is not padding, else of its first, `[B]`."""
        padding, starts = self.config.pad_token_id, batch.cu_seqlens[:-1].long()
        if padding is None and batch.grid is not None and len(batch) > 1:
            raise ValueError(
                "config.pad_token_id is None: set it, pass one sequence, or pass a PackedBatch"
            )
        if padding is None or batch.values.is_floating_point():
            return batch.cu_seqlens[1:].long() - 1
        tokens = batch.values.shape[0]
        rows = torch.arange(tokens, device=starts.device)
        owner = torch.arange(len(batch), device=starts.device).repeat_interleave(
            batch.cu_seqlens.diff(), output_size=tokens
        )
        kept = torch.where(batch.values == padding, starts[owner], rows)
        return starts.scatter_reduce(0, owner, kept, "amax")
