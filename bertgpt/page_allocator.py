"""Which page belongs to which sequence: the cache's bookkeeping on the host. No tensors.

Reading order: the sequences, what a caller does to them, what that does to pages.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from bertgpt.page_pool import PagePool
from bertgpt.prefix_index import Prefix, PrefixIndex


class OutOfPages(RuntimeError):
    """The cache has fewer free pages than were asked for; nothing has changed."""


@dataclass(frozen=True)
class CacheStats:
    """How a cache's pages are used.

    Attributes:
        used: Pages that sequences hold.
        shared: Those of them that more than one holds.
        cached: Pages that nobody holds, kept for their tokens; they are given away when needed.
        free: All others.
        fragmentation: The share of used pages' slots that hold no token; 0 where none is used.
    """

    used: int
    shared: int
    cached: int
    free: int
    fragmentation: float


@dataclass
class Entry:
    """One sequence: its pages in order, and how many tokens they hold.

    Attributes:
        pages: Page numbers; more than the tokens need where pages were set aside.
        length: Tokens.
        version: Counts the changes of `pages`.
        prefix: The longest prefix of it that has been remembered.
        remembered: How many pages that is.
    """

    pages: list[int] = field(default_factory=list)
    length: int = 0
    version: int = 0
    prefix: Prefix | None = None
    remembered: int = 0


class PageAllocator:
    """Sequences and their pages. `PagedKVCache` describes each call and what it raises.

    Args:
        num_pages: P.
        page_size: N.
        prefixes: The pages known by their tokens; None where none is to be found again.
        copy: Called with pages to copy and the pages to copy them to, none in both.
        clear: Called with pages whose content is done with, before anybody else gets them.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        prefixes: PrefixIndex | None,
        copy: Callable[[list[int], list[int]], None],
        clear: Callable[[list[int]], None],
    ) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self.pool = PagePool(num_pages)
        self.prefixes = prefixes
        self._copy = copy
        self._clear = clear
        self._unclean: list[int] = []  # free pages that could not be cleared, to be tried again
        self._entries: dict[int, Entry] = {}
        self._next_sequence = 0

    def stats(self) -> CacheStats:
        """Counts the pages by their use."""
        references = self.pool.references
        tokens: Counter[int] = Counter()
        for entry in self._entries.values():
            for i, page in enumerate(entry.pages):
                held = min(max(entry.length - i * self.page_size, 0), self.page_size)
                tokens[page] = max(tokens[page], held)
        used, cached = len(tokens), self.pool.num_cached
        return CacheStats(
            used=used,
            shared=sum(count > 1 for count in references),
            cached=cached,
            free=self.num_pages - used - cached,
            fragmentation=1 - tokens.total() / (used * self.page_size) if used else 0.0,
        )

    def allocate(self, num_tokens: int, prompt: Sequence[int] | None = None) -> int:
        """Starts a sequence, with the pages that its prompt is known to start with."""
        check_int("num_tokens", num_tokens)
        if num_tokens < 0:
            raise ValueError(f"num_tokens must not be negative, it is {num_tokens}")
        found: list[Prefix] = []
        if prompt is not None:
            _check_tokens("prompt", prompt)
            if self.prefixes is not None:
                found = self.prefixes.match(prompt[: max(len(prompt) - 1, 0)])
        pages = [prefix.page for prefix in found]
        missing = max(0, self._pages_for(num_tokens) - len(pages))
        self._check_available(missing, self.pool.num_available_beside(pages))
        self.pool.share(pages)
        entry = Entry(pages, length=len(pages) * self.page_size, remembered=len(pages))
        entry.prefix = found[-1] if found else None
        try:
            entry.pages += self._take(missing)
        except BaseException:
            self._retire(self.pool.release(pages))
            raise
        return self._enter(entry)

    def append(self, sequences: Sequence[int], counts: Sequence[int]) -> list[int]:
        """Grows sequences; returns the new tokens' slots."""
        entries = self._growing(sequences, counts)
        shared, growth = self._plan(entries, counts)
        needed = len(shared) + sum(growth)
        self._check_available(needed, self.pool.num_available)
        fresh = self._take(needed)
        try:
            self._copy([entry.pages[i] for entry, i in shared], fresh[: len(shared)])
        except BaseException:  # such as no memory on the device, or Ctrl-C
            self._retire(self.pool.release(fresh))
            raise
        for (entry, i), page in zip(shared, fresh, strict=False):
            self.pool.release([entry.pages[i]])
            entry.pages[i] = page
            entry.version += 1
        left = iter(fresh[len(shared) :])
        slots: list[int] = []
        for entry, count, pages in zip(entries, counts, growth, strict=True):
            if pages:
                entry.pages.extend(next(left) for _ in range(pages))
                entry.version += 1
            for position in range(entry.length, entry.length + count):
                page, place = divmod(position, self.page_size)
                slots.append(entry.pages[page] * self.page_size + place)
            entry.length += count
        return slots

    def fork(self, sequence: int) -> int:
        """Starts a sequence that shares all of another one's pages."""
        entry = self.entry(sequence)
        pages = entry.pages[: self._pages_for(entry.length)]
        self.pool.share(pages)
        return self._enter(
            Entry(pages, entry.length, prefix=entry.prefix, remembered=entry.remembered)
        )

    def free(self, sequence: int) -> None:
        """Ends a sequence."""
        entry = self.entry(sequence)
        del self._entries[sequence]
        self._retire(self.pool.release(entry.pages))

    def remember(self, sequence: int, tokens: Sequence[int]) -> None:
        """Makes a sequence's full pages known by its tokens."""
        entry = self.entry(sequence)
        if len(tokens) > entry.length:
            raise ValueError(
                f"sequence {sequence} has {entry.length} tokens, fewer than the {len(tokens)} to "
                "remember"
            )
        if self.prefixes is None:
            return
        size = self.page_size
        first = entry.remembered * size
        _check_tokens("tokens", tokens[first:])
        for start in range(first, len(tokens) - size + 1, size):
            page = entry.pages[start // size]
            entry.prefix, displaced = self.prefixes.add(
                entry.prefix, page, tokens[start : start + size]
            )
            entry.remembered += 1
            if entry.prefix.page == page:
                self.pool.keep(page)
            for other in displaced:
                self._retire(self.pool.drop(other))

    def forget(self) -> None:
        """Makes all known pages unknown; those that nobody holds are free."""
        if self.prefixes is None:
            return
        known = [prefix.page for prefix in self.prefixes.prefixes()]
        self.prefixes.forget(known)
        for entry in self._entries.values():
            entry.prefix, entry.remembered = None, 0
        self._retire([page for one in known for page in self.pool.drop(one)])

    def entry(self, sequence: int) -> Entry:
        """A sequence's entry, for reading."""
        if not is_int(sequence):
            raise TypeError(f"a sequence is named by the int that began it, not {sequence!r}")
        entry = self._entries.get(sequence)
        if entry is None:
            raise ValueError(f"sequence {sequence} is unknown or has been freed")
        return entry

    def _growing(self, sequences: Sequence[int], counts: Sequence[int]) -> list[Entry]:
        """The entries of a call of `append`, whose arguments are right."""
        if len(sequences) != len(counts):
            raise ValueError(f"{len(sequences)} sequences but {len(counts)} counts")
        entries = [self.entry(sequence) for sequence in sequences]
        if len(set(sequences)) != len(sequences):
            raise ValueError(f"a sequence is given twice: {list(sequences)}")
        for sequence, count in zip(sequences, counts, strict=True):
            if not is_int(count):
                raise TypeError(f"sequence {sequence} has the count {count!r}, not an integer")
            if count < 0:
                raise ValueError(f"sequence {sequence} has the negative count {count}")
        return entries

    def _plan(
        self, entries: Sequence[Entry], counts: Sequence[int]
    ) -> tuple[list[tuple[Entry, int]], list[int]]:
        """Which of the entries' pages must be copied, and how many new ones each needs."""
        copies: list[tuple[Entry, int]] = []
        holders: dict[int, int] = {}
        growth = []
        for entry, count in zip(entries, counts, strict=True):
            wanted = self._pages_for(entry.length + count)
            growth.append(max(0, wanted - len(entry.pages)))
            last, place = divmod(entry.length, self.page_size)
            if count and place:
                page = entry.pages[last]
                holders.setdefault(page, self.pool.references[page])
                if holders[page] > 1:
                    holders[page] -= 1
                    copies.append((entry, last))
        return copies, growth

    def _enter(self, entry: Entry) -> int:
        sequence = self._next_sequence
        self._next_sequence += 1
        self._entries[sequence] = entry
        return sequence

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def _check_available(self, needed: int, available: int) -> None:
        if needed > available:
            raise OutOfPages(
                f"{needed} pages are needed but {available} of {self.num_pages} are free; free a "
                "sequence, or make a cache with more pages"
            )

    def _take(self, count: int) -> list[int]:
        pages, evicted = self.pool.take(count)
        if self.prefixes is not None:
            self.prefixes.forget(evicted)
        self._unclean += evicted
        try:
            self._clean()
        except BaseException:
            self.pool.release(pages)
            raise
        return pages

    def _retire(self, pages: list[int]) -> None:
        """Clears pages that nobody holds. If that fails, it is done when pages are next taken."""
        self._unclean += pages
        with suppress(RuntimeError):  # such as a launch that failed
            self._clean()

    def _clean(self) -> None:
        self._clear(self._unclean)
        self._unclean = []


def is_int(value: object) -> bool:
    """Whether a value is an int, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_int(name: str, value: object) -> None:
    """Raises TypeError unless a value is an int, and no bool."""
    if not is_int(value):
        raise TypeError(f"{name} must be an int, not {value!r}")


def _check_tokens(name: str, tokens: Sequence[int]) -> None:
    for token in tokens:
        check_int(f"each of {name}", token)
        if not -(2**63) <= token < 2**63:
            raise IndexError(f"{name} holds {token}, which exceeds 64 bits")
