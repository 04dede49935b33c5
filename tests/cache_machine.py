"""Random calls of a paged cache beside a plain model of it, for Hypothesis to run.

The model keeps each sequence's tokens in a list and reads from the cache only which pages it was
given. A key is a function of all tokens up to its own, so a page of a wrong prefix shows. Every
slot that holds no token of anybody is NaN, so one that is read shows too.
"""

from collections import Counter

import pytest
import torch
from cases import generator
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from bertgpt import DecodeBatch, OutOfPages, PagedKVCache, ops

LAYERS, HEADS, DIM = 2, 2, 4
_STATES = 4093
_TABLE = torch.randn(2, _STATES, HEADS, DIM, generator=generator(1))  # a key and a value each
_QUERIES = torch.randn(64, HEADS, DIM, generator=generator(2))
_MOST_SEQUENCES, _MOST_TOKENS = 8, 64
_TOKEN = st.sampled_from((0, 0, 0, 1))  # texts of few words in long runs: prefixes often agree
_RUN = st.tuples(_TOKEN, st.integers(0, 12)).map(lambda run: [run[0]] * run[1])
_PROMPT = st.tuples(_TOKEN, st.integers(0, 40), _RUN).map(lambda p: [p[0]] * p[1] + p[2])


def states(tokens):
    """A number for each token that depends on all up to it."""
    found, state = [], 0
    for token in tokens:
        state = (state * 31 + token + 7) % _STATES
        found.append(state)
    return found


def keys_and_values(tokens):
    """Keys and values `[2, T, H, D]` of a sequence in layer 0; in layer 1 they are negative."""
    return _TABLE[:, states(tokens)]


def plain_attention(tokens):
    """Attention of query number T to all T keys, one head after the other."""
    (k, v), q = keys_and_values(tokens), _QUERIES[len(tokens) % 64]
    weights = torch.einsum("hd,thd->ht", q, k).div(DIM**0.5).softmax(-1)
    return torch.einsum("ht,thd->hd", weights, v)


def known_pages(cache):
    """Pages by all tokens up to their end, of those whose every page before is known too."""
    index = cache.allocator.prefixes
    found = {}
    for prefix in index.prefixes() if index is not None else ():
        chain = [prefix]
        while (parent := chain[-1].parent) is not None:
            chain.append(parent)
        if all(part in index.prefixes() for part in chain):
            found[tuple(token for part in reversed(chain) for token in part.tokens)] = prefix.page
    return found


