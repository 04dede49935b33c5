"""The Triton attention kernel, in Triton's interpreter."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from attention_calls import INF, MASKS, additive, qkv
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
    with_odd_strides,
)
from hypothesis import given
from hypothesis import strategies as st
from tolerance import assert_accurate, assert_bitwise

from bertgpt import ops, reference

pytest.importorskip("triton")
from bertgpt.kernels import attention as kernel

pytestmark = [
    pytest.mark.interpreter,
    # NumPy warns of 0 / 0 and ln 0 in rows without a key, which the kernel selects away, and of a
    # maximum over nothing but NaN, which it leaves to the exponentials.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
NAN = float("nan")
TINY = kernel.Config(BLOCK_M=16, BLOCK_N=16, num_warps=4, num_stages=2, descriptors=False)
TILES = {
    "16×16": TINY,
    "16×32": replace(TINY, BLOCK_N=32),
    "32×16 by descriptor": replace(TINY, BLOCK_M=32, descriptors=True),
}


@pytest.fixture
def tiles(monkeypatch):
    """Sets the tile shape; descriptors only where the layout allows them."""

    def set_tiles(config):
        monkeypatch.setattr(kernel, "pick_config", picker(config))

    set_tiles(TINY)
    return set_tiles


def picker(config):
    def pick(capability, head_dim, dtype_bytes, masked, aligned):
        return replace(config, descriptors=config.descriptors and aligned)

    return pick


def check(q, k, v, mask=None, factor=2.0, **call):
    """Output and lse against the definition, in memory that starts as NaN."""
    with poisoned_allocations():
        out, lse = ops.attention(q, k, v, mask=mask, return_lse=True, backend="triton", **call)
    if mask is not None:
        call["mask"] = mask.expand(q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    wide = (q.double(), k.double(), v.double())
    oracle, oracle_lse = reference.attention(*wide, return_lse=True, **call)
    baseline, baseline_lse = reference.attention(q, k, v, return_lse=True, **call)
    assert out.is_contiguous()
    assert_accurate(out, oracle, baseline, factor=factor, what="out")
    assert_accurate(lse, oracle_lse.double(), baseline_lse, factor=factor, what="lse")
    return out, lse


@pytest.mark.parametrize("config", TILES)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_every_mask(name, dtype, config, tiles):
    tiles(TILES[config])
    check(*qkv(B=2, dtype=dtype), **MASKS[name])


@pytest.mark.parametrize("name", ["none", "causal", "all", "all additive"])
def test_the_picked_tiles(name):
    check(*qkv(B=2, dtype=torch.float16), **MASKS[name])


@pytest.mark.parametrize("D", HEAD_DIMS)
def test_every_head_dim(D):
    # One element a row is no sample of half precision's rounding.
    dtype = torch.float32 if D in (1, 31) else torch.float16
    check(*qkv(D=D, L=33, S=50, dtype=dtype), causal=True, factor=3)


@pytest.mark.parametrize("config", TILES)
def test_query_heads_share_their_groups_keys(config, tiles):
    tiles(TILES[config])
    check(*qkv(B=2, H=6, K=3, dtype=torch.float16), causal=True)


@pytest.mark.parametrize("L", awkward_sizes(16))
@pytest.mark.parametrize("S", awkward_sizes(16))
def test_sizes_around_a_tile(L, S, tiles):
    by_descriptor = (L + S) % 2 == 0
    tiles(replace(TINY, descriptors=by_descriptor))
    window = (19, 3) if by_descriptor else (-1, 0)
    check(*qkv(L=L, S=S, H=1, dtype=torch.float16), window=window, factor=3)


@pytest.mark.parametrize("lengths", PACKED_LENGTHS, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_packed(lengths, causal, tiles):
    tiles(replace(TINY, BLOCK_M=32, BLOCK_N=64, descriptors=causal))
    longer = [n + 3 * (i % 2) for i, n in enumerate(lengths)]
    q = randn(sum(lengths), 2, 16, dtype=torch.float16)
    k, v = (randn(sum(longer), 1, 16, dtype=torch.float16, seed=i) for i in (1, 2))
    cu = {"cu_seqlens_q": cu_seqlens(lengths), "cu_seqlens_k": cu_seqlens(longer, torch.int64)}
    check(q, k, v, factor=3, causal=causal, window=(90, -1) if causal else None, **cu)


@examples(30)
@given(
    sizes=st.tuples(st.integers(0, 2), st.integers(0, 40), st.integers(0, 70)),
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
)
def test_padded_is_accurate_whatever_the_call(
    sizes, heads, head_dim, dtype, config, strided, causal, window, scale, kind, broadcast
):
    (B, L, S), (H, K) = sizes, heads
    inputs = qkv(B, L, S, H, K, head_dim, dtype, strided)
    shape = [1 if one else n for n, one in zip((B, H, L, S), broadcast, strict=True)]
    mask = {"none": None, "bool": randn(*shape) > 0, "additive": additive(*shape)}[kind]
    lengths = (torch.arange(B) * 13 + 5).clamp(max=S)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "pick_config", picker(TILES[config]))
        call = {"causal": causal, "window": window, "scale": scale, "key_lengths": lengths}
        check(*inputs, mask=mask, factor=3, **call)


@pytest.mark.parametrize("config", TILES)
@pytest.mark.parametrize("poison", [NAN, INF])
@pytest.mark.parametrize("masking", ["lengths", "causal", "window", "bool", "per key", "additive"])
def test_keys_that_no_query_sees_never_show(masking, poison, config, tiles):
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
    clean = check(q, k, v, **call)
    k[:, unseen], v[:, unseen] = poison, poison
    out, lse = ops.attention(q, k, v, return_lse=True, backend="triton", **call)
    assert_bitwise(out, clean[0])
    assert_bitwise(lse, clean[1])


@pytest.mark.parametrize("config", TILES)
def test_a_packed_sequence_sees_nothing_of_its_neighbours(config, tiles):
    tiles(TILES[config])
    q, k, v = (randn(45, 1, 16, dtype=torch.float16, seed=i) for i in range(3))
    cu = cu_seqlens((10, 19, 16))
    clean = ops.attention(q, k, v, cu_seqlens_q=cu, backend="triton")
    for x in (q, k, v):
        x[10:29] = NAN
    out = ops.attention(q, k, v, cu_seqlens_q=cu, backend="triton")
    assert_bitwise(out[:10], clean[:10])
    assert_bitwise(out[29:], clean[29:])
    assert out[10:29].isnan().all()


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("name", ["none", "causal", "bool", "additive"])
def test_nan_shows_where_it_is_seen(name, dtype, tiles):
    q, k, v = qkv(B=2, dtype=dtype)
    call = MASKS[name]
    seen = torch.ones(2, 2, 20, 37, dtype=torch.bool)
    if name == "causal":
        seen = seen.tril(17)
    elif name == "bool":
        seen = seen & call["mask"]
    elif name == "additive":
        seen = seen & (call["mask"] != -INF)

    q[1, 7, 1] = NAN
    out = ops.attention(q, k, v, backend="triton", **call)
    expected = torch.zeros(2, 20, 2, dtype=torch.bool)
    expected[1, 7, 1] = True
    assert torch.equal(out.isnan().all(-1), expected)
    assert torch.equal(out.isnan().any(-1), expected)

    q, k, v = qkv(B=2, dtype=dtype)
    k[0, 20] = NAN
    rows = seen[:, :, :, 20] & torch.tensor([True, False])[:, None, None]
    out = ops.attention(q, k, v, backend="triton", **call)
    assert torch.equal(out.isnan().any(-1), rows.transpose(1, 2))


def test_finite_biases_never_mask(tiles):
    q, k, v = qkv(L=3, S=40)
    low = torch.full((1, 1, 3, 40), torch.finfo(torch.float32).min)
    out, _ = check(q, k, v, mask=low)
    torch.testing.assert_close(out[0, 0, 0], v[0, :, 0].mean(0))
    low[..., 33] = -3e38  # larger, so it takes all the weight
    out, _ = check(q, k, v, mask=low)
    torch.testing.assert_close(out[0, 1, 1], v[0, 33, 0])
    low[..., 2] = torch.finfo(torch.float32).max
    out, _ = check(q, k, v, mask=low)
    torch.testing.assert_close(out[0, 2, 0], v[0, 2, 0])


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("scale", [0.0, -0.5, 1e-42, 2.0])
def test_scales_of_any_sign(scale, dtype, tiles):
    check(*qkv(B=2, dtype=dtype), scale=scale, causal=True, key_lengths=torch.tensor([21, 0]))


def test_half_masks_and_float32_masks_beside_half(tiles):
    inputs = qkv(dtype=torch.bfloat16)
    for dtype in KERNEL_DTYPES:
        check(*inputs, mask=additive(20, 37).clamp(min=-1e4).to(dtype))


def test_masks_of_any_strides(tiles):
    inputs = qkv(B=2)
    keep = randn(37, 20, 2, 2, seed=3) > 0
    check(*inputs, mask=keep.permute(3, 2, 1, 0))
    check(*inputs, mask=with_odd_strides(additive(2, 2, 20, 37)))


@pytest.mark.parametrize("config", TILES)
def test_nothing_outside_the_inputs_is_used(config, tiles):
    tiles(TILES[config])
    q, k, v = qkv(L=17, S=33, dtype=torch.float16)
    clean = ops.attention(q, k, v, causal=True, backend="triton")
    fenced = [banded_copy(x) for x in (q, k, v)]
    out = ops.attention(*(f.view for f in fenced), causal=True, backend="triton")
    assert_bitwise(out, clean)
    for f in fenced:
        f.check()


def test_bad_cu_seqlens_stay_inside_the_tensors(tiles):
    """The launcher trusts no value: spans are cut to the tokens there are."""
    q, k, v = (banded_copy(randn(20, 1, 16, seed=i)) for i in range(3))
    cu = torch.tensor([0, 12, 9, 500], dtype=torch.int32)
    out, *_ = _launch(q.view, k.view, v.view, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=40)
    alone, *_ = _launch(
        q.view[:12], k.view[:12], v.view[:12],
        cu_seqlens_q=cu[:2], cu_seqlens_k=cu[:2], max_seqlen_q=12,
    )  # fmt: skip
    assert_bitwise(out[:9], alone[:9])
    assert out.isfinite().all()


def _launch(q, k, v, **call):
    defaults = {"mask": None, "key_lengths": None, "causal": False, "window": (-1, -1)}
    defaults |= {
        "scale": 0.25,
        "max_seqlen_k": None,
        "return_lse": False,
        "dropout_p": 0.0,
        "seed": None,
    }
    return kernel.attention_fwd(q, k, v, **{**defaults, **call})


def test_index_tensors_of_any_stride(tiles):
    q, k, v = qkv(B=2)
    lengths = torch.tensor([30, -7, 9, -7])[::2]
    expected = ops.attention(q, k, v, key_lengths=lengths.clone(), backend="triton")
    assert_bitwise(ops.attention(q, k, v, key_lengths=lengths, backend="triton"), expected)


@pytest.mark.parametrize("causal", [False, True])
def test_a_sequence_has_the_same_bits_in_any_batch(causal):
    lengths = (70, 1, 0, 33, 130)
    q, k, v = (randn(sum(lengths), 2, 16, dtype=torch.float16, seed=i) for i in range(3))
    cu = cu_seqlens(lengths)
    call = {"causal": causal, "backend": "triton", "return_lse": True}
    out, lse = ops.attention(q, k, v, cu_seqlens_q=cu, **call)
    for first, last in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        rows = [x[None, first:last] for x in (q, k, v)]
        alone, alone_lse = ops.attention(*rows, **call)
        assert_bitwise(out[first:last], alone[0])
        assert_bitwise(lse[:, first:last], alone_lse[0])


def test_float32_products_follow_torchs_setting(monkeypatch):
    seen = []

    class Recorder:
        def __getitem__(self, grid):
            return lambda *args, **options: seen.append(options["PRECISION"])

    monkeypatch.setattr(kernel, "_attention_fwd_kernel", Recorder())
    for precision in ("highest", "high"):
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda p=precision: p)
        _launch(*qkv(), cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None)
    assert seen == ["ieee", "tf32"]


def test_a_float64_mask_keeps_its_finite_values_finite():
    q, k, v = qkv()
    mask = additive(20, 37).double()
    check(q, k, v, mask=mask)
    lowest = torch.full((20, 37), -1e300, dtype=torch.float64)
    out = ops.attention(q, k, v, mask=lowest, backend="triton")
    torch.testing.assert_close(out, v.mean(dim=1, keepdim=True).expand_as(out))
    assert "float64" in kernel.unsupported(mask=mask)  # what a launcher alone would lose


def test_configs_are_powers_of_two_for_every_machine():
    for capability, dim, size, extras, aligned in product(
        (80, 86, 89, 90, 100, 103, 120, 121), range(1, 257), (2, 4), (0, 1, 2), (False, True)
    ):
        config = kernel.pick_config(capability, dim, size, extras, aligned)
        for extent in (config.BLOCK_M, config.BLOCK_N):
            assert extent >= 16
            assert extent & (extent - 1) == 0
        assert not config.descriptors or (aligned and size == 2)
