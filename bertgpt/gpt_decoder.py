"""The decoder that all GPT families are: causal attention in layers; and GPT-2's, which is one.

Source: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from bertgpt.checkpoint import KeyTable, map_keys
from bertgpt.configuration import PretrainedConfig, check_shapes, refuse
from bertgpt.door import Limits, Run, enter, leave
from bertgpt.layers import (
    ACTIVATIONS,
    AddNorm,
    Attend,
    Block,
    Dropout,
    Embeddings,
    FeedForward,
    SelfAttend,
    SelfAttention,
    Window,
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


@dataclass(frozen=True)
class DecoderShape:
    """What the decoder needs to know of a family's configuration.

    Attributes:
        inner: F, width inside the feed-forward network.
        embedding_dropout: on the sum of the embeddings.
        residual_dropout: on what each half of a layer adds.
        attention_dropout: on the attention weights.
        scales: each layer's, of the attention scores.
        windows: how far each layer's attention sees.
        post_norm: whether each sum is normed, in place of each half's input (and the last sum).
        qkv_bias: whether queries, keys and values have a bias.
        names: our modules of the model → the checkpoint's.
        block_names: our modules of a layer → the checkpoint's, or the several that one of ours
            fuses.
        transposed: whether the checkpoint keeps a layer's matrices transposed (Conv1D).
    """

    inner: int
    embedding_dropout: float
    residual_dropout: float
    attention_dropout: float
    scales: Sequence[float]
    windows: Sequence[Window]
    post_norm: bool
    qkv_bias: bool
    names: KeyTable
    block_names: KeyTable
    transposed: bool


class DecoderBlock(Block):
    """Attention and the feed-forward network, each on normed input, or each sum normed.

    Pre-norm, each sum is formed by the norm that follows it, so blocks take and hand on their last
    term and the residual unadded.
    """

    def __init__(self, config: Any, shape: DecoderShape, layer: int, approximate: str) -> None:
        super().__init__()
        width, eps, dropout = config.hidden_size, config.layer_norm_epsilon, shape.residual_dropout
        before = dropout if layer or shape.post_norm else shape.embedding_dropout
        self.post_norm = shape.post_norm
        self.norm_1 = AddNorm(width, eps, before)
        self.attention = SelfAttention(
            width,
            config.num_attention_heads,
            layer,
            shape.scales[layer],
            shape.attention_dropout,
            shape.windows[layer],
            shape.qkv_bias,
        )
        self.norm_2 = AddNorm(width, eps, dropout)
        self.feed_forward = FeedForward(width, shape.inner, approximate)
        matrices = [ours for ours in shape.block_names if "norm" not in ours]
        map_keys(self, shape.block_names, transposed=matrices if shape.transposed else ())

    def compute(
        self, term_TE: Tensor, residual_TE: Tensor | None, attend: Attend
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Term and residual → the next ones, and the sum of those that came, all `[T, E]`.

        The first block's term are the embeddings, which have no residual; post-norm no block has.
        """
        if self.post_norm:
            middle_TE = self.norm_1(self.attention(term_TE, attend), term_TE)
            return self.norm_2(self.feed_forward(middle_TE), middle_TE), None, term_TE
        normed_TE, sum_TE = self.norm_1.with_sum(term_TE, residual_TE)
        mixed_TE = self.attention(normed_TE, attend)
        normed_TE, residual_TE = self.norm_2.with_sum(mixed_TE, sum_TE)
        return self.feed_forward(normed_TE), residual_TE, sum_TE


