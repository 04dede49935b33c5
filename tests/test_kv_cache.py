"""The paged cache by example: pages, forks, known prefixes, static tensors, and bad input."""

import pytest
import torch
from cases import examples, randn
from hypothesis import given
from hypothesis import strategies as st

from bertgpt import DecodeBatch, OutOfPages, PagedKVCache, ops, prefix_index
from bertgpt.reference import attention


def small_cache(num_pages=6, page_size=8, **sizes):
    sizes = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 4, **sizes}
    return PagedKVCache(num_pages, page_size, **sizes)


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


def fill(cache, sequence, count, value):
    """Appends `count` tokens whose keys and values are `value` in every layer."""
    slots = cache.append([sequence], [count])
    for pages in cache.layers:
        _, heads, _, dim = pages[0].shape
        new = torch.full((count, heads, dim), float(value))
        ops.paged_write(new, new, *pages, slots)


def content(cache, sequence, layer=1):
    """What each token of a sequence has as its key."""
    pages = cache.page_table([sequence])[0].long()
    keys = cache.layers[layer][0][pages].transpose(1, 2).flatten(0, 1)
    return keys[: cache.length(sequence), 0, 0].tolist()


def test_a_fork_copies_a_page_when_one_of_the_two_writes_it():
    cache = small_cache()
    parent = cache.allocate(0)
    fill(cache, parent, 11, 1)
    child = cache.fork(parent)
    assert cache.page_table([child]).equal(cache.page_table([parent]))
    assert cache.num_free_pages == 4
    fill(cache, child, 1, 2)
    assert cache.num_free_pages == 3
    fill(cache, parent, 1, 3)  # the last to hold its page: no copy
    assert cache.num_free_pages == 3
    assert content(cache, parent) == [1] * 11 + [3]
    assert content(cache, child) == [1] * 11 + [2]
    cache.free(parent)
    assert cache.num_free_pages == 4
    assert content(cache, child) == [1] * 11 + [2]


def test_a_full_page_is_never_copied():
    cache = small_cache()
    parent = cache.allocate(0)
    fill(cache, parent, 16, 1)
    children = [cache.fork(parent) for _ in range(4)]
    cache.append(children, [1] * 4)
    assert cache.num_free_pages == 0
    with pytest.raises(OutOfPages, match="1 pages are needed but 0 of 6"):
        cache.append([parent], [1])


