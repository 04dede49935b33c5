"""Inputs of the objectives: what is masked, which segments make a pair, and how often."""

import math
from collections import Counter

import pytest
import torch
from cases import examples
from hypothesis import given
from hypothesis import strategies as st

from bertgpt.objectives import IGNORE, Passage, mask_tokens, next_sentence_pair, passages

CLS, SEP, MASK, VOCAB = 2, 3, 4, 61
SPECIAL = (0, CLS, SEP, MASK, 60)
MARKS = {"cls_token": CLS, "sep_token": SEP}


def masked(tokens, generator=0, **changes):
    options = {"mask_token": MASK, "vocab_size": VOCAB, "special_tokens": SPECIAL}
    return mask_tokens(tokens, generator=generator, **{**options, **changes})


def assert_share(count, total, probability):
    """A binomial count within five standard deviations of its mean."""
    deviation = math.sqrt(total * probability * (1 - probability))
    assert abs(count - total * probability) <= 5 * deviation, (count, total, probability)


def test_masking_has_the_shares_of_the_paper():
    words = [word for word in range(VOCAB) if word not in SPECIAL]
    tokens = torch.tensor(words).repeat(4000)
    inputs, labels = masked(tokens)
    chosen = labels != IGNORE
    assert_share(int(chosen.sum()), tokens.numel(), 0.15)
    total = int(chosen.sum())
    hidden, changed = inputs == MASK, inputs != tokens
    assert_share(int(hidden.sum()), total, 0.8)
    # One random token in all those of the vocabulary that are not special is the token itself.
    assert_share(int((changed & ~hidden).sum()), total, 0.1 * (1 - 1 / len(words)))
    assert bool(((labels == tokens) | ~chosen).all())
    assert not bool((changed & ~chosen).any())
    drawn = Counter(inputs[changed & ~hidden].tolist())
    assert set(drawn) == set(words)
    for word in words:
        assert_share(drawn[word], sum(drawn.values()), 1 / len(words))


@examples(100)
@given(
    tokens=st.lists(st.integers(0, VOCAB - 1), max_size=40),
    seed=st.integers(0, 2**63 - 1),
    probability=st.sampled_from([0.0, 0.15, 1.0]),
    dtype=st.sampled_from([torch.int32, torch.int64]),
)
def test_masking_leaves_special_tokens_and_its_input_alone(tokens, seed, probability, dtype):
    tokens = torch.tensor(tokens, dtype=dtype)
    before = tokens.clone()
    inputs, labels = masked(tokens, seed, probability=probability)
    assert torch.equal(tokens, before)
    assert inputs.dtype == labels.dtype == dtype
    special = torch.isin(tokens, torch.tensor(SPECIAL, dtype=dtype))
    assert torch.equal(inputs[special], tokens[special])
    assert bool((labels[special] == IGNORE).all())
    assert int((labels != IGNORE).sum()) <= int(probability > 0) * int((~special).sum())
    if probability == 1.0:
        assert torch.equal(labels[~special], tokens[~special])
    changed = inputs[inputs != tokens]
    assert not bool((torch.isin(changed, torch.tensor([0, CLS, SEP, 60], dtype=dtype))).any())


def test_masking_is_told_by_its_generator_alone():
    tokens = torch.randint(5, 60, (200,))
    first = masked(tokens, 7)
    torch.rand(5)
    again = masked(tokens, torch.Generator().manual_seed(7))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[1], masked(tokens, 8)[1])


@pytest.mark.gpu
def test_masking_stays_on_the_tokens_device():
    inputs, labels = masked(torch.full((1000,), 7, device="cuda"))
    assert inputs.device.type == labels.device.type == "cuda"
    assert 0 < int((labels != IGNORE).sum()) < 1000


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"tokens": [1, 2]}, TypeError, "not list"),
        ({"tokens": torch.ones(3)}, TypeError, r"int32 or int64, not torch\.float32"),
        ({"probability": 1.5}, ValueError, "probability must lie in"),
        ({"special_tokens": (61,)}, IndexError, r"\[4, 61\] must lie in 0 … 60"),
        ({"mask_token": -1}, IndexError, "must lie in 0 … 60"),
        ({"special_tokens": range(61)}, ValueError, "every token of the vocabulary is special"),
    ],
)
def test_masking_refuses_by_name(changes, error, message):
    with pytest.raises(error, match=message):
        masked(changes.pop("tokens", torch.tensor([7])), **changes)


