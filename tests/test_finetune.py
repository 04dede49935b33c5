"""Fine-tuning: every task learns, stock loads its folder, and predictions are as they should be."""

import json
import shutil
import sys

import pytest
import torch
import transformers
from finetune_data import PLACES, tiny_bert, write, write_topics
from models import padded

from bertgpt import cli
from bertgpt.recipes.classify import Classifier
from bertgpt.recipes.datasets import Question, Sentence, Text
from bertgpt.recipes.finetune import RECIPES, Predictor, new_recipe
from bertgpt.recipes.inputs import Item
from bertgpt.recipes.qa import _target

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
    ours = RECIPES[task].model_class.from_pretrained(folder)
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


def _question(context, answer):
    return Question("1", "where ?", context, ((answer, context.index(answer)),), "", "x")


def test_an_answer_is_found_in_the_windows_that_hold_it_and_nowhere_else(bert):
    context = " ".join(["they"] * 40 + ["new york"] + ["said"] * 40)
    question = _question(context, "new york")
    recipe = new_recipe("qa", bert, [question], 24)
    items = recipe.encode([question])
    assert len(items) > 3
    held = 0
    for item in items:
        first, last = item.target
        if (first, last) == (0, 0):
            continue
        held += 1
        assert context[item.places[first][0] : item.places[last][1]] == "new york"
    assert 1 <= held < len(items)
    seen = {place for item in items for place in item.places if place is not None}
    assert len(seen) == 82  # no word of the context is left out


def test_the_best_span_of_all_windows_wins(bert, monkeypatch):
    context = " ".join(["they"] * 40 + ["new york"] + ["said"] * 40)
    recipe = new_recipe("qa", bert, [_question(context, "new york")], 24)
    new, york, they = (recipe.tokenizer.token_to_id(word) for word in ("new", "york", "they"))

    def forward(tokens):
        ids = tokens.values

        class Output:
            # the question's tokens and an end before the start score higher, and may not win
            start_logits = torch.where(ids == new, 8.0, torch.where(ids == 7, 9.0, 0.0))
            end_logits = torch.where(ids == york, 8.0, torch.where(ids == 7, 9.0, 0.0))
            end_logits = torch.where(ids == they, 8.5, end_logits)

        return Output

    monkeypatch.setattr(recipe, "_forward", forward)
    (found,) = recipe.predict([_question(context, "new york")])
    assert (found.text, found.start) == ("new york", context.index("new york"))
    assert 0 < found.score < 0.1  # the question's token takes most of the probability


@pytest.mark.parametrize(
    ("places", "target"),
    [
        ([None, (0, 3), (4, 8), (9, 11)], (1, 2)),
        ([None, (0, 2), (2, 10)], (1, 2)),  # an answer may end inside a token
        ([None, (0, 3)], (0, 0)),
        ([None, (4, 8), (9, 11)], (0, 0)),
        ([None, (9, 11)], (0, 0)),
    ],
)
def test_a_window_holds_all_of_an_answer_or_nothing(places, target):
    assert _target(places, "new york", 0) == target


def test_answers_have_a_longest(bert, monkeypatch):
    context = " ".join(["new", *["they"] * 35, "york"])
    question = _question(context, "new")
    recipe = new_recipe("qa", bert, [question], 64)
    new, york = (recipe.tokenizer.token_to_id(word) for word in ("new", "york"))

    def forward(tokens):
        class Output:
            start_logits = torch.where(tokens.values == new, 8.0, 0.0)
            end_logits = torch.where(tokens.values == york, 8.0, 0.0)

        return Output

    monkeypatch.setattr(recipe, "_forward", forward)
    (found,) = recipe.predict([question])
    assert len(found.text.split()) <= 30


def test_a_long_question_leaves_room_for_the_text(bert):
    question = Question("1", "where " * 60, "they saw london", (("london", 9),), "", "x")
    recipe = new_recipe("qa", bert, [question], 24)
    (item,) = recipe.encode([question])
    assert len(item.ids) <= 24
    assert item.target != (0, 0)


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
