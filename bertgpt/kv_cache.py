"""The paged KV cache: page tensors, and which page belongs to which sequence. No attention maths.

Pages are counted and handed out on the host; the tensors made here (slots, page tables, lengths)
hold only what has been handed out, so the ops need not check them on a GPU.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bertgpt.page_allocator import CacheStats, OutOfPages, PageAllocator, check_int
from bertgpt.prefix_index import PrefixIndex

__all__ = ["CacheStats", "OutOfPages", "PagedKVCache"]

MIN_PAGE_SIZE, MAX_PAGE_SIZE = 8, 256
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class PagedKVCache:
    """Keys and values of many sequences in one pool of pages.

    Every layer has its own page tensors, and all share one page table: page p of a sequence is
    page p in each layer.

    Attributes:
        num_pages: P.
        page_size: N, tokens a page holds.
        layers: One (k_pages, v_pages) a layer, each [P, K, N, D], zero at first.
        device: Where they lie.
        allocator: The bookkeeping; change it through this class alone.
    """

    @torch.inference_mode(False)  # whatever the caller is in, pages are written to by anyone
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
        prefix_reuse: bool = False,
        salt: bytes | None = None,
        zero_on_free: bool = False,
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
            prefix_reuse: Whether `allocate` may give a prompt the pages of an earlier one that
                starts alike. Who can time a request then learns whether its prompt was seen before.
            salt: Mixed into the keys that prefixes are found by; None draws one at random.
            zero_on_free: Whether pages are zeroed before another sequence may get them.

        Raises:
            ValueError: A size is not positive, the page size no power of two from 8 to 256, or a
                salt is given without `prefix_reuse`.
            TypeError: A size is no int, a switch no bool, `salt` no bytes, or `dtype` not one of
                those above.
        """
        sizes = {
            "num_pages": num_pages,
            "num_layers": num_layers,
            "num_kv_heads": num_kv_heads,
            "head_dim": head_dim,
        }
        for name, size in (*sizes.items(), ("page_size", page_size)):
            check_int(name, size)
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, not {size}")
        if not MIN_PAGE_SIZE <= page_size <= MAX_PAGE_SIZE or page_size & (page_size - 1):
            raise ValueError(f"page_size must be a power of two from 8 to 256, not {page_size}")
        if dtype not in _DTYPES:
            raise TypeError(f"dtype must be float16, bfloat16, float32 or float64, not {dtype}")
        self.num_pages = num_pages
        self.page_size = page_size
        prefixes = _prefix_index(page_size, prefix_reuse, salt)
        self._zero_on_free = _check_flag("zero_on_free", zero_on_free)
        shape = (num_pages, num_kv_heads, page_size, head_dim)
        self.layers = [
            (
                torch.zeros(shape, dtype=dtype, device=device),
                torch.zeros(shape, dtype=dtype, device=device),
            )
            for _ in range(num_layers)
        ]
        self.device = self.layers[0][0].device
        self.allocator = PageAllocator(num_pages, page_size, prefixes, self._copy, self._clear)

    @property
    def num_free_pages(self) -> int:
        """Pages that no sequence holds, those kept for reuse among them."""
        return self.allocator.pool.num_available

    def stats(self) -> CacheStats:
        """Counts the pages by their use."""
        return self.allocator.stats()

    def allocate(self, num_tokens: int, prompt: Sequence[int] | None = None) -> int:
        """Starts a sequence and sets pages aside for its first tokens.

        It starts empty; with `prompt` and `prefix_reuse` it starts with the longest run of full
        pages that the prompt begins with and that `remember` has made known. `length` tells how
        many tokens those are. The page of the prompt's last token is never among them, since that
        token must be read for the next one to be foretold.

        Args:
            num_tokens: Tokens in all, those found among them, that fit before `append` must ask
                for a page; 0 or more. (After a `fork` it may ask for one more.)
            prompt: The token ids that the sequence will start with.

        Returns:
            The sequence's id, never used before.

        Raises:
            TypeError: `num_tokens` or a token is no int.
            ValueError: `num_tokens` is negative.
            IndexError: A token id exceeds 64 bits.
            OutOfPages: There are too few free pages; nothing has changed.
        """
        return self.allocator.allocate(num_tokens, prompt)

    def append(self, sequences: Sequence[int], counts: Sequence[int]) -> Tensor:
        """Makes room for new tokens at the end of each sequence.

        A page that is shared and not full is copied first, in every layer, for the sequence that
        grows; the last one to hold it keeps it.

        Args:
            sequences: Ids, each at most once.
            counts: New tokens of each, 0 or more.

        Returns:
            int64 [sum(counts)] slots for `paged_write`, in the order given: page · N + place.

        Raises:
            TypeError: An id or a count is not an int.
            ValueError: An id is unknown, freed or given twice, a count is negative, or there is
                not one count for each id.
            OutOfPages: There are too few free pages; nothing has changed.
        """
        return self._tensor(self.allocator.append(sequences, counts), torch.int64)

    def fork(self, sequence: int) -> int:
        """Starts a sequence with all tokens of another one, which it shares the pages of.

        No key or value is copied until one of them grows. Pages set aside stay with the first.

        Returns:
            The new sequence's id.

        Raises:
            TypeError: The id is not an int.
            ValueError: The id is unknown or freed.
        """
        return self.allocator.fork(sequence)

    def free(self, sequence: int) -> None:
        """Ends a sequence and gives its pages back.

        Raises:
            TypeError: The id is not an int.
            ValueError: The id is unknown or already freed.
        """
        self.allocator.free(sequence)

    def remember(self, sequence: int, tokens: Sequence[int]) -> None:
        """Lets later prompts that start alike find a sequence's full pages.

        Call it when the keys and values have been written. Does nothing without `prefix_reuse`.

        Args:
            sequence: Its id.
            tokens: Its token ids from the first on; as many as are to be remembered.

        Raises:
            TypeError: The id or a token is not an int.
            ValueError: The id is unknown or freed, or there are more tokens than it has.
            IndexError: A token id exceeds 64 bits.
        """
        self.allocator.remember(sequence, tokens)

    def forget(self) -> None:
        """Makes all that was remembered unknown, so that no later prompt finds it.

        Needed when keys and values would now be others, as after a change of the model's weights.
        Sequences keep their pages, and can be remembered from their first page on.
        """
        self.allocator.forget()

    def length(self, sequence: int) -> int:
        """How many tokens a sequence has.

        Raises:
            TypeError: The id is not an int.
            ValueError: The id is unknown or freed.
        """
        return self.allocator.entry(sequence).length

    def page_table(self, sequences: Sequence[int]) -> Tensor:
        """Each sequence's pages in order, for `paged_attention`.

        Returns:
            int32 [B, max_pages], as wide as the most pages of one of them, filled up with 0.

        Raises:
            TypeError: An id is not an int.
            ValueError: An id is unknown or freed.
        """
        rows = [self.allocator.entry(sequence).pages for sequence in sequences]
        width = max(map(len, rows), default=0)
        padded = [row + [0] * (width - len(row)) for row in rows]
        return self._tensor(padded, torch.int32).view(len(rows), width)

    def lengths(self, sequences: Sequence[int]) -> Tensor:
        """How many tokens each sequence has, the latest appended included.

        Returns:
            int32 [B].

        Raises:
            TypeError: An id is not an int.
            ValueError: An id is unknown or freed.
        """
        return self._tensor([self.allocator.entry(s).length for s in sequences], torch.int32)

    def _copy(self, sources: list[int], targets: list[int]) -> None:
        """Copies whole pages in every layer; no target is a source."""
        if not sources:
            return
        source, target = self._tensor([sources, targets], torch.int64)
        for tensors in self.layers:
            for pages in tensors:
                pages[target] = pages[source]

    def _clear(self, pages: list[int]) -> None:
        """Zeroes pages whose content is done with, where that was asked for."""
        if self._zero_on_free and pages:
            index = self._tensor(pages, torch.int64)
            for tensors in self.layers:
                for tensor in tensors:
                    tensor.index_fill_(0, index, 0)

    def _tensor(self, values: Sequence[Any], dtype: torch.dtype) -> Tensor:
        return staged(values, dtype, self.device).to(self.device, non_blocking=True)


def staged(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor on the host, in memory that a copy to `device` can start from without waiting.

    Pinned memory is not given out again before such a copy is over, so it may be dropped at once.
    """
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")


def _prefix_index(page_size: int, prefix_reuse: bool, salt: bytes | None) -> PrefixIndex | None:
    if salt is not None and not isinstance(salt, bytes):
        raise TypeError(f"salt must be bytes, not {type(salt).__name__}")
    if not _check_flag("prefix_reuse", prefix_reuse):
        if salt is not None:
            raise ValueError("salt goes with prefix_reuse=True")
        return None
    return PrefixIndex(page_size, secrets.token_bytes(32) if salt is None else salt)


def _check_flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, not {value!r}")
    return value
