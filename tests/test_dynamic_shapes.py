"""Compiling and exporting every op once for all batch sizes and lengths, masks among them."""

import pytest
import torch
from cases import cu_seqlens, randn
from tolerance import assert_bitwise
from torch.export import Dim

from bertgpt import ops

H, K, D, E, F, N = 6, 2, 8, 12, 20, 10  # of all different sizes, so that none is taken for another
W, B1, W2 = randn(F, E), randn(F, seed=1), randn(E, F, seed=2)


def padded(batch, queries, keys):
    q = randn(batch, queries, H, D)
    return q, *(randn(batch, keys, K, D, seed=i) for i in (1, 2))


class Call(torch.nn.Module):
    """What is compiled and exported: one call of an op."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *tensors):
        return self.function(*tensors)


def attention(batch, length):
    return padded(batch, length, length + 2)


def with_mask(*fixed):
    """q, k, v and a mask whose sizes are 1 where `fixed` is 1, else those of [B, H, L, S]."""

    def tensors(batch, length):
        sizes = (batch, H, length, length + 2)
        shape = [1 if one else n for one, n in zip(fixed, sizes, strict=True)]
        return (*padded(batch, length, length + 2), randn(*shape, seed=3))

    return tensors


def with_lengths(batch, length):
    return (*padded(batch, length, length + 2), torch.arange(batch) % (length + 1))


def packed(batch, length):
    lengths = [length - i % 2 for i in range(batch)]
    total = sum(lengths)
    q = randn(total, H, D)
    return q, *(randn(total, K, D, seed=i) for i in (1, 2)), cu_seqlens(lengths)


def rows(batch, length):
    return (randn(batch, length, E),)


def pages(batch, length):
    table = torch.arange(batch * length).view(batch, length)
    stored = (randn(batch * length, K, N, D, seed=i) for i in (1, 2))
    return randn(batch, H, D), *stored, table, torch.arange(batch) % (N * length)


def written(batch, length):
    k, v = randn(batch, K, D), randn(batch, K, D, seed=1)
    slots = torch.arange(batch) * 3 % (N * length)
    return k, v, torch.zeros(length, K, N, D), torch.zeros(length, K, N, D), slots


def chunks(batch, length):
    _, k_pages, v_pages, table, _ = pages(batch, length)
    lengths = torch.arange(batch) + 2 * length
    sizes = [int(n) // 2 for n in lengths]
    return randn(sum(sizes), H, D), k_pages, v_pages, table, lengths, cu_seqlens(sizes)


def write(*tensors):
    k, v, k_pages, v_pages, slots = tensors
    k_pages, v_pages = k_pages.clone(), v_pages.clone()
    ops.paged_write(k, v, k_pages, v_pages, slots)
    return k_pages, v_pages


CALLS = {
    "attention": (lambda q, k, v: ops.attention(q, k, v, causal=True, return_lse=True), attention),
    "bool mask": (
        lambda q, k, v, m: ops.attention(q, k, v, mask=m > 0, causal=True),
        with_mask(0, 1, 0, 0),
    ),
    "mask per key": (lambda q, k, v, m: ops.attention(q, k, v, mask=m), with_mask(0, 1, 1, 0)),
    "mask of heads": (lambda q, k, v, m: ops.attention(q, k, v, mask=m), with_mask(1, 0, 0, 0)),
    "whole mask": (lambda q, k, v, m: ops.attention(q, k, v, mask=m), with_mask(0, 0, 0, 0)),
    "lengths": (lambda q, k, v, n: ops.attention(q, k, v, key_lengths=n), with_lengths),
    "packed": (lambda q, k, v, cu: ops.attention(q, k, v, cu_seqlens_q=cu), packed),
    "linear_gelu": (lambda x: ops.linear_gelu(x, W, B1), rows),
    "gelu_ffn": (lambda x: ops.gelu_ffn(x, W, B1, W2, None, approximate="tanh"), rows),
    "add_layer_norm": (
        lambda x: ops.add_layer_norm(x, x * 2, W2[:, 0].contiguous(), None, return_sum=True),
        rows,
    ),
    "pool": (lambda *t: ops.pool(t[0][:, 0], t[-1], normalize=True), packed),
    "paged_attention": (lambda *t: ops.paged_attention(*t, return_lse=True), pages),
    "paged chunks": (
        lambda *t: ops.paged_attention(*t[:-1], cu_seqlens_q=t[-1], max_seqlen_q=None),
        chunks,
    ),
    "paged_write": (write, written),
}
SIZES = ((3, 5), (5, 9), (2, 4), (8, 31))


def same(actual, expected):
    pairs = (
        zip(actual, expected, strict=True) if isinstance(actual, tuple) else [(actual, expected)]
    )
    for one, other in pairs:
        assert_bitwise(one, other)


@pytest.mark.parametrize("name", CALLS)
def test_one_compilation_for_all_sizes(name):
    function, tensors = CALLS[name]
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=count)
    for size in SIZES:
        same(compiled(*tensors(*size)), function(*tensors(*size)))
    assert len(graphs) == 1


@pytest.mark.parametrize("name", CALLS)
def test_one_export_for_all_sizes(name):
    function, tensors = CALLS[name]
    args = tensors(*SIZES[0])
    dynamic = tuple(dict.fromkeys(range(t.dim()), Dim.AUTO) for t in args)
    program = torch.export.export(Call(function), args, dynamic_shapes=(dynamic,))
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any(target.startswith("bertgpt.") for target in targets)
    module = program.module()
    for size in SIZES:
        same(module(*tensors(*size)), function(*tensors(*size)))


class Masked(torch.nn.Module):
    """A module with a mask of its own: a buffer's sizes are constants, q's and k's symbols."""

    def __init__(self, sizes):
        super().__init__()
        self.register_buffer("mask", randn(*sizes))

    def forward(self, q, k, v):
        return ops.attention(q, k, v, mask=self.mask)


@pytest.mark.parametrize("sizes", [(2, 1, 5, 7), (1, 1, 1, 7), (1, 6, 1, 1), (5, 7)])
def test_a_mask_of_constant_sizes_compiles(sizes):
    module, inputs = Masked(sizes), padded(2, 5, 7)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    same(compiled(*inputs), module(*inputs))
