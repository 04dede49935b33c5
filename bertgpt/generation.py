"""Greedy decoding of ragged prompts on a paged key-value cache.

Prompts are read in one packed pass, which fills the cache; then every step reads one token per
unfinished sequence, which attends to its own pages. A sequence that finishes gives its pages back
at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

from bertgpt import ops
from bertgpt.door import enter
from bertgpt.kv_cache import PagedKVCache
from bertgpt.layers import SelfAttend
from bertgpt.packing import PackedBatch, pack, unpad

if TYPE_CHECKING:
    from bertgpt.gpt import GPT2LMHeadModel
    from bertgpt.gpt_decoder import GPT2Model

PAGE_SIZE = 16


@dataclass(frozen=True)
class FillPages:
    """Prompts attend within themselves while their keys and values go to their pages."""

    cache: PagedKVCache
    slots: Tensor
    attend: SelfAttend

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, layer: int, scale: float, dropout_p: float
    ) -> Tensor:
        """Attention over the packed prompts, `[T, H, D]` each."""
        ops.paged_write(k, v, *self.cache.layers[layer], self.slots)
        return self.attend(q, k, v, layer, scale, dropout_p)


@dataclass(frozen=True)
class ReadPages:
    """One token per sequence attends to all of its sequence's pages, its own key among them."""

    cache: PagedKVCache
    slots: Tensor
    page_table: Tensor
    lengths: Tensor

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, layer: int, scale: float, dropout_p: float
    ) -> Tensor:
        """Attention of B tokens, `[B, H, D]` each."""
        k_pages, v_pages = self.cache.layers[layer]
        ops.paged_write(k, v, k_pages, v_pages, self.slots)
        return ops.paged_attention(q, k_pages, v_pages, self.page_table, self.lengths, scale=scale)


@torch.no_grad()
def greedy(
    model: GPT2LMHeadModel,
    prompts: Sequence[Sequence[int]] | Tensor,
    max_new_tokens: int,
    *,
    attention_mask: Tensor | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
) -> Any:
    """Continues each prompt with its likeliest next token until a stop token or the limit.

    Args:
        model: the language model; put it in eval mode first, dropout would apply otherwise.
        prompts: B lists of token ids of any lengths; or a padded tensor `[B, L]`, as transformers
            takes it, whose real tokens are counted from position 0.
        max_new_tokens: most tokens to add to each prompt.
        attention_mask: `[B, L]` beside a tensor, nonzero for real tokens; by default the tokens
            that differ from the padding token, where that is set and is no stop token.
        eos_token_id: token or tokens that end a sequence (kept in it); None takes the config's,
            an empty sequence never stops.
        pad_token_id: fills rows of the returned tensor that ended early; None takes the config's,
            or else the first stop token, or else 0.

    Returns:
        The prompts with what was added: lists for lists, a tensor `[B, L + added]` for a tensor.

    Raises:
        TypeError: prompts, a limit, stop or padding tokens that are no integers.
        ValueError: an empty prompt, a limit below 1, or more tokens than the position table holds.
        IndexError: a token outside the vocabulary.
    """
    stops = _stop_tokens(eos_token_id, model.config.eos_token_id)
    if pad_token_id is None:
        pad_token_id = model.config.pad_token_id
    elif not _is_int(pad_token_id):
        raise TypeError(f"pad_token_id must be a token id, not {pad_token_id!r}")
    batch = _prompts(prompts, attention_mask, pad_token_id, stops).to(model.device)
    _check(model, batch, max_new_tokens)
    added = _decode(model, batch, max_new_tokens, stops)
    if not isinstance(prompts, Tensor):
        return [[*map(int, prompt), *new] for prompt, new in zip(prompts, added, strict=True)]
    fill = next((token for token in (pad_token_id, *stops) if token is not None), 0)
    width = max(map(len, added), default=0)
    rows = [new + [fill] * (width - len(new)) for new in added]
    tail = torch.tensor(rows, dtype=prompts.dtype, device=prompts.device)
    return torch.cat([prompts, tail.view(prompts.shape[0], width)], dim=1)


