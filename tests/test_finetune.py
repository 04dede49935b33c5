"""Fine-tuning: every task learns, stock loads its folder, and predictions are as they should be."""

import json
import math
import shutil
import sys

import pytest
import torch
import transformers
from finetune_data import PLACES, tiny_bert, write, write_topics
from models import padded

from bertgpt import BertModel, cli
from bertgpt.auto import encoder_class
from bertgpt.recipes.classify import Classifier
from bertgpt.recipes.datasets import Sentence, Text
from bertgpt.recipes.finetune import RECIPES, Predictor, finetune, new_recipe
from bertgpt.recipes.inputs import Item
from bertgpt.recipes.settings import Settings

pytest.importorskip("accelerate")

LABELS = {
    "classify": ["money", "sport"],
    "pair": ["0", "1"],
    "tag": ["O", "B-place", "I-place"],
    "qa": ["LABEL_0", "LABEL_1"],
}


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return tiny_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module", params=list(RECIPES))
def tuned(request, bert, tmp_path_factory):
    """(task, data, folder), made by the command."""
    folder = tmp_path_factory.mktemp(request.param)
    data, output = write(request.param, folder), folder / "model"
    arguments = ["--model", bert, "--data", data, "--output", output, "--cpu", "--epochs", "6"]
    arguments += ["--learning-rate", "1e-2", "--max-length", "48"]
    with pytest.MonkeyPatch.context() as patch:
        command = ["bertgpt", "finetune", request.param, *map(str, arguments)]
        patch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as end:
            cli.main()
    assert end.value.code in (0, None)
    return request.param, data, output


def facts_of(folder):
    return json.loads((folder / "finetuning.json").read_text())


def test_every_task_learns(tuned):
    task, _, folder = tuned
    facts, metric = facts_of(folder), RECIPES[task].metric
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < 0.2 * log[0]["loss"]
    assert facts["after"][metric] >= 0.95
    assert facts["after"][metric] > facts["before"][metric]
    assert facts["baseline"][metric] <= facts["after"][metric]
    assert facts["training"] == 80
    assert facts["held_out"] == 20


def test_stock_loads_the_folder_and_says_the_same(tuned):
    task, _, folder = tuned
    ours = encoder_class(folder, RECIPES[task].head).from_pretrained(folder)
    stock = getattr(transformers, type(ours).__name__).from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rows = tokenizer(["we saw the team in new york", "rates was very london"])["input_ids"]
    ids, mask = padded(rows)
    with torch.no_grad():
        mine, theirs = ours(ids, attention_mask=mask), stock(ids, attention_mask=mask)
    for name in set(mine) & {"logits", "start_logits", "end_logits"}:
        rows = (mine[name], theirs[name])
        if task in ("tag", "qa"):
            rows = tuple(values[mask.bool()] for values in rows)
        torch.testing.assert_close(*rows, atol=1e-4, rtol=0)
    assert list(stock.config.id2label.values()) == LABELS[task]
    assert stock.config.label2id == {name: i for i, name in enumerate(LABELS[task])}


def test_predict_reads_the_same_file_and_ignores_its_labels(tuned, run, tmp_path):
    task, data, folder = tuned
    output = tmp_path / "found.jsonl"
    code, out, err = run("predict", folder, data, "--output", output, "--device", "cpu")
    assert (code, out) == (0, ""), err
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(found) == 100
    if task in ("classify", "pair"):
        names = [LABELS[task][(i % 5 > 2) ^ (task == "classify")] for i in range(100)]
        assert sum(line["label"] == name for line, name in zip(found, names, strict=True)) >= 95
        assert all(0.5 <= line["confidence"] <= 1 for line in found)
    elif task == "tag":
        named = [[span["text"] for span in line["spans"]] for line in found]
        assert sum(len(texts) == 1 and texts[0] in PLACES for texts in named) >= 95
        assert all(len(line["tags"]) == len(line["words"]) for line in found)
    else:
        assert sum(line["answer"] in PLACES for line in found) >= 95
        assert all(0 < line["score"] <= 1 for line in found)


def test_a_threshold_hands_the_unsure_on(bert, tmp_path, run):
    data, output = write_topics(tmp_path / "topics.csv"), tmp_path / "model"
    code, out, err = run(
        "finetune", "classify", "--model", bert, "--data", data, "--output", output, "--cpu",
        "--epochs", "1", "--threshold", "0.9",
    )  # fmt: skip
    assert code == 0, err
    assert "handed on" in out
    unsure = Predictor.from_folder(output)
    lines = list(unsure.predict(data))
    assert {line["handed_on"] for line in lines} >= {True}  # one epoch leaves doubts
    assert all(line["handed_on"] == (line["confidence"] < 0.9) for line in lines)
    assert not any(line["handed_on"] for line in unsure.with_threshold(0.0).predict(data))


