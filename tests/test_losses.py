"""Every head's loss and gradients against stock transformers, and the loss without scores."""

from types import SimpleNamespace

import pytest
import torch
from models import (
    BERT,
    GPT2,
    TOLERANCE,
    gradients_by_name,
    largest_difference,
    ragged_mask,
    random_ids,
    twins,
)
from torch.utils._python_dispatch import TorchDispatchMode

from bertgpt import bert, gpt, pack
from bertgpt.objectives import classification_loss, span_loss

SIDES = ("right", "left", "both", "holes")
CLASSES = torch.tensor([0, 2, 1, 0])
PROBLEMS = (  # num_labels, config.problem_type, labels of four sequences
    (1, None, torch.tensor([0.5, -1.0, 2.0, 0.1])),
    (3, None, CLASSES),
    (3, None, torch.eye(3)[CLASSES]),
    (3, "regression", torch.eye(3)[CLASSES] - 0.3),
    (3, "single_label_classification", CLASSES),
    (3, "multi_label_classification", torch.eye(3)[CLASSES]),
)


def assert_trains_alike(model, stock, inputs):
    """Equal loss, and the gradient of every weight equal to stock's."""
    losses = [each(**inputs).loss for each in (model, stock)]
    assert largest_difference(*losses) <= 1e-5
    for loss in losses:
        loss.backward()
    ours = gradients_by_name(model)
    for name, weight in stock.named_parameters():
        expected = torch.zeros_like(weight) if weight.grad is None else weight.grad
        assert largest_difference(ours[name], expected) <= TOLERANCE, name


def inputs_of(side, low=3, **more):
    """Four ragged rows of ids and their mask."""
    mask = ragged_mask(side)
    return {"input_ids": random_ids(4, 12, low=low) * mask, "attention_mask": mask, **more}


def some_labels(mask, high=61):
    """Labels of about half of the real tokens."""
    labels = random_ids(*mask.shape, low=0, high=high)
    return labels.masked_fill((mask == 0) | (torch.rand(mask.shape) < 0.5), -100)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForTokenClassification"])
def test_token_heads(name, side):
    words = name == "BertForMaskedLM"
    model, stock = twins(bert, name, BERT, **({} if words else {"num_labels": 5}))
    inputs = inputs_of(side)
    labels = some_labels(inputs["attention_mask"], 61 if words else 5)
    assert_trains_alike(model, stock, {**inputs, "labels": labels})


def test_pretraining_adds_both_losses():
    model, stock = twins(bert, "BertForPreTraining", BERT)
    inputs = inputs_of("right", next_sentence_label=torch.tensor([0, 1, 1, 0]))
    inputs["labels"] = some_labels(inputs["attention_mask"])
    assert_trains_alike(model, stock, inputs)
    for missing in ("labels", "next_sentence_label"):  # no loss without both, as in stock
        assert model(**{**inputs, missing: None}).loss is None
        assert stock(**{**inputs, missing: None}).loss is None


@pytest.mark.parametrize(("num_labels", "problem", "labels"), PROBLEMS)
def test_bert_classifies_sequences(num_labels, problem, labels):
    name, options = "BertForSequenceClassification", {"num_labels": num_labels}
    model, stock = twins(bert, name, BERT, problem_type=problem, **options)
    assert_trains_alike(model, stock, inputs_of("right", labels=labels))
    assert model.config.problem_type == stock.config.problem_type is not None


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(("num_labels", "problem", "labels"), PROBLEMS)
def test_gpt_classifies_sequences(num_labels, problem, labels, side):
    name, options = "GPT2ForSequenceClassification", {"num_labels": num_labels, "pad_token_id": 0}
    model, stock = twins(gpt, name, GPT2, problem_type=problem, **options)
    assert_trains_alike(model, stock, inputs_of(side, labels=labels))
    assert model.config.problem_type == stock.config.problem_type is not None


@pytest.mark.parametrize(("num_labels", "problem", "labels"), PROBLEMS)
def test_a_float64_loss_is_computed_in_float64(num_labels, problem, labels):
    scores = torch.randn(4, num_labels, dtype=torch.float64).requires_grad_()
    config = SimpleNamespace(problem_type=problem, num_labels=num_labels)
    assert torch.autograd.gradcheck(lambda s: classification_loss(config, s, labels), scores)


def test_a_float64_span_loss_is_computed_in_float64():
    batch = pack([[1] * 3, [1] * 5])
    scores = torch.randn(8, 2, dtype=torch.float64).requires_grad_()
    starts, ends = torch.tensor([0, 2]), torch.tensor([2, 4])
    assert torch.autograd.gradcheck(lambda s: span_loss(s, starts, ends, batch), scores)


def test_the_other_sequence_heads():
    model, stock = twins(bert, "BertForNextSentencePrediction", BERT)
    assert_trains_alike(model, stock, inputs_of("right", labels=torch.tensor([1, 0, 0, 1])))
    model, stock = twins(bert, "BertForMultipleChoice", BERT)
    inputs = {name: value.view(2, 2, 12) for name, value in inputs_of("right").items()}
    assert_trains_alike(model, stock, {**inputs, "labels": torch.tensor([1, 0])})


def test_question_answering():
    """Without padding, over which stock's spans reach and ours do not."""
    model, stock = twins(bert, "BertForQuestionAnswering", BERT)
    starts, ends = torch.tensor([0, 3, 2, 99]), torch.tensor([1, 3, 9, 4])
    inputs = {"input_ids": random_ids(4, 12), "start_positions": starts, "end_positions": ends}
    assert_trains_alike(model, stock, inputs)


