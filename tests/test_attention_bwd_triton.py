"""The Triton kernels of attention's gradient and of its dropout, in Triton's interpreter."""

from dataclasses import replace

import pytest
import torch
from attention_calls import INF, MASKS, additive, qkv, triton_gradients
from attention_calls import check_gradients as check
from cases import (
    HEAD_DIMS,
    KERNEL_DTYPES,
    PACKED_LENGTHS,
    awkward_sizes,
    banded_copy,
    cu_seqlens,
    examples,
    poisoned_allocations,
    randn,
    rows_far_apart,
    with_odd_strides,
)
from hypothesis import given
from hypothesis import strategies as st
from tolerance import assert_accurate, assert_bitwise

from bertgpt import ops
from bertgpt.reference.philox import keep_attention

pytest.importorskip("triton")
from bertgpt.kernels import attention as forward
from bertgpt.kernels import attention_backward as kernel
from bertgpt.kernels.attention_call import Config

pytestmark = [
    pytest.mark.interpreter,
    # NumPy warns of ln 0 and 2^inf in rows without a key, which are selected away.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
NAN = float("nan")
TINY = Config(BLOCK_M=16, BLOCK_N=16, num_warps=4, num_stages=2)
TILES = {"16×16": TINY, "16×32": replace(TINY, BLOCK_N=32), "32×16": replace(TINY, BLOCK_M=32)}
DTYPE_TILES = list(zip(KERNEL_DTYPES, TILES, strict=True))


@pytest.fixture
def tiles(monkeypatch):
    """Sets the tile shape of both gradient kernels."""

    def set_tiles(config):
        monkeypatch.setattr(kernel, "pick_config", lambda *call: config)

    set_tiles(TINY)
    return set_tiles


@pytest.mark.parametrize(("dtype", "config"), DTYPE_TILES, ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_every_mask(name, dtype, config, tiles):
    tiles(TILES[config])
    check(*qkv(B=2, dtype=dtype), **MASKS[name])


@pytest.mark.parametrize("name", ["none", "causal", "all", "all additive"])
def test_the_picked_tiles(name):
    check(*qkv(B=2, dtype=torch.float16), **MASKS[name])


@pytest.mark.parametrize("D", HEAD_DIMS)
def test_every_head_dim(D):
    dtype = torch.float32 if D in (1, 31) else torch.float16
    check(*qkv(D=D, L=33, S=50, dtype=dtype), causal=True)


@pytest.mark.parametrize("config", TILES)
def test_query_heads_add_up_in_their_group(config, tiles):
    tiles(TILES[config])
    check(*qkv(B=2, H=6, K=3, dtype=torch.float16), causal=True)


@pytest.mark.parametrize("L", awkward_sizes(16))
@pytest.mark.parametrize("S", awkward_sizes(16))
def test_sizes_around_a_tile(L, S, tiles):
    window = (19, 3) if (L + S) % 2 else (-1, 0)
    check(*qkv(L=L, S=S, H=1, dtype=torch.float16), window=window)


@pytest.mark.parametrize("lengths", PACKED_LENGTHS, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_packed(lengths, causal, tiles):
    tiles(replace(TINY, BLOCK_M=64, BLOCK_N=32))
    dtype = KERNEL_DTYPES[(PACKED_LENGTHS.index(lengths) + causal) % 3]
    longer = [n + 3 * (i % 2) for i, n in enumerate(lengths)]
    q = randn(sum(lengths), 2, 16, dtype=dtype)
    k, v = (randn(sum(longer), 1, 16, dtype=dtype, seed=i) for i in (1, 2))
    cu = {"cu_seqlens_q": cu_seqlens(lengths), "cu_seqlens_k": cu_seqlens(longer, torch.int64)}
    check(q, k, v, causal=causal, window=(90, -1) if causal else None, **cu)


@examples(25)
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
    kind=st.sampled_from(["none", "bool", "additive"]),
    broadcast=st.tuples(*[st.booleans()] * 4),
    dropout_p=st.sampled_from([0.0, 0.0, 0.3, 1.0]),
)
def test_padded_is_accurate_whatever_the_call(
    sizes,
    heads,
    head_dim,
    dtype,
    config,
    strided,
    causal,
    window,
    scale,
    kind,
    broadcast,
    dropout_p,
):
    (B, L, S), (H, K) = sizes, heads
    inputs = qkv(B, L, S, H, K, head_dim, dtype, strided)
    shape = [1 if one else n for n, one in zip((B, H, L, S), broadcast, strict=True)]
    mask = {"none": None, "bool": randn(*shape) > 0, "additive": additive(*shape)}[kind]
    lengths = (torch.arange(B) * 13 + 5).clamp(max=S)
    grad_out = randn(B, L, H, head_dim, dtype=dtype, seed=9, strided=strided)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "pick_config", lambda *call: TILES[config])
        call = {"causal": causal, "window": window, "scale": scale, "key_lengths": lengths}
        check(*inputs, grad_out, mask=mask, dropout_p=dropout_p, seed=5, **call)


@pytest.mark.parametrize(("poison", "config"), [(NAN, "16×32"), (INF, "32×16")])
@pytest.mark.parametrize("masking", ["lengths", "causal", "window", "bool", "per key", "additive"])
def test_keys_that_no_query_sees_reach_no_gradient(masking, poison, config, tiles):
    tiles(TILES[config])
    q, k, v = qkv(L=20, S=37, dtype=torch.float16)
    unseen = torch.arange(37) >= 30
    call = {
        "lengths": {"key_lengths": torch.tensor([30])},
        "causal": {"causal": True, "mask": ~unseen},
        "window": {"window": (4, -1)},
        "bool": {"mask": (randn(20, 37) > 0) & ~unseen},
        "per key": {"mask": ~unseen},
        "additive": {"mask": additive(20, 37).masked_fill(unseen, -INF)},
    }[masking]
    if masking == "window":
        unseen = torch.arange(37) < 13  # the first query sits on key 17 and sees back to 13
    grad_out = randn(*q.shape, dtype=q.dtype, seed=9)
    clean = check(q, k, v, grad_out, **call)
    k[:, unseen], v[:, unseen] = poison, poison
    dirty = triton_gradients((q, k, v), grad_out, **call)
    for a, b in zip(dirty, clean, strict=True):
        assert_bitwise(a, b)
    assert (dirty[1][:, unseen] == 0).all()
    assert (dirty[2][:, unseen] == 0).all()


@pytest.mark.parametrize("name", ["causal", "bool", "additive"])
def test_queries_that_see_no_key_reach_no_gradient(name, tiles):
    q, k, v = qkv(L=40, S=20)
    call = {
        "causal": {"causal": True},
        "bool": {"mask": torch.arange(40)[:, None] >= 20},
        "additive": {"mask": torch.where(torch.arange(40)[:, None] < 20, -INF, randn(40, 20))},
    }[name]
    grad_out = randn(*q.shape, seed=9)
    clean = check(q, k, v, grad_out, **call)
    assert (clean[0][:, :20] == 0).all()
    q[:, :20], grad_out[:, :20] = NAN, NAN
    for a, b in zip(triton_gradients((q, k, v), grad_out, **call), clean, strict=True):
        assert_bitwise(a, b)


@pytest.mark.parametrize("config", TILES)
def test_a_packed_sequence_gets_nothing_from_its_neighbours(config, tiles):
    tiles(TILES[config])
    q, k, v, grad_out = (randn(45, 1, 16, dtype=torch.float16, seed=i) for i in range(4))
    cu = cu_seqlens((10, 19, 16))
    clean = triton_gradients((q, k, v), grad_out, cu_seqlens_q=cu)
    for x in (q, k, v, grad_out):
        x[10:29] = NAN
    dirty = triton_gradients((q, k, v), grad_out, cu_seqlens_q=cu)
    for a, b in zip(dirty, clean, strict=True):
        assert_bitwise(a[:10], b[:10])
        assert_bitwise(a[29:], b[29:])
        assert a[10:29].isnan().all()


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_biases_beyond_float16_leave_weights_exact(dtype, tiles):
    """ln l would vanish beside them: a row's weights would no longer add up to 1."""
    low = torch.full((1, 1, 20, 37), torch.finfo(torch.float32).min)
    check(*qkv(dtype=dtype), mask=low)
    check(*qkv(dtype=dtype), mask=low.clamp(min=-1e5) + randn(20, 37))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("scale", [0.0, -0.5, 1e-42, 0.7])
def test_scales_of_any_sign(scale, dtype, tiles):
    check(*qkv(B=2, dtype=dtype), scale=scale, causal=True, key_lengths=torch.tensor([21, 0]))


def test_gradients_arrive_in_any_layout(tiles):
    q, k, v = qkv(B=2, H=2, D=8)
    for grad_out in (
        torch.ones(1).expand(q.shape),
        with_odd_strides(randn(*q.shape, seed=4)),
        randn(2, 20, 8, 2, seed=4).transpose(2, 3),
    ):
        check(q, k, v, grad_out, causal=True)


def test_inputs_of_any_layout(tiles):
    q, k, v = qkv(B=2)
    grad_out = randn(*q.shape, seed=9)
    expected = triton_gradients((q, k, v), grad_out)
    turned = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (q, k, v)]
    for a, b in zip(triton_gradients(turned, grad_out), expected, strict=True):
        assert_bitwise(a, b)


