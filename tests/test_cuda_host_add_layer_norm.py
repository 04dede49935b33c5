"""The C++ kernel of `add_layer_norm`, on the host engine."""

import pytest
import torch
from cases import KERNEL_DTYPES, examples, poisoned_allocations, randn
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from test_add_layer_norm import assert_both_accurate, inputs
from tolerance import assert_bitwise

from bertgpt import ops

pytestmark = pytest.mark.usefixtures("host_engine")
CUDA = {"backend": "cuda"}


@given(
    leading=st.lists(st.integers(0, 4), max_size=3),
    chunks=st.sampled_from([1, 4, 10, 96, 127, 128, 129, 400]),
    dtype=st.sampled_from(KERNEL_DTYPES),
    options=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    dropout_p=st.sampled_from([0.0, 0.3, 1.0]),
    schedule=st.integers(0, 2**32),
)
@examples(60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rows_of_every_width_are_accurate(
    host_engine, leading, chunks, dtype, options, dropout_p, schedule
):
    host_engine.set_schedule(schedule)
    has_residual, has_bias, wide = options
    x, residual, weight, bias = inputs(leading, chunks * 16 // dtype.itemsize, dtype)
    if wide:
        weight, bias = weight.float(), bias.float()
    tensors = (x, residual if has_residual else None, weight, bias if has_bias else None)
    run = {"eps": 1e-5, "dropout_p": dropout_p, "seed": 2**40 + 7}
    with poisoned_allocations():
        both = ops.add_layer_norm(*tensors, **run, return_sum=True, **CUDA)
    assert_both_accurate(both, tensors, **run)
    assert_bitwise(ops.add_layer_norm(*tensors, **run, **CUDA), both[0])


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("width", [1024, 1032, 8192])
def test_the_widest_rows_of_each_kind(width, dtype):
    tensors = inputs((3,), width, dtype)
    both = ops.add_layer_norm(*tensors, return_sum=True, **CUDA)
    assert_both_accurate(both, tensors)


def test_a_large_mean_does_not_cancel_the_variance():
    x, residual, weight, bias = inputs((4,), 768)
    tensors = (x + 1e4, residual, weight, bias)
    assert_both_accurate(ops.add_layer_norm(*tensors, return_sum=True, **CUDA), tensors)


def test_rows_with_strides_are_read_in_place():
    x = randn(6, 96, dtype=torch.float16)[:, 16:80]
    weight = randn(64, dtype=torch.float16)
    assert_bitwise(
        ops.add_layer_norm(x, None, weight, None, **CUDA),
        ops.add_layer_norm(x.contiguous(), None, weight, None, **CUDA),
    )


@pytest.mark.parametrize("seed", [0, -1, 2**63 + 5])
def test_dropout_keeps_what_the_definition_keeps(seed):
    x = torch.ones(70, 36)
    zeros, weight = torch.zeros(70, 36), torch.ones(36)
    run = {"dropout_p": 0.4, "seed": seed, "return_sum": True}
    _, total = ops.add_layer_norm(x, zeros, weight, None, **run, **CUDA)
    _, expected = ops.add_layer_norm(x, zeros, weight, None, **run, backend="reference")
    assert_bitwise(total, expected)


@pytest.mark.parametrize(
    ("width", "words"),
    [(8196, "8196 columns do not fit registers"), (30, "not a multiple of 16 bytes")],
)
def test_what_it_does_not_do_is_refused_in_words(width, words):
    with pytest.raises(ops.BackendUnavailable, match=words):
        ops.add_layer_norm(*inputs((2,), width), **CUDA)


def test_it_refuses_to_run_where_a_gradient_is_wanted():
    tensors = inputs((2,), 32)
    tensors[0].requires_grad_()
    with pytest.raises(ops.BackendUnavailable, match="no gradient"):
        ops.add_layer_norm(*tensors, **CUDA)
