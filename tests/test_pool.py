"""`ops.pool` on torch and reference: the definition, its fine print, gradients."""

import math

import pytest
import torch
from cases import ALL_DTYPES, cu_seqlens, examples, randn
from hypothesis import given
from hypothesis import strategies as st
from tolerance import assert_accurate, assert_bitwise

from bertgpt import ops, reference
from bertgpt.ops._dispatch import OPS

BACKENDS = ("torch", "reference")
POOLINGS = ("cls", "mean", "max")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalize", [False, True])
def test_the_definition_by_hand(normalize, backend):
    lengths, x = (3, 0, 1, 4), randn(8, 5, dtype=torch.float64)
    start = 0
    for b, length in enumerate(lengths):
        tokens, start = x[start : start + length].tolist(), start + length
        for pooling in POOLINGS:
            if not tokens:
                expected = [0.0] * 5
            elif pooling == "cls":
                expected = tokens[0]
            elif pooling == "mean":
                expected = [sum(column) / length for column in zip(*tokens, strict=True)]
            else:
                expected = [max(column) for column in zip(*tokens, strict=True)]
            if normalize and tokens:
                size = math.sqrt(sum(value**2 for value in expected))
                expected = [value / size for value in expected]
            vectors = ops.pool(
                x, cu_seqlens(lengths), pooling=pooling, normalize=normalize, backend=backend
            )
            assert vectors.shape == (4, 5)
            assert vectors[b].tolist() == pytest.approx(expected, rel=1e-12)


@examples(100)
@given(
    lengths=st.lists(st.integers(0, 9), max_size=5),
    E=st.integers(0, 40),
    dtype=st.sampled_from(ALL_DTYPES),
    index=st.sampled_from([torch.int32, torch.int64]),
    pooling=st.sampled_from(POOLINGS),
    normalize=st.booleans(),
)
def test_odd_shapes_and_strides(lengths, E, dtype, index, pooling, normalize):
    x, options = randn(sum(lengths), E, dtype=dtype, strided=True), {"pooling": pooling}
    options["normalize"] = normalize
    boundaries = cu_seqlens(lengths, index)
    vectors = ops.pool(x, boundaries, **options)
    assert vectors.is_contiguous()
    oracle = reference.pool(x.double(), boundaries, **options)
    assert_accurate(vectors, oracle, reference.pool(x, boundaries, **options))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_nan_stays_in_its_sequence(pooling, backend):
    x = randn(6, 4)
    x[0, 1] = x[5, 2] = math.nan
    vectors = ops.pool(x, cu_seqlens((2, 2, 2)), pooling=pooling, backend=backend)
    assert vectors[0].isnan().tolist() == [False, True, False, False]
    assert vectors[1].isfinite().all()
    assert vectors[2].isnan().any() == (pooling != "cls")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_gradients(pooling, normalize, backend):
    x = randn(8, 3, dtype=torch.float64).requires_grad_()
    options = {"pooling": pooling, "normalize": normalize, "backend": backend}
    assert torch.autograd.gradcheck(lambda x: ops.pool(x, cu_seqlens((3, 0, 1, 4)), **options), x)
    nothing = torch.zeros(0, 3, requires_grad=True)
    ops.pool(nothing, cu_seqlens((0, 0)), **options).sum().backward()
    assert nothing.grad.shape == (0, 3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pull", [1.0, -1.0])
def test_equal_maxima_share_their_gradient(pull, backend):
    x = torch.tensor([[1.0], [2.0], [2.0], [3.0], [3.0], [3.0]], requires_grad=True)
    vectors = ops.pool(x, cu_seqlens((3, 3)), pooling="max", backend=backend)
    (gradient,) = torch.autograd.grad(vectors, x, torch.full((2, 1), pull))
    shares = [0.0, 1 / 2, 1 / 2, 1 / 3, 1 / 3, 1 / 3]
    assert gradient[:, 0].tolist() == pytest.approx([pull * share for share in shares])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(5)}, ValueError, "x must have 2 dimensions"),
        ({"x": torch.ones(5, 2).long()}, TypeError, "x must be float16"),
        ({"x": torch.ones(5, 2, device="meta")}, ValueError, "cu_seqlens is on cpu"),
        ({"cu_seqlens": [0, 5]}, TypeError, "cu_seqlens must be a tensor"),
        ({"cu_seqlens": torch.tensor([0.0, 5.0])}, TypeError, "cu_seqlens must be int32"),
        ({"cu_seqlens": torch.zeros(0, dtype=torch.int32)}, ValueError, "not empty"),
        ({"cu_seqlens": torch.tensor([0, 4])}, ValueError, "cu_seqlens must end at 5"),
        ({"cu_seqlens": torch.tensor([1, 5])}, ValueError, "cu_seqlens must start at 0"),
        ({"cu_seqlens": torch.tensor([0, 6, 5])}, ValueError, "cu_seqlens must not fall"),
        ({"pooling": "sum"}, ValueError, "pooling must be one of"),
        ({"normalize": 1}, TypeError, "normalize must be True or False"),
        ({"backend": "numpy"}, ValueError, "unknown backend"),
    ],
)
def test_refusals_by_name(change, error, message):
    with pytest.raises(error, match=message):
        ops.pool(**{"x": torch.ones(5, 2), "cu_seqlens": torch.tensor([0, 2, 5])} | change)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_registration(pooling):
    op = OPS["pool"]
    call = op.check(randn(5, 3).requires_grad_(), cu_seqlens((2, 3)), pooling=pooling)
    results = torch.library.opcheck(op.overload, tuple(call[f] for f in op.fields))
    assert set(results.values()) == {"SUCCESS"}


def test_compiles_without_a_break():
    def function(x, boundaries):
        return ops.pool(x * 2, boundaries, normalize=True) + 1

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in ((2, 3), (4, 0, 5)):
        x = randn(sum(lengths), 6).requires_grad_()
        y = compiled(x, cu_seqlens(lengths))
        assert_bitwise(y, function(x, cu_seqlens(lengths)))
        (gradient,) = torch.autograd.grad(y.sum(), x)
        expected = torch.autograd.grad(function(x, cu_seqlens(lengths)).sum(), x)[0]
        assert_bitwise(gradient, expected)