class Decoder(PreTrainedModel):
    """A decoder without a head; a family is a configuration and its `DecoderShape`.

    Args:
        config: the model's configuration.

    Attributes:
        activation_field: the configuration's field that names the activation.
        activations: names it may hold → `approximate` of the op.

    Raises:
        ValueError: the config asks for cross-attention, attention weights, or an activation that is
            no GELU.
    """

    activation_field: ClassVar[str] = "activation_function"
    activations: ClassVar[Mapping[str, str]] = ACTIVATIONS

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        heads, width = config.num_attention_heads, config.hidden_size
        check_shapes(config, width, heads, self.activation_field, self.activations)
        shape = self.shape(config)
        approximate = self.activations[getattr(config, self.activation_field)]
        words, positions = config.vocab_size, config.max_position_embeddings
        layers = config.num_hidden_layers
        self.limits = Limits(words, positions, types=words, width=width)
        self.embeddings = Embeddings(words, positions, 0, width, None)
        self.layers = nn.ModuleList(
            DecoderBlock(config, shape, i, approximate) for i in range(layers)
        )
        dropout = shape.residual_dropout if layers else shape.embedding_dropout
        self.drop: Dropout | None = None
        self.final_norm: AddNorm | None = None
        if shape.post_norm:
            self.drop = Dropout(shape.embedding_dropout)
        else:
            self.final_norm = AddNorm(width, config.layer_norm_epsilon, dropout)
        map_keys(self, shape.names)
        self.post_init()

    @staticmethod
    def shape(config: Any) -> DecoderShape:
        """The family's shape."""
        raise NotImplementedError("a family says what its shape is")

    def embed(self, values: Tensor, positions: Tensor, types: Tensor | None = None) -> Tensor:
        """Embeddings `[T, E]` of words (or of given embeddings), positions and types.

        Their dropout is left to the first norm, where that is what comes next.
        """
        words, places = self.embeddings(values, positions)
        if types is not None:
            words = words + self.embeddings.word_embeddings(types)
        return words + places if self.drop is None else self.drop(words + places)

    def decode(self, x_TE: Tensor, attend: Attend, every_layer: bool = False) -> tuple[Tensor, ...]:
        """Embeddings → hidden states `[T, E]`: the last, or what enters each layer and the last."""
        states: list[Tensor] = []
        term: Tensor = x_TE
        residual: Tensor | None = None
        for block in self.layers:
            term, residual, entering = block(term, residual, attend)
            if every_layer:
                states.append(entering)
        last = term if self.final_norm is None else self.final_norm(term, residual)
        return (*states, last)

    def run(
        self,
        inputs: tuple[Any, ...],
        output_hidden_states: bool | None,
        **refused: Any,
    ) -> Run:
        """What `forward` computes, still packed, for a head to go on from."""
        for name in ("past_key_values", "use_cache"):
            refuse("generate() keeps a cache of its own", **{name: refused.pop(name, None)})
        refuse("leave it out, or use transformers for it", **refused)
        batch = enter(self.limits, *inputs)
        every_layer = self._wants_layers(output_hidden_states)
        x_TE = self.embed(batch.values, batch.positions(), batch.token_type_ids)
        states = self.decode(x_TE, SelfAttend(batch, causal=True), every_layer)
        return Run.of(batch, states, every_layer)

    def hidden(
        self,
        inputs: tuple[Any, ...],
        output_hidden_states: bool | None,
        return_dict: bool | None,
        **refused: Any,
    ) -> Any:
        """What a family's `forward` returns."""
        run = self.run(inputs, output_hidden_states, **refused)
        output = BaseModelOutput(
            last_hidden_state=leave(run.last, run.batch), hidden_states=run.every_layer
        )
        return self._finish(output, return_dict)


GPT2_NAMES: KeyTable = {
    "embeddings.word_embeddings": "wte",
    "embeddings.position_embeddings": "wpe",
    "layers": "h",
    "final_norm": "ln_f",
}
GPT2_BLOCK_NAMES: KeyTable = {
    "norm_1": "ln_1",
    "attention.qkv": "attn.c_attn",
    "attention.out": "attn.c_proj",
    "norm_2": "ln_2",
    "feed_forward.inner": "mlp.c_fc",
    "feed_forward.outer": "mlp.c_proj",
}


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


class GPT2Model(Decoder, GPT2PreTrainedModel):
    """GPT-2's decoder without a head."""

    @staticmethod
    def shape(config: GPT2Config) -> DecoderShape:
        """Pre-norm; the scores' scale is 1/√(head dim) or 1, or that over the layer's number."""
        scale = (config.n_embd // config.n_head) ** -0.5 if config.scale_attn_weights else 1.0
        by_layer = config.scale_attn_by_inverse_layer_idx
        return DecoderShape(
            inner=4 * config.n_embd if config.n_inner is None else config.n_inner,
            embedding_dropout=config.embd_pdrop,
            residual_dropout=config.resid_pdrop,
            attention_dropout=config.attn_pdrop,
            scales=[scale / (i + 1 if by_layer else 1) for i in range(config.n_layer)],
            windows=[None] * config.n_layer,
            post_norm=False,
            qkv_bias=True,
            names=GPT2_NAMES,
            block_names=GPT2_BLOCK_NAMES,
            transposed=True,
        )

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
        return self.hidden(
            (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds),
            output_hidden_states,
            return_dict,
            past_key_values=past_key_values,
            use_cache=use_cache,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            output_attentions=output_attentions,
        )
