"""`ops.sample` on torch and reference: which token is drawn, how often, and what is refused."""

import importlib
import math

import numpy as np
import pytest
import torch
from cases import ALL_DTYPES, HALF_DTYPES, examples, randn, with_odd_strides
from hypothesis import given
from hypothesis import strategies as st
from sampling import INF, SEEDED, expected, logits_of, problems, settings_of
from tolerance import assert_bitwise

from bertgpt import ops, portable, reference
from bertgpt.exact_softmax import COEFFICIENTS, MAX_VOCABULARY, exact_weights

BACKENDS = ("torch", "reference")
NAN = float("nan")


@pytest.mark.parametrize("backend", BACKENDS)
@given(problem=problems(ALL_DTYPES))
@examples(120)
def test_tokens_are_those_of_a_brute_force_sort(backend, problem):
    logits, run = problem
    tokens = ops.sample(logits, **run, backend=backend)
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == expected(logits, run).tolist()


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_a_vocabulary_of_50257(dtype):
    logits, run = logits_of(12, 50257, dtype, holes=True), settings_of(12)
    tokens = ops.sample(logits, **run)
    assert tokens.tolist() == expected(logits, run).tolist()
    assert_bitwise(ops.sample(logits, **run, backend="reference"), tokens)


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_half_logits_draw_what_the_same_float32_logits_draw(dtype):
    logits, run = logits_of(40, 300, dtype), settings_of(40)
    assert_bitwise(ops.sample(logits, **run), ops.sample(logits.float(), **run))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_draws_the_same_token_in_any_batch(backend):
    logits, run = logits_of(64, 127, torch.float32, ties=True), settings_of(64)
    tokens = ops.sample(logits, **run, backend=backend)
    order = torch.randperm(64)
    for rows in (order, order[:5], torch.tensor([3]), torch.tensor([9, 9, 60])):
        part = {name: value[rows] for name, value in run.items()}
        assert_bitwise(ops.sample(logits[rows], **part, backend=backend), tokens[rows])
    for row in range(0, 64, 7):
        numbers = {name: value[row].item() for name, value in run.items()}
        assert ops.sample(logits[row : row + 1], **numbers, backend=backend) == tokens[row]


def test_more_rows_than_are_worked_on_at_once(monkeypatch):
    logits, run = logits_of(50, 64, torch.float32), settings_of(50)
    tokens = ops.sample(logits, **run)
    module = importlib.import_module("bertgpt.portable.sample")
    monkeypatch.setattr(module, "_LOGITS_AT_ONCE_CPU", 64 * 7)
    assert_bitwise(ops.sample(logits, **run), tokens)


def chi_squared(tokens, probabilities):
    """Fails where the counts are five sigma from the probabilities; or where one is impossible."""
    counts = torch.bincount(tokens, minlength=len(probabilities)).double()
    possible = probabilities > 0
    assert not counts[~possible].any()
    drawn = len(tokens) * probabilities[possible]
    statistic = float(((counts[possible] - drawn) ** 2 / drawn).sum())
    freedom = int(possible.sum()) - 1
    assert statistic < freedom + 5 * math.sqrt(2 * freedom), statistic


@pytest.mark.parametrize("along", ["seed", "sequence_ids", "steps"])
@pytest.mark.parametrize(
    ("kept", "run"),
    [
        (12, {}),
        (12, {"temperature": 0.6}),
        (5, {"top_k": 5, "temperature": 1.5}),
        (4, {"top_p": 0.7}),
        (3, {"top_k": 6, "top_p": 0.7}),
        (3, {"min_p": 0.45}),
        (2, {"top_p": 0.7, "min_p": 0.6, "temperature": 0.6}),
    ],
)
def test_frequencies_are_the_softmax_of_what_is_kept(kept, run, along):
    row = torch.tensor([0.1, 2.0, -1.0, 1.3, 0.5, 1.1, -2.0, 0.0, 1.9, -0.4, 0.3, -3.0])
    logits = row.expand(20000, 12)
    tokens = ops.sample(logits, **{**SEEDED, **run, along: torch.arange(20000)})
    likeliest = row.double().sort(descending=True).indices[:kept]
    probabilities = torch.zeros(12, dtype=torch.float64)
    scaled = row.double()[likeliest] / run.get("temperature", 1.0)
    probabilities[likeliest] = scaled.softmax(0)
    chi_squared(tokens, probabilities)


