"""The dropout bits: published vectors, the counter layout in docs/dropout.md, rate and mean."""

import math

import pytest
import torch
from cases import ALL_DTYPES
from hypothesis import given
from hypothesis import strategies as st

from bertgpt.philox import dropout_rows, keep_rows
from bertgpt.reference import philox

MASK = 0xFFFFFFFF

# Random123's known answers for philox4x32 with 10 rounds: counter, key, words.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((MASK,) * 4, (MASK, MASK), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def words_by_hand(seed, counter):
    """The ten rounds in Python's own integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & MASK, seed >> 32 & MASK
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & MASK, (p0 >> 32) ^ c3 ^ k1, p0 & MASK
        k0, k1 = k0 + 0x9E3779B9 & MASK, k1 + 0xBB67AE85 & MASK
    return c0, c1, c2, c3


def words(seed, counter):
    return tuple(int(w) for w in philox.philox_words(seed, *(torch.tensor(c) for c in counter)))


def signed(seed):
    return seed - 2**64 if seed >= 2**63 else seed


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter, key, expected):
    seed = key[0] | key[1] << 32
    assert words(seed, counter) == expected
    assert words(signed(seed), counter) == expected
    assert words(torch.tensor(signed(seed)), counter) == expected
    assert words_by_hand(seed, counter) == expected


@given(seed=st.integers(-(2**63), 2**64 - 1), counter=st.tuples(*[st.integers(0, MASK)] * 4))
def test_words_by_hand(seed, counter):
    assert words(seed, counter) == words_by_hand(seed % 2**64, counter)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
def test_rows_follow_the_counter_layout(p):
    rows = torch.tensor([0, 7, 2**32 - 1, 2**32 + 5, 2**40])
    keep = philox.keep_rows(12345 << 20, rows, 11, p)
    for i, row in enumerate(rows.tolist()):
        for col in range(11):
            drawn = words_by_hand(12345 << 20, (col // 4, row & MASK, row >> 32, 0))
            assert bool(keep[i, col]) == (drawn[col % 4] >= math.floor(p * 2**32))


@pytest.mark.parametrize("keys", [1, 4, 6])
def test_attention_follows_the_counter_layout(keys):
    keep = philox.keep_attention(-3, 0.4, 3, 5, keys)
    assert keep.shape == (3, 5, keys)
    for bh in range(3):
        for query in range(5):
            for key in range(keys):
                drawn = words_by_hand(2**64 - 3, (key // 4, query, bh, 1))
                assert bool(keep[bh, query, key]) == (drawn[key % 4] >= int(0.4 * 2**32))


def test_a_part_equals_its_place_in_the_whole(monkeypatch):
    whole = philox.keep_attention(9, 0.3, 6, 17, 33)
    part = philox.keep_attention(9, 0.3, torch.tensor([4, 1]), torch.arange(8, 17), 33)
    assert torch.equal(part, whole[[4, 1], 8:17])
    rows = philox.keep_rows(9, 40, 33, 0.3)
    assert torch.equal(philox.keep_rows(9, torch.arange(20, 40), 20, 0.3), rows[20:, :20])
    monkeypatch.setattr("bertgpt.philox._COUNTERS_AT_ONCE_CPU", 7)
    assert torch.equal(philox.keep_attention(9, 0.3, 6, 17, 33), whole)
    assert torch.equal(philox.keep_rows(9, 40, 33, 0.3), rows)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_nothing_to_draw(shape):
    assert philox.keep_rows(1, *shape, 0.5).shape == shape
    assert philox.keep_attention(1, 0.5, 2, *shape).shape == (2, *shape)


@pytest.mark.parametrize("p", [0.02, 0.1, 0.5, 0.9])
def test_rate_within_five_sigma(p):
    for keep in (
        philox.keep_rows(2024, 1000, 999, p),
        philox.keep_attention(2024, p, 10, 100, 1001),
    ):
        n = keep.numel()
        sigma = math.sqrt(p * (1 - p) / n)
        assert abs(float((~keep).double().mean()) - p) < 5 * sigma
        for dim in (-2, -1):  # neighbours are independent
            both = ~keep.narrow(dim, 1, keep.shape[dim] - 1) & ~keep.narrow(
                dim, 0, keep.shape[dim] - 1
            )
            assert abs(float(both.double().mean()) - p * p) < 5 * sigma


def test_seeds_streams_and_rows_differ():
    masks = [
        philox.keep_rows(1, 64, 64, 0.5),
        philox.keep_rows(2, 64, 64, 0.5),
        philox.keep_rows(1 << 32, 64, 64, 0.5),
        philox.keep_attention(1, 0.5, 1, 64, 64)[0],
        philox.keep_attention(1, 0.5, torch.tensor([1]), 64, 64)[0],
    ]
    for i, a in enumerate(masks):
        for b in masks[:i]:
            assert 0.4 < float((a == b).double().mean()) < 0.6


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_dropout_rows(dtype):
    x = torch.randn(3, 50, 21, dtype=dtype)
    keep = philox.keep_rows(5, 150, 21, 0.25).view(x.shape)
    y = dropout_rows(x, 0.25, 5)
    assert torch.equal(y, torch.where(keep, x * (1 / 0.75), 0.0))
    assert y.dtype == dtype
    assert dropout_rows(x, 0.0, None) is x
    assert not dropout_rows(x, 1.0, 5).any()
    poisoned = torch.where(keep, x, float("nan"))
    assert torch.equal(dropout_rows(poisoned, 0.25, 5), y)


def test_dropout_keeps_the_mean():
    y = dropout_rows(torch.ones(1000, 1000), 0.3, 77)
    sigma = math.sqrt(0.3 / 0.7 / y.numel())
    assert abs(float(y.double().mean()) - 1) < 5 * sigma


def test_a_word_equal_to_the_threshold_is_kept():
    word = words(3, (0, 0, 0, 0))[2]
    assert bool(philox.keep_rows(3, 1, 3, word / 2**32)[0, 2])
    assert not bool(philox.keep_rows(3, 1, 3, (word + 1) / 2**32)[0, 2])


def test_masks_compile_without_a_break():
    compiled = torch.compile(lambda s: keep_rows(s, 3, 9, 0.5), fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.tensor(3)), keep_rows(3, 3, 9, 0.5))