class CacheMachine(RuleBasedStateMachine):
    """Every public call, with failures foretold by the model."""

    operations = 0  # over all runs

    @initialize(
        num_pages=st.integers(1, 16), page_size=st.sampled_from([8, 8, 16]),
        prefix_reuse=st.sampled_from([True, True, False]), zero_on_free=st.booleans(),
    )  # fmt: skip
    def start(self, num_pages, page_size, prefix_reuse, zero_on_free):
        self.cache = PagedKVCache(
            num_pages, page_size, num_layers=LAYERS, num_kv_heads=HEADS, head_dim=DIM,
            prefix_reuse=prefix_reuse, zero_on_free=zero_on_free,
        )  # fmt: skip
        self.batch = DecodeBatch(self.cache, _MOST_SEQUENCES, _MOST_TOKENS)
        self.addresses = self.pointers()
        self.zeroing, self.reusing = zero_on_free, prefix_reuse
        self.tokens: dict[int, list[int]] = {}
        self.pages: dict[int, list[int]] = {}
        self.known: dict[tuple[int, ...], int] = {}  # page by all tokens up to its end
        self.evicted = False
        self.freed: set[int] = set()

    # -- the model's own arithmetic

    def pages_for(self, tokens):
        return -(-tokens // self.cache.page_size)

    def holders(self):
        return Counter(page for pages in self.pages.values() for page in pages)

    def found(self, prompt):
        """Known pages that a prompt starts with, without its last token."""
        size, pages = self.cache.page_size, []
        while (end := (len(pages) + 1) * size) < len(prompt) and tuple(prompt[:end]) in self.known:
            pages.append(self.known[tuple(prompt[:end])])
        return pages

    def notice_eviction(self, taken):
        """Before `taken` pages are handed out: whether known ones must go for them."""
        stats = self.cache.stats()
        self.evicted |= taken > stats.free

    def needed(self, ids, counts):
        """New pages for growing, those for copies of shared pages that are not full among them."""
        new = sum(
            max(0, self.pages_for(len(self.tokens[s]) + n) - len(self.pages[s]))
            for s, n in zip(ids, counts, strict=True)
        )
        growing = Counter(
            self.pages[s][len(self.tokens[s]) // self.cache.page_size]
            for s, n in zip(ids, counts, strict=True)
            if n and len(self.tokens[s]) % self.cache.page_size
        )
        holders = self.holders()
        return new + sum(min(k, holders[page] - 1) for page, k in growing.items())

    def snapshot(self):
        ids, cache = sorted(self.tokens), self.cache
        tensors = [cache.page_table(ids), cache.lengths(ids)]
        content = [pages.nan_to_num(9).sum() for pages in cache.layers[0]]
        references = list(cache.allocator.pool.references)
        return references, cache.stats(), [t.tolist() for t in (*tensors, *content)]

    def pointers(self):
        batch = self.batch
        return [t.data_ptr() for t in (batch.page_table, batch.lengths, batch.slots,
                                       batch.positions)]  # fmt: skip

    # -- after a call

    def read_pages(self, ids):
        """Takes down which pages sequences have now, and which are known, if any was evicted."""
        for s in ids:
            entry = self.cache.allocator.entry(s)
            assert entry.length == len(self.tokens[s])
            self.pages[s] = list(entry.pages)
        if self.evicted:
            self.known = known_pages(self.cache)

    def write(self, ids, counts, slots):
        news = [keys_and_values(self.tokens[s])[:, len(self.tokens[s]) - n :]
                for s, n in zip(ids, counts, strict=True)]  # fmt: skip
        if news:
            k, v = torch.cat(news, 1)
            for sign, pages in zip((1, -1), self.cache.layers, strict=True):
                ops.paged_write(sign * k, sign * v, *pages, slots)

    # -- rules

    @precondition(lambda self: len(self.tokens) < _MOST_SEQUENCES)
    @rule(extra=st.integers(-30, 10), prompt=st.none() | _PROMPT)
    def allocate(self, extra, prompt):
        self.begin(max(0, extra + len(prompt or [])), prompt)

    @precondition(lambda self: len(self.tokens) < _MOST_SEQUENCES)
    @rule(prompt=_PROMPT, stays=st.booleans())
    def serve(self, prompt, stays):
        """A prompt is read and remembered, and its sequence perhaps ends."""
        sequence = self.begin(len(prompt), prompt)
        if sequence is None:
            return
        self.extend([sequence], [prompt[len(self.tokens[sequence]) :]])
        self.make_known(sequence)
        if not stays:
            self.end(sequence)

    def begin(self, count, prompt):
        """A new sequence, or None where there are too few pages."""
        CacheMachine.operations += 1
        found = self.found(prompt) if prompt is not None else []
        missing = max(0, self.pages_for(count) - len(found))
        available = self.cache.num_free_pages - len(set(found) - set(self.holders()))
        if missing > available:
            before = self.snapshot()
            with pytest.raises(OutOfPages, match=f"{missing} pages are needed but {available} of"):
                self.cache.allocate(count, prompt)
            assert self.snapshot() == before
            return None
        self.notice_eviction(missing)
        sequence = self.cache.allocate(count, prompt)
        assert sequence not in self.tokens
        assert sequence not in self.freed
        assert self.cache.length(sequence) == len(found) * self.cache.page_size
        self.tokens[sequence] = (prompt or [])[: self.cache.length(sequence)]
        self.read_pages([sequence])
        assert self.pages[sequence][: len(found)] == found
        assert len(self.pages[sequence]) == len(found) + missing
        return sequence

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def append(self, data):
        ids = data.draw(st.lists(st.sampled_from(sorted(self.tokens)), unique=True))
        new = [data.draw(_RUN) for _ in ids]
        new = [n[: _MOST_TOKENS - len(self.tokens[s])] for s, n in zip(ids, new, strict=True)]
        self.extend(ids, new)

    def extend(self, ids, new):
        CacheMachine.operations += 1
        counts = [len(n) for n in new]
        if self.needed(ids, counts) > self.cache.num_free_pages:
            before = self.snapshot()
            with pytest.raises(OutOfPages, match=f"{self.needed(ids, counts)} pages are needed"):
                self.cache.append(ids, counts)
            assert self.snapshot() == before
            return
        self.notice_eviction(self.needed(ids, counts))
        slots = self.cache.append(ids, counts)
        assert slots.dtype == torch.int64
        self.grow(ids, new)
        self.write(ids, counts, slots)

    @precondition(lambda self: self.tokens)
    @rule(token=_TOKEN)
    def decode(self, token):
        CacheMachine.operations += 1
        ids = [s for s in sorted(self.tokens) if len(self.tokens[s]) < _MOST_TOKENS]
        ones = [1] * len(ids)
        if self.needed(ids, ones) > self.cache.num_free_pages:
            before = self.snapshot(), self.batch.lengths.tolist()
            with pytest.raises(OutOfPages):
                self.batch.advance(ids)
            assert (self.snapshot(), self.batch.lengths.tolist()) == before
            return
        self.notice_eviction(self.needed(ids, ones))
        self.batch.advance(ids)
        self.grow(ids, [[token]] * len(ids))
        self.write(ids, ones, self.batch.slots[: len(ids)])
        self.check_batch(ids)

    def grow(self, ids, new):
        for s, tokens in zip(ids, new, strict=True):
            self.tokens[s] += tokens
        self.read_pages(ids)

    def check_batch(self, ids):
        """The static tensors say what the cache's own would, at the same addresses."""
        batch, n = self.batch, len(ids)
        table = self.cache.page_table(ids)
        assert self.pointers() == self.addresses
        assert batch.page_table[:n, : table.shape[1]].equal(table)
        assert batch.lengths.tolist() == [*self.cache.lengths(ids), *[0] * (len(batch.slots) - n)]
        assert batch.slots[n:].eq(-1).all()
        assert batch.positions.tolist() == [max(0, m - 1) for m in batch.lengths.tolist()]

    @precondition(lambda self: 0 < len(self.tokens) < _MOST_SEQUENCES)
    @rule(data=st.data())
    def fork(self, data):
        CacheMachine.operations += 1
        sequence = data.draw(st.sampled_from(sorted(self.tokens)))
        before = self.cache.num_free_pages
        child = self.cache.fork(sequence)
        assert child not in self.tokens
        assert child not in self.freed
        self.tokens[child] = list(self.tokens[sequence])
        self.read_pages([child])
        filled = self.pages_for(len(self.tokens[child]))
        assert self.pages[child] == self.pages[sequence][:filled]
        assert self.cache.num_free_pages == before

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def remember(self, data):
        self.make_known(data.draw(st.sampled_from(sorted(self.tokens))))

    def make_known(self, sequence):
        CacheMachine.operations += 1
        tokens, size = self.tokens[sequence], self.cache.page_size
        self.cache.remember(sequence, tokens)
        for i in range(len(tokens) // size if self.reusing else 0):
            self.known.setdefault(tuple(tokens[: (i + 1) * size]), self.pages[sequence][i])
        self.read_pages([])

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def free(self, data):
        self.end(data.draw(st.sampled_from(sorted(self.tokens))))

    def end(self, sequence):
        CacheMachine.operations += 1
        self.cache.free(sequence)
        del self.tokens[sequence], self.pages[sequence]
        self.freed.add(sequence)

    @precondition(lambda self: self.known)
    @rule(sure=st.sampled_from([True, False, False, False]))
    def forget(self, sure):
        if sure:
            CacheMachine.operations += 1
            self.cache.forget()
            self.known = {}
            self.read_pages(self.tokens)

    @precondition(lambda self: self.freed)
    @rule(data=st.data())
    def use_a_freed_one(self, data):
        CacheMachine.operations += 1
        sequence, before = data.draw(st.sampled_from(sorted(self.freed))), self.snapshot()
        for call in (
            lambda: self.cache.free(sequence),
            lambda: self.cache.append([sequence], [1]),
            lambda: self.cache.fork(sequence),
            lambda: self.cache.length(sequence),
            lambda: self.cache.remember(sequence, []),
            lambda: self.batch.advance([sequence]),
            lambda: self.cache.page_table([sequence]),
            lambda: self.cache.lengths([sequence]),
        ):
            with pytest.raises(ValueError, match=f"sequence {sequence} is unknown or has been"):
                call()
        assert self.snapshot() == before

    # -- what must hold after every call

    @invariant()
    def every_page_is_accounted_for(self):
        pool, holders, stats = self.cache.allocator.pool, self.holders(), self.cache.stats()
        assert pool.references == [holders[page] for page in range(self.cache.num_pages)]
        free, cached = pool._free, list(pool._cached)
        assert sorted([*free, *cached, *holders]) == list(range(self.cache.num_pages))
        assert self.cache.num_free_pages == self.cache.num_pages - len(holders)
        assert (stats.used, stats.cached, stats.free) == (len(holders), len(cached), len(free))
        assert stats.shared == sum(count > 1 for count in holders.values())
        assert known_pages(self.cache) == self.known

    @invariant()
    def shared_pages_hold_what_each_holder_has(self):
        size = self.cache.page_size
        content: dict[int, tuple] = {}
        for s, pages in self.pages.items():
            assert self.pages_for(len(self.tokens[s])) <= len(pages)
            assert len(set(pages)) == len(pages)
            for i, page in enumerate(pages):
                mine = i, tuple(self.tokens[s][: (i + 1) * size])
                assert content.setdefault(page, mine) == mine
                assert self.holders()[page] == 1 or mine[1][i * size :], "a shared empty page"
        filled = sum(max(0, len(tokens) - i * size) for i, tokens in content.values())
        if content:
            expected = 1 - filled / (len(content) * size)
            assert abs(self.cache.stats().fragmentation - expected) < 1e-9

    @invariant()
    def poisoned_slots_are_never_read(self):
        live = torch.zeros(self.cache.num_pages, self.cache.page_size, dtype=torch.bool)
        for s, pages in self.pages.items():
            slots = torch.arange(len(self.tokens[s]))
            live[torch.tensor(pages, dtype=torch.int64)[slots // self.cache.page_size],
                 slots % self.cache.page_size] = True  # fmt: skip
        pool = self.cache.allocator.pool
        if self.zeroing:
            for pages in self.cache.layers[1]:
                assert not pages[pool._free].any(), "a free page was not zeroed"
        live[list(pool._cached)] = True
        if not self.zeroing:
            for layer in self.cache.layers:
                for pages in layer:
                    pages.masked_fill_(~live[:, None, :, None], float("nan"))
        for prefix, page in self.known.items():
            held = keys_and_values(prefix)[:, -self.cache.page_size :]
            for pages, what in zip(self.cache.layers[0], held, strict=True):
                assert pages[page].equal(what.transpose(0, 1))
        ids = [s for s in self.tokens if self.tokens[s]]
        if not ids:
            return
        table, lengths = self.cache.page_table(ids), self.cache.lengths(ids)
        q = _QUERIES[lengths.long() % 64]
        expected = torch.stack([plain_attention(self.tokens[s]) for s in ids])
        for scale, pages in (
            (DIM**-0.5, self.cache.layers[0]),
            (-(DIM**-0.5), self.cache.layers[1]),
        ):
            out = ops.paged_attention(q, *pages, table, lengths, scale=scale)
            expected = expected if scale > 0 else -expected
            torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
