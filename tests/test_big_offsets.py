"""Kernels of attention and pages past 2^31 elements, and on more than 65,535 heads.

Triton's interpreter wraps 32-bit offsets as a GPU does.
"""

import pytest
import torch
from cases import generator, randn, rows_far_apart
from tolerance import assert_bitwise

from bertgpt import ops

pytest.importorskip("triton")
from bertgpt.kernels import (
    add_layer_norm,
    attention,
    linear_gelu,
    merge_splits,
    paged_attention,
    paged_write,
    pool,
)

pytestmark = [
    pytest.mark.interpreter,
    # NumPy warns of 0 / 0 and ln 0, which the kernels select away.
    pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning"),
]
TRITON = {"backend": "triton"}
R = 3  # rows along each dimension: row 2 starts at element 2^31


def attention_tensors():
    q = randn(R, R, R, 8)
    k, v = (randn(R, R, R, 8, seed=i) for i in (1, 2))
    return {"q": q, "k": k, "v": v, "mask": randn(R, R, R, R, seed=3) > -1}


@pytest.mark.parametrize("dim", range(4))
@pytest.mark.parametrize("name", ["q", "k", "v", "mask"])
def test_attention(name, dim):
    if dim == 3 and name != "mask":
        return  # their last stride is 1
    tensors = attention_tensors()
    expected = ops.attention(**tensors, return_lse=True, **TRITON)
    tensors[name] = rows_far_apart(tensors[name], dim)
    for got, want in zip(
        ops.attention(**tensors, return_lse=True, **TRITON), expected, strict=True
    ):
        assert_bitwise(got, want)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_packed_attention(name, dim):
    tensors = {n: randn(5, R, 8, seed=i) for i, n in enumerate("qkv")}
    run = {"cu_seqlens_q": torch.tensor([0, 2, 5]), "causal": True, **TRITON}
    expected = ops.attention(**tensors, **run)
    tensors[name] = rows_far_apart(tensors[name], dim)
    assert_bitwise(ops.attention(**tensors, **run), expected)


def paged_tensors():
    lengths = torch.tensor([9, 12, 5])
    table = torch.randperm(9, generator=generator(4)).view(R, R)
    k_pages, v_pages = (randn(9, R, 4, 8, seed=i) for i in (1, 2))
    q = randn(R, R, 8)
    return {"q": q, "k_pages": k_pages, "v_pages": v_pages, "page_table": table, "lengths": lengths}


@pytest.mark.parametrize(
    ("name", "dim"),
    [
        *((n, d) for n in ("q", "page_table") for d in range(2)),
        *((n, d) for n in ("k_pages", "v_pages") for d in range(3)),
    ],
)
def test_paged_attention(name, dim):
    tensors = paged_tensors()
    expected = ops.paged_attention(**tensors, return_lse=True, **TRITON)
    tensors[name] = rows_far_apart(tensors[name], dim)
    actual = ops.paged_attention(**tensors, return_lse=True, **TRITON)
    for got, want in zip(actual, expected, strict=True):
        assert_bitwise(got, want)


@pytest.mark.parametrize(
    ("name", "dim"),
    [
        *((n, d) for n in ("k", "v") for d in range(2)),
        *((n, d) for n in ("k_pages", "v_pages") for d in range(3)),
        ("slots", 0),
    ],
)
def test_paged_write(name, dim):
    pages = {n: torch.zeros(R, R, 4, 8) for n in ("k_pages", "v_pages")}
    tensors = {"k": randn(5, R, 8), "v": randn(5, R, 8, seed=1), **pages}
    tensors["slots"] = torch.tensor([0, 7, 10, 11, 3])
    expected = {**tensors, **{n: t.clone() for n, t in pages.items()}}
    ops.paged_write(**expected, **TRITON)
    tensors[name] = rows_far_apart(tensors[name], dim)
    ops.paged_write(**tensors, **TRITON)
    for pages_name in pages:
        assert_bitwise(tensors[pages_name].contiguous(), expected[pages_name])


class Grids:
    """Stands for a kernel: keeps the grids that it is launched on and runs nothing."""

    def __init__(self):
        self.seen = []

    def __getitem__(self, grid):
        self.seen.append(grid)
        return lambda *args, **kwargs: None


@pytest.mark.parametrize("heads", [65_535, 65_536])
def test_no_axis_but_the_first_grows_with_the_heads(heads, monkeypatch):
    """A GPU takes 2^31 - 1 programs on the first axis of a grid and 65,535 on the others."""
    grids = Grids()
    for module in (
        add_layer_norm,
        attention,
        linear_gelu,
        merge_splits,
        paged_attention,
        paged_write,
        pool,
    ):
        for name in vars(module):
            if name.startswith("_") and name.endswith("_kernel"):
                monkeypatch.setattr(module, name, grids)
    x = torch.zeros(1, 8).expand(heads, 8)
    qkv = x.view(heads, 1, 1, 8)
    pages = torch.zeros(1, 1, 4, 8).expand(2, heads, 4, 8)
    ops.attention(qkv, qkv, qkv, **TRITON)  # many sequences
    ops.attention(*(t.transpose(0, 2) for t in (qkv, qkv, qkv)), **TRITON)  # many heads
    table, lengths = torch.zeros(heads, 1, dtype=torch.int32), torch.ones(heads, dtype=torch.int32)
    ops.paged_attention(x[:, None], pages[:, :1], pages[:, :1], table, lengths, **TRITON)
    ops.paged_attention(x[None], pages, pages, table[:1].expand(1, 9), lengths[:1], **TRITON)
    ops.linear_gelu(x, torch.zeros(4, 8), None, **TRITON)
    ops.add_layer_norm(x, None, torch.ones(8), None, **TRITON)
    ops.pool(x, torch.arange(heads + 1), **TRITON)
    writable = torch.zeros(1, 1, 4, 8)
    ops.paged_write(x[:, None], x[:, None], writable, writable.clone(), lengths * 0, **TRITON)
    assert len(grids.seen) == 8
    for grid in grids.seen:
        assert grid[0] < 2**31
        assert all(size <= 65_535 for size in grid[1:])
    assert max(grid[0] for grid in grids.seen) >= heads
