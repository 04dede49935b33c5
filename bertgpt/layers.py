"""The layers both models are made of: each holds weights, reshapes, and calls one op.

Everything here is packed: hidden states are `[T, E]`, T tokens of a whole batch and no padding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bertgpt import ops
from bertgpt.ops._linear import linear
from bertgpt.packing import PackedBatch

ACTIVATIONS = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}

# How far a query sees (left, right), −1 for no bound; None for everywhere.
Window = tuple[int, int] | None
# (q_THD, k_THD, v_THD, layer, scale, dropout_p, window) → out_THD: how the tokens at hand meet the
# keys.
Attend = Callable[[Tensor, Tensor, Tensor, int, float, float, Window], Tensor]


@dataclass(frozen=True)
class SelfAttend:
    """Every token of a batch attends within its own sequence."""

    batch: PackedBatch
    causal: bool = False

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer: int,
        scale: float,
        dropout_p: float,
        window: Window,
    ) -> Tensor:
        """Attention over the whole batch, `[T, H, D]` each."""
        batch = self.batch
        if batch.equal_lengths:  # [T, H, D] is [B, L, H, D] without a copy
            q, k, v = (x.unflatten(0, (len(batch), batch.max_seqlen)) for x in (q, k, v))
            out = ops.attention(
                q, k, v, causal=self.causal, window=window, scale=scale, dropout_p=dropout_p
            )
            return out.flatten(0, 1)
        return ops.attention(
            q,
            k,
            v,
            causal=self.causal,
            window=window,
            scale=scale,
            cu_seqlens_q=batch.cu_seqlens,
            max_seqlen_q=batch.max_seqlen,
            dropout_p=dropout_p,
        )


class Block(nn.Module):
    """A layer that a model repeats: `compute` is what it does, `forward` may do it twice.

    Attributes:
        checkpointing: arguments of `torch.utils.checkpoint.checkpoint`; in training only the
            layer's inputs are then kept, and the backward pass computes the rest again, with the
            same dropout. None keeps everything.
    """

    checkpointing: dict[str, Any] | None = None

    def compute(self, *inputs: Any) -> Any:
        """What the layer makes of its inputs."""
        raise NotImplementedError(f"{type(self).__name__} computes nothing")

    def forward(self, *inputs: Any) -> Any:
        """`compute`, inside the checkpoint, so that hooks on the layer run once."""
        if self.checkpointing is None or not (self.training and torch.is_grad_enabled()):
            return self.compute(*inputs)
        return checkpoint(self.compute, *inputs, **self.checkpointing)


class Embeddings(nn.Module):
    """The sum of word, position and (where there are tables) type embeddings, as two terms.

    Args:
        vocab_size: words.
        positions: length of the position table.
        types: token types, or 0 for no table.
        width: E.
        padding_idx: word whose embedding gets no gradient.
        tasks: task types, or 0 for no table.
        padding_place: position whose embedding gets no gradient.
    """

    def __init__(
        self,
        vocab_size: int,
        positions: int,
        types: int,
        width: int,
        padding_idx: int | None,
        tasks: int = 0,
        padding_place: int | None = None,
    ) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(vocab_size, width, padding_idx=padding_idx)
        self.position_embeddings = nn.Embedding(positions, width, padding_idx=padding_place)
        self.token_type_embeddings = nn.Embedding(types, width) if types else None
        self.task_type_embeddings = nn.Embedding(tasks, width) if tasks else None

    def forward(
        self,
        values: Tensor,
        positions: Tensor,
        types: Tensor | None = None,
        tasks: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The two terms, whose sum is left to the next op.

        Args:
            values: word ids `[T]`, or their embeddings `[T, E]`.
            positions: `[T]`.
            types: `[T]`, or None for type 0.
            tasks: `[T]`, or None for task 0.

        Returns:
            Words plus types, and positions, each `[T, E]`.
        """
        words = values if values.is_floating_point() else self.word_embeddings(values)
        for table, ids in ((self.token_type_embeddings, types), (self.task_type_embeddings, tasks)):
            if table is not None:
                words = words + (table.weight[0] if ids is None else table(ids))
        return words, self.position_embeddings(positions)


