"""A call like one before is not settled again, and one that differs in anything is."""

import pytest
import torch
from cases import randn
from paged_batch import paged_batch
from tolerance import assert_bitwise

from bertgpt import ops
from bertgpt.ops import _plans
from bertgpt.ops._dispatch import OPS

pytestmark = pytest.mark.usefixtures("host_engine")
W, B = randn(8, 16), randn(8, seed=1)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No plan from another test."""
    for op in OPS.values():
        monkeypatch.setattr(op.plans, "_plans", {})


@pytest.fixture
def checks(monkeypatch):
    """How often the checks of `linear_gelu` ran."""
    op, count = OPS["linear_gelu"], []
    check = op.check
    monkeypatch.setattr(op, "check", lambda *a, **k: count.append(1) or check(*a, **k))
    return count


def run(x=None, w=W, b=B, **options):
    return ops.linear_gelu(randn(3, 16) if x is None else x, w, b, **{"backend": "cuda"} | options)


def test_the_like_of_a_call_is_settled_once_and_gives_the_same(checks):
    first = run()
    assert_bitwise(run(), first)
    other = run(randn(3, 16, seed=5))
    assert len(checks) == 1
    OPS["linear_gelu"].plans._plans.clear()
    assert_bitwise(run(randn(3, 16, seed=5)), other)
    assert len(checks) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"x": randn(4, 16)},
        {"x": randn(3, 1, 16)},
        {"x": randn(3, 32)[:, ::2]},
        {"x": randn(3, 32)[:, :16]},
        {"x": randn(3, 16).half(), "w": W.half(), "b": B.half()},
        {"b": None},
        {"w": torch.nn.Parameter(W)},
        {"approximate": "tanh"},
        {"backend": "torch"},
        {"backend": None},
    ],
    ids=lambda change: ",".join(change),
)
def test_anything_else_is_another_call(checks, change):
    with torch.no_grad():
        run()
        run(**change)
        assert len(checks) == 2


def test_a_plan_is_for_contiguous_tensors_whatever_strides_a_size_of_one_has(checks):
    x = randn(1, 16)
    expected = run(x)
    assert_bitwise(run(x.as_strided((1, 16), (99, 1))), expected)
    assert len(checks) == 1


def test_what_would_be_refused_is_refused_after_its_like_was_not():
    memory = randn(3 * 16 + 1)
    run(memory[:48].view(3, 16))
    with pytest.raises(ops.BackendUnavailable, match="multiples of 16 bytes"):
        run(memory[1:].view(3, 16))
    with torch.no_grad():
        run(randn(3, 16).requires_grad_())
    with pytest.raises(ops.BackendUnavailable, match="no gradient"):
        run(randn(3, 16).requires_grad_())


def test_true_is_not_one():
    x, weight = randn(2, 16), torch.ones(16)
    ops.add_layer_norm(x, x, weight, None, return_sum=True, backend="cuda")
    with pytest.raises(TypeError, match="return_sum must be True or False, not 1"):
        ops.add_layer_norm(x, x, weight, None, return_sum=1, backend="cuda")


def test_values_are_looked_at_each_time():
    batch = paged_batch((5, 9), head_dim=64)
    q, k_pages, v_pages, table, lengths = batch.args
    ops.paged_attention(*batch.args, backend="cuda")
    with pytest.raises(ValueError, match="lengths holds"):
        ops.paged_attention(q, k_pages, v_pages, table, lengths + 1000, backend="cuda")


def test_a_tensor_elsewhere_is_another_call():
    batch = paged_batch((5, 9), head_dim=64)
    q, k_pages, v_pages, table, lengths = batch.args
    ops.paged_attention(*batch.args, backend="cuda")
    with pytest.raises(ValueError, match="lengths is on meta"):
        ops.paged_attention(q, k_pages, v_pages, table, lengths.to("meta"), backend="cuda")


def test_a_seed_is_drawn_for_each_call():
    x, weight = randn(8, 64), torch.ones(64)
    torch.manual_seed(0)
    results = [
        ops.add_layer_norm(x, None, weight, None, dropout_p=0.5, backend="cuda") for _ in range(3)
    ]
    assert not torch.equal(results[0], results[1])
    assert not torch.equal(results[1], results[2])


def test_autocast_and_lists_go_the_long_way(checks):
    run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert run(backend=None).dtype == torch.bfloat16
    batch = paged_batch((5, 9), head_dim=64)
    for window in ([3, -1], (3, -1), [3, -1]):
        out = ops.paged_attention(*batch.args, window=window, backend="cuda")
        assert_bitwise(out, ops.paged_attention(*batch.args, window=(3, -1), backend="cuda"))
    with pytest.raises(TypeError, match="x must be a tensor, not list"):
        ops.linear_gelu([1.0], W, B)


def test_numbers_and_tensors_of_settings_draw_the_same():
    logits, rows = randn(4, 50), torch.zeros(4, dtype=torch.int64)
    numbers = {"seed": 3, "sequence_ids": rows, "steps": 7, "temperature": 0.7, "top_k": 5}
    expected = ops.sample(logits, **numbers)
    for _ in range(2):
        assert_bitwise(ops.sample(logits, **numbers, backend="cuda"), expected)
    other = ops.sample(logits, **{**numbers, "seed": 4}, backend="cuda")
    assert_bitwise(other, ops.sample(logits, **{**numbers, "seed": 4}))


def test_a_step_by_number_leaves_no_plan():
    logits, rows = randn(4, 50), torch.zeros(4, dtype=torch.int64)
    for step in range(3):
        ops.sample(logits, seed=3, sequence_ids=rows, steps=step, backend="cuda")
    assert not OPS["sample"].plans._plans


def test_bounds_of_a_window_are_told_apart_by_type():
    batch = paged_batch((5, 9), head_dim=64)
    ops.paged_attention(*batch.args, window=(1, -1), backend="cuda")
    for odd in ((True, -1), (1.0, -1)):
        with pytest.raises(TypeError, match="window bounds must be integers"):
            ops.paged_attention(*batch.args, window=odd, backend="cuda")


def test_plans_stay_few(monkeypatch):
    monkeypatch.setattr(_plans, "_MOST", 3)
    for rows in range(1, 9):
        run(randn(rows, 16))
    assert len(OPS["linear_gelu"].plans._plans) <= 3
