"""GPT-Neo, and so GPT-3's kind of layers: attention in turn everywhere and to near tokens only.

It is the decoder of `gpt_decoder` with windows, without a scale and without biases on queries, keys
and values, under transformers' names.

Source: Black et al., "GPT-Neo", 2021; Brown et al., "Language Models are Few-Shot Learners", 2020;
    Child et al., "Generating Long Sequences with Sparse Transformers", 2019 (banded attention).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from bertgpt.causal_lm import CausalLM
from bertgpt.checkpoint import KeyTable
from bertgpt.configuration import PretrainedConfig, require
from bertgpt.gpt_decoder import GPT2_NAMES, Decoder, DecoderShape, Ids
from bertgpt.pretrained import PreTrainedModel

__all__ = ["GPTNeoConfig", "GPTNeoForCausalLM", "GPTNeoModel", "GPTNeoPreTrainedModel"]

_BLOCK_NAMES: KeyTable = {
    "norm_1": "ln_1",
    "attention.qkv": tuple(f"attn.attention.{part}_proj" for part in "qkv"),
    "attention.out": "attn.attention.out_proj",
    "norm_2": "ln_2",
    "feed_forward.inner": "mlp.c_fc",
    "feed_forward.outer": "mlp.c_proj",
}


@dataclass(init=False, eq=False)
class GPTNeoConfig(PretrainedConfig):
    """GPT-Neo's configuration: Hugging Face's keys and defaults.

    `attention_types` holds pairs of kinds ("global", "local") and how often they come one after
    another: `[[["global", "local"], 12]]` for 24 layers in turn, which None stands for.
    """

    model_type: ClassVar[str] = "gpt_neo"
    attribute_map: ClassVar[dict[str, str]] = {
        "num_attention_heads": "num_heads",
        "num_hidden_layers": "num_layers",
    }

    vocab_size: int = 50257
    max_position_embeddings: int = 2048
    hidden_size: int = 2048
    num_layers: int = 24
    attention_types: list[Any] | None = None
    num_heads: int = 16
    intermediate_size: int | None = None
    window_size: int = 256
    activation_function: str = "gelu_new"
    resid_dropout: float = 0.0
    embed_dropout: float = 0.0
    attention_dropout: float = 0.0
    layer_norm_epsilon: float = 1e-5
    use_cache: bool = True
    bos_token_id: int | None = 50256
    eos_token_id: int | list[int] | None = 50256
    pad_token_id: int | None = None

    def __init__(self, **values: Any) -> None:
        values.pop("attention_layers", None)  # spelt out from attention_types; saved by stock
        super().__init__(**values)

    @property
    def attention_layers(self) -> list[str]:
        """Each layer's kind, "global" or "local".

        Raises:
            ValueError: `attention_types` is of another form.
        """
        types = self.attention_types
        wanted = 'it must hold pairs such as [["global", "local"], 12]'
        try:
            pairs = [
                ([*kinds], int(times)) for kinds, times in types or [[["global", "local"], 12]]
            ]
        except (TypeError, ValueError):
            raise ValueError(f"attention_types={types!r}: {wanted}") from None
        layers = [kind for kinds, times in pairs for kind in kinds * times]
        known = all(kind in ("global", "local") for kind in layers)
        require(known, "attention_types", types, wanted)
        return layers


class GPTNeoPreTrainedModel(PreTrainedModel):
    """Base of the GPT-Neo models."""

    config_class = GPTNeoConfig
    base_model_prefix = "transformer"


class GPTNeoModel(Decoder, GPTNeoPreTrainedModel):
    """GPT-Neo's decoder without a head."""

    @staticmethod
    def shape(config: GPTNeoConfig) -> DecoderShape:
        """Pre-norm, unscaled; a local layer's token sees itself and the `window_size` − 1 before.

        Raises:
            ValueError: `attention_types` does not give each layer its kind.
        """
        kinds, layers = config.attention_layers, config.num_layers
        require(
            len(kinds) == layers,
            "attention_types",
            config.attention_types,
            f"it gives {len(kinds)} layers a kind, and num_layers is {layers}",
        )
        near = (config.window_size - 1, -1)
        width = config.hidden_size
        return DecoderShape(
            inner=4 * width if config.intermediate_size is None else config.intermediate_size,
            embedding_dropout=config.embed_dropout,
            residual_dropout=config.resid_dropout,
            attention_dropout=config.attention_dropout,
            scales=[1.0] * layers,
            windows=[near if kind == "local" else None for kind in kinds],
            post_norm=False,
            qkv_bias=False,
            names=GPT2_NAMES,
            block_names=_BLOCK_NAMES,
            transposed=False,
        )

    def forward(
        self,
        input_ids: Ids = None,
        past_key_values: None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Runs padded tensors or a `PackedBatch` through the decoder; see `GPT2Model.forward`."""
        return self.hidden(
            (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds),
            output_hidden_states,
            return_dict,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_attentions=output_attentions,
        )


class GPTNeoForCausalLM(CausalLM, GPTNeoPreTrainedModel):
    """The language model: scores of each next word, by the word embeddings."""

    tied_weights: ClassVar[dict[str, str]] = {"lm_head.weight": "transformer.wte.weight"}
    decoder_class = GPTNeoModel

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
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_attentions=output_attentions,
        )
