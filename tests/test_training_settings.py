"""A run's settings: which weights decay, the order of examples, the rate, and what is refused."""

import pytest
from models import BERT

from bertgpt import (
    BertConfig,
    BertForMaskedLM,
)
from bertgpt.recipes import loop
from bertgpt.recipes.order import Order
from bertgpt.recipes.settings import Settings

pytest.importorskip("accelerate")
from test_training_loop import settings


def test_matrices_decay_and_vectors_do_not():
    model = BertForMaskedLM(BertConfig(**BERT))
    decayed, spared = loop.decay_groups(model, 0.1)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    names = {id(weight): name for name, weight in model.named_parameters()}
    assert {id(w) for g in (decayed, spared) for w in g["params"]} == set(names)
    for weight in spared["params"]:
        assert names[id(weight)].endswith("bias") or "norm" in names[id(weight)]
    for weight in decayed["params"]:
        assert "norm" not in names[id(weight)]


def test_every_epoch_takes_every_example_once_however_steps_are_split():
    order = Order(examples=10, batch_size=4, seed=3)
    stream = [item for step in range(10) for item in order.step(step)]
    epochs = [[i for i, _ in stream[e * 10 : e * 10 + 10]] for e in range(4)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert len({seed for _, seed in stream}) == 40
    for parts in (1, 2, 3):
        for step in range(10):
            shares = [order.step(step, part, parts) for part in range(parts)]
            together = [shares[i % parts][i // parts] for i in range(4)]
            assert together == order.step(step)
    assert Order(10, 4, 4).step(0) != order.step(0)


def test_the_rate_rises_and_falls_linearly(tmp_path):
    given = settings(tmp_path, learning_rate=1.0, warmup=0.2)
    rates = [given.rate(step, 10) for step in range(10)]
    assert rates == pytest.approx([0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])
    assert settings(tmp_path, warmup=3).warmup_steps(10) == 3
    flat = settings(tmp_path, learning_rate=1.0, warmup=0)
    assert [flat.rate(step, 4) for step in range(4)] == [1, 0.75, 0.5, 0.25]
    assert Settings(tmp_path, batch_size=8, epochs=1.5).steps(40) == 8


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "batch_size must be 1 or more, not 0"),
        ({"max_steps": 0}, ValueError, "max_steps must be 1 or more, not 0"),
        ({"accumulation": 1.0}, TypeError, r"accumulation must be an integer, not 1\.0"),
        ({"seed": -1}, ValueError, "seed must be 0 or more, not -1"),
        ({"seed": 2**63}, ValueError, r"seed must be below 2\^63, not 9223372036854775808"),
        ({"learning_rate": 0.0}, ValueError, "learning_rate must be positive and finite"),
        ({"learning_rate": float("nan")}, ValueError, "learning_rate must be positive and finite"),
        ({"weight_decay": float("inf")}, ValueError, "weight_decay must be 0 or more and finite"),
        ({"clip_norm": "1"}, TypeError, "clip_norm must be a number, not '1'"),
        ({"warmup": 2.5}, ValueError, "warmup must be a fraction below 1 or whole steps"),
        ({"precision": "fp8"}, ValueError, "precision must be one of no, bf16, fp16, not 'fp8'"),
    ],
)
def test_settings_are_refused_by_name(tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        settings(tmp_path, **changes)


def test_a_run_needs_examples_and_steps_after_the_warmup(tmp_path):
    with pytest.raises(ValueError, match="there is no example to train on"):
        settings(tmp_path).steps(0)
    with pytest.raises(ValueError, match="warmup=6 leaves none of the 6 steps"):
        settings(tmp_path, warmup=6).steps(40)
