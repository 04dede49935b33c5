"""`ops.attention` on torch and reference: the definition, its fine print, gradients."""

import math

import pytest
import torch
from cases import ALL_DTYPES, HEAD_DIMS, KERNEL_DTYPES, PACKED_LENGTHS, cu_seqlens, randn
from hypothesis import given
from hypothesis import strategies as st
from tolerance import assert_accurate, assert_bitwise

from bertgpt import ops, reference
from bertgpt.ops._dispatch import OPS

INF, NAN = float("inf"), float("nan")
BACKENDS = ("torch", "reference")


def qkv(B=2, L=5, S=7, H=4, K=2, D=8, dtype=torch.float32, seed=0):
    q = randn(B, L, H, D, dtype=dtype, seed=seed)
    return q, *(randn(B, S, K, D, dtype=dtype, seed=seed + i) for i in (1, 2))


def packed(lengths_q, lengths_k, H=4, K=2, D=8, dtype=torch.float32):
    q = randn(sum(lengths_q), H, D, dtype=dtype)
    k, v = (randn(sum(lengths_k), K, D, dtype=dtype, seed=i) for i in (1, 2))
    return q, k, v, cu_seqlens(lengths_q), cu_seqlens(lengths_k, torch.int64)


def by_hand(q, k, v, b, h, i, seen, scale, bias=0.0):
    """One output row and its log-sum-exp from the keys `seen`, in Python floats' precision."""
    kv = h // (q.shape[2] // k.shape[2])
    keys = [j for j in range(k.shape[1]) if seen(j)]
    if not keys:
        return torch.zeros(q.shape[-1], dtype=torch.float64), -INF
    scores = [float(q[b, i, h].double() @ k[b, j, kv].double()) * scale + bias for j in keys]
    top = max(scores)
    weights = [math.exp(s - top) for s in scores]
    row = sum(w * v[b, j, kv].double() for w, j in zip(weights, keys, strict=True))
    return row / sum(weights), top + math.log(sum(weights))


MASKS = {
    "none": {},
    "causal": {"causal": True},
    "window": {"window": (2, 1)},
    "causal window": {"causal": True, "window": (1, 2)},
    "left only": {"window": (0, -1)},
    "lengths": {"key_lengths": torch.tensor([0, 3], dtype=torch.int32)},
    "bool": {"mask": torch.rand(2, 1, 5, 7, generator=torch.Generator().manual_seed(1)) > 0.5},
    "per key": {"mask": torch.arange(7) % 3 > 0},
    "additive": {"mask": torch.randn(4, 1, 7, generator=torch.Generator().manual_seed(1))},
    "additive -inf": {"mask": torch.tensor([0.0, -INF, 1.0, -INF, -1e30, 0.5, 2.0])},
    "all": {
        "causal": True,
        "window": (3, 3),
        "key_lengths": torch.tensor([6, 2]),
        "mask": torch.rand(1, 4, 1, 7, generator=torch.Generator().manual_seed(2)) > 0.3,
    },
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["none", "causal", "causal window", "lengths", "all"])
def test_the_definition_by_hand(name, backend):
    q, k, v = qkv(dtype=torch.float64)
    kwargs = MASKS[name]
    out, lse = ops.attention(q, k, v, scale=0.3, return_lse=True, backend=backend, **kwargs)
    plain = ops.attention(q, k, v, scale=0.3, backend=backend, **kwargs)
    left, right = kwargs.get("window", (-1, -1))
    lengths = kwargs.get("key_lengths", torch.tensor([7, 7]))
    mask = kwargs.get("mask", torch.ones(1, 1, 1, 1, dtype=torch.bool)).expand(2, 4, 5, 7)
    for b in range(2):
        for h in range(4):
            for i in range(5):
                corner = i + 2  # bottom-right: S − L = 2

                def seen(j, b=b, h=h, i=i, corner=corner):
                    return (
                        j < lengths[b]
                        and (not kwargs.get("causal") or j <= corner)
                        and (left < 0 or j >= corner - left)
                        and (right < 0 or j <= corner + right)
                        and bool(mask[b, h, i, j])
                    )

                row, total = by_hand(q, k, v, b, h, i, seen, 0.3)
                torch.testing.assert_close(out[b, i, h], row, rtol=1e-12, atol=1e-12)
                torch.testing.assert_close(plain[b, i, h], row, rtol=1e-12, atol=1e-12)
                assert float(lse[b, h, i]) == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_torch_is_accurate(name, dtype):
    inputs = qkv(dtype=dtype)
    oracle = reference.attention(*(t.double() for t in inputs), **_expanded(MASKS[name]))
    baseline = reference.attention(*inputs, **_expanded(MASKS[name]))
    assert_accurate(ops.attention(*inputs, backend="torch", **MASKS[name]), oracle, baseline)


