"""The training loop: its order, its schedule, resuming, stopping, and what it leaves behind."""

import json
import os
import signal

import pytest
import torch
import transformers
from models import GPT2
from safetensors.torch import load_file, save_file

from bertgpt import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    pack,
)
from bertgpt.recipes import loop, state
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


def test_bfloat16_trains_float32_weights(tmp_path):
    exact = run(tmp_path / "exact", max_steps=20)  # in the same process: both are as asked
    result = run(tmp_path / "out", max_steps=20, precision="bf16")
    assert result.log[-1]["loss"] < 0.9 * result.log[0]["loss"]
    assert result.model.dtype == torch.float32
    plain = [line["loss"] for line in result.log]
    assert plain != [line["loss"] for line in exact.log]


class Poisoned(Task):
    """Gives a loss that is no number, or has no finite gradient, in its fourth batch."""

    seen = 0

    def forward(self, batch):
        losses = super().forward(batch)
        self.seen += self.training
        if self.seen == 4:
            losses["loss"] = losses["loss"] * self.poison
        return losses


@pytest.mark.parametrize(
    ("poison", "message"),
    [
        (float("nan"), "the loss is nan at step 4"),
        (float("inf"), "the loss is inf at step 4"),
        (1e37, "the gradient's norm is inf at step 4"),
    ],
)
def test_a_lost_loss_stops_at_its_step_and_keeps_the_last_checkpoint(tmp_path, poison, message):
    poisoned = type("_", (Poisoned,), {"poison": poison})
    with pytest.raises(FloatingPointError, match=message):
        run(tmp_path / "out", task=poisoned, checkpoint_every=2)
    assert state.read_facts(tmp_path / "out")["done"] == 2
    found = run(tmp_path / "out", checkpoint_every=2, resume=True)
    expected = run(tmp_path / "whole", checkpoint_every=2)
    for one, other in zip(found.log, expected.log, strict=True):
        assert one["loss"] == other["loss"]


