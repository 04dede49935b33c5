"""The paged KV cache's bookkeeping: which page belongs to which sequence. No attention maths.

Pages are counted and handed out on the host; the tensors made here (slots, page tables, lengths)
hold only what has been handed out, so the ops need not check them on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

MIN_PAGE_SIZE, MAX_PAGE_SIZE = 8, 256
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class OutOfPages(RuntimeError):
    """The cache has fewer free pages than were asked for; nothing has changed."""


@dataclass
class _Entry:
    """One sequence: its pages in order, and how many tokens they hold."""

    pages: list[int] = field(default_factory=list)
    length: int = 0


class PagedKVCache:
    """Keys and values of many sequences in one pool of pages.

    Every layer has its own page tensors, and all share one page table: page p of a sequence is
    page p in each layer.

    Attributes:
        num_pages: P.
        page_size: N, tokens a page holds.
        layers: One (k_pages, v_pages) a layer, each [P, K, N, D], zero at first.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        """Allocates the pool: 2 · num_layers · P · K · N · D elements of `dtype`.

        Args:
            num_pages: P.
            page_size: N, a power of two from 8 to 256.
            num_layers: Layers that keep keys and values.
            num_kv_heads: K.
            head_dim: D.
            dtype: float16, bfloat16, float32 or float64.
            device: Where the pages lie, and the tensors that this class makes.

        Raises:
            ValueError: A size is not positive, or the page size no power of two from 8 to 256.
            TypeError: `dtype` is not one of those above.
        """
        sizes = {
            "num_pages": num_pages,
            "num_layers": num_layers,
            "num_kv_heads": num_kv_heads,
            "head_dim": head_dim,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, not {size}")
        if not MIN_PAGE_SIZE <= page_size <= MAX_PAGE_SIZE or page_size & (page_size - 1):
            raise ValueError(f"page_size must be a power of two from 8 to 256, not {page_size}")
        if dtype not in _DTYPES:
            raise TypeError(f"dtype must be float16, bfloat16, float32 or float64, not {dtype}")
        self.num_pages = num_pages
        self.page_size = page_size
        shape = (num_pages, num_kv_heads, page_size, head_dim)
        self.layers = [
            (
                torch.zeros(shape, dtype=dtype, device=device),
                torch.zeros(shape, dtype=dtype, device=device),
            )
            for _ in range(num_layers)
        ]
        self._device = self.layers[0][0].device
        self._free = list(range(num_pages - 1, -1, -1))  # a stack: the lowest page goes first
        self._entries: dict[int, _Entry] = {}
        self._next_sequence = 0

    @property
    def num_free_pages(self) -> int:
        """Pages that no sequence holds."""
        return len(self._free)

    def allocate(self, num_tokens: int) -> int:
        """Starts an empty sequence and sets pages aside for its first tokens.

        Args:
            num_tokens: Tokens that `append` can then add without asking for a page; 0 or more.

        Returns:
            The sequence's id, never used before.

        Raises:
            ValueError: `num_tokens` is negative.
            OutOfPages: There are too few free pages; nothing has changed.
        """
        if num_tokens < 0:
            raise ValueError(f"num_tokens must not be negative, it is {num_tokens}")
        entry = _Entry()
        self._grow([(entry, num_tokens)])
        sequence = self._next_sequence
        self._next_sequence += 1
        self._entries[sequence] = entry
        return sequence

    def append(self, sequences: Sequence[int], counts: Sequence[int]) -> Tensor:
        """Makes room for new tokens at the end of each sequence.

        Args:
            sequences: Ids, each at most once.
            counts: New tokens of each, 0 or more.

        Returns:
            int64 [sum(counts)] slots for `paged_write`, in the order given: page · N + place.

        Raises:
            TypeError: A count is not an int.
            ValueError: An id is unknown, freed or given twice, a count is negative, or there is
                not one count for each id.
            OutOfPages: There are too few free pages; nothing has changed.
        """
        if len(sequences) != len(counts):
            raise ValueError(f"{len(sequences)} sequences but {len(counts)} counts")
        if len(set(sequences)) != len(sequences):
            raise ValueError(f"a sequence is given twice: {list(sequences)}")
        entries = [self._entry(sequence) for sequence in sequences]
        for sequence, count in zip(sequences, counts, strict=True):
            if not isinstance(count, int):
                raise TypeError(f"sequence {sequence} has the count {count!r}, not an integer")
            if count < 0:
                raise ValueError(f"sequence {sequence} has the negative count {count}")
        self._grow([(e, e.length + n) for e, n in zip(entries, counts, strict=True)])
        slots: list[int] = []
        for entry, count in zip(entries, counts, strict=True):
            for position in range(entry.length, entry.length + count):
                page, place = divmod(position, self.page_size)
                slots.append(entry.pages[page] * self.page_size + place)
            entry.length += count
        return torch.tensor(slots, dtype=torch.int64, device=self._device)

    def free(self, sequence: int) -> None:
        """Ends a sequence and gives its pages back.

        Raises:
            ValueError: The id is unknown or already freed.
        """
        pages = self._entry(sequence).pages
        del self._entries[sequence]
        self._free.extend(reversed(pages))

    def page_table(self, sequences: Sequence[int]) -> Tensor:
        """Each sequence's pages in order, for `paged_attention`.

        Returns:
            int32 [B, max_pages], as wide as the most pages of one of them, filled up with 0.

        Raises:
            ValueError: An id is unknown or freed.
        """
        rows = [self._entry(sequence).pages for sequence in sequences]
        width = max(map(len, rows), default=0)
        padded = [row + [0] * (width - len(row)) for row in rows]
        table = torch.tensor(padded, dtype=torch.int32, device=self._device)
        return table.view(len(rows), width)

    def lengths(self, sequences: Sequence[int]) -> Tensor:
        """How many tokens each sequence has, the latest appended included.

        Returns:
            int32 [B].

        Raises:
            ValueError: An id is unknown or freed.
        """
        values = [self._entry(sequence).length for sequence in sequences]
        return torch.tensor(values, dtype=torch.int32, device=self._device)

    def _entry(self, sequence: int) -> _Entry:
        entry = self._entries.get(sequence)
        if entry is None:
            raise ValueError(f"sequence {sequence} is unknown or has been freed")
        return entry

    def _grow(self, wanted: list[tuple[_Entry, int]]) -> None:
        """Gives each entry pages for that many tokens, or raises and gives none."""
        missing = [max(0, -(-tokens // self.page_size) - len(e.pages)) for e, tokens in wanted]
        if sum(missing) > len(self._free):
            raise OutOfPages(
                f"{sum(missing)} pages are needed but {len(self._free)} of {self.num_pages} are "
                "free; free a sequence, or make a cache with more pages"
            )
        for (entry, _), count in zip(wanted, missing, strict=True):
            entry.pages.extend(self._free.pop() for _ in range(count))