def test_what_is_kept_is_what_reaches_the_threshold(bert):
    examples = [Text("goal", None, "a", "x:1"), Text("bank", None, "b", "x:2")]
    recipe = new_recipe("classify", bert, examples, 48)
    verdicts = recipe.predict(examples)
    low, high = sorted(verdict.confidence for verdict in verdicts)
    assert recipe.hand_on(examples, low).kept == 2
    assert recipe.hand_on(examples, (low + high) / 2).kept == 1
    none = recipe.hand_on(examples, 1.0)
    assert (none.kept, none.handed_on, none.accuracy) == (0, 2, 1.0)


def test_pairs_are_two_segments(bert):
    examples = [Text("a goal", "the bank", label, "x:1") for label in "ab"]
    recipe = new_recipe("pair", bert, examples, 48)
    item = recipe.encode(examples)[0]
    assert item.types == [0, 0, 0, 0, 1, 1, 1]
    assert recipe.collate([item], [0]).tokens.token_type_ids.tolist() == item.types


def test_a_long_sentence_is_tagged_in_windows(bert):
    words = tuple(f"{place}ly" for place in ["london", "oslo"] * 30)
    sentence = Sentence(words, ("O", "B-place") * 30, "x:1")
    recipe = new_recipe("tag", bert, [sentence], 16)
    items = recipe.encode([sentence])
    assert len(items) > 1
    assert max(len(item.ids) for item in items) <= 16
    places = [place for item in items for place in item.places if place is not None]
    assert places == list(range(60))  # every word once, by its first piece
    targets = [target for item in items for target in item.target if target != -100]
    assert targets == [0, 1] * 30
    assert recipe.collate(items, [0] * len(items)).counts == {"loss": 60}
    assert len(recipe.predict([sentence])[0]) == 60


def test_further_training_keeps_the_classes_and_refuses_others(tuned, tmp_path):
    task, _, folder = tuned
    if task != "classify":
        pytest.skip("one task is enough")
    examples = [Text("goal", None, label, f"x:{i}") for i, label in enumerate(["sport", "tech"])]
    recipe = new_recipe("classify", folder, examples, 48)
    assert recipe.model.config.label2id == {"money": 0, "sport": 1}
    with pytest.raises(ValueError, match=r"x:1: unknown label 'tech': the model has money, sport"):
        recipe.encode(examples)
    tagger = Sentence(("a",), ("B-x",), "y:3")
    with pytest.raises(ValueError, match="y:3: unknown tag 'B-z'"):
        new_recipe("tag", folder, [tagger], 48).encode([Sentence(("a",), ("B-z",), "y:3")])


def test_labels_that_teach_nothing_are_refused(bert):
    with pytest.raises(ValueError, match="every example is of class 'a'"):
        new_recipe("classify", bert, [Text("x", None, "a", "f:1")] * 3, 48)
    with pytest.raises(ValueError, match="every word is tagged O"):
        new_recipe("tag", bert, [Sentence(("x",), ("O",), "f:1")], 48)


@pytest.mark.parametrize("length", [2, 65])
def test_lengths_that_the_model_cannot_have_are_refused(bert, length):
    examples = [Text("x", None, label, "f:1") for label in "ab"]
    with pytest.raises(ValueError, match="max_length must lie between 16 and the model's 64"):
        new_recipe("classify", bert, examples, length)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_checkpoint_is_trained_in_float32(bert, tmp_path, dtype):
    half = shutil.copytree(bert, tmp_path / "half")
    BertModel.from_pretrained(bert, dtype=dtype).save_pretrained(half)
    examples = [Text("x", None, label, "f:1") for label in "ab"]
    model = new_recipe("classify", half, examples, 48).model
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


def stock_head(bert, folder, name, **config):
    """A folder whose head's classes nobody named."""
    shutil.copytree(bert, folder)
    kind = getattr(transformers, name)
    kind(transformers.BertConfig.from_pretrained(bert, **config)).save_pretrained(folder)
    return folder


def test_classes_without_names_get_the_examples(bert, tmp_path):
    examples = [Text("x", None, label, "f:1") for label in "ba"]
    two = stock_head(bert, tmp_path / "two", "BertForSequenceClassification")
    assert "id2label" not in json.loads((two / "config.json").read_text())
    recipe = new_recipe("classify", two, examples, 48)
    assert [item.target for item in recipe.encode(examples)] == [1, 0]
    assert recipe.predict(examples)[0].label in ("a", "b")
    numbered = [Text("x", None, f"LABEL_{i}", "f:1") for i in (1, 0)]
    recipe = new_recipe("classify", two, numbered, 48)
    assert [item.target for item in recipe.encode(numbered)] == [1, 0]
    sentence = Sentence(("x", "y"), ("B-p", "O"), "f:1")
    tagger = stock_head(bert, tmp_path / "tags", "BertForTokenClassification")
    (item,) = new_recipe("tag", tagger, [sentence], 48).encode([sentence])
    assert item.target == [-100, 1, 0, -100]
    three = stock_head(bert, tmp_path / "three", "BertForSequenceClassification", num_labels=3)
    with pytest.raises(ValueError, match=r"3 classes without names, the data has 2 \(a, b\)"):
        new_recipe("classify", three, examples, 48)


