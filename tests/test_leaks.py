"""Ten thousand steps of varying shapes leave memory as it was."""

import ctypes
import gc
from pathlib import Path
from resource import getpagesize

import pytest
import torch
from cases import randn

from bertgpt import PagedKVCache, ops, pack, pad

STEPS = 10_000
WARM = 2_000  # first steps fill caches: allocator arenas, operator schemas, interned sizes
GROWTH = 8 * 2**20  # bytes over the rest: a tensor of 1 KiB kept at each step would be 8 MiB


def resident():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else room that earlier tests left takes what is kept
    return int(Path("/proc/self/statm").read_text().split()[1]) * getpagesize()


def flat(step):
    """Whether memory stays within GROWTH over the steps after the first."""
    for i in range(WARM):
        step(i)
    before = resident()
    for i in range(WARM, STEPS):
        step(i)
    return resident() - before < GROWTH


W, B1, W2 = randn(24, 16), randn(24, seed=1), randn(16, 24, seed=2)


def call_ops(i):
    """Every op that returns something, forward and now and then backward, packed and padded."""
    rows, length = 1 + i % 7, 1 + i * 3 % 11
    x = randn(rows, length, 16, seed=i % 5).requires_grad_(i % 10 == 0)
    y, total = ops.add_layer_norm(x, x.detach(), W2[:, 0].contiguous(), None, return_sum=True)
    y = ops.gelu_ffn(y, W, B1, W2, None, dropout_p=0.1 * (i % 2)) + ops.linear_gelu(
        total, W2.t()[:16], None
    )
    q = y.view(rows, length, 2, 8)
    out = ops.attention(q, q, q, causal=True, return_lse=i % 3 == 0)
    if isinstance(out, tuple):
        out = out[0]
    batch = pack([[1] * (1 + j) for j in range(rows)])
    packed = randn(len(batch.values), 2, 8)
    pad(ops.attention(packed, packed, packed, cu_seqlens_q=batch.cu_seqlens), batch)
    if out.requires_grad:
        out.sum().backward()


@pytest.mark.slow
def test_ops():
    assert flat(call_ops)


@pytest.mark.slow
def test_decoding():
    """Sequences come, grow and go; every step writes a token of each and attends to its pages."""
    cache = PagedKVCache(
        num_pages=64,
        page_size=8,
        num_layers=1,
        num_kv_heads=1,
        head_dim=8,
        dtype=torch.float32,
        device="cpu",
    )
    alive = []

    def step(i):
        if i % 5 == 0 and len(alive) < 6:
            alive.append(cache.allocate(32))
        if i % 29 == 28 or any(int(n) == 32 for n in cache.lengths(alive)):
            cache.free(alive.pop(0))
        if not alive:
            return
        slots = cache.append(alive, [1] * len(alive))
        k = randn(len(alive), 1, 8, seed=i % 3)
        ops.paged_write(k, k, *cache.layers[0], slots)
        tensors = (*cache.layers[0], cache.page_table(alive), cache.lengths(alive))
        ops.paged_attention(k, *tensors, return_lse=i % 2 == 0)

    assert flat(step)


def test_the_bound_sees_a_leak():
    kept = []
    assert not flat(lambda i: kept.append(torch.ones(1000)))
