"""Fine-tuning beside stock: the same batches through the same loop give the same losses."""

import json
import os
import signal

import pytest
import torch
from finetune_data import tiny_bert, write, write_questions, write_topics

from bertgpt import BertForSequenceClassification
from bertgpt.benchmarks.finetune_stock import StockModel, make_stock
from bertgpt.benchmarks.train_finetune_cpu import keep
from bertgpt.recipes.classify import Classifier
from bertgpt.recipes.finetune import RECIPES, Columns, fit, new_recipe, read_examples
from bertgpt.recipes.settings import Settings
from bertgpt.recipes.split import hold_out

pytest.importorskip("accelerate")


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return tiny_bert(tmp_path_factory.mktemp("bert"))


@pytest.mark.parametrize("task", list(RECIPES))
def test_both_learn_alike(bert, tmp_path, task):
    second = "sentence2" if task == "pair" else None
    columns = Columns("sentence1" if second else "text", second)
    # Stock's loss of an answer runs over padding too: lengths are equal, so that there is none.
    data = write_questions(tmp_path / "a.json", equal=True) if task == "qa" else None
    examples = read_examples(task, data or write(task, tmp_path), columns)
    training, held = hold_out(examples)
    logs, reports = [], []
    for name in ("ours", "stock"):
        recipe = new_recipe(task, bert, examples, 24)
        if name == "stock":
            make_stock(recipe)
            assert isinstance(recipe.model, StockModel)
        settings = Settings(
            tmp_path / name, learning_rate=3e-3, batch_size=8, max_steps=12, cpu=True
        )
        reports.append(fit(recipe, training, held, settings))
        lines = (tmp_path / name / "log.jsonl").read_text().splitlines()
        logs.append([json.loads(line)["loss"] for line in lines])
    assert logs[0] == pytest.approx(logs[1], abs=1e-4)
    assert reports[0].before == reports[1].before
    assert reports[0].after == pytest.approx(reports[1].after, abs=0.051)  # one example of twenty


def test_a_run_replaces_its_own_line_and_no_other(tmp_path):
    file = tmp_path / "results.json"
    for contest, contender, seed, value in [
        ("tags", "ours", 0, 1), ("topics", "stock", 0, 2), ("topics", "ours", 1, 3),
        ("topics", "ours", 0, 4), ("topics", "stock", 0, 5),
    ]:  # fmt: skip
        keep({"contest": contest, "contender": contender, "seed": seed, "value": value}, file)
    assert [line["value"] for line in json.loads(file.read_text())] == [4, 3, 5, 1]


def test_an_interrupted_run_goes_on_to_the_same_model(bert, tmp_path, run, monkeypatch):
    data = write_topics(tmp_path / "topics.csv")

    def command(output, *more):
        return run(
            "finetune", "classify", "--model", bert, "--data", data, "--output", output, "--cpu",
            "--epochs", "2", "--learning-rate", "1e-2", *more,
        )  # fmt: skip

    assert command(tmp_path / "whole")[0] == 0
    collate, calls = Classifier.collate, []

    def interrupting(self, items, seeds):
        calls.append(1)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return collate(self, items, seeds)

    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "collate", interrupting)
        code, _, err = command(tmp_path / "parts")
    assert code == 128 + signal.SIGINT, err
    assert command(tmp_path / "parts")[0] == 1  # it holds something, and was not told to resume
    code, out, err = command(tmp_path / "parts", "--resume")
    assert code == 0, err
    weights = [
        BertForSequenceClassification.from_pretrained(tmp_path / name).classifier.weight
        for name in ("whole", "parts")
    ]
    assert torch.equal(*weights)
    whole, parts = (
        json.loads((tmp_path / name / "finetuning.json").read_text()) for name in ("whole", "parts")
    )
    assert whole == parts
    assert f"{parts['before']['accuracy']:.3f}" in out