def launch(q, k, v, grad_out, **call):
    """Both launchers, on what the op would hand them."""
    defaults = {"mask": None, "key_lengths": None, "causal": False, "window": (-1, -1)}
    defaults |= {"scale": 0.25, "dropout_p": 0.0, "seed": None, "max_seqlen_q": None}
    defaults |= {"cu_seqlens_q": None, "cu_seqlens_k": None, "max_seqlen_k": None}
    call = {**defaults, **call}
    out, _, stats = forward.attention_fwd(q, k, v, return_lse=False, return_stats=True, **call)
    return kernel.attention_bwd(grad_out, out, stats, q, k, v, **call)


def test_nothing_outside_the_inputs_is_used(tiles):
    q, k, v = qkv(L=17, S=33, dtype=torch.float16)
    grad_out = randn(*q.shape, dtype=q.dtype, seed=9)
    clean = launch(q, k, v, grad_out, causal=True)
    fenced = [banded_copy(x) for x in (q, k, v, grad_out)]
    found = launch(*(f.view for f in fenced), causal=True)
    for name in "qkv":
        assert_bitwise(found[name], clean[name])
    for f in fenced:
        f.check()


def test_offsets_past_32_bits(tiles):
    rows = [randn(4, 16, seed=i) for i in range(4)]
    near = launch(*(x[:, None] for x in rows), **spans([4], 4))
    far = launch(*(rows_far_apart(x)[:, None] for x in rows), **spans([4], 4))
    for name in "qkv":
        assert_bitwise(far[name], near[name])