@pytest.fixture
def interruptible():
    """SIGINT raises KeyboardInterrupt, also in a background job, which a shell makes ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_signal_does_not_wait(tmp_path, interruptible):
    class Twice(Task):
        def forward(self, batch):
            for _ in range(2):
                signal.raise_signal(signal.SIGINT)  # handled before it returns
            return super().forward(batch)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", task=Twice)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_before_the_first_step_leaves_no_checkpoint(tmp_path):
    came = []

    def collate_and_signal(examples, seeds):
        if not came:
            came.append(os.kill(os.getpid(), signal.SIGTERM))
        return collate(examples, seeds)

    with pytest.raises(Interrupted, match="SIGTERM after step 0: nothing was learned yet"):
        train(Task(gpt(), collate_and_signal), EXAMPLES, settings(tmp_path / "out"))
    assert not (tmp_path / "out" / state.FILE).exists()


@pytest.fixture
def cut_off(tmp_path):
    """A folder with the checkpoint of two steps."""
    crashes = type("_", (Stops,), {"act": staticmethod(crash)})
    with pytest.raises(Crash):
        run(tmp_path / "out", task=crashes, checkpoint_every=2)
    return tmp_path / "out"


def classifier():
    return GPT2ForSequenceClassification(gpt().config)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: gpt(n_embd=48), r"config\.n_embd=24, not 48"),
        (lambda: gpt(n_layer=3), r"config\.n_layer=2, not 3"),
        (lambda: gpt(n_head=1), r"config\.n_head=\d, not 1"),  # of the same shapes
        (lambda: gpt(attn_pdrop=0.3), r"config\.attn_pdrop=0\.1, not 0\.3"),
        (classifier, r"training\.safetensors is of another shape: \S+ is absent"),
    ],
)
def test_a_checkpoint_of_another_model_is_named(cut_off, model, message):
    before = (cut_off / state.FILE).read_bytes(), (cut_off / "log.jsonl").read_bytes()
    model = model()
    weights = [weight.clone() for weight in model.parameters()]
    with pytest.raises(ValueError, match=message):
        run(cut_off, model=model, resume=True, checkpoint_every=2)
    assert before == ((cut_off / state.FILE).read_bytes(), (cut_off / "log.jsonl").read_bytes())
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "was made with seed=0, not 1"),
        ({"learning_rate": 0.02}, r"was made with learning_rate=0\.01, not 0\.02"),
        ({"max_steps": 9}, "was made with steps=6, not 9"),
    ],
)
def test_a_checkpoint_of_another_run_is_named(cut_off, changes, message):
    with pytest.raises(ValueError, match=message):
        run(cut_off, resume=True, **changes)


def test_a_checkpoint_of_other_examples_is_named(cut_off):
    others = [*EXAMPLES[:-1], [5, *EXAMPLES[-1][1:]]]
    options = {"checkpoint_every": 2, "batch_size": 8}
    with pytest.raises(ValueError, match="was made with digest of the examples="):
        train(Task(gpt(), collate), others, settings(cut_off, **options), resume=True)
    copied = json.loads(json.dumps(EXAMPLES))  # equal, not the same
    train(Task(gpt(), collate), copied, settings(cut_off, **options), resume=True)


def test_a_run_that_left_no_checkpoint_says_how_to_go_on(tmp_path):
    stops = type("_", (Stops,), {"act": staticmethod(crash)})
    with pytest.raises(Crash):
        run(tmp_path / "out", task=stops)
    hint = "it has no checkpoint: delete it, or name another"
    with pytest.raises(FileExistsError, match=hint):
        run(tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=hint):
        run(tmp_path / "out", resume=True)
    run(tmp_path / "whole")
    with pytest.raises(FileExistsError, match="it is finished: name another"):
        run(tmp_path / "whole")
    with pytest.raises(FileNotFoundError, match="it is finished: name another"):
        run(tmp_path / "whole", resume=True)


def test_half_weights_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"weights must be float32 .*: \S+ is torch\.float16"):
        run(tmp_path / "out", model=gpt().half())
    assert not (tmp_path / "out").exists()


def test_held_out_examples_without_labels_have_no_loss(tmp_path):
    result = run(tmp_path / "out", held_out=[[4]], max_steps=2)
    assert result.before == result.after == {"loss": 0.0}


def test_the_checkpoint_stays_until_the_model_is_measured(tmp_path):
    seen = []

    def cut_short(model):
        seen.append({file.name for file in (tmp_path / "out").iterdir()})
        raise Crash

    def beside():
        (tmp_path / "out" / "beside").touch()

    with pytest.raises(Crash):
        train(
            Task(gpt(), collate), EXAMPLES, settings(tmp_path / "out", checkpoint_every=4),
            beside=beside, measure=cut_short,
        )  # fmt: skip
    assert seen[0] >= {"model.safetensors", "beside", state.FILE}
    assert len(run(tmp_path / "out", resume=True).log) == 6


def test_a_signal_waits_for_the_model_to_be_saved(tmp_path):
    with pytest.raises(Interrupted, match=r"SIGTERM after the last step: .*out has the model"):
        train(
            Task(gpt(), collate), EXAMPLES, settings(tmp_path / "out"),
            beside=lambda: signal.raise_signal(signal.SIGTERM), measure=lambda _: crash(),
        )  # fmt: skip
    assert GPT2LMHeadModel.from_pretrained(tmp_path / "out")


def test_a_broken_checkpoint_is_named(cut_off):
    file = cut_off / state.FILE
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"training\.safetensors is no checkpoint of a training"):
        run(cut_off, resume=True)


def test_nothing_is_overwritten(cut_off, tmp_path):
    with pytest.raises(FileExistsError, match="out holds something: resume it"):
        run(cut_off)
    with pytest.raises(FileNotFoundError, match=r"has no training\.safetensors to resume from"):
        run(tmp_path / "empty", resume=True)
    (tmp_path / "file").write_text("kept")
    with pytest.raises(FileExistsError, match="file holds something"):
        run(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "kept"


def test_a_write_that_fails_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    def half(tensors, file, metadata):
        file.write_bytes(b"half")
        if len(written) == 2:
            raise OSError("disk full")
        written.append(save_file(tensors, file, metadata=metadata))

    written = []
    monkeypatch.setattr(state, "save_file", half)
    with pytest.raises(OSError, match="disk full"):
        run(tmp_path / "out", checkpoint_every=1)
    assert state.read_facts(tmp_path / "out")["done"] == 2


def test_a_step_too_small_to_share_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"batch_size=8 is too small to share among 1 ranks × 9"):
        run(tmp_path / "out", accumulation=9)
    assert not (tmp_path / "out").exists()


def test_fsdp_of_the_first_version_is_refused():
    from accelerate import FullyShardedDataParallelPlugin

    with pytest.raises(ValueError, match="--fsdp_version 2"):
        loop._prepare_sharding(FullyShardedDataParallelPlugin(fsdp_version=1))
