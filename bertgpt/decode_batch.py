"""One token per sequence, step after step, in tensors that stay where they are.

A CUDA graph replays on the addresses that it was captured with. So the tensors that a decoding step
reads are made once, for a batch of fixed size, and each step writes its numbers into them; the
host waits for nothing. Rows without a sequence are there and do nothing: they have length 0, and
their slot is skipped by `paged_write`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bertgpt.kv_cache import PagedKVCache, staged
from bertgpt.page_allocator import check_int

_SKIP = -1


class DecodeBatch:
    """What `paged_write` and `paged_attention` read in a decoding step, at fixed addresses.

    A step of fewer sequences may use the first rows alone: such slices keep their addresses too.

    Attributes:
        cache: The cache whose sequences decode.
        size: Rows, B.
        max_tokens: Longest sequence that a row can hold.
        page_table: int32 [B, ⌈max_tokens / N⌉].
        lengths: int32 [B], keys of each sequence with the step's own; 0 for a row without one.
        slots: int64 [B], where the step's keys and values go; −1 for a row without a sequence.
        positions: int64 [B], of the step's tokens; 0 for a row without a sequence.
    """

    @torch.inference_mode(False)  # whatever the caller is in, each step writes to them
    def __init__(self, cache: PagedKVCache, size: int, max_tokens: int) -> None:
        """Makes the tensors, on the cache's device.

        Raises:
            TypeError: A size is no int.
            ValueError: A size is below 1.
        """
        for name, value in (("size", size), ("max_tokens", max_tokens)):
            check_int(name, value)
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        self.cache = cache
        self.size = size
        self.max_tokens = max_tokens
        device = cache.device
        width = -(-max_tokens // cache.page_size)
        self.page_table = torch.zeros(size, width, dtype=torch.int32, device=device)
        self.lengths = torch.zeros(size, dtype=torch.int32, device=device)
        self._places = torch.tensor([[_SKIP] * size, [0] * size], device=device)
        self.slots, self.positions = self._places
        self._rows: list[tuple[int, int] | None] = [None] * size  # sequence, version of its pages

    def advance(self, sequences: Sequence[int]) -> None:
        """Appends one token to each sequence, and writes the step's numbers into the tensors.

        Args:
            sequences: Ids, each at most once; the first goes to row 0. A sequence that stays in its
                row costs least.

        Raises:
            TypeError: An id is not an int.
            ValueError: An id is unknown, freed or given twice, there are more than rows, or a
                sequence has `max_tokens` already.
            OutOfPages: There are too few free pages. In each case nothing has changed.
        """
        allocator, count = self.cache.allocator, len(sequences)
        if count > self.size:
            raise ValueError(f"{count} sequences do not fit {self.size} rows")
        entries = [allocator.entry(sequence) for sequence in sequences]
        for sequence, entry in zip(sequences, entries, strict=True):
            if entry.length >= self.max_tokens:
                raise ValueError(
                    f"sequence {sequence} has {entry.length} tokens, and a row holds no more than "
                    f"{self.max_tokens}"
                )
        slots = allocator.append(sequences, [1] * count)
        changed, width = [], self.page_table.shape[1]
        rows = []
        for row, (sequence, entry) in enumerate(zip(sequences, entries, strict=True)):
            if self._rows[row] != (sequence, entry.version):
                self._rows[row] = (sequence, entry.version)
                changed.append(row)
                rows.append((entry.pages + [0] * width)[:width])
        device, spare = self.cache.device, self.size - count
        if changed:
            index = staged(changed, torch.int64, device).to(device, non_blocking=True)
            table = staged(rows, torch.int32, device).to(device, non_blocking=True)
            self.page_table.index_copy_(0, index, table)
        lengths = [entry.length for entry in entries]
        places = [slots + [_SKIP] * spare, [n - 1 for n in lengths] + [0] * spare]
        self.lengths.copy_(staged(lengths + [0] * spare, torch.int32, device), non_blocking=True)
        self._places.copy_(staged(places, torch.int64, device), non_blocking=True)