def _stop_tokens(given: int | Sequence[int] | None, default: int | list[int] | None) -> list[int]:
    stops = default if given is None else given
    if stops is None:
        return []
    tokens = list(stops) if isinstance(stops, Sequence) else [stops]
    if not all(_is_int(token) for token in tokens):
        raise TypeError(f"eos_token_id must be a token id or a sequence of them, not {stops!r}")
    return tokens


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _prompts(
    prompts: Sequence[Sequence[int]] | Tensor,
    attention_mask: Tensor | None,
    pad_token_id: int | None,
    stops: list[int],
) -> PackedBatch:
    if not isinstance(prompts, Tensor):
        if attention_mask is not None:
            raise ValueError("attention_mask goes with a padded tensor, not with lists")
        return pack(prompts)
    if prompts.ndim != 2:
        raise ValueError(f"prompts must be [B, L] or lists, not {list(prompts.shape)}")
    if attention_mask is None:
        attention_mask = torch.ones_like(prompts)
        if pad_token_id is not None and pad_token_id not in stops:
            attention_mask = (prompts != pad_token_id).long()
    return unpad(prompts, attention_mask)


def _check(model: GPT2LMHeadModel, batch: PackedBatch, max_new_tokens: int) -> None:
    if not _is_int(max_new_tokens):
        raise TypeError(f"max_new_tokens must be an integer, not {max_new_tokens!r}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    if min(batch.lengths, default=1) == 0:
        raise ValueError(f"prompt {batch.lengths.index(0)} is empty: start it with a token")
    room = model.config.n_positions - batch.max_seqlen
    if max_new_tokens > room:
        raise ValueError(
            f"a prompt of {batch.max_seqlen} tokens leaves room for {max(room, 0)} more in the "
            f"position table of {model.config.n_positions}, not {max_new_tokens}"
        )
    enter(model.transformer.limits, batch)


def _decode(
    model: GPT2LMHeadModel, batch: PackedBatch, max_new_tokens: int, stops: list[int]
) -> list[list[int]]:
    """The tokens added to each prompt."""
    cache = _cache(model, batch, max_new_tokens)
    sequences = [cache.allocate(length + max_new_tokens) for length in batch.lengths]
    added: list[list[int]] = [[] for _ in sequences]
    active = list(range(len(sequences)))
    slots = cache.append(sequences, list(batch.lengths))
    fill = FillPages(cache, slots, SelfAttend(batch, causal=True))
    hidden = _forward(model, batch.values, batch.positions(), fill)
    tokens = _likeliest(model, hidden[batch.cu_seqlens[1:].long() - 1])
    while active:
        chosen = tokens.tolist()
        ops.raise_pending()  # the host has just waited for the device
        for row, token in zip(active, chosen, strict=True):
            added[row].append(token)
        going = [
            i
            for i, row in enumerate(active)
            if chosen[i] not in stops and len(added[row]) < max_new_tokens
        ]
        for i in set(range(len(active))) - set(going):
            cache.free(sequences[active[i]])
        if len(going) < len(active):
            tokens = tokens[torch.tensor(going, dtype=torch.int64, device=tokens.device)]
            active = [active[i] for i in going]
        if active:
            tokens = _step(model, cache, [sequences[row] for row in active], tokens)
    return added


def _step(
    model: GPT2LMHeadModel, cache: PagedKVCache, sequences: list[int], tokens: Tensor
) -> Tensor:
    """Next tokens `[B]` after `tokens` `[B]`."""
    slots = cache.append(sequences, [1] * len(sequences))
    lengths = cache.lengths(sequences)
    pages = ReadPages(cache, slots, cache.page_table(sequences), lengths)
    return _likeliest(model, _forward(model, tokens, lengths.long() - 1, pages))


def _forward(
    model: GPT2LMHeadModel, tokens: Tensor, positions: Tensor, attend: FillPages | ReadPages
) -> Tensor:
    decoder: GPT2Model = model.transformer
    return decoder.decode(decoder.embed(tokens, positions), attend)[-1]


def _likeliest(model: GPT2LMHeadModel, hidden: Tensor) -> Tensor:
    return model.lm_head(hidden).argmax(dim=-1)


def _cache(model: GPT2LMHeadModel, batch: PackedBatch, max_new_tokens: int) -> PagedKVCache:
    """Pages for every prompt and all that may follow it."""
    config = model.config
    pages = sum(-(-(length + max_new_tokens) // PAGE_SIZE) for length in batch.lengths)
    return PagedKVCache(
        num_pages=max(pages, 1),
        page_size=PAGE_SIZE,
        num_layers=max(config.n_layer, 1),
        num_kv_heads=config.n_head,
        head_dim=config.n_embd // config.n_head,
        dtype=model.dtype,
        device=model.device,
    )
