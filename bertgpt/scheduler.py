"""Which texts an engine reads next, and which give up their pages for others. No tensors' values.

Texts wait in the order of their urgency. One that is admitted gets pages for all of its tokens and
the next one; then it is read in chunks, and from there on token by token. When pages run out, the
least urgent of the running texts gives up its pages and waits again; it is read anew later.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Iterable

from bertgpt.engine_request import Request, Text
from bertgpt.kv_cache import PagedKVCache


def _urgency(text: Text) -> tuple[int, int, int]:
    return text.urgency


def _room(text: Text) -> int:
    """Tokens to set pages aside for: one more than it has, unless that is its last, never read."""
    return min(len(text.tokens) + 1, text.request.longest - 1)


class Scheduler:
    """The texts of an engine.

    Args:
        cache: Where their keys and values are.
        max_batch: Most texts that run at once.
        prefill_tokens: Most tokens of prompts in a step, and what a prompt's chunks are multiples
            of: so a prompt is cut at the same places whatever is read beside it.

    Attributes:
        waiting: Texts without pages, the most urgent first.
        running: Texts with pages, in the order of their admission.
        preemptions: How often a text gave up its pages for another.
        reused_tokens: Tokens that texts found in the cache when they were admitted.
    """

    def __init__(self, cache: PagedKVCache, max_batch: int, prefill_tokens: int) -> None:
        self.cache = cache
        self.waiting: list[Text] = []
        self.running: list[Text] = []
        self.preemptions = 0
        self.reused_tokens = 0
        self._max_batch = max_batch
        self._prefill_tokens = prefill_tokens

    def check_fits(self, tokens: int, texts: int) -> None:
        """Raises ValueError unless a request for so many texts can be served when it is alone.

        Each has up to so many tokens, of which the last is never read.
        """
        size, most = self.cache.page_size, self.cache.num_pages
        pages = -(-(tokens - 1) // size)
        if pages > most:
            raise ValueError(
                f"prompt and text take up to {tokens - 1} tokens of the cache, {pages} pages of "
                f"{size}, and the whole cache has {most}"
            )
        if texts > self._max_batch:
            raise ValueError(
                f"num_return_sequences={texts} is more than max_batch={self._max_batch}"
            )

    def add(self, text: Text) -> None:
        """Lets a text wait for its turn."""
        insort(self.waiting, text, key=_urgency)

    def add_fork(self, parent: Text, text: Text) -> None:
        """Lets a text run that has all of its parent's tokens; `admit` has left room for it."""
        assert parent.sequence is not None
        text.sequence = self.cache.fork(parent.sequence)
        text.remembered = parent.remembered
        self.running.append(text)

    def remove(self, text: Text) -> None:
        """Forgets a text, wherever it is, and frees its pages."""
        if text.sequence is not None:
            self.running.remove(text)
            self._free(text)
        elif text in self.waiting:
            self.waiting.remove(text)

    def unread(self, text: Text) -> int:
        """Tokens of a running text whose keys and values are not in the cache."""
        assert text.sequence is not None
        return len(text.tokens) - self.cache.length(text.sequence)

    def admit(self, text: Text) -> bool:
        """Lets a waiting text run, if there is room; whether there was.

        It may take the place of texts of lower priority, if there are enough of them.
        """
        if not self._make_room(text):
            return False
        text.sequence = self.cache.allocate(_room(text), text.tokens)
        self.waiting.remove(text)
        self.running.append(text)
        found = self.cache.length(text.sequence)
        self.reused_tokens += found
        text.remembered = found // self.cache.page_size
        return True

    def decoding(self) -> list[Text]:
        """Running texts with a single token to read, the same ones always in the same order."""
        return [text for text in self.running if self.unread(text) == 1]

    def chunks(self) -> list[tuple[Text, int]]:
        """Texts with more to read, and how many tokens of each to read in this step."""
        left, chosen = self._prefill_tokens, []
        for text in sorted(self.running, key=_urgency):
            unread = self.unread(text)
            if unread < 2:
                continue
            start = len(text.tokens) - unread
            count = min(unread, self._prefill_tokens - start % self._prefill_tokens)
            if count > left:
                break
            left -= count
            chosen.append((text, count))
        return chosen

    def preempt(self, text: Text) -> None:
        """Takes a running text's pages away; it waits, and is read anew later."""
        self.running.remove(text)
        self.add(text)
        self.preemptions += 1
        self._free(text)

    def restart(self, request: Request) -> None:
        """Lets all unfinished texts of a request that has begun wait, wherever they are."""
        for text in request.texts if request.forked else request.texts[:1]:
            if text in self.running:
                self.preempt(text)
            elif text.finish_reason is None and text not in self.waiting:
                self.add(text)

    def least_urgent(self) -> Text:
        """The running text that is served last."""
        return max(self.running, key=_urgency)

    def _make_room(self, text: Text) -> bool:
        """Whether a waiting text fits, perhaps after others of lower priority have made way."""
        if self._fits(text, ()):
            return True
        lower = [t for t in self.running if t.request.priority < text.request.priority]
        lower.sort(key=_urgency)
        if not self._fits(text, lower):
            return False
        while not self._fits(text, ()):
            self.preempt(lower.pop())
        return True

    def _fits(self, text: Text, without: Iterable[Text]) -> bool:
        """Whether there are rows and pages for a text if these running ones gave theirs up."""
        gone = list(without)
        rows = sum(self._rows(t) for t in self.running) - sum(self._rows(t) for t in gone)
        if rows + self._rows(text) > self._max_batch:
            return False
        allocator = self.cache.allocator
        held: Counter[int] = Counter()
        for other in gone:
            assert other.sequence is not None
            held.update(allocator.entry(other.sequence).pages)
        references = allocator.pool.references
        freed = sum(references[page] == count for page, count in held.items())
        return -(-_room(text) // self.cache.page_size) <= self.cache.num_free_pages + freed

    def _rows(self, text: Text) -> int:
        """Rows of a batch that a text needs: its own, and those of texts that will fork off it."""
        request = text.request
        return 1 if text.index or request.forked else len(request.texts)

    def _free(self, text: Text) -> None:
        assert text.sequence is not None
        sequence, text.sequence, text.remembered = text.sequence, None, 0
        self.cache.free(sequence)
