"""Storing new keys and values in their pages with one indexed copy each."""

from __future__ import annotations

import torch
from torch import Tensor


def paged_write(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor) -> None:
    """What `bertgpt.ops.paged_write` does; the arguments are described there.

    The last of several tokens with the same slot stays.
    """
    # An indexed copy may mix tokens that share a slot, so only the last of each is copied.
    slot, token = slots.long().sort(stable=True)
    written = slot >= 0
    written[:-1] &= slot[:-1] != slot[1:]
    slot, token = slot[written], token[written]
    page_size = k_pages.shape[2]
    with torch.no_grad():
        page, offset = slot // page_size, slot % page_size
        k_pages[page, :, offset] = k[token]
        v_pages[page, :, offset] = v[token]
