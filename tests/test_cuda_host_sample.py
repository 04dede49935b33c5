"""The C++ kernel of `sample`, on the host engine: the very tokens of the reference."""

import math

import pytest
import torch
from cases import KERNEL_DTYPES, examples, poisoned_allocations, randn, with_odd_strides
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from sampling import INF, SEEDED, expected, logits_of, problems, settings_of
from tolerance import assert_bitwise

from bertgpt import ops
from bertgpt.cuda import extension
from bertgpt.cuda import sample as kernel

pytestmark = pytest.mark.usefixtures("host_engine")
CUDA = {"backend": "cuda"}
NAN = float("nan")


def check(logits, run):
    with poisoned_allocations():
        tokens = ops.sample(logits, **run, **CUDA)
    assert_bitwise(tokens, ops.sample(logits, **run, backend="reference"))
    return tokens


@given(
    problem=problems(KERNEL_DTYPES, vocabularies=(1, 2, 3, 7, 13, 64, 127, 300, 1031, 2100)),
    schedule=st.integers(0, 2**32),
)
@examples(150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_tokens_are_the_references(host_engine, problem, schedule):
    host_engine.set_schedule(schedule)
    check(*problem)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("ties", [False, True])
def test_a_vocabulary_of_50257(dtype, ties):
    logits, run = logits_of(9, 50257, dtype, ties=ties, holes=True), settings_of(9)
    assert check(logits, run).tolist() == expected(logits, run).tolist()


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_rows_that_start_and_end_off_16_bytes(dtype):
    memory = torch.full((6, 100), NAN, dtype=dtype)
    run = settings_of(6)
    for start in range(9):
        for width in (1, 5, 61):
            view = memory[:, start : start + width]
            view.copy_(logits_of(6, width, dtype))
            check(view, run)
            view.fill_(NAN)


def test_any_stride_and_settings_of_one_row():
    logits = logits_of(7, 61, torch.float32)
    run = {**SEEDED, "sequence_ids": torch.arange(7), "top_k": torch.tensor(9), "top_p": 0.9}
    tokens = check(logits, run)
    for view in (with_odd_strides(logits), logits.mT.contiguous().mT):
        assert_bitwise(check(view, run), tokens)
    run["temperature"] = torch.tensor([1.0]).expand(7)
    assert_bitwise(check(logits, run), tokens)


def test_a_row_draws_the_same_token_in_any_batch_and_schedule(host_engine):
    logits, run = logits_of(40, 300, torch.bfloat16), settings_of(40)
    tokens = ops.sample(logits, **run, **CUDA)
    for seed, rows in enumerate((torch.randperm(40), torch.tensor([7]), torch.tensor([39, 0, 0]))):
        host_engine.set_schedule(seed)
        part = {name: value[rows] for name, value in run.items()}
        assert_bitwise(ops.sample(logits[rows], **part, **CUDA), tokens[rows])


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_ties_at_the_edge_and_shares_reached_exactly(dtype):
    run = {**SEEDED, "sequence_ids": torch.arange(300)}
    tied = torch.tensor([0.0, 1, 1, -0.0, 1, 0, -9], dtype=dtype).expand(300, 7)
    assert set(check(tied, {**run, "top_k": 4}).tolist()) == {0, 1, 2, 3, 4, 5}
    assert set(check(tied, {**run, "top_k": 3, "top_p": 0.5}).tolist()) == {1, 2}
    assert set(check(tied, {**run, "top_p": 1e-30}).tolist()) == {1}
    equal = torch.zeros(300, 8, dtype=dtype)
    assert set(check(equal, {**run, "top_p": 0.25}).tolist()) == {0, 1}
    assert set(check(equal, {**run, "top_p": 0.2500001}).tolist()) == {0, 1, 2}
    halves = torch.tensor([1.0, 0, 0, -1, -9], dtype=dtype).mul(math.log(2)).expand(300, 5)
    assert set(check(halves, {**run, "min_p": 0.49}).tolist()) == {0, 1, 2}
    assert set(check(halves, {**run, "min_p": 0.51}).tolist()) == {0}
    assert set(check(tied, {**run, "min_p": 1.0}).tolist()) == {1, 2, 4}


def test_the_ends_of_the_range_of_numbers():
    run = {**SEEDED, "sequence_ids": torch.arange(60)}
    wide = torch.tensor([[1.5e38, -1.5e38, 1.5e38, -INF, 0.0]]).expand(60, 5)
    tiny = torch.tensor([[1e-45, 0.0, -1e-45, -0.0]]).expand(60, 4)
    half = torch.tensor([[6e-8, 0.0, -6e-8, 65504, -65504]]).half().expand(60, 5)
    for logits in (wide, tiny, half):
        for temperature in (1e-45, 1e-38, 1.0, 3.4e38):
            for kept in ({}, {"top_k": 1}, {"top_k": 3, "top_p": 0.7}):
                check(logits, {**run, **kept, "temperature": temperature})


def test_a_row_that_nothing_can_be_drawn_by_gives_minus_one_and_is_told_of():
    logits, run = logits_of(9, 61, torch.float32), settings_of(9)
    right = kernel.sample(logits, **run)
    extension.raise_pending()
    logits[1, 5], logits[2, 60], logits[3] = NAN, INF, -INF
    wrong = torch.tensor([False, True, True, True, *[False] * 5])
    assert kernel.sample(logits, **run).tolist() == right.where(~wrong, -1).tolist()
    with pytest.raises(ValueError, match="a row of logits holds NaN") as told:
        extension.raise_pending()
    assert "top_k" not in str(told.value)
    for row, name, value in ((5, "temperature", -1.0), (6, "top_k", -1), (7, "top_p", NAN)):
        run[name][row] = value
    run["temperature"][8], run["top_p"][0], run["min_p"][4] = INF, 0.0, 1.5
    wrong |= torch.tensor([True, *[False] * 3, *[True] * 5])
    assert kernel.sample(logits, **run).tolist() == right.where(~wrong, -1).tolist()
    with pytest.raises(ValueError, match="a temperature, top_k, top_p or min_p is out of"):
        extension.raise_pending()
    extension.raise_pending()  # told once


def test_no_rows():
    assert ops.sample(randn(0, 61), **SEEDED, **CUDA).shape == (0,)