def test_eight_samples_of_a_long_prompt_take_little_more_than_one():
    """Under 1.3 times the pages of one, and less than a page of each is unused."""
    cache = small_cache(num_pages=80, page_size=16)
    prompt = cache.allocate(0)
    cache.append([prompt], [512])
    samples = [prompt, *(cache.fork(prompt) for _ in range(7))]
    alone = -(-(512 + 16) // 16)
    for _ in range(16):
        cache.append(samples, [1] * 8)
    stats = cache.stats()
    assert stats.used < 1.3 * alone
    assert stats.shared == 32
    assert stats.fragmentation * stats.used < 8


def test_a_failed_copy_gives_its_pages_back(monkeypatch):
    cache = small_cache()
    parent = cache.allocate(0)
    fill(cache, parent, 3, 1)
    child = cache.fork(parent)
    monkeypatch.setattr(cache.allocator, "_copy", lambda *_: (_ for _ in ()).throw(
        RuntimeError("out of memory")))  # fmt: skip
    with pytest.raises(RuntimeError, match="out of memory"):
        cache.append([child], [1])
    assert cache.num_free_pages == 5
    assert cache.lengths([parent, child]).tolist() == [3, 3]
    assert cache.stats().shared == 1


def remembering(num_pages=6, **options):
    return small_cache(num_pages, prefix_reuse=True, **options)


def seen(cache, tokens, value=1):
    """A sequence with these tokens, remembered."""
    sequence = cache.allocate(0, tokens)
    fill(cache, sequence, len(tokens) - cache.length(sequence), value)
    cache.remember(sequence, tokens)
    return sequence


def test_a_prompt_starts_with_the_known_pages_of_an_earlier_one():
    cache = remembering()
    tokens = list(range(20))
    first = seen(cache, tokens)
    second = cache.allocate(24, [*tokens[:17], 99])
    assert cache.length(second) == 16
    assert cache.num_free_pages == 2
    assert cache.page_table([second])[0, :2].equal(cache.page_table([first])[0, :2])
    assert content(cache, second) == [1] * 16
    third = cache.allocate(0, tokens[:16])  # its last token is still to be read
    assert cache.length(third) == 8
    assert cache.length(cache.allocate(0, [5, *tokens[1:]])) == 0


def test_known_pages_outlive_their_sequence_until_pages_are_needed():
    cache = remembering(num_pages=3)
    tokens = list(range(17))
    cache.free(seen(cache, tokens))
    stats = cache.stats()
    assert (stats.used, stats.cached, stats.free) == (0, 2, 1)
    again = cache.allocate(0, tokens)
    assert cache.length(again) == 16
    cache.free(again)
    other = cache.allocate(16)  # the free page, and of the known ones the later: its prefix stays
    assert cache.stats().cached == 1
    assert cache.length(cache.allocate(0, tokens)) == 8
    assert cache.lengths([other]).tolist() == [0]


def test_the_longest_unused_page_goes_first():
    cache = remembering(num_pages=3)
    for first in (10, 20, 30):
        cache.free(seen(cache, [first] * 8))
    cache.free(cache.allocate(0, [10] * 9))
    cache.free(cache.allocate(8))  # takes the page of the 20s
    assert [cache.length(cache.allocate(0, [n] * 9)) for n in (10, 20, 30)] == [8, 0, 8]


def test_equal_keys_of_different_prefixes_are_told_apart(monkeypatch):
    """With one key for everything, pages are found by their tokens and by what they follow."""
    monkeypatch.setattr(prefix_index.PrefixIndex, "_key", lambda *_: b"the same")
    cache = remembering()
    a, b = [1] * 8, [2] * 8
    first = seen(cache, [*a, *b])  # of two pages with one key the later stays
    assert len(cache.allocator.prefixes.prefixes()) == 1
    for prompt in ([*a, *b, 3], [*b, 3]):
        assert cache.length(cache.allocate(0, prompt)) == 0
    cache.free(first)
    assert cache.stats().cached == 1
    seen(cache, a)
    assert cache.length(cache.allocate(0, [*a, 3])) == 8
    assert cache.length(cache.allocate(0, [*b, 3])) == 0
    assert cache.stats().cached == 0


def test_a_page_follows_only_the_very_page_that_was_matched():
    cache = remembering()
    a, b = [1] * 8, [2] * 8
    first = seen(cache, [*a, *b])
    index = cache.allocator.prefixes
    orphan = next(prefix for prefix in index.prefixes() if prefix.tokens == tuple(b))
    index.forget([orphan.parent.page])
    cache.allocator.pool.drop(orphan.parent.page)
    second = seen(cache, a)
    assert cache.length(cache.allocate(0, [*a, *b, 3])) == 8
    cache.remember(first, [*a, *b])
    assert cache.length(second) == 8


def test_what_was_forgotten_is_found_no_more():
    cache = remembering(num_pages=4, zero_on_free=True)
    tokens = list(range(17))
    cache.free(seen(cache, [7] * 8))
    stays = seen(cache, tokens)
    cache.forget()
    assert cache.stats().cached == 0
    assert not cache.layers[0][0][cache.allocator.pool._free].any()
    assert content(cache, stays) == [1] * 17
    assert cache.length(cache.allocate(0, tokens)) == 0
    cache.remember(stays, tokens)
    assert cache.length(cache.allocate(0, tokens)) == 16
    small_cache().forget()  # which never remembers anything


def test_salts_part_the_keys():
    keys = []
    for salt in (b"one", b"two", b"one", None, None):
        cache = remembering(salt=salt)
        seen(cache, [1] * 8)
        keys.append(next(iter(cache.allocator.prefixes.prefixes())).key)
    assert keys[0] == keys[2]
    assert len(set(keys)) == 4
    assert len(keys[0]) == 32


def test_without_prefix_reuse_nothing_is_found():
    cache = small_cache()
    seen(cache, [1] * 8)
    assert cache.length(cache.allocate(0, [1] * 9)) == 0


def test_pages_are_zeroed_before_another_sequence_has_them():
    cache = remembering(num_pages=2, zero_on_free=True)
    cache.free(seen(cache, [1] * 8))
    assert cache.layers[0][0].any()  # known: kept
    cache.allocate(16)
    for layer in cache.layers:
        for pages in layer:
            assert not pages.any()


def test_a_decode_batch_stays_where_it_is_and_says_what_the_cache_says():
    cache = small_cache(num_pages=12)
    batch = DecodeBatch(cache, size=4, max_tokens=24)
    assert batch.page_table.shape == (4, 3)
    tensors = [batch.page_table, batch.lengths, batch.slots, batch.positions]
    addresses = [tensor.data_ptr() for tensor in tensors]
    ids = [cache.allocate(0) for _ in range(3)]
    cache.append(ids, [7, 8, 3])
    ids.append(cache.fork(ids[2]))
    for step in range(12):
        if step == 5:
            cache.free(ids.pop(1))
        batch.advance(ids)
        table, rows = cache.page_table(ids), len(ids)
        assert batch.page_table[:rows, : table.shape[1]].equal(table)
        assert batch.lengths[:rows].equal(cache.lengths(ids))
        assert batch.positions[:rows].equal(cache.lengths(ids).long() - 1)
        place = batch.positions[:rows] % 8
        last = table.long().gather(1, batch.positions[:rows, None] // 8)[:, 0]
        assert batch.slots[:rows].equal(last * 8 + place)
        assert batch.lengths[rows:].tolist() == [0] * (4 - rows)
        assert batch.slots[rows:].tolist() == [-1] * (4 - rows)
        assert batch.positions[rows:].tolist() == [0] * (4 - rows)
    assert [tensor.data_ptr() for tensor in tensors] == addresses


def test_a_decode_batch_refuses_what_it_cannot_hold():
    cache = small_cache()
    batch = DecodeBatch(cache, size=1, max_tokens=8)
    a, b = cache.allocate(0), cache.allocate(0)
    with pytest.raises(ValueError, match="2 sequences do not fit 1 rows"):
        batch.advance([a, b])
    cache.append([a], [8])
    with pytest.raises(ValueError, match=r"has 8 tokens, and a row holds no more than 8"):
        batch.advance([a])
    assert cache.length(a) == 8
    for sizes, error in (((0, 8), ValueError), ((1, 0), ValueError), ((1.0, 8), TypeError)):
        with pytest.raises(error, match=r"(size|max_tokens) must be"):
            DecodeBatch(cache, *sizes)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "num_pages must be an int, not True", lambda: small_cache(num_pages=True)),
        (TypeError, r"page_size must be an int, not 8\.0", lambda: small_cache(page_size=8.0)),
        (TypeError, "head_dim must be an int, not '4'", lambda: small_cache(head_dim="4")),
        (TypeError, "prefix_reuse must be True or False", lambda: small_cache(prefix_reuse=1)),
        (TypeError, "zero_on_free must be True or False", lambda: small_cache(zero_on_free="no")),
        (TypeError, "salt must be bytes, not str", lambda: remembering(salt="salt")),
        (ValueError, "salt goes with prefix_reuse", lambda: small_cache(salt=b"salt")),
        (TypeError, "num_tokens must be an int", lambda: small_cache().allocate(1.5)),
        (TypeError, "num_tokens must be an int", lambda: small_cache().allocate(False)),
        (TypeError, "each of prompt must be an int", lambda: remembering().allocate(0, [1.5])),
        (IndexError, "exceeds 64 bits", lambda: remembering().allocate(0, [2**63])),
        (TypeError, "named by the int that began it, not '0'", lambda: small_cache().free("0")),
        (TypeError, "named by the int that began it, not True", lambda: small_cache().fork(True)),
        (TypeError, "count True, not an integer", lambda: filled().append([0], [True])),
        (TypeError, r"not \[0\]", lambda: filled().append([[0]], [1])),
        (ValueError, "has 3 tokens, fewer than the 4", lambda: filled().remember(0, [1] * 4)),
        (TypeError, "each of tokens must be an int", lambda: filled(11).remember(0, ["a"] * 8)),
        (ValueError, "sequence 7 is unknown", lambda: small_cache().fork(7)),
    ],
)
def test_bad_input_is_named(error, message, call):
    with pytest.raises(error, match=message):
        call()


def filled(count=3):
    """A cache whose sequence 0 has some tokens."""
    cache = remembering()
    cache.append([cache.allocate(0)], [count])
    return cache


def test_a_fractional_count_changes_nothing():
    cache = small_cache()
    sequences = [cache.allocate(1), cache.allocate(1)]
    before = cache.lengths(sequences).tolist(), cache.num_free_pages
    with pytest.raises(TypeError, match=r"count 8\.5, not an integer"):
        cache.append(sequences, [9, 8.5])
    assert (cache.lengths(sequences).tolist(), cache.num_free_pages) == before
