"""DistilBERT: BERT's layers without token types and without a pooler.

Source: Sanh et al., "DistilBERT, a distilled version of BERT: smaller, faster, cheaper and
    lighter", 2019.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from bertgpt import encoder_heads as heads
from bertgpt import encoder_word_heads as word_heads
from bertgpt.bert_encoder import Encoder, EncoderShape, Ids
from bertgpt.checkpoint import KeyTable
from bertgpt.configuration import PretrainedConfig, require
from bertgpt.door import Run
from bertgpt.pretrained import PreTrainedModel

__all__ = [
    "DistilBertConfig",
    "DistilBertForMaskedLM",
    "DistilBertForMultipleChoice",
    "DistilBertForQuestionAnswering",
    "DistilBertForSequenceClassification",
    "DistilBertForTokenClassification",
    "DistilBertModel",
    "DistilBertPreTrainedModel",
]


@dataclass(init=False, eq=False)
class DistilBertConfig(PretrainedConfig):
    """DistilBERT's configuration: Hugging Face's keys and defaults."""

    model_type: ClassVar[str] = "distilbert"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "dim",
        "num_attention_heads": "n_heads",
        "num_hidden_layers": "n_layers",
    }

    vocab_size: int = 30522
    max_position_embeddings: int = 512
    sinusoidal_pos_embds: bool = False
    n_layers: int = 6
    n_heads: int = 12
    dim: int = 768
    hidden_dim: int = 3072
    dropout: float = 0.1
    attention_dropout: float = 0.1
    activation: str = "gelu"
    qa_dropout: float = 0.1
    seq_classif_dropout: float = 0.2
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None


class DistilBertPreTrainedModel(PreTrainedModel):
    """Base of the DistilBERT models."""

    config_class = DistilBertConfig
    base_model_prefix = "distilbert"


class DistilBertModel(Encoder, DistilBertPreTrainedModel):
    """DistilBERT's encoder.

    Args:
        config: the model's configuration.

    Raises:
        ValueError: as other encoders, and where the config asks for positions as sine waves.
    """

    activation_field = "activation"

    def __init__(self, config: DistilBertConfig) -> None:
        super().__init__(config, add_pooling_layer=False)

    @staticmethod
    def shape(config: DistilBertConfig) -> EncoderShape:
        """Nothing of what attention adds is dropped."""
        waves = config.sinusoidal_pos_embds
        require(not waves, "sinusoidal_pos_embds", waves, "positions are learnt, set it to false")
        return EncoderShape(
            inner=config.hidden_dim,
            eps=1e-12,
            dropout=config.dropout,
            attention_dropout=config.attention_dropout,
            added_dropouts=(0.0, config.dropout),
            names={"embeddings_norm": "embeddings.LayerNorm", "layers": "transformer.layer"},
            layer_names={
                "attention.qkv": tuple(f"attention.{part}_lin" for part in "qkv"),
                "attention.out": "attention.out_lin",
                "attention_norm": "sa_layer_norm",
                "feed_forward.inner": "ffn.lin1",
                "feed_forward.outer": "ffn.lin2",
                "feed_forward_norm": "output_layer_norm",
            },
        )

    def forward(  # type: ignore[override]
        self,
        input_ids: Ids = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Encodes padded tensors or a `PackedBatch`; see `BertModel.forward`."""
        return self.hidden(
            (input_ids, attention_mask, None, position_ids, inputs_embeds),
            output_attentions,
            output_hidden_states,
            return_dict,
        )


class _DistilBertHead(heads.Head, DistilBertPreTrainedModel):
    encoder_class = DistilBertModel

    def _encoder(self, config: DistilBertConfig) -> Encoder:
        return self.encoder_class(config)

    def forward(  # type: ignore[override]
        self,
        input_ids: Ids = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Scores, and with `labels` their loss; the other arguments are the encoder's."""
        inputs = (input_ids, attention_mask, None, position_ids, inputs_embeds)
        return self.answer(inputs, labels, (output_attentions, output_hidden_states, return_dict))


class DistilBertForMaskedLM(_DistilBertHead, word_heads.MaskedLM):
    """Scores of every word for every token, `[B, L, V]` (packed: `[T, V]`)."""

    own_bias = False
    names: ClassVar[KeyTable] = {
        "predictions.dense": "vocab_transform",
        "predictions.norm": "vocab_layer_norm",
        "predictions.decoder": "vocab_projector",
    }
    tied_weights: ClassVar[dict[str, str]] = {
        "vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight"
    }

    def forward(  # type: ignore[override]
        self,
        input_ids: Ids = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        skip_logits: bool = False,
    ) -> Any:
        """As `BertForMaskedLM.forward`, in stock's order."""
        inputs = (input_ids, attention_mask, None, position_ids, inputs_embeds)
        flags = (output_attentions, output_hidden_states, return_dict)
        return self.predict(inputs, labels, flags, skip_logits)


class _DistilBertPooled(_DistilBertHead):
    """A head on each sequence's first token, with a hidden layer of its own."""

    dropouts = ("seq_classif_dropout",)

    def _build(self, config: DistilBertConfig) -> None:
        self.pre_classifier = nn.Linear(config.dim, config.dim)
        super()._build(config)

    def _pooled(self, run: Run) -> Tensor:
        return self.pre_classifier(run.batch.first_tokens(run.last)).relu()


class DistilBertForSequenceClassification(_DistilBertPooled, heads.SequenceClassification):
    """Classes or values of each sequence: logits `[B, num_labels]`."""


class DistilBertForMultipleChoice(_DistilBertPooled, heads.MultipleChoice):
    """One score per choice: logits `[B, choices]` from padded inputs `[B, choices, L]`."""

    def forward(  # type: ignore[override]
        self,
        input_ids: Ids = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_choices: int | None = None,
    ) -> Any:
        """As `BertForMultipleChoice.forward`, in stock's order."""
        inputs = (input_ids, attention_mask, None, position_ids, inputs_embeds)
        flags = (output_attentions, output_hidden_states, return_dict)
        return self.choose(inputs, labels, flags, num_choices)


class DistilBertForTokenClassification(_DistilBertHead, heads.TokenClassification):
    """Classes of each token: logits `[B, L, num_labels]` (packed: `[T, num_labels]`)."""

    dropouts = ("dropout",)


class DistilBertForQuestionAnswering(_DistilBertHead, heads.QuestionAnswering):
    """Scores of each token as an answer's start and end, `[B, L]` each (packed: `[T]`)."""

    dropouts = ("qa_dropout",)

    def _build(self, config: DistilBertConfig) -> None:
        super()._build(config)
        self.dropout = self._classifier_dropout(config)

    def _spans(self, hidden_TE: Tensor) -> Tensor:
        return self.qa_outputs(self.dropout(hidden_TE))

    def forward(  # type: ignore[override]
        self,
        input_ids: Ids = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Scores, and with both positions `[B]` the mean of their losses."""
        inputs = (input_ids, attention_mask, None, position_ids, inputs_embeds)
        flags = (output_attentions, output_hidden_states, return_dict)
        return self.find(inputs, start_positions, end_positions, flags)
