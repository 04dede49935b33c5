"""Who holds which page: reference counts, free pages, and pages kept for reuse. No tensors.

A page is in one of three states. Held: sequences refer to it, and are counted. Cached: nobody
refers to it, but its keys and values are known by their tokens and may be wanted again. Free: its
content means nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class PagePool:
    """Hands out `num_pages` pages, counts who refers to each, and takes them back.

    Attributes:
        references: Of each page, how many sequences refer to it.
    """

    def __init__(self, num_pages: int) -> None:
        self.references = [0] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))  # a stack: the lowest page goes first
        self._kept: set[int] = set()  # to be cached once nobody holds them
        self._cached: dict[int, None] = {}  # in the order of their release: the oldest goes first

    @property
    def num_available(self) -> int:
        """Pages that nobody holds: the free ones and, since they can be evicted, the cached."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Pages that nobody holds and whose content is kept for reuse."""
        return len(self._cached)

    def num_available_beside(self, pages: Iterable[int]) -> int:
        """Pages that nobody would hold if these were held."""
        return self.num_available - sum(page in self._cached for page in pages)

    def take(self, count: int) -> tuple[list[int], list[int]]:
        """Takes pages for one holder each: free ones first, then the longest unused cached ones.

        The caller has made sure that as many are available.

        Returns:
            The pages, and those among them that were evicted: what was known of them holds no more.
        """
        pages, evicted = [], []
        for _ in range(count):
            if self._free:
                page = self._free.pop()
            else:
                page = next(iter(self._cached))
                del self._cached[page]
                self._kept.discard(page)
                evicted.append(page)
            self.references[page] = 1
            pages.append(page)
        return pages, evicted

    def share(self, pages: Iterable[int]) -> None:
        """Adds a reference to each page, which is held or cached."""
        for page in pages:
            self._cached.pop(page, None)
            self.references[page] += 1

    def release(self, pages: Sequence[int]) -> list[int]:
        """Takes a reference off each of a sequence's pages, in its order.

        From the last to the first: the end of a prefix is then evicted before what it follows.

        Returns:
            The pages that became free.
        """
        freed = []
        for page in reversed(pages):
            self.references[page] -= 1
            if self.references[page]:
                continue
            if page in self._kept:
                self._cached[page] = None
            else:
                self._free.append(page)
                freed.append(page)
        return freed

    def keep(self, page: int) -> None:
        """From now on a held page will be cached, not free, when nobody holds it any more."""
        self._kept.add(page)

    def drop(self, page: int) -> list[int]:
        """Undoes `keep`; returns the page if that made it free."""
        self._kept.discard(page)
        if page not in self._cached:
            return []
        del self._cached[page]
        self._free.append(page)
        return [page]
