"""Training mode: which rates fall where, one seed one result, checkpointing, packed as padded."""

import contextlib
import math

import pytest
import torch
from models import BERT, GPT2, gradients_by_name, ragged_mask, random_ids
from tolerance import assert_bitwise

from bertgpt import bert, gpt, ops, pack

RATES = {  # all different, so that a rate in the wrong place shows
    "bert": {"hidden_dropout_prob": 0.11, "attention_probs_dropout_prob": 0.13},
    "gpt2": {"resid_pdrop": 0.11, "embd_pdrop": 0.12, "attn_pdrop": 0.13},
}
FAMILIES = {"bert": (bert, "BertForMaskedLM", BERT), "gpt2": (gpt, "GPT2LMHeadModel", GPT2)}


def model_of(family, name=None, **values):
    module, head, config = FAMILIES[family]
    model_class = getattr(module, name or head)
    return model_class(model_class.config_class(**{**config, **RATES[family], **values})).train()


def batch_of(family, packed=False):
    mask = ragged_mask("right")
    ids = random_ids(4, 12) * mask
    labels = random_ids(4, 12).masked_fill(mask == 0, -100)
    if packed:
        keep = mask.bool()
        rows = [row[k] for row, k in zip(ids, keep, strict=True)]
        return {"input_ids": pack(rows), "labels": labels[keep]}
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def trained(model, inputs, seed=1, **options):
    """Loss and gradients of one pass under a seed."""
    torch.manual_seed(seed)
    model.zero_grad()
    loss = model(**inputs, **options).loss
    loss.backward()
    return {"loss": loss.detach(), **gradients_by_name(model)}


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert_bitwise(first[name], second[name], what=name)


@pytest.fixture
def rates(monkeypatch):
    """The rate of every call that can drop, in order, by op."""
    seen = []

    def watch(name):
        op = getattr(ops, name)

        def call(*args, **kwargs):
            seen.append((name, kwargs.get("dropout_p", 0.0)))
            return op(*args, **kwargs)

        monkeypatch.setattr(ops, name, call)

    for name in ("attention", "gelu_ffn", "add_layer_norm"):
        watch(name)
    return seen


def test_berts_rates_fall_in_their_places(rates):
    model = model_of("bert", "BertForSequenceClassification", classifier_dropout=0.17)
    norm, hidden = "add_layer_norm", 0.11
    layer = [("attention", 0.13), (norm, hidden), ("gelu_ffn", 0.0), (norm, hidden)]
    ids = random_ids(2, 5)
    model(ids)
    assert rates == [(norm, 0.0), (norm, hidden), *layer, *layer, (norm, 0.17)]
    rates.clear()
    model.eval()(ids)
    assert {rate for _, rate in rates} == {0.0}
    model = model_of("bert", "BertForTokenClassification")  # no rate of its own: the hidden one's
    rates.clear()
    model(ids)
    assert rates[-1] == (norm, hidden)


def test_gpts_rates_fall_in_their_places(rates):
    model = model_of("gpt2")
    norm, ffn = "add_layer_norm", ("gelu_ffn", 0.0)
    first = [(norm, 0.12), ("attention", 0.13), (norm, 0.11), ffn]
    second = [(norm, 0.11), *first[1:]]
    ids = random_ids(2, 5)
    model(ids)
    assert rates == [*first, *second, (norm, 0.11)]
    rates.clear()
    model.eval()(ids)
    assert {rate for _, rate in rates} == {0.0}


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_what_the_embeddings_lose(p):
    """Rate and mean within 5 standard deviations; what stays is scaled by 1 / (1 − p)."""
    model = model_of("bert", "BertModel", hidden_dropout_prob=p)
    seen = []
    model.embeddings_dropout.register_forward_hook(lambda _, x, y: seen.append((x[0], y)))
    torch.manual_seed(0)
    for _ in range(20):
        model(random_ids(8, 20))
    whole, left = (torch.cat(tensors).detach() for tensors in zip(*seen, strict=True))
    dropped, count = left == 0, whole.numel()
    assert abs(dropped.double().mean() - p) <= 5 * math.sqrt(p * (1 - p) / count)
    torch.testing.assert_close(left[~dropped], whole[~dropped] / (1 - p), rtol=1e-6, atol=0)
    spread = (whole.double().square().sum() * p / (1 - p)).sqrt()
    assert abs(left.double().sum() - whole.double().sum()) <= 5 * spread