def _expanded(kwargs):
    """The reference takes checked arguments: masks already in four dimensions."""
    if "mask" not in kwargs:
        return kwargs
    return {**kwargs, "mask": kwargs["mask"].expand(2, 4, 5, 7)}


@pytest.mark.parametrize("D", HEAD_DIMS)
def test_every_head_dim(D):
    q, k, v = qkv(D=D, dtype=torch.float32)
    oracle = reference.attention(q.double(), k.double(), v.double(), causal=True)
    baseline = reference.attention(q, k, v, causal=True)
    assert_accurate(ops.attention(q, k, v, causal=True), oracle, baseline)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", PACKED_LENGTHS, ids=str)
@pytest.mark.parametrize("kwargs", [{}, {"causal": True}, {"window": (3, 1)}], ids=str)
def test_packed_equals_each_sequence_alone(lengths, kwargs, backend):
    longer = [n + 2 * (i % 2) for i, n in enumerate(lengths)]
    q, k, v, cu_q, cu_k = packed(lengths, longer, dtype=torch.float64)
    out, lse = ops.attention(
        q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, return_lse=True, backend=backend, **kwargs
    )
    plain = ops.attention(
        q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=500, backend=backend, **kwargs
    )
    assert out.shape == q.shape
    assert lse.shape == (4, sum(lengths))
    for b in range(len(lengths)):
        rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        alone = (q[rows][None], k[keys][None], v[keys][None])
        expected, expected_lse = ops.attention(*alone, return_lse=True, **kwargs)
        torch.testing.assert_close(out[rows], expected[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(plain[rows], expected[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(lse[:, rows], expected_lse[0])


def test_self_attention_needs_one_set_of_lengths():
    q, k, v, cu, _ = packed((5, 9, 5), (5, 9, 5))
    both = ops.attention(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, causal=True)
    assert_bitwise(ops.attention(q, k, v, cu_seqlens_q=cu, causal=True), both)


@given(
    lengths=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=6),
    causal=st.booleans(),
    window=st.none() | st.tuples(st.integers(-1, 9), st.integers(-1, 9)),
    groups=st.sampled_from([1, 3]),
    head_dim=st.integers(8, 19),
    dtype=st.sampled_from(KERNEL_DTYPES),
)
def test_packed_is_accurate_whatever_the_lengths(lengths, causal, window, groups, head_dim, dtype):
    lengths_q, lengths_k = ([pair[i] for pair in lengths] for i in (0, 1))
    q, k, v, cu_q, cu_k = packed(lengths_q, lengths_k, 2 * groups, 2, head_dim, dtype)
    kwargs = {"causal": causal, "window": window, "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
    oracle = reference.attention(q.double(), k.double(), v.double(), **kwargs)
    baseline = reference.attention(q, k, v, **kwargs)
    # Factor 3: in rows this short the baseline may be right by luck.
    assert_accurate(ops.attention(q, k, v, **kwargs), oracle, baseline, factor=3)


@given(
    shape=st.tuples(*(st.integers(0, 9) for _ in range(3))),
    heads=st.sampled_from([(1, 1), (4, 1), (6, 3)]),
    head_dim=st.integers(8, 40),
    dtype=st.sampled_from(KERNEL_DTYPES),
    causal=st.booleans(),
    strided=st.booleans(),
    data=st.data(),
)
def test_padded_is_accurate_whatever_the_shape(
    shape, heads, head_dim, dtype, causal, strided, data
):
    (B, L, S), (H, K) = shape, heads
    q = randn(B, L, H, head_dim, dtype=dtype, strided=strided)
    k, v = (randn(B, S, K, head_dim, dtype=dtype, seed=i, strided=strided) for i in (1, 2))
    mask_shape = [data.draw(st.sampled_from([1, n])) for n in (B, H, L, S)]
    kind = data.draw(st.sampled_from(["none", "bool", "additive"]))
    mask = {"none": None, "bool": randn(*mask_shape) > 0, "additive": randn(*mask_shape)}[kind]
    full = None if mask is None else mask.expand(B, H, L, S)
    kwargs = {"causal": causal, "key_lengths": torch.arange(B) % (S + 1)}
    oracle = reference.attention(q.double(), k.double(), v.double(), mask=full, **kwargs)
    baseline = reference.attention(q, k, v, mask=full, **kwargs)
    assert_accurate(ops.attention(q, k, v, mask=mask, **kwargs), oracle, baseline, factor=3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
def test_what_no_query_sees_never_shows(backend, poison):
    q, k, v = qkv()
    lengths = torch.tensor([3, 5])
    clean = ops.attention(q, k, v, key_lengths=lengths, backend=backend)
    for b, n in enumerate(lengths):
        k[b, n:], v[b, n:] = poison, poison
    out, lse = ops.attention(q, k, v, key_lengths=lengths, return_lse=True, backend=backend)
    torch.testing.assert_close(out, clean)
    assert torch.isfinite(lse).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_a_query_stays_in_its_row(backend):
    q, k, v = qkv()
    clean = ops.attention(q, k, v, backend=backend)
    q[1, 2, 3, 0] = NAN
    out = ops.attention(q, k, v, backend=backend)
    assert torch.isnan(out[1, 2, 3]).all()
    out[1, 2, 3] = clean[1, 2, 3]
    torch.testing.assert_close(out, clean)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_a_seen_key_or_value_shows(backend):
    for which in (1, 2):
        inputs = list(qkv())
        inputs[which][0, 6] = NAN
        out = ops.attention(*inputs, causal=True, backend=backend)
        assert torch.isnan(out[0, 4]).all()  # the last query sees the last key
        assert torch.isfinite(out[1]).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_query_without_keys_gives_zero_and_minus_infinity(backend):
    q, k, v = (t.requires_grad_() for t in qkv(L=7, S=5))
    out, lse = ops.attention(q, k, v, causal=True, return_lse=True, backend=backend)
    assert (out[:, :2] == 0).all()
    assert (lse[:, :, :2] == -INF).all()
    assert torch.isfinite(lse[:, :, 2:]).all()
    assert not lse.requires_grad
    out.sum().backward()
    assert (q.grad[:, :2] == 0).all()
    assert all(torch.isfinite(t.grad).all() for t in (q, k, v))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_finite_bias_however_large_rules_nothing_out(backend, dtype):
    q, k, v = qkv(dtype=dtype)
    lowest = torch.full((5, 7), torch.finfo(torch.float32).min)
    beyond = torch.full((5, 7), -1e300, dtype=torch.float64)
    out = ops.attention(q, k, v, mask=lowest, backend=backend)
    assert_bitwise(ops.attention(q, k, v, mask=beyond, backend=backend), out)
    mean = v.double().mean(dim=1, keepdim=True).repeat_interleave(2, dim=2).expand(2, 5, 4, 8)
    torch.testing.assert_close(out.double(), mean, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MASKS)
def test_gradients(name, backend):
    q, k, v = (t.requires_grad_() for t in qkv(B=2, L=5, S=7, dtype=torch.float64))
    kwargs = dict(MASKS[name])
    inputs = (q, k, v)
    if "additive" in name:
        kwargs.pop("mask")
        inputs = (*inputs, MASKS[name]["mask"].double().requires_grad_())

    fixed = kwargs.pop("mask", None)

    def function(q, k, v, mask=None):
        mask = fixed if mask is None else mask
        return ops.attention(q, k, v, mask=mask, backend=backend, **kwargs)

    if name == "additive -inf":  # no finite difference at −inf: compare with the autograd oracle
        mine = torch.autograd.grad(function(*inputs).square().sum(), inputs)
        full = inputs[3].expand(2, 4, 5, 7)
        oracle = reference.attention(q, k, v, mask=full).square().sum()
        for a, b in zip(mine, torch.autograd.grad(oracle, inputs), strict=True):
            torch.testing.assert_close(a, b)
    else:
        assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


def test_packed_gradients():
    q, k, v, cu_q, cu_k = packed((3, 0, 6, 3), (4, 2, 6, 0), dtype=torch.float64)
    inputs = tuple(t.requires_grad_() for t in (q, k, v))
    for causal in (False, True):
        assert torch.autograd.gradcheck(
            lambda q, k, v, causal=causal: ops.attention(
                q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, causal=causal
            ),
            inputs,
            fast_mode=True,
        )


def test_dropout_is_one_mask_for_all():
    q, k, v = qkv(B=3, L=6, S=6, H=2, K=1)
    kwargs = {"dropout_p": 0.4, "seed": 11, "causal": True}
    a, lse = ops.attention(q, k, v, backend="torch", return_lse=True, **kwargs)
    b = ops.attention(q, k, v, backend="reference", **kwargs)
    flat = (t.flatten(0, 1) for t in (q, k, v))
    c = ops.attention(*flat, cu_seqlens_q=cu_seqlens([6, 6, 6]), **kwargs)
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(c.view_as(a), a)
    undropped = ops.attention(q, k, v, causal=True, return_lse=True)
    assert_bitwise(lse, undropped[1])
    assert not torch.equal(a, undropped[0])
    assert not torch.equal(a, ops.attention(q, k, v, causal=True, dropout_p=0.4, seed=12))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("keys", [(3, 0, 6, 3, 3), (3, 0, 6, 0, 3), (5, 2, 6, 0, 1)])
def test_dropout_of_packed_sequences_is_the_definitions(keys, causal, dtype, monkeypatch):
    monkeypatch.setattr("bertgpt.portable.length_buckets._WEIGHTS", 80)  # 3 × 3 × 4 heads, twice
    q, k, v, cu_q, cu_k = packed((3, 0, 6, 3, 3), keys, dtype=dtype)
    kwargs = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "causal": causal, "dropout_p": 0.3}
    mine, oracle, baseline = (
        ops.attention(*(t.to(wide) for t in (q, k, v)), seed=5, backend=backend, **kwargs)
        for backend, wide in (("torch", dtype), ("reference", torch.float64), ("reference", dtype))
    )
    assert_accurate(mine, oracle, baseline)


@pytest.mark.parametrize("dropout_p", [0.5, 1.0])
def test_scores_that_overflow_under_dropout_are_the_definitions(dropout_p):
    q, k, v = (t.requires_grad_() for t in (qkv(dtype=torch.float32)))
    found = []
    for backend in BACKENDS:
        out = ops.attention(
            q.abs() * 1e20, k.abs() * -1e20, v, dropout_p=dropout_p, seed=3, backend=backend
        )
        found.append((out, *torch.autograd.grad(out.sum(), (q, k, v))))
    for mine, oracle in zip(*found, strict=True):
        torch.testing.assert_close(mine, oracle, equal_nan=True)
    assert found[0][0].isfinite().any()


def test_dropout_of_everything_is_zero_and_seeds_are_drawn_from_torch():
    q, k, v = qkv()
    assert (ops.attention(q, k, v, dropout_p=1.0) == 0).all()
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(ops.attention(q, k, v, dropout_p=0.5))
    assert_bitwise(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_operator_registration():
    op = OPS["attention"]
    q, k, v = qkv()
    packed_inputs = packed((3, 0, 6), (4, 2, 6))
    calls = [
        op.check(q, k, v, causal=True, window=(2, 2)),
        op.check(q.requires_grad_(), k, v, mask=torch.randn(5, 7), return_lse=True),
        op.check(q, k, v, mask=torch.randn(4, 1, 7).requires_grad_(), causal=True),
        op.check(*packed_inputs[:3], cu_seqlens_q=packed_inputs[3], cu_seqlens_k=packed_inputs[4]),
        op.check(q, k, v, key_lengths=torch.tensor([3, 7]), backend="reference"),
    ]
    for call in calls:
        values = tuple(call[field] for field in op.fields)
        results = torch.library.opcheck(op.overload, values)
        assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_break(dynamic):
    def function(q, k, v, cu):
        out, lse = ops.attention(q, k, v, cu_seqlens_q=cu, causal=True, return_lse=True)
        return out * 2, lse

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for lengths in ((3, 5), (4, 9)):
        q, k, v, cu, _ = packed(lengths, lengths)
        q.requires_grad_()
        out, lse = compiled(q, k, v, cu)
        expected, expected_lse = function(q, k, v, cu)
        assert_bitwise(out, expected)
        assert_bitwise(lse, expected_lse)
        (gradient,) = torch.autograd.grad(out.sum(), q)
        (expected_gradient,) = torch.autograd.grad(expected.sum(), q)
        torch.testing.assert_close(gradient, expected_gradient)


def test_autocast_and_flops():
    q, k, v = qkv()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ops.attention(q, k, v).dtype == torch.bfloat16
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        ops.attention(q, k, v)
    assert counter.get_total_flops() == 4 * 2 * 5 * 7 * 4 * 8
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        ops.attention(q.requires_grad_(), k, v).sum().backward()
    assert counter.get_total_flops() == (4 + 10) * 2 * 5 * 7 * 4 * 8


def test_inputs_are_left_alone():
    inputs = qkv()
    copies = [t.clone() for t in inputs]
    ops.attention(*inputs, key_lengths=torch.tensor([2, 5]), mask=torch.ones(7, dtype=torch.bool))
    for tensor, copy in zip(inputs, copies, strict=True):
        assert_bitwise(tensor, copy)