def spans(lengths, longest):
    cu = cu_seqlens(lengths)
    longest_both = {"max_seqlen_q": longest, "max_seqlen_k": longest}
    return {"cu_seqlens_q": cu, "cu_seqlens_k": cu, **longest_both}


def test_bad_cu_seqlens_stay_inside_the_tensors(tiles):
    fenced = [banded_copy(randn(20, 1, 16, seed=i)) for i in range(4)]
    call = spans([12], 40)
    call["cu_seqlens_q"] = call["cu_seqlens_k"] = torch.tensor([0, 12, 9, 500], dtype=torch.int32)
    with poisoned_allocations():
        found = launch(*(f.view for f in fenced), **call)
    alone = launch(*(f.view[:12] for f in fenced), **spans([12], 12))
    assert_bitwise(found["q"][:9], alone["q"][:9])  # rows of one sequence alone
    assert all(gradient.isfinite().all() for gradient in found.values())
    for f in fenced:
        f.check()


def test_tokens_of_no_sequence_get_zeros(tiles):
    with poisoned_allocations():
        found = launch(*(randn(20, 1, 16, seed=i) for i in range(4)), **spans([12], 12))
    for name in "qkv":
        assert (found[name][12:] == 0).all()


@pytest.mark.parametrize("causal", [False, True])
def test_a_sequence_has_the_same_bits_in_any_batch_and_run(causal):
    lengths = (70, 1, 0, 33, 100)
    q, k, v, grad_out = (randn(sum(lengths), 2, 16, dtype=torch.float16, seed=i) for i in range(4))
    cu = cu_seqlens(lengths)
    together = triton_gradients((q, k, v), grad_out, causal=causal, cu_seqlens_q=cu)
    again = triton_gradients((q, k, v), grad_out, causal=causal, cu_seqlens_q=cu)
    for a, b in zip(together, again, strict=True):
        assert_bitwise(a, b)
    for first, last in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        rows = [x[None, first:last] for x in (q, k, v)]
        alone = triton_gradients(rows, grad_out[None, first:last], causal=causal)
        for a, b in zip(together, alone, strict=True):
            assert_bitwise(a[first:last], b[0])


