"""Storing new keys and values in their pages with one indexed copy each."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def paged_write(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor) -> None:
    """What `bertgpt.ops.paged_write` does; the arguments are described there.

    The last of several tokens with the same slot stays.
    """
    _, K, N, _ = k_pages.shape
    chosen, rows = _places(tuple(slots.tolist()), K, N, k_pages.device)
    with torch.no_grad():
        for tokens, pages in ((k, k_pages), (v, v_pages)):
            _store(tokens if chosen is None else tokens[chosen], pages, rows)


def _store(tokens_TKD: Tensor, pages_PKND: Tensor, rows: Tensor) -> None:
    _, K, N, D = pages_PKND.shape
    if pages_PKND.is_contiguous():  # rows of one matrix, several times as fast
        pages_PKND.view(-1, D).index_copy_(0, rows, tokens_TKD.reshape(-1, D))
        return
    first_T = rows.view(-1, K)[:, 0]  # of each token's rows, the one of head 0
    pages_PKND[first_T // (K * N), :, first_T % N] = tokens_TKD


@lru_cache(maxsize=4)
def _places(
    slots: tuple[int, ...], K: int, N: int, device: torch.device
) -> tuple[Tensor | None, Tensor]:
    """Which tokens are stored, None for all, and the row of each and each head in [P · K · N, D].

    Every layer of a step asks for the same; by values, which cannot go stale. An indexed copy may
    mix tokens that share a slot, so only the last of each is stored.
    """
    last = {slot: token for token, slot in enumerate(slots) if slot >= 0}
    slot_T1 = torch.tensor(list(last), dtype=torch.int64, device=device)[:, None]
    head = torch.arange(K, device=device)
    rows = ((slot_T1 // N * K + head) * N + slot_T1 % N).flatten()
    chosen = None
    if len(last) < len(slots):
        chosen = torch.tensor(list(last.values()), dtype=torch.int64, device=device)
    return chosen, rows
