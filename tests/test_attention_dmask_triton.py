"""The Triton kernel of an additive mask's gradient, in Triton's interpreter."""

from itertools import product

import pytest
import torch
from attention_calls import INF, additive, qkv
from cases import (
    KERNEL_DTYPES,
    awkward_sizes,
    banded_copy,
    examples,
    poisoned_allocations,
    randn,
    rows_far_apart,
    with_odd_strides,
)
from hypothesis import given
from hypothesis import strategies as st
from test_attention_bwd_triton import NAN, TILES, TINY
from tolerance import assert_accurate, assert_bitwise

from bertgpt import ops, reference
from bertgpt.ops._dispatch import OPS

pytest.importorskip("triton")
from bertgpt.kernels import attention as forward
from bertgpt.kernels import attention_backward as kernel
from bertgpt.kernels import attention_dmask as dmask

pytestmark = [
    pytest.mark.interpreter,
    # NumPy warns of ln 0 and 2^inf in rows without a key, which are selected away.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
B, H, L, S = 2, 2, 20, 37
SHAPES = [(B, H, L, S), (1, H, L, S), (B, 1, L, S), (L, S), (B, H, 1, S), (B, 1, 1, S), (S,)]


@pytest.fixture
def tiles(monkeypatch):
    """Sets the tile shape of the gradient kernels."""

    def set_tiles(config):
        for module in (kernel, dmask):
            monkeypatch.setattr(module, "pick_config", lambda *call: config)

    set_tiles(TINY)
    return set_tiles


def gradient(function, inputs, mask, grad_out, **call):
    """The function's gradient of the mask."""
    leaf = mask.detach().requires_grad_()
    out = function(*inputs, mask=leaf, **call)
    if not out.requires_grad:  # the definition's, of nothing to attend
        assert function is not ops.attention
        return torch.zeros_like(leaf)
    return torch.autograd.grad(out, leaf, grad_out.to(out.dtype))[0]


def triton_gradient(inputs, mask, grad_out, **call):
    return gradient(ops.attention, inputs, mask, grad_out, backend="triton", **call)


def check(inputs, mask, grad_out=None, **call):
    """The mask's gradient against the definition's, in memory that starts as NaN."""
    q, k = inputs[:2]
    if grad_out is None:
        grad_out = randn(*q.shape, dtype=q.dtype, seed=9)
    with poisoned_allocations():
        actual = triton_gradient(inputs, mask, grad_out, **call)
    assert (actual.shape, actual.dtype) == (mask.shape, mask.dtype)

    def define(*tensors, mask, **options):
        whole = mask.expand(q.shape[0], q.shape[2], q.shape[1], k.shape[1])
        return reference.attention(*tensors, mask=whole, **options)

    oracle = gradient(define, [x.double() for x in inputs], mask.double(), grad_out, **call)
    baseline = gradient(define, inputs, mask, grad_out, **call)
    # A query that sees one key, and a sum over all keys, have a zero gradient, the difference of
    # two equal sums: right to the size of those sums. So a head's rows are judged together, and
    # one of such queries alone by the rounding of the output that goes into one sum.
    assert actual.isfinite().all()
    if not actual.numel():
        return actual
    actual_rows, *rows = (x.reshape(*x.shape[:-2], -1) for x in (actual, oracle, baseline))
    cancelled = rows[0].abs().sum(dim=-1) < 1e-11
    assert (actual_rows[cancelled].abs() < 64 * torch.finfo(q.dtype).eps).all()
    assert_accurate(actual_rows[~cancelled], *(x[~cancelled] for x in rows), factor=3, what="dmask")
    return actual


CALLS = {
    "causal": {"causal": True},
    "window": {"window": (5, 3)},
    "left": {"window": (4, -1)},
    "lengths": {"key_lengths": torch.tensor([21, 0])},
    "dropout": {"dropout_p": 0.3, "seed": 2**40 + 1},
    "all": {
        "causal": True, "window": (25, 2), "key_lengths": torch.tensor([36, 18]),
        "dropout_p": 0.3, "seed": 4, "scale": -0.3,
    },
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_broadcast(shape, tiles):
    dtype = KERNEL_DTYPES[SHAPES.index(shape) % 3]
    check(qkv(B, L, S, H, 1, 16, dtype), additive(*shape))


@pytest.mark.parametrize("shape", [(1, H, L, S), (B, 1, 1, S)], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_every_other_mask_beside_it(name, shape, tiles):
    """In turn each dtype and tile shape, a float32 mask beside the half tensors."""
    turn = list(CALLS).index(name)
    tiles(TILES[sorted(TILES)[turn % 3]])
    check(
        qkv(B, L, S, H, 1 + turn % 2, 16, KERNEL_DTYPES[turn % 3]), additive(*shape), **CALLS[name]
    )


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_a_mask_of_the_tensors_own_dtype_and_the_picked_tiles(dtype):
    check(qkv(B, L, S, H, 2, 16, dtype), randn(H, L, S, dtype=dtype, seed=5), causal=True)


@pytest.mark.parametrize("length", awkward_sizes(16))
def test_sizes_around_a_tile(length, tiles):
    for queries, keys, row in ((length, 30, False), (30, length, True)):
        mask = randn(1 if row else queries, keys, seed=5)
        check(qkv(1, queries, keys, 1, 1, 8, torch.float16), mask, window=(20, 20))


@examples(12)
@given(
    sizes=st.tuples(st.integers(0, 2), st.integers(0, 40), st.integers(0, 50)),
    heads=st.sampled_from([(1, 1), (4, 1), (6, 3)]),
    head_dim=st.integers(8, 40),
    dtype=st.sampled_from(KERNEL_DTYPES),
    config=st.sampled_from(sorted(TILES)),
    strided=st.booleans(),
    causal=st.booleans(),
    window=st.none() | st.tuples(st.integers(-1, 60), st.integers(-1, 60)),
    scale=st.sampled_from([None, 0.0, -0.3, 0.5]),
    broadcast=st.tuples(*[st.booleans()] * 3, st.sampled_from([False, False, True])),
    dropout_p=st.sampled_from([0.0, 0.0, 0.3, 1.0]),
)
def test_accurate_whatever_the_call(
    sizes, heads, head_dim, dtype, config, strided, causal, window, scale, broadcast, dropout_p
):
    (B, L, S), (H, K) = sizes, heads
    inputs = qkv(B, L, S, H, K, head_dim, dtype, strided)
    shape = [1 if one else n for n, one in zip((B, H, L, S), broadcast, strict=True)]
    mask = additive(*shape)
    mask = with_odd_strides(mask) if strided and mask.numel() else mask
    grad_out = randn(B, L, H, head_dim, dtype=dtype, seed=9, strided=strided)
    call = {"causal": causal, "window": window, "scale": scale, "dropout_p": dropout_p, "seed": 5}
    lengths = (torch.arange(B) * 13 + 5).clamp(max=S)
    with pytest.MonkeyPatch.context() as patch:
        for module in (kernel, dmask):
            patch.setattr(module, "pick_config", lambda *call: TILES[config])
        check(inputs, mask, grad_out, key_lengths=lengths, **call)


@pytest.mark.parametrize("shape", [(1, 1, L, 1), (B, H, 1, 1), (B, 1, L, 1), ()], ids=str)
def test_one_value_for_all_keys_changes_nothing(shape, tiles):
    """A shift of all of a query's scores is one that softmax does not see."""
    inputs = qkv(B, L, S, H, 2, 16, torch.float16)
    mask = randn(*shape, seed=5) if shape else torch.tensor(0.5)
    assert not check(inputs, mask, dropout_p=0.3, seed=3).any()


def test_an_expanded_mask_has_a_gradient_of_its_whole_shape(tiles):
    inputs = qkv(B, L, S, H, 2, 16)
    whole = check(inputs, randn(S, seed=5).expand(B, H, L, S))
    torch.testing.assert_close(whole.sum((0, 1, 2)), check(inputs, randn(S, seed=5)))


def test_masked_pairs_and_queries_without_a_key_have_none(tiles):
    q, k, v = qkv(1, 40, 20, 2, 1, 16, torch.float16)
    mask = torch.where(torch.arange(40)[:, None] < 20, -INF, randn(40, 20)).index_fill(
        1, torch.tensor([3, 19]), -INF
    )
    grad_out = randn(*q.shape, dtype=q.dtype, seed=9)
    clean = check((q, k, v), mask, grad_out)
    assert (clean[mask == -INF] == 0).all()
    assert (clean[mask != -INF] != 0).all()
    q[:, :20], grad_out[:, :20] = NAN, NAN
    k[:, [3, 19]], v[:, [3, 19]] = NAN, NAN
    assert_bitwise(triton_gradient((q, k, v), mask, grad_out), clean)
    row = mask[30:31]
    assert triton_gradient((q[:, 20:], k, v), row, grad_out[:, 20:]).isfinite().all()


@pytest.mark.parametrize("shape", [(1, H, L, S), (S,)], ids=str)
def test_bitwise_again_and_only_what_is_asked_for(shape, tiles):
    inputs = qkv(B, L, S, H, 2, 16, torch.float16)
    mask, grad_out = additive(*shape), randn(B, L, H, 16, dtype=torch.float16, seed=9)
    first = triton_gradient(inputs, mask, grad_out, causal=True)
    assert_bitwise(triton_gradient(inputs, mask, grad_out, causal=True), first)
    leaves = [x.detach().requires_grad_() for x in (*inputs, mask)]
    out = ops.attention(*leaves[:3], mask=leaves[3], causal=True, backend="triton")
    every = torch.autograd.grad(out, leaves, grad_out)
    assert_bitwise(every[3], first)
    out = ops.attention(*leaves[:3], mask=mask, causal=True, backend="triton")
    for a, b in zip(every, torch.autograd.grad(out, leaves[:3], grad_out), strict=False):
        assert_bitwise(a, b)


def launch(q, k, v, grad_out, mask):
    """Both launchers, on what the op would hand them."""
    call = {"key_lengths": None, "causal": False, "window": (-1, -1), "scale": 0.25}
    call |= {"dropout_p": 0.0, "seed": None, "max_seqlen_q": None, "max_seqlen_k": None}
    call |= {"cu_seqlens_q": None, "cu_seqlens_k": None}
    call["mask"] = mask.expand(q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    out, _, stats = forward.attention_fwd(q, k, v, return_lse=False, return_stats=True, **call)
    gradients = kernel.attention_bwd(grad_out, out, stats, q, k, v, mask_shape=mask.shape, **call)
    return gradients["mask"]


@pytest.mark.parametrize("shape", [(1, 2, 17, 33), (1, 1, 1, 33)], ids=str)
def test_nothing_outside_the_inputs_is_used(shape, tiles):
    q, k, v = qkv(1, 17, 33, 2, 1, 16, torch.float16)
    inputs = q, k, v, randn(*q.shape, dtype=q.dtype, seed=9), randn(*shape, seed=5)
    clean = launch(*inputs)
    fenced = [banded_copy(x) for x in inputs]
    assert_bitwise(launch(*(f.view for f in fenced)), clean)
    for f in fenced:
        f.check()


def test_offsets_past_32_bits(tiles):
    rows = [randn(4, 16, seed=i) for i in range(4)]
    mask = randn(4, 4, seed=5)
    near = launch(*(x[None, :, None] for x in rows), mask[None, None])
    far = launch(
        *(rows_far_apart(x)[None, :, None] for x in rows), rows_far_apart(mask)[None, None]
    )
    assert_bitwise(far, near)


def test_the_right_one_where_a_graph_hid_who_asks_for_it():
    """As in a compiled graph, whose forward pass runs on tensors that ask for nothing."""
    q, k, v = qkv()
    mask, grad_out = randn(20, 37, seed=5), randn(*q.shape, seed=9)
    call = OPS["attention"].check(q, k, v, mask=mask, backend="triton")
    values = [{**call, "return_stats": True}[field] for field in OPS["attention"].fields]
    out, _, stats = torch.ops.bertgpt.attention(*values)
    found = torch.ops.bertgpt.attention_backward([grad_out], [out, stats], [True] * 4, *values)
    inputs = [x.requires_grad_() for x in (q, k, v, mask)]
    expected = torch.autograd.grad(ops.attention(q, k, v, mask=mask), inputs, grad_out)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.view(b.shape), b)


def test_configs_are_powers_of_two_for_every_machine():
    for capability, dim, size, aligned in product(
        (80, 86, 89, 90, 100, 103, 120, 121), range(1, 257), (2, 4), (False, True)
    ):
        config = dmask.pick_config(capability, dim, size, aligned)
        for extent in (config.BLOCK_M, config.BLOCK_N):
            assert extent >= 16
            assert extent & (extent - 1) == 0
