"""Patched encoders against stock: every head, padding anywhere, gradients, real text."""

import pytest
import torch
import transformers
from models import TOLERANCE, needs_minilm, news_ids, padded, ragged_mask
from patching import (
    NO_DROPOUT,
    SIDES,
    assert_close,
    assert_same_gradients,
    bert,
    differences,
    gradients,
    inputs_for,
    ragged,
    rows_seen,
)

import bertgpt
from bertgpt import demo_data

HEADS = (
    "BertModel",
    "BertForMaskedLM",
    "BertForPreTraining",
    "BertForNextSentencePrediction",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertForQuestionAnswering",
    "BertForMultipleChoice",
)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("side", SIDES)
def test_every_head_under_any_padding(name, side):
    model, inputs = bert(name, num_labels=3), inputs_for(name, side)
    stock = model(**inputs)
    bertgpt.patch(model)
    with rows_seen() as seen:
        ours = model(**inputs)
    assert_close(ours, stock, inputs["attention_mask"])
    assert seen
    assert all(len(shape) == 1 for shape in seen), "padded tokens went through the layers"


@pytest.mark.parametrize("name", HEADS)
def test_gradients(name):
    model, inputs = bert(name, num_labels=3, **NO_DROPOUT).train(), inputs_for(name, "left")
    stock = gradients(model, inputs)
    bertgpt.patch(model)
    assert_same_gradients(gradients(model, inputs), stock)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", SIDES)
def test_only_real_tokens_and_first_columns_are_computed(attention, side):
    model, inputs = bert(attention=attention), ragged(side)
    bertgpt.patch(model)
    with rows_seen() as seen:
        hidden = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"].bool()
    kept = mask.clone()
    kept[:, 0] = True
    assert set(seen) == {(int(kept.sum()),)}
    assert hidden[~kept].abs().max() == 0


def test_masks_that_say_more_than_padding():
    model, inputs = bert(), ragged("right")
    mask = inputs["attention_mask"].bool()
    band = (torch.arange(12)[:, None] - torch.arange(12)).abs() <= 2
    inputs["attention_mask"] = (mask[:, None, None, :] & band)[:, :1]
    stock = model(**inputs)
    bertgpt.patch(model)
    assert_close(model(**inputs), stock, mask)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_hidden_states_are_stocks_and_do_not_linger(attention):
    model, inputs = bert(attention=attention), ragged("left")
    stock = model(**inputs, output_hidden_states=True)
    picked = model(**inputs, output_hidden_states=[1]).hidden_states
    bertgpt.patch(model)
    ours = model(**inputs, output_hidden_states=True)
    assert len(ours.hidden_states) == 3
    assert_close(ours, stock, torch.ones_like(inputs["attention_mask"]))  # padding as well
    again = model(**inputs, output_hidden_states=[1]).hidden_states
    assert [h is None for h in again] == [h is None for h in picked]
    with rows_seen() as seen:  # transformers' hooks are still there, and idle
        model(**inputs)
    assert seen
    assert all(len(shape) == 1 for shape in seen)


def test_attention_weights_are_stocks():
    model, inputs = bert(attention="eager"), ragged("right")
    stock = model(**inputs, output_attentions=True)
    bertgpt.patch(model)
    ours = model(**inputs, output_attentions=True)
    assert len(ours.attentions) == 2
    assert_close(ours, stock, inputs["attention_mask"])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant):
    model, inputs = bert("BertForMaskedLM", **NO_DROPOUT).train(), inputs_for("LM", "left")
    stock = gradients(model, inputs)
    bertgpt.patch(model)
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    with rows_seen() as seen:
        ours = gradients(model, inputs)
    assert len(seen) == 8, "each of two layers runs twice, with two norms"
    assert_same_gradients(ours, stock)


def test_dropout_falls_as_the_modules_say():
    model, inputs = bert(), ragged("right")
    bertgpt.patch(model)
    still = model(**inputs).last_hidden_state
    assert torch.equal(still, model(**inputs).last_hidden_state)
    layer = model.encoder.layer[0]
    for dropout in (layer.output.dropout, layer.attention.output.dropout):
        dropout.train().p = 0.5  # Monte Carlo dropout: one module of a model in eval mode
        assert not torch.equal(still, model(**inputs).last_hidden_state)
        dropout.eval()
    layer.attention.self.train()  # of the weights, stock goes by the module around the dropout
    layer.attention.self.dropout.p = 0.5
    first = model(**inputs).last_hidden_state
    assert not torch.equal(first, model(**inputs).last_hidden_state)
    torch.manual_seed(3)
    first = model(**inputs).last_hidden_state
    torch.manual_seed(3)
    assert torch.equal(first, model(**inputs).last_hidden_state)


@pytest.mark.parametrize(
    ("activation", "fused"),
    [("gelu_new", True), ("gelu_pytorch_tanh", True), ("gelu_fast", True), ("relu", False)],
)
def test_other_activations(activation, fused):
    model, inputs = bert(hidden_act=activation), ragged("right")
    stock = model(**inputs)
    report = bertgpt.patch(model)
    with rows_seen("gelu_ffn") as seen:
        assert_close(model(**inputs), stock, inputs["attention_mask"])
    assert bool(seen) == fused
    assert bool(report.skipped) != fused


def test_a_decoder_is_left_to_stock():
    model = bert("BertLMHeadModel", is_decoder=True, add_cross_attention=True)
    inputs = ragged("left")
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    stock = model.generate(**inputs, **options)
    report = bertgpt.patch(model)
    assert {item.reason for item in report.skipped} == {
        "it is a decoder's layer (config.is_decoder)"
    }
    assert torch.equal(model.generate(**inputs, **options), stock)


def test_an_empty_row_and_a_full_batch():
    model = bert()
    bertgpt.patch(model)
    mask = ragged_mask("right", (12, 12, 0))
    inputs = {"input_ids": torch.full((3, 12), 5), "attention_mask": mask}
    hidden = model(**inputs).last_hidden_state
    assert hidden[2, 1:].abs().max() == 0
    assert torch.isfinite(hidden).all()
    full = {"input_ids": inputs["input_ids"], "attention_mask": torch.ones_like(mask)}
    ours = model(**full)
    bertgpt.unpatch(model)
    assert_close(ours, model(**full), full["attention_mask"])


@needs_minilm
@pytest.mark.parametrize("side", ["right", "left"])
def test_real_checkpoint_on_real_text(side):
    folder = demo_data.minilm_folder()
    model = transformers.BertModel.from_pretrained(folder).eval()
    ids, mask = padded(news_ids(5), side)
    with torch.no_grad():
        stock = model(ids, attention_mask=mask)
        bertgpt.patch(model)
        ours = model(ids, attention_mask=mask)
    assert max(differences(ours, stock, mask).values()) <= TOLERANCE