@pytest.mark.parametrize("family", FAMILIES)
def test_a_seed_fixes_everything_and_evaluation_draws_nothing(family):
    model, inputs = model_of(family), batch_of(family)
    first = trained(model, inputs)
    assert_same(trained(model, inputs), first)
    assert not trained(model, inputs, seed=2)["loss"].equal(first["loss"])
    model.eval()
    state = torch.get_rng_state()
    assert_bitwise(model(**inputs).logits, model(**inputs).logits)
    assert torch.get_rng_state().equal(state)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_tokens_lose_what_padded_ones_do(family):
    model = model_of(family)
    torch.manual_seed(3)
    padded = batch_of(family)
    torch.manual_seed(3)
    packed = batch_of(family, packed=True)
    assert_same(trained(model, packed), trained(model, padded))


@pytest.mark.parametrize("skip_logits", [False, True])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("arguments", [None, {"use_reentrant": True}], ids=["default", "reentrant"])
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_changes_no_bit(family, arguments, packed, skip_logits):
    model, inputs = model_of(family), batch_of(family, packed)
    expected = trained(model, inputs, skip_logits=skip_logits)
    passes = []
    for layer in (model.bert if family == "bert" else model.transformer).layers:
        layer.attention.register_forward_hook(lambda *_: passes.append(1))
    model.gradient_checkpointing_enable(arguments)
    assert model.is_gradient_checkpointing
    assert_same(trained(model, inputs, skip_logits=skip_logits), expected)
    assert len(passes) == 2 * 2  # each layer twice
    model.eval()(**inputs)
    assert len(passes) == 3 * 2  # and once where nothing is trained
    model.train().gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing
    passes.clear()
    assert_same(trained(model, inputs, skip_logits=skip_logits), expected)
    assert len(passes) == 2


def kept_for_backward(model, inputs):
    """Bytes that autograd saves in a forward pass, weights and each memory once."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept = {}

    def save(tensor):
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in weights:
            kept[memory.data_ptr()] = memory.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        loss = model(**inputs, skip_logits=True).loss
    loss.backward()
    return sum(kept.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_keeps_less(family):
    depth = {"bert": "num_hidden_layers", "gpt2": "n_layer"}[family]
    inputs, grown = batch_of(family), []
    for enable in (False, True):
        sizes = []
        for layers in (2, 6):
            model = model_of(family, **{depth: layers})
            if enable:
                model.gradient_checkpointing_enable()
            sizes.append(kept_for_backward(model, inputs))
        grown.append(sizes[1] - sizes[0])
    assert grown[1] <= 0.4 * grown[0]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "autocast"])
@pytest.mark.parametrize("family", FAMILIES)
def test_under_autocast_and_with_frozen_embeddings(family, dtype):
    """Checkpointing's default needs no input that asks for a gradient."""
    model, inputs = model_of(family), batch_of(family)
    model.base_model.embeddings.requires_grad_(requires_grad=False)
    cast = contextlib.nullcontext() if dtype is None else torch.autocast("cpu", dtype)
    with cast:
        expected = trained(model, inputs)
        model.gradient_checkpointing_enable()
        assert_same(trained(model, inputs), expected)
    assert all(gradient.isfinite().all() for gradient in expected.values())
    weight = model.base_model.layers[0].attention.qkv.weight
    assert weight.grad.abs().max() > 0