class Linear(nn.Linear):
    """torch's linear layer, on the faster GEMM of a CPU where nothing watches the call."""

    def forward(self, x: Tensor) -> Tensor:
        """`[..., E]` → `[..., F]`."""
        return linear(x, self.weight, self.bias)


class SelfAttention(nn.Module):
    """Multi-head self-attention with one fused projection for queries, keys and values.

    Args:
        width: E.
        heads: H, a divisor of E.
        layer: which of the model's layers this is.
        scale: of the scores; by default 1/√(E/H).
        dropout: of the attention weights.
        window: how far a query sees.
        qkv_bias: whether the fused projection has a bias.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        layer: int,
        scale: float | None = None,
        dropout: float = 0.0,
        window: Window = None,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__()
        self.heads, self.head_dim, self.layer = heads, width // heads, layer
        self.scale = self.head_dim**-0.5 if scale is None else scale
        self.dropout, self.window = dropout, window
        self.qkv = Linear(width, 3 * width, bias=qkv_bias)
        self.out = Linear(width, width)

    def forward(self, x_TE: Tensor, attend: Attend) -> Tensor:
        """`[T, E]` → `[T, E]`."""
        return self.out(self.mix(x_TE, attend))

    def project(self, x_TE: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values: `[T, E]` → `[T, H, D]` each."""
        return self.qkv(x_TE).view(-1, 3, self.heads, self.head_dim).unbind(1)

    def mix(self, x_TE: Tensor, attend: Attend) -> Tensor:
        """What the heads see, end to end: `[T, E]` → `[T, H · D]`."""
        q, k, v = self.project(x_TE)
        dropout_p = self.dropout if self.training else 0.0
        return attend(q, k, v, self.layer, self.scale, dropout_p, self.window).flatten(1)


class FeedForward(nn.Module):
    """W_out · gelu(W_in · x)."""

    def __init__(self, width: int, inner: int, approximate: str) -> None:
        super().__init__()
        self.approximate = approximate
        self.inner = nn.Linear(width, inner)
        self.outer = nn.Linear(inner, width)

    def forward(self, x_TE: Tensor) -> Tensor:
        """`[T, E]` → `[T, E]`."""
        return ops.gelu_ffn(
            x_TE,
            self.inner.weight,
            self.inner.bias,
            self.outer.weight,
            self.outer.bias,
            approximate=self.approximate,
        )


class AddNorm(nn.Module):
    """LayerNorm(dropout(x) + residual)."""

    def __init__(self, width: int, eps: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.eps, self.dropout = eps, dropout
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x_TE: Tensor, residual_TE: Tensor | None = None) -> Tensor:
        """The norm alone: what a post-norm layer hands on."""
        return self._call(x_TE, residual_TE, return_sum=False)

    def with_sum(self, x_TE: Tensor, residual_TE: Tensor | None) -> tuple[Tensor, Tensor]:
        """The norm and the sum under it: a pre-norm layer hands on both."""
        if residual_TE is None and not (self.training and self.dropout):
            return self.forward(x_TE), x_TE  # nothing dropped or added: it is its own sum
        return self._call(x_TE, residual_TE, return_sum=True)

    def _call(self, x: Tensor, residual: Tensor | None, return_sum: bool):  # type: ignore[no-untyped-def]
        return ops.add_layer_norm(
            x,
            residual,
            self.weight,
            self.bias,
            eps=self.eps,
            dropout_p=self.dropout if self.training else 0.0,
            return_sum=return_sum,
        )


class Dropout(nn.Module):
    """Dropout of rows `[..., E]` where no norm follows that would do it.

    It is the sum that `add_layer_norm` forms, so its bits are the defined ones on every backend.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """In training, x with elements dropped, in autocast's dtype; otherwise x itself."""
        if not self.training or self.p == 0.0:
            return x
        weight = x.new_ones(x.shape[-1])
        _, dropped = ops.add_layer_norm(x, None, weight, None, dropout_p=self.p, return_sum=True)
        return dropped
