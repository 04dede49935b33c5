"""GPT-2's configuration and its decoder: causal attention, pre-norm layers.

Source: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from bertgpt.checkpoint import map_keys
from bertgpt.configuration import PretrainedConfig, check_shapes, refuse
from bertgpt.door import Limits, Run, enter, leave
from bertgpt.layers import (
    ACTIVATIONS,
    AddNorm,
    Attend,
    Block,
    Embeddings,
    FeedForward,
    SelfAttend,
    SelfAttention,
)
from bertgpt.outputs import BaseModelOutput
from bertgpt.packing import PackedBatch
from bertgpt.pretrained import PreTrainedModel

Ids = Tensor | PackedBatch | None


@dataclass(init=False, eq=False)
class GPT2Config(PretrainedConfig):
    """GPT-2's configuration: Hugging Face's keys and defaults."""

    model_type: ClassVar[str] = "gpt2"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    reorder_and_upcast_attn: bool = False
    add_cross_attention: bool = False
    use_cache: bool = True
    bos_token_id: int | None = 50256
    eos_token_id: int | list[int] | None = 50256
    pad_token_id: int | None = None


class GPT2Block(Block):
    """Attention and the feed-forward network, each on normed input.

    Each sum is formed by the norm that follows it, so blocks take and hand on their last term and
    the residual unadded.
    """

    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        width, eps, dropout = config.n_embd, config.layer_norm_epsilon, config.resid_pdrop
        scale = (width // config.n_head) ** -0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            scale /= layer + 1
        inner = 4 * width if config.n_inner is None else config.n_inner
        self.norm_1 = AddNorm(width, eps, dropout if layer else config.embd_pdrop)
        self.attention = SelfAttention(width, config.n_head, layer, scale, config.attn_pdrop)
        self.norm_2 = AddNorm(width, eps, dropout)
        self.feed_forward = FeedForward(width, inner, ACTIVATIONS[config.activation_function])
        table = {
            "norm_1": "ln_1",
            "attention.qkv": "attn.c_attn",
            "attention.out": "attn.c_proj",
            "norm_2": "ln_2",
            "feed_forward.inner": "mlp.c_fc",
            "feed_forward.outer": "mlp.c_proj",
        }
        map_keys(self, table, transposed=[ours for ours in table if "norm" not in ours])

    def compute(
        self, term_TE: Tensor, residual_TE: Tensor | None, attend: Attend
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Term and residual → the next ones, and the sum of those that came, all `[T, E]`.

        The first block's term are the embeddings, which have no residual.
        """
        normed_TE, sum_TE = self.norm_1.with_sum(term_TE, residual_TE)
        mixed_TE = self.attention(normed_TE, attend)
        normed_TE, residual_TE = self.norm_2.with_sum(mixed_TE, sum_TE)
        return self.feed_forward(normed_TE), residual_TE, sum_TE


class GPT2PreTrainedModel(PreTrainedModel):
    """Base of the GPT-2 models."""

    config_class = GPT2Config
    base_model_prefix = "transformer"

    def _standard_deviation(self, name: str) -> float:
        """Projections into the residual stream start smaller, by 1/√(their number)."""
        std = self.config.initializer_range
        if name.endswith(("attention.out.weight", "feed_forward.outer.weight")):
            return std / math.sqrt(2 * self.config.n_layer)
        return std


class GPT2Model(GPT2PreTrainedModel):
    """The decoder without a head.

    Args:
        config: the model's shape.

    Raises:
        ValueError: the config asks for cross-attention, attention weights, or an activation that is
            no GELU.
    """

    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config)
        check_shapes(config, config.n_embd, config.n_head, "activation_function")
        words, positions, width = config.vocab_size, config.n_positions, config.n_embd
        self.limits = Limits(words, positions, types=words, width=width)
        self.embeddings = Embeddings(words, positions, 0, width, None)
        self.layers = nn.ModuleList(GPT2Block(config, i) for i in range(config.n_layer))
        dropout = config.resid_pdrop if config.n_layer else config.embd_pdrop
        self.final_norm = AddNorm(width, config.layer_norm_epsilon, dropout)
        table = {
            "embeddings.word_embeddings": "wte",
            "embeddings.position_embeddings": "wpe",
            "layers": "h",
            "final_norm": "ln_f",
        }
        map_keys(self, table)
        self.post_init()

    def embed(self, values: Tensor, positions: Tensor, types: Tensor | None = None) -> Tensor:
        """Embeddings `[T, E]` of words (or of given embeddings), positions and types.

        Their dropout is left to the first norm.
        """
        words, places = self.embeddings(values, positions, None)
        if types is not None:
            words = words + self.embeddings.word_embeddings(types)
        return words + places

    def decode(self, x_TE: Tensor, attend: Attend, every_layer: bool = False) -> tuple[Tensor, ...]:
        """Embeddings → hidden states `[T, E]`: the normed last, or each sum and the normed last."""
        states: list[Tensor] = []
        term, residual = x_TE, None
        for block in self.layers:
            term, residual, entering = block(term, residual, attend)
            if every_layer:
                states.append(entering)
        normed = self.final_norm(term, residual)
        return (*states, normed)

    def run(
        self,
        inputs: tuple[Any, ...],
        output_hidden_states: bool | None,
        **refused: Any,
    ) -> Run:
        """What `forward` computes, still packed, for a head to go on from."""
        for name in ("past_key_values", "use_cache"):
            refuse("generate() keeps a cache of its own", **{name: refused.pop(name)})
        refuse("leave it out, or use transformers for it", **refused)
        batch = enter(self.limits, *inputs)
        every_layer = self._wants_layers(output_hidden_states)
        x_TE = self.embed(batch.values, batch.positions(), batch.token_type_ids)
        states = self.decode(x_TE, SelfAttend(batch, causal=True), every_layer)
        return Run.of(batch, states, every_layer)

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
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Runs padded tensors or a `PackedBatch` through the decoder.

        Args:
            input_ids: token ids `[B, L]`, or a `PackedBatch`, which then comes alone.
            past_key_values: refused; `GPT2LMHeadModel.generate` keeps a cache of its own.
            attention_mask: `[B, L]`, nonzero for real tokens; padding may be anywhere.
            token_type_ids: `[B, L]`, words whose embeddings are added.
            position_ids: `[B, L]`, by default each token's column, also under left padding.
            inputs_embeds: `[B, L, E]` in place of `input_ids`.
            encoder_hidden_states: refused, as is `encoder_attention_mask`.
            encoder_attention_mask: refused.
            use_cache: refused when True.
            output_attentions: refused when True.
            output_hidden_states: also return the embeddings and every layer's output.
            return_dict: False for a tuple.

        Returns:
            `last_hidden_state` `[B, L, E]` with zeros at padding, or `[T, E]` for a packed batch;
            `hidden_states` if asked for.

        Raises:
            TypeError: ids that are no integers.
            ValueError: shapes that disagree, a sequence longer than the position table, or an
                argument that is refused.
            IndexError: an id outside its table.
        """
        run = self.run(
            (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds),
            output_hidden_states,
            past_key_values=past_key_values,
            use_cache=use_cache,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            output_attentions=output_attentions,
        )
        output = BaseModelOutput(
            last_hidden_state=leave(run.last, run.batch), hidden_states=run.every_layer
        )
        return self._finish(output, return_dict)
