"""Sampling calls and what they should draw, by floats and sorting in plain Python."""

import math

import torch
from cases import generator, randn
from hypothesis import strategies as st
from test_philox import MASK, words_by_hand

INF = float("inf")
SEEDED = {"seed": 7, "sequence_ids": 0, "steps": 0}


def by_hand(row, temperature, top_k, top_p, min_p, seed, sequence, step):
    """One row's token: float64 probabilities, a full sort, and Philox in Python's integers."""
    top = max(row)
    if temperature == 0:
        return row.index(top)
    order = sorted(range(len(row)), key=lambda i: (-row[i], i))
    if 0 < top_k < len(row):
        order = [i for i in order if row[i] >= row[order[top_k - 1]]]
    weight = {i: math.exp((row[i] - top) / temperature) for i in order}
    enough, mass, kept = top_p * math.fsum(weight.values()), 0.0, []
    for i in order:
        if kept and mass >= enough * (1 - 1e-12):
            break
        kept.append(i)
        mass += weight[i]
    kept = [i for i in kept if weight[i] >= min_p]
    mass = math.fsum(weight[i] for i in kept)
    counter = (step, sequence & MASK, sequence >> 32 & MASK, 2)
    high, low, _, _ = words_by_hand(seed, counter)
    point, walked = (high << 32 | low) / 2**64 * mass, 0.0
    for i in sorted(kept):
        walked += weight[i]
        if walked > point:
            return i
    return max(kept)


def expected(logits, settings):
    """The tokens of a whole call, whose settings are tensors or numbers."""
    rows = len(logits)
    per_row = {
        name: value.expand(rows).tolist() if isinstance(value, torch.Tensor) else [value] * rows
        for name, value in {"min_p": 0.0, **settings}.items()
    }
    names = ("temperature", "top_k", "top_p", "min_p", "seed", "sequence_ids", "steps")
    columns = zip(*(per_row[name] for name in names), strict=True)
    tokens = [by_hand(x, *row) for x, row in zip(logits.double().tolist(), columns, strict=True)]
    return torch.tensor(tokens)


def settings_of(rows, seed=0):
    """Settings of every kind, mixed over the rows."""
    rng = generator(seed)

    def some(values):
        return torch.tensor(values)[torch.randint(len(values), (rows,), generator=rng)]

    def words():
        return torch.randint(-(2**63), 2**63 - 1, (rows,), generator=rng)

    return {
        "temperature": some([0.0, 0.3, 0.8, 1.0, 1.7]),
        "top_k": some([0, 0, 1, 3, 50, 10**6]),
        "top_p": some([1.0, 1.0, 0.95, 0.6, 0.2, 1e-6]),
        "seed": words(),
        "sequence_ids": words(),
        "steps": some([0, 1, 1023, 2**32 - 1]),
        "min_p": some([0.0, 0.0, 1e-9, 0.05, 0.4, 1.0]),
    }


def logits_of(rows, vocabulary, dtype, *, ties=False, holes=False, seed=0):
    """Logits [B, V]; `ties` makes many equal, `holes` rules some tokens out."""
    x = randn(rows, vocabulary, scale=3.0, seed=seed)
    if ties:
        x = x.round()
    if holes:
        open_ = torch.rand(rows, vocabulary, generator=generator(seed + 1)) > 0.3
        open_[torch.arange(rows), torch.arange(rows) % vocabulary] = True
        x = x.masked_fill(~open_, -INF)
    return x.to(dtype)


@st.composite
def problems(draw, dtypes, vocabularies=(1, 2, 3, 13, 64, 127, 300)):
    rows = draw(st.integers(0, 9))
    seed = draw(st.integers(0, 10**6))
    logits = logits_of(
        rows,
        draw(st.sampled_from(vocabularies)),
        draw(st.sampled_from(dtypes)),
        ties=draw(st.booleans()),
        holes=draw(st.booleans()),
        seed=seed,
    )
    return logits, settings_of(rows, seed)
