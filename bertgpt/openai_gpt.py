"""GPT-1: the decoder of `gpt_decoder` with each sum normed, under transformers' names.

Source: Radford et al., "Improving Language Understanding by Generative Pre-Training", 2018.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from bertgpt.causal_lm import CausalLM
from bertgpt.configuration import PretrainedConfig
from bertgpt.gpt_decoder import GPT2_BLOCK_NAMES, Decoder, DecoderShape, Ids
from bertgpt.pretrained import PreTrainedModel

__all__ = ["OpenAIGPTConfig", "OpenAIGPTLMHeadModel", "OpenAIGPTModel", "OpenAIGPTPreTrainedModel"]


@dataclass(init=False, eq=False)
class OpenAIGPTConfig(PretrainedConfig):
    """GPT-1's configuration: Hugging Face's keys and defaults."""

    model_type: ClassVar[str] = "openai-gpt"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }

    vocab_size: int = 40478
    n_positions: int = 512
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    afn: str = "gelu"
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None


class OpenAIGPTPreTrainedModel(PreTrainedModel):
    """Base of the GPT-1 models."""

    config_class = OpenAIGPTConfig
    base_model_prefix = "transformer"


class OpenAIGPTModel(Decoder, OpenAIGPTPreTrainedModel):
    """GPT-1's decoder without a head. Its "gelu" is the tanh approximation."""

    activation_field = "afn"
    activations: ClassVar[Mapping[str, str]] = {"gelu": "tanh"}

    @staticmethod
    def shape(config: OpenAIGPTConfig) -> DecoderShape:
        """Post-norm."""
        return DecoderShape(
            inner=4 * config.n_embd,
            embedding_dropout=config.embd_pdrop,
            residual_dropout=config.resid_pdrop,
            attention_dropout=config.attn_pdrop,
            scales=[(config.n_embd // config.n_head) ** -0.5] * config.n_layer,
            windows=[None] * config.n_layer,
            post_norm=True,
            qkv_bias=True,
            names={
                "embeddings.word_embeddings": "tokens_embed",
                "embeddings.position_embeddings": "positions_embed",
                "layers": "h",
            },
            block_names=GPT2_BLOCK_NAMES,
            transposed=True,
        )

    def forward(
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
        """Runs padded tensors or a `PackedBatch` through the decoder; see `GPT2Model.forward`."""
        return self.hidden(
            (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds),
            output_hidden_states,
            return_dict,
            output_attentions=output_attentions,
        )


class OpenAIGPTLMHeadModel(CausalLM, OpenAIGPTPreTrainedModel):
    """The language model: scores of each next word, by the word embeddings."""

    tied_weights: ClassVar[dict[str, str]] = {"lm_head.weight": "transformer.tokens_embed.weight"}
    decoder_class = OpenAIGPTModel

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
        logits_to_keep: int | Tensor = 0,
        skip_logits: bool = False,
    ) -> Any:
        """Scores `[B, L, V]` (packed: `[T, V]`); see `GPT2LMHeadModel.forward`."""
        return self.scores(
            (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds),
            labels,
            logits_to_keep,
            skip_logits,
            output_hidden_states,
            return_dict,
            output_attentions=output_attentions,
        )
