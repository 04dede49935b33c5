"""Shared by the tests of patching: stock models of odd sizes, their inputs, and what to compare."""

import copy
from contextlib import contextmanager

import pytest
import torch
import transformers
from models import BERT, GPT2, TOLERANCE, ragged_mask, random_ids

from bertgpt import portable

GRADIENT_TOLERANCE = 1e-3
SIDES = ("right", "left", "both", "holes")
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
NO_GPT_DROPOUT = {
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "classifier_dropout": 0.0,
}


def build(name, attention="sdpa", **values):
    """A stock model in eval mode, of random weights."""
    model_class = getattr(transformers, name)
    if "QuestionAnswering" in name:
        values["num_labels"] = 2
    config = model_class.config_class(**values, attn_implementation=attention)
    return model_class(config).eval()


def bert(name="BertModel", attention="sdpa", **extra):
    return build(name, attention, **{**BERT, **extra})


def gpt2(name="GPT2LMHeadModel", attention="sdpa", **extra):
    return build(name, attention, **{**GPT2, "pad_token_id": 0, **extra})


def ragged(side="right"):
    """Ids and mask [4, 12], padded on that side with the padding token."""
    mask = ragged_mask(side)
    return {"input_ids": random_ids(4, 12).masked_fill(mask == 0, 0), "attention_mask": mask}


def labels_for(name, inputs, count):
    """What the head of that name takes for labels, padding left out.

    No span for question answering: stock's loss is over the scores at padding as well.
    """
    mask = inputs["attention_mask"]
    rows = mask.shape[0]
    if "QuestionAnswering" in name:
        return {}
    if "PreTraining" in name:
        sentence = {"Bert": "next_sentence_label", "Albert": "sentence_order_label"}
        field = next((v for k, v in sentence.items() if name.startswith(k)), None)
        tokens = random_ids(*mask.shape, low=0, high=2 if field is None else 61)
        extra = {field: torch.arange(rows) % 2} if field else {}
        return {"labels": tokens.masked_fill(mask == 0, -100), **extra}
    if "MultipleChoice" in name:
        return {"labels": torch.arange(rows) % 2}
    if "SequenceClassification" in name or "NextSentence" in name:
        return {"labels": torch.arange(rows) % (2 if "Next" in name else count)}
    if "Token" in name or "LM" in name:
        high = count if "Token" in name else 61
        if "LMHead" in name or "Causal" in name:  # what follows padding is predicted from padding
            mask = mask * torch.nn.functional.pad(mask, (1, -1))
        return {"labels": random_ids(*mask.shape, low=0, high=high).masked_fill(mask == 0, -100)}
    return {}


def inputs_for(name, side, count=3):
    """Inputs of the head of that name, ragged."""
    inputs = ragged(side)
    if "MultipleChoice" in name:
        inputs = {key: torch.stack([value, value.flip(0)], 1) for key, value in inputs.items()}
    return {**inputs, **labels_for(name, inputs, count)}


def differences(ours, stock, mask):
    """The largest difference of each output, without padding where it is one per token."""
    assert set(ours) == set(stock)
    found = {}
    for name in set(ours) - {"past_key_values", "cache"}:
        pairs = [(ours[name], stock[name])]
        if isinstance(ours[name], tuple):
            pairs = list(zip(ours[name], stock[name], strict=True))
        for a, b in pairs:
            assert a.shape == b.shape
            difference = (a - b).abs()
            if difference.shape[: mask.ndim] == mask.shape:
                difference = difference[mask.bool()]
            found[name] = max(found.get(name, 0.0), difference.max().item())
    return found


def assert_close(ours, stock, mask, tolerance=TOLERANCE):
    found = differences(ours, stock, mask)
    assert found
    assert max(found.values()) <= tolerance, found


def gradients(model, inputs):
    """Every parameter's gradient of the loss, or of a sum that weighs each output cell."""
    model.zero_grad()
    out = model(**inputs)
    loss = out.get("loss")
    if loss is None:
        scores = "last_hidden_state" if "last_hidden_state" in out else "start_logits"
        hidden = out[scores].view(*inputs["attention_mask"].shape, -1)
        hidden = hidden * inputs["attention_mask"][..., None]
        loss = (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(ours, stock):
    assert set(ours) == set(stock)
    for name, gradient in stock.items():
        scale = max(1.0, gradient.abs().max().item())
        assert (ours[name] - gradient).abs().max() <= GRADIENT_TOLERANCE * scale, name


def frozen(model):
    """A copy of every parameter and buffer that a state dict holds."""
    return copy.deepcopy(model.state_dict())


def assert_same_state(model, before):
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


@contextmanager
def rows_seen(op="add_layer_norm"):
    """The leading shapes that an op's torch backend is called with while patched models run."""
    seen = []
    original = getattr(portable, op)

    def spy(x, *args, **kwargs):
        seen.append(tuple(x.shape[:-1]))
        return original(x, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patcher:
        patcher.setattr(portable, op, spy)
        yield seen


MODELS = {"BertForMaskedLM": bert, "GPT2LMHeadModel": gpt2}


def blocks(model):
    """Its layers."""
    return model.bert.encoder.layer if hasattr(model, "bert") else model.transformer.h
