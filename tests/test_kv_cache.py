"""The page allocator: its rules hold after any calls, and a failed call changes nothing."""

import pytest
import torch
from cases import examples, randn
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from bertgpt import OutOfPages, PagedKVCache, ops
from bertgpt.reference import attention


def small_cache(num_pages=6, page_size=8, **sizes):
    sizes = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 4, **sizes}
    return PagedKVCache(num_pages, page_size, **sizes)


class Allocator(RuleBasedStateMachine):
    """Random calls beside a plain model: per sequence, which slot holds which token."""

    @initialize(num_pages=st.integers(1, 12), page_size=st.sampled_from([8, 16]))
    def start(self, num_pages, page_size):
        self.cache = small_cache(num_pages, page_size)
        self.slots: dict[int, list[int]] = {}
        self.pages: dict[int, int] = {}
        self.freed: set[int] = set()

    def pages_for(self, tokens):
        return -(-tokens // self.cache.page_size)

    def snapshot(self):
        ids = list(self.slots)
        table, lengths = self.cache.page_table(ids), self.cache.lengths(ids)
        return self.cache.num_free_pages, table.tolist(), lengths.tolist()

    @rule(tokens=st.integers(0, 40))
    def allocate(self, tokens):
        before, free = self.snapshot(), self.cache.num_free_pages
        if self.pages_for(tokens) > free:
            with pytest.raises(OutOfPages, match=f"but {free} of"):
                self.cache.allocate(tokens)
            assert self.snapshot() == before
            return
        sequence = self.cache.allocate(tokens)
        assert sequence not in self.slots
        assert sequence not in self.freed
        self.slots[sequence], self.pages[sequence] = [], self.pages_for(tokens)

    @precondition(lambda self: self.slots)
    @rule(data=st.data())
    def append(self, data):
        ids = data.draw(st.lists(st.sampled_from(sorted(self.slots)), unique=True))
        counts = [data.draw(st.integers(0, 20)) for _ in ids]
        wanted = [self.pages_for(len(self.slots[s]) + n) for s, n in zip(ids, counts, strict=True)]
        extra = sum(max(0, w - self.pages[s]) for s, w in zip(ids, wanted, strict=True))
        before = self.snapshot()
        if extra > self.cache.num_free_pages:
            with pytest.raises(OutOfPages):
                self.cache.append(ids, counts)
            assert self.snapshot() == before
            return
        new = self.cache.append(ids, counts)
        assert new.dtype == torch.int64
        assert len(new) == sum(counts)
        left = new.tolist()
        for s, n, w in zip(ids, counts, wanted, strict=True):
            self.slots[s] += left[:n]
            left = left[n:]
            self.pages[s] = max(self.pages[s], w)

    @precondition(lambda self: self.slots)
    @rule(data=st.data())
    def free(self, data):
        sequence = data.draw(st.sampled_from(sorted(self.slots)))
        self.cache.free(sequence)
        del self.slots[sequence], self.pages[sequence]
        self.freed.add(sequence)

    @precondition(lambda self: self.freed)
    @rule(data=st.data())
    def use_a_freed_one(self, data):
        sequence, before = data.draw(st.sampled_from(sorted(self.freed))), self.snapshot()
        for call in (
            lambda: self.cache.free(sequence),
            lambda: self.cache.append([sequence], [1]),
            lambda: self.cache.page_table([sequence]),
            lambda: self.cache.lengths([sequence]),
        ):
            with pytest.raises(ValueError, match=f"sequence {sequence} is unknown or has been"):
                call()
        assert self.snapshot() == before

    @invariant()
    def no_two_tokens_share_a_slot(self):
        taken = [slot for slots in self.slots.values() for slot in slots]
        assert len(taken) == len(set(taken))
        assert all(0 <= s < self.cache.num_pages * self.cache.page_size for s in taken)

    @invariant()
    def tables_and_lengths_say_where_the_tokens_are(self):
        ids, size = list(self.slots), self.cache.page_size
        table, lengths = self.cache.page_table(ids), self.cache.lengths(ids)
        assert table.dtype == lengths.dtype == torch.int32
        assert table.shape == (len(ids), max(self.pages.values(), default=0))
        for row, length, slots in zip(
            table.tolist(), lengths.tolist(), self.slots.values(), strict=True
        ):
            assert [row[i // size] * size + i % size for i in range(length)] == slots

    @invariant()
    def every_page_is_free_or_held_once(self):
        assert self.cache.num_free_pages == self.cache.num_pages - sum(self.pages.values())
        ids = list(self.slots)
        rows = self.cache.page_table(ids).tolist()
        held = [page for s, row in zip(ids, rows, strict=True) for page in row[: self.pages[s]]]
        assert len(held) == len(set(held))


Allocator.TestCase.settings = examples(60, stateful_step_count=40)
TestAllocator = Allocator.TestCase


def test_a_freed_page_is_used_again():
    cache = small_cache(num_pages=1)
    first = cache.allocate(8)
    slots = cache.append([first], [8])
    cache.free(first)
    second = cache.allocate(0)
    assert second != first
    assert torch.equal(cache.append([second], [8]), slots)


def test_a_failed_append_takes_no_page_for_the_sequences_before_it():
    cache = small_cache(num_pages=2)
    a, b = cache.allocate(0), cache.allocate(0)
    with pytest.raises(OutOfPages, match="3 pages are needed but 2 of 2 are free"):
        cache.append([a, b], [1, 16])
    assert cache.num_free_pages == 2
    assert cache.lengths([a, b]).tolist() == [0, 0]


def test_pages_are_per_layer_and_start_at_zero():
    cache = small_cache(num_layers=3, dtype=torch.float16)
    assert len(cache.layers) == 3
    tensors = [pages for layer in cache.layers for pages in layer]
    assert len({pages.data_ptr() for pages in tensors}) == 6
    for pages in tensors:
        assert pages.shape == (6, 2, 8, 4)
        assert pages.dtype == torch.float16
        assert not pages.any()


@pytest.mark.parametrize("page_size", [0, 4, 12, 512, -8])
def test_a_wrong_page_size_is_refused(page_size):
    with pytest.raises(ValueError, match="power of two from 8 to 256"):
        small_cache(page_size=page_size)


@pytest.mark.parametrize("name", ["num_pages", "num_layers", "num_kv_heads", "head_dim"])
def test_a_size_below_one_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1"):
        small_cache(**{name: 0})


def test_a_wrong_dtype_is_refused():
    with pytest.raises(TypeError, match="int8"):
        small_cache(dtype=torch.int8)


@pytest.mark.parametrize(
    ("sequences", "counts", "message"),
    [
        ([0, 0], [1, 1], "given twice"),
        ([0], [1, 1], "1 sequences but 2 counts"),
        ([0], [-1], "negative count -1"),
        ([7], [1], "sequence 7 is unknown"),
        ([0, 7], [1, 1], "sequence 7 is unknown"),
    ],
)
def test_a_wrong_append_changes_nothing(sequences, counts, message):
    cache = small_cache()
    assert cache.allocate(0) == 0
    with pytest.raises(ValueError, match=message):
        cache.append(sequences, counts)
    assert cache.lengths([0]).tolist() == [0]
    assert cache.num_free_pages == 6


def test_a_negative_allocation_is_refused():
    with pytest.raises(ValueError, match="must not be negative"):
        small_cache().allocate(-1)


@given(prompts=st.lists(st.integers(1, 20), min_size=1, max_size=4), steps=st.integers(0, 12))
@examples(20)
def test_prefill_and_decoding_equal_attention_over_everything(prompts, steps):
    """Chunks, then single tokens, through the cache give each row of plain causal attention."""
    heads, dim = 2, 4
    cache = small_cache(num_pages=20)
    ids = [cache.allocate(n) for n in prompts]
    tokens = [randn(3, n + steps, heads, dim, seed=n + 7 * i) for i, n in enumerate(prompts)]
    pages = cache.layers[1]
    outs = [[] for _ in ids]
    at = [0] * len(ids)
    for step in range(steps + 1):
        counts = list(prompts) if step == 0 else [1] * len(ids)
        q, k, v = torch.cat(
            [t[:, a : a + n] for t, a, n in zip(tokens, at, counts, strict=True)], 1
        )
        at = [a + n for a, n in zip(at, counts, strict=True)]
        ops.paged_write(k, v, *pages, cache.append(ids, counts))
        cu = torch.tensor([0, *torch.tensor(counts).cumsum(0)]) if step == 0 else None
        out = ops.paged_attention(
            q, *pages, cache.page_table(ids), cache.lengths(ids),
            cu_seqlens_q=cu, max_seqlen_q=max(counts),
        )  # fmt: skip
        for rows, part in zip(outs, out.split(counts), strict=True):
            rows.append(part)
    assert not cache.layers[0][0].any()
    for rows, (q, k, v) in zip(outs, tokens, strict=True):
        expected = attention(q[None], k[None], v[None], causal=True)[0]
        torch.testing.assert_close(torch.cat(rows), expected, rtol=1e-5, atol=1e-5)


def test_a_fractional_count_changes_nothing():
    cache = small_cache()
    sequences = [cache.allocate(1), cache.allocate(1)]
    before = cache.lengths(sequences).tolist(), cache.num_free_pages
    with pytest.raises(TypeError, match=r"count 8\.5, not an integer"):
        cache.append(sequences, [9, 8.5])
    assert (cache.lengths(sequences).tolist(), cache.num_free_pages) == before
