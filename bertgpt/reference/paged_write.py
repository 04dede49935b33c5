"""Storing new keys and values in their pages, by the definition: one token after the other."""

from __future__ import annotations

import torch
from torch import Tensor


def paged_write(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor) -> None:
    """What `bertgpt.ops.paged_write` does; the arguments are described there.

    The last of several tokens with the same slot stays.
    """
    page_size = k_pages.shape[2]
    with torch.no_grad():
        for token, slot in enumerate(slots.tolist()):
            if slot >= 0:
                page, offset = divmod(slot, page_size)
                k_pages[page, :, offset] = k[token]
                v_pages[page, :, offset] = v[token]
