"""Storing new keys and values in their pages with one indexed copy each."""

from __future__ import annotations

import torch
from torch import Tensor


def paged_write(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor) -> None:
    """What `bertgpt.ops.paged_write` does; the arguments are described there.

    The last of several tokens with the same slot stays.
    """
    # An indexed copy may mix tokens that share a slot, so only the last of each is copied.
    last = {slot: token for token, slot in enumerate(slots.tolist()) if slot >= 0}
    if len(last) < len(slots):
        slots, token = torch.tensor([[*last], [*last.values()]], device=slots.device).long()
        k, v = k[token], v[token]
    page_size = k_pages.shape[2]
    with torch.no_grad():
        page, offset = slots // page_size, slots % page_size
        k_pages[page, :, offset] = k
        v_pages[page, :, offset] = v