# Document d's tokens are 1000·d + …, so that a token tells where it comes from.
DOCUMENTS = [
    [[1000 * d + 10 * s + i for i in range(1 + (d + s) % 6)] for s in range(n)]
    for d, n in enumerate((9, 1, 7, 0, 12, 2))
]


def test_passages_keep_the_order_and_name_short_documents():
    found, short = passages(DOCUMENTS, 16)
    assert short == [1, 3]
    for passage in found:
        assert len(passage.sentences) > 1
        document = DOCUMENTS[passage.document]
        start = document.index(passage.sentences[0])
        assert list(passage.sentences) == document[start : start + len(passage.sentences)]
        assert sum(map(len, passage.sentences[:-1])) < 13 or len(passage.sentences) == 2
    starts = [(p.document, p.sentences[0][0]) for p in found]
    assert starts == sorted(starts)
    assert len(set(starts)) == len(found)


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([], "0 of 0 are shorter"),
        ([[[1], [2]]], "0 of 1 are shorter"),
        ([[[1], [2]], [[3]], [[4], []]], "2 of 3 are shorter"),
    ],
)
def test_pairs_need_two_documents(documents, message):
    with pytest.raises(ValueError, match=message):
        passages(documents, 16)


def test_a_pair_needs_room():
    with pytest.raises(ValueError, match="length must be 5 or more"):
        passages(DOCUMENTS, 4)


def test_half_of_the_pairs_follow_and_the_rest_come_from_elsewhere():
    found, _ = passages(DOCUMENTS, 16)
    labels, cuts, others = Counter(), Counter(), Counter()
    for seed in range(3000):
        place = seed % len(found)
        generator = torch.Generator().manual_seed(seed)
        ids, types, label = next_sentence_pair(
            found[place], found, length=16, **MARKS, generator=generator
        )
        labels[label] += 1
        assert len(ids) == len(types) <= 16
        assert (ids[0], ids[-1], ids.count(SEP)) == (CLS, SEP, 2)
        middle = ids.index(SEP)
        assert types == [0] * (middle + 1) + [1] * (len(ids) - middle - 1)
        first, second = ids[1:middle], ids[middle + 1 : -1]
        assert first
        assert second
        assert {token // 1000 for token in first} == {found[place].document}
        (source,) = {token // 1000 for token in second}
        assert (source == found[place].document) == (label == 0)
        whole = [token for sentence in found[place].sentences for token in sentence]
        assert whole[: len(first)] == first
        if label:
            others[source] += 1
        elif place == 0:
            cuts[len(first)] += 1
    assert_share(labels[0], 3000, 0.5)
    assert len(cuts) == len(found[0].sentences) - 1
    assert set(others) == {0, 2, 4, 5}


@examples(100)
@given(a=st.integers(1, 30), b=st.integers(1, 30), length=st.integers(5, 40))
def test_the_longer_segment_is_cut_first(a, b, length):
    first, second = list(range(100, 100 + a)), list(range(200, 200 + b))
    everything = [Passage(0, (first, second)), Passage(1, (first, second))]
    ids, types, _ = next_sentence_pair(
        everything[0],
        everything,
        length=length,
        **MARKS,
        generator=torch.Generator().manual_seed(0),
    )
    kept = [types.count(0) - 2, types.count(1) - 1]
    expected = [a, b]
    while sum(expected) > length - 3:  # one token at a time, as the paper's code does
        expected[1 if expected[1] >= expected[0] else 0] -= 1
    assert kept == expected
    assert ids[1 : 1 + kept[0]] == first[: kept[0]]
    assert ids[2 + kept[0] : -1] == second[: kept[1]]