def test_steps_and_sequences_draw_independently():
    """Pairs of neighbours are spread like the product of their probabilities."""
    row = torch.tensor([0.0, 0.4, 0.8, 1.2])
    run = {"seed": 3, "sequence_ids": torch.arange(30000)}
    logits = row.expand(30000, 4)
    now = ops.sample(logits, **run, steps=5)
    pairs = torch.outer(row.double().softmax(0), row.double().softmax(0)).flatten()
    chi_squared(now * 4 + ops.sample(logits, **run, steps=6), pairs)
    chi_squared(now[::2] * 4 + now[1::2], pairs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_temperature_0_takes_the_largest_and_of_equal_ones_the_first(backend):
    logits = torch.tensor([[1.0, 3, 3, -INF], [-0.0, 0, -1, -2], [-5, -4, -3, -2]])
    run = {**SEEDED, "temperature": 0, "top_k": 2, "top_p": 0.5}
    assert ops.sample(logits, **run, backend=backend).tolist() == [1, 0, 3]


@pytest.mark.parametrize("backend", BACKENDS)
def test_top_k_1_takes_the_largest(backend):
    logits = logits_of(200, 61, torch.float32)
    run = {"seed": 1, "sequence_ids": torch.arange(200), "steps": 0, "backend": backend}
    greedy = ops.sample(logits, temperature=0, **run)
    assert_bitwise(greedy, logits.argmax(dim=1))
    assert_bitwise(ops.sample(logits, top_k=1, temperature=5.0, **run), greedy)
    assert_bitwise(ops.sample(logits, top_p=1e-30, temperature=5.0, **run), greedy)


@pytest.mark.parametrize("backend", BACKENDS)
def test_top_k_keeps_ties_and_top_p_the_first_of_them(backend):
    row = torch.tensor([0.0, 1, 1, -0.0, 1, 0, -9])
    logits, run = row.expand(400, 7), {**SEEDED, "sequence_ids": torch.arange(400)}

    def drawn(**kept):
        return set(ops.sample(logits, **run, **kept, backend=backend).tolist())

    assert drawn(top_k=1) == {1, 2, 4}
    assert drawn(top_k=4) == {0, 1, 2, 3, 4, 5}
    share = math.e / (3 * math.e + 3 + math.exp(-9))
    assert drawn(top_p=share * 0.99) == {1}
    assert drawn(top_p=share * 1.01) == {1, 2}
    assert drawn(top_p=share * (3 + 0.99 / math.e)) == {0, 1, 2, 4}
    assert drawn(top_k=3, top_p=0.5) == {1, 2}  # the share is of what top-k leaves
    assert drawn(top_k=2, top_p=0.3) == {1}


def test_a_share_that_is_reached_exactly_is_enough():
    logits = torch.zeros(300, 8)
    run = {**SEEDED, "sequence_ids": torch.arange(300)}
    assert set(ops.sample(logits, **run, top_p=0.25).tolist()) == {0, 1}
    assert set(ops.sample(logits, **run, top_p=0.2500001).tolist()) == {0, 1, 2}


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_ends_of_the_range_of_numbers(backend):
    logits = torch.tensor([[1.5e38, -1.5e38, 1.5e38, -INF]]).expand(200, 4)
    run = {**SEEDED, "sequence_ids": torch.arange(200), "backend": backend}
    for temperature in (1e-45, 1e-38, 1.0, 3.4e38):
        tokens = set(ops.sample(logits, **run, temperature=temperature).tolist())
        assert tokens == ({0, 2, 1} if temperature == 3.4e38 else {0, 2})
    tiny = torch.tensor([[1e-45, 0.0, -1e-45]]).expand(200, 3)
    assert set(ops.sample(tiny, **run).tolist()) == {0, 1, 2}
    assert set(ops.sample(tiny, **run, top_k=1).tolist()) == {0}
    assert set(ops.sample(tiny, **run, temperature=1e-45).tolist()) == {0, 1, 2}


def weight_by_hand(x, top, temperature):
    """The integer weight of a float32 logit, step by step in numpy's float32 and Python's int."""
    rate = min(np.float32(math.log2(math.e)) / np.float32(temperature), np.finfo(np.float32).max)
    y = (np.float32(top) - np.float32(x)) * rate
    if not y < 41:
        return 0
    fraction = int((y - np.floor(y)) * np.float32(2**32))
    mantissa = COEFFICIENTS[-1]
    for coefficient in reversed(COEFFICIENTS[:-1]):
        mantissa = coefficient - (mantissa * fraction >> 32)
    return (mantissa << 9) >> int(np.floor(y))


@given(
    row=st.lists(st.floats(-60, 60, width=32), min_size=1, max_size=8),
    temperature=st.floats(0.0625, 64, width=32),
)
def test_weights_by_hand_and_by_exp(row, temperature):
    x, t = torch.tensor(row), torch.tensor(temperature)
    weights = exact_weights(x, t)
    assert weights.tolist() == [weight_by_hand(v, max(row), temperature) for v in row]
    for dtype, relative in ((torch.float32, 1e-5), (torch.float64, 2**-27)):
        weights = exact_weights(x.to(dtype), t).double()
        true = 2.0**40 * ((x.double() - x.double().max()) / t.double()).exp()
        assert ((weights - true).abs() <= relative * true + 1).all()
    assert weights.max() == 2**40


def test_the_coefficients_are_the_documented_interpolation():
    nodes = (1 - np.cos((2 * np.arange(7) + 1) * np.pi / 14)) / 2
    q = np.linalg.solve(np.vander(nodes, increasing=True), -np.expm1(-nodes * math.log(2)) / nodes)
    signs = (-1.0) ** np.arange(7)
    assert [2**31, *(round(c) for c in q * signs * 2**31)] == list(COEFFICIENTS)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("strided", [with_odd_strides, lambda x: x.mT.contiguous().mT])
def test_strides_are_honoured_and_inputs_stay(strided, backend):
    logits, run = logits_of(7, 61, torch.float32), settings_of(7)
    view = strided(logits)
    tokens = ops.sample(view, **run, backend=backend)
    assert_bitwise(tokens, ops.sample(logits, **run, backend=backend))
    assert_bitwise(view, logits)


@pytest.mark.parametrize("backend", BACKENDS)
def test_settings_may_be_numbers_tensors_of_one_or_of_every_row(backend):
    logits = logits_of(5, 61, torch.float32)
    numbers = {"temperature": 0.7, "top_k": 9, "top_p": 0.9, "seed": 2**64 - 3, "steps": 4}
    run = {**numbers, "sequence_ids": torch.arange(5, dtype=torch.int32)}
    tokens = ops.sample(logits, **run, backend=backend)
    single = {
        "temperature": torch.tensor(0.7),
        "top_k": torch.tensor(9, dtype=torch.int32),
        "top_p": torch.tensor(0.9),
        "seed": torch.tensor(-3),
        "steps": torch.tensor(4),
    }
    every = {name: value.expand(5) for name, value in single.items()}
    for other in (single, every):
        assert_bitwise(ops.sample(logits, **{**run, **other}, backend=backend), tokens)


def test_gradients_stop_here():
    logits = logits_of(3, 61, torch.float32).requires_grad_()
    assert not ops.sample(logits, **SEEDED).requires_grad


LOGITS = randn(3, 8)


def changed(row, value):
    logits = LOGITS.clone()
    logits[row] = torch.tensor(value)
    return logits


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": LOGITS[0]}, ValueError, "logits must have 2 dimensions"),
        ({"logits": LOGITS.int()}, TypeError, "logits must be float16"),
        ({"logits": LOGITS[:, :0]}, ValueError, "V in 1 … 4194304"),
        ({"logits": LOGITS[:, :1].expand(3, MAX_VOCABULARY + 1)}, ValueError, "V in 1"),
        ({"logits": changed(1, [NAN, *[0.0] * 7])}, ValueError, "row 1 of logits holds NaN"),
        ({"logits": changed(2, [INF, *[0.0] * 7])}, ValueError, r"row 2 .* holds \+inf"),
        ({"logits": changed(0, [-INF] * 8)}, ValueError, "row 0 .* nothing but -inf"),
        ({"temperature": -0.5}, ValueError, "temperature must be 0 or more, .* not -0.5"),
        ({"temperature": NAN}, ValueError, "temperature must be 0 or more"),
        ({"temperature": 1e39}, ValueError, "finite in float32"),
        ({"temperature": "hot"}, TypeError, "temperature must be a number"),
        ({"temperature": True}, TypeError, "temperature must be a number"),
        ({"temperature": torch.tensor([1.0, 2, -1])}, ValueError, r"not -1.0 \(row 2\)"),
        ({"temperature": torch.tensor([1.0, NAN, 1])}, ValueError, r"not nan \(row 1\)"),
        ({"temperature": torch.ones(3).double()}, TypeError, "temperature .* float32"),
        ({"temperature": torch.ones(2)}, ValueError, r"temperature must have shape \(\) or \[B\]"),
        ({"temperature": torch.ones(3, device="meta")}, ValueError, "temperature is on meta"),
        ({"top_k": -1}, ValueError, "top_k must be 0 .* not -1"),
        ({"top_k": 2**63}, ValueError, "top_k must be .* below"),
        ({"top_k": 1.5}, TypeError, "top_k must be an int"),
        ({"top_k": torch.tensor([0, -3, 1])}, ValueError, r"top_k .* not -3 \(row 1\)"),
        ({"top_k": torch.ones(3)}, TypeError, "top_k must be an int or an int32 or int64 tensor"),
        ({"top_p": 0}, ValueError, r"top_p must lie in \(0, 1\], not 0"),
        ({"top_p": 1.01}, ValueError, "top_p must lie"),
        ({"min_p": -0.1}, ValueError, r"min_p must lie in \[0, 1\], not -0.1"),
        ({"min_p": torch.tensor([1, 0, 1.1])}, ValueError, r"min_p .* \(row 2\)"),
        ({"top_p": torch.tensor([1, 0.0, 1])}, ValueError, r"top_p .* \(row 1\)"),
        ({"seed": None}, TypeError, "seed must be an int"),
        ({"seed": 2**64}, ValueError, "seed must fit 64 bits"),
        ({"seed": torch.ones(3, dtype=torch.int32)}, TypeError, "seed .* int64 tensor"),
        ({"sequence_ids": [0, 1, 2]}, TypeError, "sequence_ids must be an int or a tensor"),
        ({"sequence_ids": torch.zeros(3, 1).long()}, ValueError, "sequence_ids must have shape"),
        ({"steps": -1}, ValueError, "steps must lie in 0"),
        ({"steps": 2**32}, ValueError, "steps must lie in 0"),
        ({"steps": torch.tensor([0, 0, 2**32])}, ValueError, r"steps .* not 4294967296 \(row 2\)"),
        ({"backend": "opencl"}, ValueError, "unknown backend"),
    ],
)
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match=message):
        ops.sample(**{"logits": LOGITS, **SEEDED, **change})


