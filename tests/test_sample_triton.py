"""The Triton kernel of `sample`, in Triton's interpreter: the very tokens of the reference."""

import pytest
import torch
from cases import KERNEL_DTYPES, poisoned_allocations, randn, with_odd_strides
from sampling import INF, SEEDED, expected, logits_of, settings_of
from tolerance import assert_bitwise

from bertgpt import ops

pytest.importorskip("triton")
from bertgpt.kernels import sample as kernel

pytestmark = [
    pytest.mark.interpreter,
    # NumPy warns of what is selected away: sums with infinities, and NaN made integers.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
TRITON = {"backend": "triton"}
NAN = float("nan")


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 32 logits, so that short rows cross several."""
    monkeypatch.setattr(kernel, "pick_config", lambda *_: kernel.Config(block=32, num_warps=1))


def check(logits, run):
    with poisoned_allocations():
        tokens = ops.sample(logits, **run, **TRITON)
    assert_bitwise(tokens, ops.sample(logits, **run, backend="reference"))
    return tokens


# A row is some hundred interpreted steps a block, and more for top-k and top-p: few rows do.
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_tokens_are_the_references(small_blocks, dtype, ties):
    logits, run = logits_of(4, 70, dtype, ties=ties, holes=True), settings_of(4, seed=int(ties))
    run["temperature"] = torch.tensor([1.7, 0.8, 0.0, 1.0])
    run["top_k"], run["top_p"] = torch.tensor([9, 0, 5, 0]), torch.tensor([0.8, 0.6, 0.5, 1.0])
    run["min_p"] = torch.tensor([0.0, 0.1, 0.0, 0.02])
    assert check(logits, run).tolist() == expected(logits, run).tolist()


@pytest.mark.parametrize("run", [{}, {"top_k": 40, "top_p": 0.9}], ids=str)
def test_a_vocabulary_of_50257(run):
    logits = logits_of(1, 50257, torch.bfloat16, ties=True, holes=True)
    check(logits, {**SEEDED, **run})


def test_ties_at_the_edge_and_shares_reached_exactly(small_blocks):
    """Tokens 1, 34 and 40 are the likeliest, then 0, 3 and 5: the cut falls between blocks too."""
    run = {**SEEDED, "sequence_ids": torch.arange(3)}
    tied = torch.full((3, 45), -9.0, dtype=torch.bfloat16)
    tied[:, [0, 3, 5]], tied[:, [1, 34, 40]] = 0.0, 1.0
    assert set(check(tied, {**run, "top_k": 3, "top_p": 0.5}).tolist()) <= {1, 34}
    assert set(check(tied, {**run, "top_p": 1e-30}).tolist()) == {1}
    assert set(check(tied, {**run, "min_p": 1.0}).tolist()) <= {1, 34, 40}
    zeros = torch.full((1, 45), -9.0)
    zeros[0, 2], zeros[0, 40] = -0.0, 0.0
    assert check(zeros, {**SEEDED, "temperature": 0}).tolist() == [2]


@pytest.mark.parametrize("temperature", [1e-45, 1.0, 3.4e38])
def test_the_ends_of_the_range_of_numbers(small_blocks, temperature):
    wide = torch.tensor([[1.5e38, -1.5e38, 1.5e38, -INF, 0.0], [1e-45, 0.0, -1e-45, -0.0, -INF]])
    check(wide, {**SEEDED, "temperature": temperature, "top_k": 3})


def test_any_stride_and_settings_of_one_row(small_blocks):
    logits = logits_of(3, 61, torch.float32)
    run = {**SEEDED, "sequence_ids": torch.arange(3), "min_p": torch.tensor(0.05)}
    tokens = check(logits, run)
    for view in (with_odd_strides(logits), logits.mT.contiguous().mT):
        assert_bitwise(check(view, run), tokens)
    assert check(randn(0, 61), SEEDED).shape == (0,)


def test_a_row_that_nothing_can_be_drawn_by_gives_minus_one(small_blocks):
    logits, run = logits_of(10, 40, torch.float32), settings_of(10)
    logits[1, 5], logits[2, 39], logits[3] = NAN, INF, -INF
    for row, name, value in ((5, "temperature", -1.0), (6, "top_k", -1), (7, "top_p", NAN)):
        run[name][row] = value
    run["temperature"][8], run["top_p"][0], run["min_p"][4] = INF, 0.0, 1.5
    run["temperature"][9] = 0.0
    assert kernel.sample(logits, **run).tolist() == [-1] * 9 + [int(logits[9].argmax())]


def test_float64_goes_elsewhere():
    with pytest.raises(ops.BackendUnavailable, match="float64 is for the torch and reference"):
        ops.sample(randn(2, 5, dtype=torch.float64), **SEEDED, **TRITON)