@pytest.mark.parametrize(("dtype", "config"), DTYPE_TILES, ids=str)
@pytest.mark.parametrize("name", ["none", "causal", "all", "all additive"])
def test_dropout(name, dtype, config, tiles):
    tiles(TILES[config])
    call = {**MASKS[name], "dropout_p": 0.4, "seed": -(2**60) + 3}
    q, k, v = qkv(B=2, dtype=dtype)
    check(q, k, v, **call)
    out, lse = ops.attention(q, k, v, backend="triton", return_lse=True, **call)
    oracle = ops.attention(q.double(), k.double(), v.double(), backend="reference", **call)
    baseline = ops.attention(q, k, v, backend="reference", **call)
    assert_accurate(out, oracle, baseline, what="out")
    plain = ops.attention(q, k, v, backend="triton", return_lse=True, **MASKS[name])
    torch.testing.assert_close(lse, plain[1])  # in other tiles, which add up in another order


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("config", [*TILES, "picked"])
def test_the_dropout_mask_is_the_defined_one_bit_for_bit(config, packed, tiles, monkeypatch):
    """Equal weights, and values and gradients of one-hot rows, show every kept weight."""
    if config == "picked":
        monkeypatch.undo()
    else:
        tiles(TILES[config])
        shape = {"BLOCK_M": TILES[config].BLOCK_M, "BLOCK_N": TILES[config].BLOCK_N}
        tile = forward.Config(**shape, num_warps=4, num_stages=2, descriptors=False)
        monkeypatch.setattr(forward, "pick_config", lambda *call: tile)
    B, L, S, H = 3, 33, 50, 2
    q, k, v = torch.zeros(B, L, H, 64), randn(B, S, H, 64), torch.eye(S, 64)
    v = v[None, :, None].expand(B, S, H, 64)
    one_hot = torch.eye(L, 64)[None, :, None].expand(q.shape)
    call = {"dropout_p": 0.25, "seed": 2**64 - 5, "backend": "triton"}
    inputs = [x.contiguous().requires_grad_() for x in (q, k, v)]
    given = inputs
    if packed:
        given = [x.flatten(0, 1) for x in inputs]
        call |= {"cu_seqlens_q": cu_seqlens([L] * B), "cu_seqlens_k": cu_seqlens([S] * B)}
    out = ops.attention(*given, **call)
    keep = keep_attention(2**64 - 5, 0.25, B * H, L, S).view(B, H, L, S)
    shown = out.detach().view(B, L, H, 64)[..., :S]
    assert torch.equal(shown != 0, keep.transpose(1, 2))
    (grad_v,) = torch.autograd.grad(out, inputs[2], one_hot.reshape(out.shape))
    assert torch.equal(grad_v[..., :L] != 0, keep.permute(0, 3, 1, 2))


def test_dropping_everything_gives_zeros(tiles):
    q, k, v = (x.requires_grad_() for x in qkv())
    out = ops.attention(q, k, v, dropout_p=1.0, backend="triton")
    assert (out == 0).all()
    for gradient in torch.autograd.grad(out.sum(), (q, k, v)):
        assert (gradient == 0).all()


def test_a_seed_is_drawn_once_for_both_directions(tiles):
    q, k, v = (x.requires_grad_() for x in qkv())
    torch.manual_seed(3)
    first = torch.autograd.grad(ops.attention(q, k, v, dropout_p=0.5, backend="triton").sum(), v)
    torch.manual_seed(3)
    seed = torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64)
    out = ops.attention(q, k, v, dropout_p=0.5, seed=seed, backend="triton")
    assert_bitwise(torch.autograd.grad(out.sum(), v)[0], first[0])


@pytest.mark.parametrize(("dtype", "D"), [(torch.float32, 5), (torch.bfloat16, 17)], ids=str)
def test_rows_of_any_width_where_a_call_adds_most(dtype, D, tiles):
    q, k, v = qkv(L=20, S=37, D=D, dtype=dtype)
    check(q, k, v, mask=additive(20, 37), dropout_p=0.3, seed=5)
