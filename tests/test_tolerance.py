"""The accuracy rule accepts what is as good as the reference and nothing else."""

import pytest
import torch
from cases import banded, poisoned_allocations, randn, with_odd_strides
from tolerance import assert_accurate, assert_bitwise

from bertgpt.accuracy import measure, unit_in_last_place

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def _product(dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Oracle, a computation in float32 rounded once, and one rounded at every step."""
    x, w = randn(33, 48, dtype=dtype, seed=seed), randn(48, 17, dtype=dtype, seed=seed + 1)
    oracle = torch.tanh(x.double() @ w.double())
    accumulate = dtype if dtype == torch.float64 else torch.float32
    fused = torch.tanh(x.to(accumulate) @ w.to(accumulate)).to(dtype)
    return oracle, fused, torch.tanh(x @ w)


@pytest.mark.parametrize("dtype", DTYPES)
def test_accepts_another_correct_computation(dtype):
    oracle, fused, stepwise = _product(dtype)
    accuracy = assert_accurate(fused, oracle, stepwise)
    assert accuracy.row_excess <= 1
    assert accuracy.max_error < 0.05


@pytest.mark.parametrize("dtype", DTYPES)
def test_accepts_the_rounded_oracle_against_a_perfect_baseline(dtype):
    oracle, _, _ = _product(dtype)
    assert_accurate(oracle.to(dtype), oracle, oracle.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("element", [(0, 0), (12, 3), (32, 16)])
def test_refuses_one_wrong_element_and_names_it(dtype, element):
    oracle, fused, stepwise = _product(dtype)
    wrong = fused.clone()
    wrong[element] += 0.05
    with pytest.raises(AssertionError, match=rf"product: .* at \({element[0]}, {element[1]}\)"):
        assert_accurate(wrong, oracle, stepwise, what="product")


def test_refuses_an_error_that_only_a_small_row_shows():
    oracle = torch.ones(4, 64, dtype=torch.float64)
    oracle[2] *= 1e-3
    baseline = oracle.float() * (1 + 1e-5)
    wrong = oracle.float()
    wrong[2, 5] *= 1.01  # 1e-5: other rows may err twice as much, this one 500 times less
    with pytest.raises(AssertionError, match=r"\(2, 5\)"):
        assert_accurate(wrong, oracle, baseline)


def test_refuses_a_bias_that_the_maximum_hides():
    oracle = randn(64, 64, seed=3).double()
    baseline = oracle.float()
    baseline[:, 0] += 0.5  # a poor baseline, so that the maximum allows much
    with pytest.raises(AssertionError, match="rms ratio"):
        assert_accurate(oracle.float() + 0.02, oracle, baseline)


@pytest.mark.parametrize("form", [float("nan"), float("inf"), float("-inf")])
def test_the_pattern_of_the_non_finite_is_exact(form):
    oracle, fused, stepwise = _product(torch.float32)
    oracle[3, 4] = form
    with pytest.raises(AssertionError, match="1 wrong places, first \\(3, 4\\)"):
        assert_accurate(fused, oracle, stepwise)
    fused[3, 4] = form
    assert_accurate(fused, oracle, stepwise)
    fused[5, 6] = form
    with pytest.raises(AssertionError, match="first \\(5, 6\\)"):
        assert_accurate(fused, oracle, stepwise)


def test_overflow_of_the_dtype_is_expected_as_infinity():
    oracle = torch.tensor([[1e6, 1.0]], dtype=torch.float64)
    rounded = oracle.half()
    assert rounded.isinf().any()
    assert_accurate(rounded, oracle, rounded)


def test_refuses_another_shape_or_dtype():
    oracle, fused, stepwise = _product(torch.float16)
    with pytest.raises(AssertionError, match="shape"):
        assert_accurate(fused[:-1], oracle, stepwise)
    with pytest.raises(AssertionError, match="dtype"):
        assert_accurate(fused.float(), oracle, stepwise)


def test_a_wrong_oracle_is_the_callers_mistake():
    oracle, fused, stepwise = _product(torch.float16)
    with pytest.raises(ValueError, match="float64"):
        measure(fused, oracle.float(), stepwise)
    with pytest.raises(ValueError, match="shaped"):
        measure(fused, oracle[:-1], stepwise)


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), ()])
def test_empty_and_scalar_results(shape):
    oracle = torch.zeros(shape, dtype=torch.float64)
    assert_accurate(oracle.float(), oracle, oracle.float())


def test_unit_in_last_place_is_the_spacing():
    for dtype in (torch.float32, torch.float16, torch.float64):
        values = torch.tensor([1.0, 1.5, 0.37, 1000.0, 6e-5], dtype=dtype)
        spacing = torch.nextafter(values, torch.full_like(values, float("inf"))) - values
        assert torch.equal(unit_in_last_place(values, dtype), spacing.double())
    assert unit_in_last_place(torch.tensor(1.0), torch.bfloat16) == 2.0**-7
    assert unit_in_last_place(torch.tensor(0.0), torch.float16) == 2.0**-24


def test_bitwise_tells_zeros_apart_and_knows_nan():
    x = torch.tensor([0.0, float("nan"), 1.0])
    assert_bitwise(x, x.clone())
    with pytest.raises(AssertionError, match="differ"):
        assert_bitwise(x, torch.tensor([-0.0, float("nan"), 1.0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64])
@pytest.mark.parametrize("offset", [-1, 12])
def test_bands_find_a_write_past_either_end(dtype, offset):
    fenced = banded((3, 4), dtype)
    fenced.view.fill_(1)
    fenced.check()
    torch.as_strided(fenced.memory, (1,), (1,), 64 + offset).fill_(7)
    with pytest.raises(AssertionError, match="written"):
        fenced.check()


@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 4, 5), (0, 3, 2), (2, 0)])
def test_odd_strides_keep_the_values(shape):
    x = randn(*shape, seed=1)
    view = with_odd_strides(x, seed=2)
    assert torch.equal(view, x)
    assert view.stride(-1) == 1


def test_some_odd_strides_are_really_odd():
    views = [with_odd_strides(randn(2, 3, 4, 5), seed=s) for s in range(8)]
    assert sum(not v.is_contiguous() for v in views) >= 6
    assert len({v.stride() for v in views}) >= 4


def test_poisoned_allocations_hold_nan_and_end():
    with poisoned_allocations():
        assert torch.empty(100).isnan().all()
        assert torch.empty_like(torch.zeros(3, dtype=torch.bfloat16)).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_rounding_is_taken_at_the_magnitude_of_what_cancels():
    oracle = torch.tensor([[1e-3]], dtype=torch.float64)
    baseline, actual = oracle.float(), (oracle + 1e-6).float()
    assert not measure(actual, oracle, baseline).accurate
    assert measure(actual, oracle, baseline, terms=torch.tensor([[-4.0]])).accurate
    assert not measure(actual, oracle, baseline, terms=torch.tensor([[0.01]])).accurate