@pytest.mark.parametrize("side", SIDES)
def test_language_model(side):
    """Where stock would predict from padding there is no label."""
    model, stock = twins(gpt, "GPT2LMHeadModel", GPT2)
    inputs = inputs_of(side)
    mask = inputs["attention_mask"]
    after_a_token = torch.nn.functional.pad(mask[:, :-1], (1, 0)) * mask
    labels = inputs["input_ids"].masked_fill(after_a_token == 0, -100)
    assert_trains_alike(model, stock, {**inputs, "labels": labels})


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation gives back."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for result in results if isinstance(results, tuple | list) else (results,):
            if isinstance(result, torch.Tensor):
                self.elements = max(self.elements, result.numel())
        return results


HEADS = {
    "BertForMaskedLM": (bert, BERT),
    "BertForPreTraining": (bert, BERT),
    "GPT2LMHeadModel": (gpt, GPT2),
}


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", HEADS)
def test_the_loss_without_scores(name, packed):
    module, config = HEADS[name]
    words, tokens = 1009, 48
    model, _ = twins(module, name, {**config, "vocab_size": words})
    ids = random_ids(4, 12, high=words)
    labels = some_labels(torch.ones(4, 12), words)
    inputs = {"input_ids": ids, "labels": labels}
    if packed:
        inputs = {"input_ids": pack([*ids]), "labels": labels.flatten()}
    if name == "BertForPreTraining":
        inputs["next_sentence_label"] = torch.tensor([0, 1, 1, 0])
    whole = model(**inputs)
    whole.loss.backward()
    expected = gradients_by_name(model)
    model.zero_grad()
    with Largest() as largest:
        alone = model(**inputs, skip_logits=True)
        alone.loss.backward()
    assert largest.elements < tokens * words
    logits = next(field for field in whole if field.endswith("logits"))
    assert list(alone) == [field for field in whole if field != logits]
    assert largest_difference(alone.loss, whole.loss) <= 1e-5
    for key, gradient in gradients_by_name(model).items():
        assert largest_difference(gradient, expected[key]) <= 1e-5, key
    with Largest() as largest:
        model(**inputs)
    assert largest.elements >= tokens * words  # so that the figure above says something


@pytest.mark.parametrize("name", ["BertForMaskedLM", "GPT2LMHeadModel"])
def test_no_label_at_all_gives_zero_without_scores(name):
    module, config = HEADS[name]
    model, _ = twins(module, name, config)
    loss = model(random_ids(4, 12), labels=torch.full((4, 12), -100), skip_logits=True).loss
    loss.backward()
    assert loss == 0
    assert all(g.abs().max() == 0 for g in gradients_by_name(model).values())


IDS, NEXT = torch.ones(2, 4, dtype=torch.long), torch.tensor([0, 1])


@pytest.mark.parametrize("skip_logits", [False, True])
@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize(
    ("error", "message", "labels"),
    [
        (TypeError, "labels must be a tensor, not list", [[1, 2, 3, 4]] * 2),
        (TypeError, "labels must be int32 or int64, not torch.float32", IDS.float()),
        (ValueError, r"labels must have shape \[2, 4\], not \[2, 3\]", IDS[:, :3]),
        (ValueError, "labels is on meta, but the model is on cpu", IDS.to("meta")),
        (IndexError, "labels holds 61", IDS * 61),
        (IndexError, "labels holds -1", -IDS),
    ],
)
def test_bad_labels_are_named(name, error, message, labels, skip_logits):
    module, config = HEADS[name]
    model, _ = twins(module, name, config)
    extra = {"next_sentence_label": NEXT} if name == "BertForPreTraining" else {}
    with pytest.raises(error, match=message):
        model(IDS, labels=labels, skip_logits=skip_logits, **extra)


def test_values_of_another_shape_are_named():
    config = bert.BertConfig(num_labels=3, problem_type="regression")
    with pytest.raises(ValueError, match=r"labels must have shape \[4, 3\], not \[3, 4\]"):
        classification_loss(config, torch.ones(4, 3), torch.ones(3, 4))


@pytest.mark.parametrize("name", HEADS)
def test_no_scores_and_no_labels_is_an_error(name):
    module, config = HEADS[name]
    model, _ = twins(module, name, config)
    with pytest.raises(ValueError, match="skip_logits leaves nothing to return"):
        model(IDS, skip_logits=True)


@pytest.mark.parametrize("skip_logits", [False, True])
@pytest.mark.parametrize("name", ["BertForMaskedLM", "GPT2LMHeadModel"])
def test_no_label_that_counts_gives_zero_and_zero_gradients(name, skip_logits):
    module, config = (bert, BERT) if name.startswith("Bert") else (gpt, GPT2)
    model, _ = twins(module, name, config)
    inputs = inputs_of("right")
    labels = torch.full_like(inputs["input_ids"], -100)
    loss = model(**inputs, labels=labels, skip_logits=skip_logits).loss
    assert loss == 0.0
    loss.backward()
    assert all(g is None or (g == 0.0).all() for g in gradients_by_name(model).values())


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("BertForTokenClassification", {"labels": torch.full((4, 12), -100)}),
        ("BertForSequenceClassification", {"labels": torch.full((4,), -100)}),
        ("BertForQuestionAnswering", dict.fromkeys(("start_positions", "end_positions"),
                                                   torch.full((4,), 99))),
    ],
)  # fmt: skip
def test_task_heads_without_a_label_that_counts(name, labels):
    model, _ = twins(bert, name, BERT, **({} if "Question" in name else {"num_labels": 3}))
    loss = model(**inputs_of("right"), **labels).loss
    assert loss == 0.0
    loss.backward()
    assert all(g is None or (g == 0.0).all() for g in gradients_by_name(model).values())
