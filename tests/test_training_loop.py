"""The training loop: its order, its schedule, resuming, stopping, and what it leaves behind."""

import json
import os
import signal

import pytest
import torch
import transformers
from models import GPT2
from safetensors.torch import load_file

from bertgpt import GPT2Config, GPT2LMHeadModel, pack
from bertgpt.recipes import state
from bertgpt.recipes.loop import Interrupted, train
from bertgpt.recipes.settings import Settings
from bertgpt.recipes.task import Batch, Task

pytest.importorskip("accelerate")

EXAMPLES = [[(7 * i + 3 * j) % 50 + 3 for j in range(4 + i % 17)] for i in range(40)]


def collate(examples, seeds):
    batch = pack(examples)
    count = sum(len(example) - 1 for example in examples)
    return Batch(batch, {"labels": batch.values}, {"loss": count})


def gpt(**changes):
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**{**GPT2, "initializer_range": 0.02, **changes}))


def settings(folder, **changes):
    values = {"batch_size": 8, "max_steps": 6, "learning_rate": 1e-2, "cpu": True}
    return Settings(folder, **{**values, **changes})


def run(folder, model=None, task=Task, resume=False, held_out=(), **changes):
    task = task(model or gpt(), collate)
    return train(task, EXAMPLES, settings(folder, **changes), resume=resume, held_out=held_out)


class Stops(Task):
    """Raises, or sends a signal, when it has seen so many batches."""

    after, act = 4, None

    def forward(self, batch):
        self.after -= 1
        if not self.after:
            type(self).act()
        return super().forward(batch)


class Crash(Exception):
    pass


def crash():
    raise Crash


def test_training_lowers_the_loss_and_stock_loads_what_is_left(tmp_path):
    result = run(tmp_path / "out", held_out=EXAMPLES[:10], max_steps=20)
    assert result.log[-1]["loss"] < 0.9 * result.log[0]["loss"]
    assert result.after["loss"] < 0.9 * result.before["loss"]
    left = {file.name for file in (tmp_path / "out").iterdir()}
    assert left == {"model.safetensors", "config.json", "log.jsonl", "loss.png"}
    lines = (tmp_path / "out" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == result.log
    stock = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out").eval()
    ids = torch.tensor([EXAMPLES[20]])
    with torch.no_grad():
        torch.testing.assert_close(result.model(ids).logits, stock(ids).logits)


@pytest.mark.parametrize("stop", ["crash", "signal"])
def test_an_interrupted_and_resumed_run_is_the_uninterrupted_one(tmp_path, stop):
    """Bit for bit, with dropout on: weights, and every line of the log but its times."""
    expected = run(tmp_path / "whole", checkpoint_every=2)
    stops = type("_", (Stops,), {"act": lambda: os.kill(os.getpid(), signal.SIGTERM)})
    if stop == "crash":
        stops.act = crash
    with pytest.raises(Interrupted if stop == "signal" else Crash):
        run(tmp_path / "out", task=stops, checkpoint_every=2)
    facts = state.read_facts(tmp_path / "out")
    assert facts["done"] == (4 if stop == "signal" else 2)
    torch.manual_seed(7)
    found = run(tmp_path / "out", model=gpt(), checkpoint_every=2, resume=True)
    for name, weight in expected.model.named_parameters():
        assert torch.equal(found.model.get_parameter(name), weight), name
    for one, other in zip(expected.log, found.log, strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}
    stored = [load_file(tmp_path / d / "model.safetensors") for d in ("whole", "out")]
    assert all(torch.equal(stored[0][name], stored[1][name]) for name in stored[0])


def test_accumulation_changes_nothing_but_rounding(tmp_path):
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    one = run(tmp_path / "1", gpt(**off))
    three = run(tmp_path / "3", gpt(**off), accumulation=3)
    for a, b in zip(one.log, three.log, strict=True):
        assert abs(a["loss"] - b["loss"]) < 1e-5
        assert abs(a["norm"] - b["norm"]) < 1e-4 * a["norm"]
