"""Scales of any sign, and a log-sum-exp whose asking changes nothing else, on backend torch."""

import importlib

import pytest
import torch
from cases import ALL_DTYPES, cu_seqlens, generator, randn
from paged_batch import paged_batch
from tolerance import assert_accurate, assert_bitwise

from bertgpt import ops, reference

SCALES = (-1.0, -0.3, 0.0, -0.0, 0.3, 2.0)
LENGTHS = (5, 0, 9, 5, 1)


def qkv(*shape, dtype):
    q = randn(*shape, 4, 8, dtype=dtype)
    return q, *(randn(*shape, 2, 8, dtype=dtype, seed=i) for i in (1, 2))


def masks():
    drawn = torch.randn(2, 1, 9, 9, generator=generator(3))
    return {
        "causal": {"causal": True},
        "none": {},
        "window": {"window": (2, 1)},
        "lengths": {"key_lengths": torch.tensor([4, 0]), "causal": True},
        "bool": {"mask": (drawn > 0).expand(2, 4, 9, 9), "causal": True},
        "additive": {"mask": drawn.expand(2, 4, 9, 9)},
    }


def check(inputs, kwargs):
    """Output and log-sum-exp are accurate, and the output is the same without the other."""
    oracle = reference.attention(*(t.double() for t in inputs), return_lse=True, **kwargs)
    baseline = reference.attention(*inputs, return_lse=True, **kwargs)
    actual = ops.attention(*inputs, return_lse=True, backend="torch", **kwargs)
    assert_bitwise(ops.attention(*inputs, backend="torch", **kwargs), actual[0])
    for got, want, low in zip(actual, oracle, baseline, strict=True):
        assert_accurate(got, want.double(), low, factor=3)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", masks())
def test_any_sign_of_scale(name, scale, dtype):
    inputs, kwargs = qkv(2, 9, dtype=dtype), {"scale": scale, **masks()[name]}
    check(inputs, kwargs)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("scale", SCALES)
def test_any_sign_of_scale_packed(scale, dtype):
    inputs = qkv(sum(LENGTHS), dtype=dtype)
    kwargs = {"scale": scale, "causal": True, "cu_seqlens_q": cu_seqlens(LENGTHS)}
    check(inputs, kwargs)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("chunks", [None, (3, 1, 8)])
def test_any_sign_of_scale_on_pages(scale, chunks):
    batch = paged_batch((3, 1, 17), chunks)
    kwargs = {"scale": scale, "return_lse": True, **batch.chunks}
    for actual, expected in zip(
        ops.paged_attention(*batch.args, backend="torch", **kwargs),
        ops.paged_attention(*batch.double().args, backend="reference", **kwargs),
        strict=True,
    ):
        torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_gradients_at_any_sign_of_scale(scale):
    inputs = tuple(t.requires_grad_() for t in qkv(1, 5, dtype=torch.float64))

    def function(q, k, v):
        return ops.attention(q, k, v, scale=scale, causal=True, backend="torch")

    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("name", masks())
def test_asking_for_lse_changes_nothing_else(name, dtype):
    q, k, v = qkv(2, 9, dtype=dtype)
    kwargs = {"scale": 2.0, "backend": "torch", **masks()[name]}
    out, lse = ops.attention(q, k, v, return_lse=True, **kwargs)
    assert_bitwise(ops.attention(q, k, v, **kwargs), out)
    # Products in float32 or wider, whatever the inputs.
    wide = ops.attention(q.double(), k.double(), v.double(), return_lse=True, **kwargs)[1]
    torch.testing.assert_close(lse, wide, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("name", masks())
def test_lse_comes_in_pieces(name, monkeypatch):
    portable = importlib.import_module("bertgpt.portable.attention")
    inputs, kwargs = qkv(2, 9, dtype=torch.float64), {"return_lse": True, **masks()[name]}
    whole = ops.attention(*inputs, backend="torch", **kwargs)[1]
    for scores in (1, 2 * 4 * 9 * 2, 2 * 4 * 9 * 4):  # one, two and four rows a piece
        monkeypatch.setattr(portable, "_LSE_SCORES", scores)
        pieces = ops.attention(*inputs, backend="torch", **kwargs)[1]
        torch.testing.assert_close(pieces, whole)


def test_lse_holds_few_scores_at_once():
    q, k = (torch.randn(1, 2048, 4, 8, generator=generator(i)) for i in (0, 1))
    with torch.profiler.profile(profile_memory=True) as profile:
        ops.attention(q, k, k, causal=True, return_lse=True, backend="torch")
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest < 2048 * 2048 * 4 * 4 / 4  # [1, 4, L, S] in float32, a quarter of it