@pytest.mark.parametrize("implementation", [portable.sample, reference.sample])
def test_where_values_are_not_checked_a_bad_row_gives_minus_one_and_no_other_changes(
    implementation,
):
    logits, run = logits_of(9, 61, torch.float32), settings_of(9)
    right = implementation(logits, **run)
    logits[1, 5], logits[2, 60], logits[3] = NAN, INF, -INF
    for row, name, value in ((5, "temperature", -1.0), (6, "top_k", -1), (7, "top_p", NAN)):
        run[name][row] = value
    run["temperature"][8] = INF
    wrong = torch.tensor([False, True, True, True, False, True, True, True, True])
    assert implementation(logits, **run).tolist() == right.where(~wrong, -1).tolist()


def test_registration():
    for rows in (0, 3):
        logits, run = logits_of(rows, 61, torch.float32), settings_of(rows)
        values = (logits, *(run[name] for name in ("temperature", "top_k", "top_p", "min_p")))
        values += tuple(run[name] for name in ("seed", "sequence_ids", "steps"))
        torch.library.opcheck(torch.ops.bertgpt.sample.default, (*values, None))


@pytest.mark.parametrize("run", [settings_of(3), {**SEEDED, "temperature": 0.5, "top_k": 5}])
def test_compiles_whole(run):
    def step(hidden, weight):
        return ops.sample(hidden @ weight, **run) + 1

    tensors = randn(3, 16), randn(16, 61)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert_bitwise(compiled(*tensors), step(*tensors))
