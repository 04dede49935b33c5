"""Answers of fine-tuned models: windows over a text, and the likeliest span of them all."""

import math

import pytest
import torch
from finetune_data import tiny_bert

from bertgpt.recipes.datasets import Question
from bertgpt.recipes.finetune import new_recipe
from bertgpt.recipes.qa import _target


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return tiny_bert(tmp_path_factory.mktemp("bert"))


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


def test_answers_too_unlikely_for_a_float_are_still_compared(bert, monkeypatch):
    context = " ".join(["they"] * 40 + ["new york"] + ["said"] * 40)
    recipe = new_recipe("qa", bert, [_question(context, "new york")], 24)
    new, york, cls = (recipe.tokenizer.token_to_id(word) for word in ("new", "york", "[CLS]"))

    def forward(tokens, far=2000.0):
        class Output:
            start_logits = torch.where(tokens.values == new, 1.0, 0.0)
            start_logits = torch.where(tokens.values == cls, far, start_logits)
            end_logits = torch.where(tokens.values == york, 1.0, 0.0)

        return Output

    monkeypatch.setattr(recipe, "_forward", forward)
    (found,) = recipe.predict([_question(context, "new york")])
    assert (found.text, found.score) == ("new york", 0.0)
    monkeypatch.setattr(recipe, "_forward", lambda tokens: forward(tokens, math.nan))
    with pytest.raises(ValueError, match="the model's scores are NaN"):
        recipe.predict([_question(context, "new york")])