def test_what_is_shown_is_what_the_threshold_compares(bert, monkeypatch):
    examples = [Text("goal", None, "a", "x:1"), Text("bank", None, "b", "x:2")]
    recipe = new_recipe("classify", bert, examples, 48)

    class Output:
        logits = torch.tensor([[math.log(9 - 1e-4), 0.0]] * 2)  # a confidence a little under 0.9

    monkeypatch.setattr(recipe, "_forward", lambda tokens: Output)
    verdict = recipe.predict(examples)[0]
    assert recipe.describe(examples[0], verdict)["confidence"] == verdict.confidence == 0.9
    assert recipe.hand_on(examples, 0.9).kept == 2


def test_a_run_cut_short_after_training_leaves_a_folder_that_predicts(bert, tmp_path, monkeypatch):
    data, output = write_topics(tmp_path / "topics.csv"), tmp_path / "model"
    evaluate, calls = Classifier.evaluate, []

    def second_fails(self, examples):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(self, examples)

    settings = Settings(output, max_steps=4, checkpoint_every=3, cpu=True)
    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "evaluate", second_fails)
        with pytest.raises(KeyboardInterrupt):
            finetune("classify", bert, data, settings)
    assert facts_of(output)["after"] == {}
    assert len(list(Predictor.from_folder(output).predict(data))) == 100
    with pytest.raises(ValueError, match="was made with digest of the examples"):
        finetune("classify", bert, data, settings, max_length=16, resume=True)
    _, report, _ = finetune("classify", bert, data, settings, resume=True)
    assert facts_of(output)["after"] == report.after != {}
    assert not (output / "training.safetensors").exists()


def test_a_threshold_of_another_task_is_refused(tuned, run):
    task, data, folder = tuned
    code, _, err = run("predict", folder, data, "--threshold", "0.5")
    if task in ("classify", "pair"):
        assert code == 0
    else:
        assert code == 2
        assert "only classes are handed on" in err


def test_a_new_head_depends_on_the_seed_alone(bert):
    examples = [Text("x", None, label, "f:1") for label in "ab"]
    heads = []
    for seed in (1, 1, 2):
        torch.rand(3)
        heads.append(new_recipe("classify", bert, examples, 48, seed).model.classifier.weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_an_output_that_holds_something_stays(bert, tmp_path, run):
    data = write_topics(tmp_path / "topics.csv")
    kept = tmp_path / "model" / "kept"
    kept.parent.mkdir()
    kept.write_text("mine")
    code, _, err = run(
        "finetune", "classify", "--model", bert, "--data", data, "--output", kept.parent, "--cpu"
    )
    assert code == 1
    assert "holds something" in err
    assert [file.name for file in kept.parent.iterdir()] == ["kept"]


def test_a_folder_of_another_origin_is_named(bert, tmp_path, run):
    data = write_topics(tmp_path / "topics.csv")
    code, _, err = run("predict", bert, data)
    assert code == 1
    assert "finetuning.json" in err
    other = shutil.copytree(bert, tmp_path / "other")
    (other / "finetuning.json").write_text('{"task": "dance", "columns": {}}')
    assert run("predict", other, data)[0] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("qa", "--threshold", "0.5"), "only classes are handed on"),
        (("classify", "--second", "b"), "only a pair has a second text"),
        (("dance",), "dance"),
    ],
)
def test_options_of_another_task_are_refused(bert, tmp_path, run, arguments, message):
    data, output = write_topics(tmp_path / "topics.csv"), tmp_path / "model"
    code, _, err = run("finetune", *arguments, "--model", bert, "--data", data, "--output", output)
    assert code == 2
    assert message in err
    assert not output.exists()


def test_items_without_a_target_predict(bert):
    examples = [Text("goal", None, "a", "x:1"), Text("bank", None, "b", "x:2")]
    recipe = new_recipe("classify", bert, examples, 48)
    unlabelled = [Text(e.text, None, "", e.where) for e in examples]
    assert isinstance(recipe, Classifier)
    assert isinstance(recipe.encode(unlabelled)[0], Item)
    assert recipe.encode(unlabelled)[0].target is None
    assert recipe.predict(unlabelled) == recipe.predict(examples)
