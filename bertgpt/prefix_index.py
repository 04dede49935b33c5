"""Finds full pages by the tokens that they and all pages before them hold. No tensors.

A page's key is SHA-256 over a salt, the key of the page before it and its own tokens, so that it
stands for the whole prefix. A key only finds a candidate: its tokens are compared one by one, and
it must follow the very page that was matched before it, so even equal keys of different prefixes
never mix them.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, eq=False)
class Prefix:
    """A prefix that ends with a full page.

    Attributes:
        key: SHA-256 over salt, the parent's key and the tokens.
        page: The page with the last tokens.
        tokens: Those tokens.
        parent: The prefix without that page; None where there is nothing before it.
    """

    key: bytes
    page: int
    tokens: tuple[int, ...]
    parent: Prefix | None


class PrefixIndex:
    """The full pages of a cache by their tokens.

    Args:
        page_size: Tokens of a page.
        salt: Mixed into every key, so that nobody who does not know it can foresee one.
    """

    def __init__(self, page_size: int, salt: bytes) -> None:
        self._page_size = page_size
        self._salt = salt
        self._by_key: dict[bytes, Prefix] = {}
        self._by_page: dict[int, Prefix] = {}

    def prefixes(self) -> Collection[Prefix]:
        """All known prefixes."""
        return self._by_page.values()

    def match(self, tokens: Sequence[int]) -> list[Prefix]:
        """The longest run of known pages that `tokens` starts with, page by page."""
        found: list[Prefix] = []
        parent = None
        for start in range(0, len(tokens) - self._page_size + 1, self._page_size):
            page_tokens = tuple(tokens[start : start + self._page_size])
            known = self._known(parent, page_tokens)
            if known is None:
                break
            found.append(known)
            parent = known
        return found

    def add(
        self, parent: Prefix | None, page: int, tokens: Sequence[int]
    ) -> tuple[Prefix, list[int]]:
        """Makes a full page known, unless one with the same prefix is already.

        Returns:
            The prefix that ends here: the new one, or the known one, whose page is another. And
            the pages that are known no more, since the new one has their key.
        """
        page_tokens = tuple(tokens)
        known = self._known(parent, page_tokens)
        if known is not None:
            return known, []
        prefix = Prefix(self._key(parent, page_tokens), page, page_tokens, parent)
        same_key = self._by_key.get(prefix.key)
        displaced = [same_key.page] if same_key is not None else []
        self.forget({*displaced, *({page} & self._by_page.keys())})
        self._by_key[prefix.key] = self._by_page[page] = prefix
        return prefix, [other for other in displaced if other != page]

    def forget(self, pages: Iterable[int]) -> None:
        """Makes known pages unknown; their content is about to change."""
        for page in pages:
            del self._by_key[self._by_page.pop(page).key]

    def _known(self, parent: Prefix | None, tokens: tuple[int, ...]) -> Prefix | None:
        prefix = self._by_key.get(self._key(parent, tokens))
        if prefix is None or prefix.parent is not parent or prefix.tokens != tokens:
            return None
        return prefix

    def _key(self, parent: Prefix | None, tokens: tuple[int, ...]) -> bytes:
        digest = hashlib.sha256(self._salt)
        digest.update(parent.key if parent is not None else bytes(digest.digest_size))
        digest.update(array("q", tokens).tobytes())
        return digest.digest()
