"""A decoder's forward pass on a paged key-value cache: prompts in one packed pass, then tokens.

Which token comes next is no matter of this file: `generation`, `beam_search` and whoever else
schedules sequences call it with a cache of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from bertgpt import ops
from bertgpt.kv_cache import PagedKVCache
from bertgpt.layers import SelfAttend, Window
from bertgpt.packing import PackedBatch, pack

if TYPE_CHECKING:
    from bertgpt.generation import GenerationMixin


@dataclass(frozen=True)
class FillPages:
    """Prompts attend within themselves while their keys and values go to their pages."""

    cache: PagedKVCache
    slots: Tensor
    attend: SelfAttend

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
        """Attention over the packed prompts, `[T, H, D]` each."""
        ops.paged_write(k, v, *self.cache.layers[layer], self.slots)
        return self.attend(q, k, v, layer, scale, dropout_p, window)


@dataclass(frozen=True)
class ReadPages:
    """New tokens attend to all of their sequence's pages, their own keys among them.

    One token per sequence, or chunks of several with their boundaries `cu_seqlens` `[B + 1]`.
    """

    cache: PagedKVCache
    slots: Tensor
    page_table: Tensor
    lengths: Tensor
    cu_seqlens: Tensor | None = None
    max_seqlen: int = 1

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
        """Attention of the new tokens, `[T, H, D]` each."""
        k_pages, v_pages = self.cache.layers[layer]
        ops.paged_write(k, v, k_pages, v_pages, self.slots)
        return ops.paged_attention(
            q,
            k_pages,
            v_pages,
            self.page_table,
            self.lengths,
            cu_seqlens_q=self.cu_seqlens,
            max_seqlen_q=self.max_seqlen,
            window=window,
            scale=scale,
        )


def pages_for(lengths: Sequence[int], limits: Sequence[int], texts: int, page_size: int) -> int:
    """Pages for prompts of these lengths and, on each, `texts` texts that share its full pages.

    Args:
        lengths: tokens of each prompt.
        limits: most tokens that a text adds to it.
        texts: how many go on from each prompt.
        page_size: tokens of a page.
    """
    pages = 0
    for length, limit in zip(lengths, limits, strict=True):
        shared = length // page_size
        pages += shared + texts * (-(-(length + limit) // page_size) - shared)
    return pages


def make_cache(model: GenerationMixin, num_pages: int, page_size: int) -> PagedKVCache:
    """A cache of the model's shape, dtype and device, for the heads that this rank computes."""
    config, ranks = model.config, 1 if model.mesh is None else model.mesh.size()
    return PagedKVCache(
        num_pages=max(num_pages, 1),
        page_size=page_size,
        num_layers=max(config.num_hidden_layers, 1),
        num_kv_heads=config.num_attention_heads // ranks,
        head_dim=config.hidden_size // config.num_attention_heads,
        dtype=model.dtype,
        device=model.device,
    )


def read_prompts(
    model: GenerationMixin, cache: PagedKVCache, sequences: Sequence[int], batch: PackedBatch
) -> Tensor:
    """Reads whole prompts into empty sequences.

    Returns:
        `[B, V]`: the scores of each prompt's next token.

    Raises:
        OutOfPages: there are too few free pages; nothing has changed.
    """
    slots = cache.append(sequences, list(batch.lengths))
    attend = FillPages(cache, slots, SelfAttend(batch, causal=True))
    hidden = forward(model, batch.values, batch.positions(), attend)
    return model.lm_head(hidden[batch.cu_seqlens[1:].long() - 1])


def read_tokens(
    model: GenerationMixin, cache: PagedKVCache, sequences: Sequence[int], tokens: Tensor
) -> Tensor:
    """Reads one more token `[B]` of each sequence.

    Returns:
        `[B, V]`: the scores of each sequence's next token.

    Raises:
        OutOfPages: there are too few free pages; nothing has changed.
    """
    slots = cache.append(sequences, [1] * len(sequences))
    lengths = cache.lengths(sequences)
    attend = ReadPages(cache, slots, cache.page_table(sequences), lengths)
    return model.lm_head(forward(model, tokens, lengths.long() - 1, attend))


def read_chunks(
    model: GenerationMixin,
    cache: PagedKVCache,
    sequences: Sequence[int],
    chunks: Sequence[Sequence[int]],
    longest: int,
) -> Tensor:
    """Reads more tokens of each sequence, any number of them above none.

    Args:
        model: the language model.
        cache: where the sequences are.
        sequences: B of them.
        chunks: each one's tokens.
        longest: no chunk is longer; the same for all calls keeps a text's numbers the same.

    Returns:
        `[B, V]`: the scores of the token after each chunk.

    Raises:
        OutOfPages: there are too few free pages; nothing has changed.
    """
    batch = pack(chunks).to(model.device)
    slots = cache.append(sequences, list(batch.lengths))
    lengths = cache.lengths(sequences)
    table = cache.page_table(sequences)
    attend = ReadPages(cache, slots, table, lengths, batch.cu_seqlens, longest)
    before = lengths - batch.cu_seqlens.diff()
    tokens = batch.values.shape[0]
    positions = batch.positions() + before.repeat_interleave(
        batch.cu_seqlens.diff(), output_size=tokens
    )
    hidden = forward(model, batch.values, positions, attend)
    return model.lm_head(hidden[batch.cu_seqlens[1:].long() - 1])


def forward(
    model: GenerationMixin, tokens: Tensor, positions: Tensor, attend: FillPages | ReadPages
) -> Tensor:
    """Hidden states `[T, E]` of tokens at these positions, `[T]` each."""
    decoder = model.transformer
    return decoder.decode(decoder.embed(tokens, positions), attend)[-1]
