"""What must not be read through in a patched model is called: hooks, adapters, odd weights."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from models import TOLERANCE
from patching import (
    MODELS,
    assert_close,
    assert_same_gradients,
    bert,
    blocks,
    gradients,
    inputs_for,
    ragged,
    rows_seen,
)
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import bertgpt
from bertgpt import ops


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param](request.param)


HOOKED = {
    "BertForMaskedLM": ("", "attention", "attention.self", "attention.self.query", "output.dense"),
    "GPT2LMHeadModel": ("", "attn", "attn.c_proj", "mlp", "mlp.act", "ln_2", "attn.attn_dropout"),
}


@pytest.mark.parametrize("kind", ["forward", "pre", "backward"])
def test_hooks_see_what_stock_shows_them(model, kind):
    places, inputs = HOOKED[type(model).__name__], inputs_for("LMHead", "right")
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0

    def watch():
        seen = {}
        handles = []
        for place in places:
            module = blocks(model)[1].get_submodule(place)
            if kind == "forward":
                hook = module.register_forward_hook(lambda m, i, o, p=place: seen.update({p: o}))
            elif kind == "pre":
                hook = module.register_forward_pre_hook(lambda m, i, p=place: seen.update({p: i}))
            else:
                hook = module.register_full_backward_hook(
                    lambda m, i, o, p=place: seen.update({p: o})
                )
            handles.append(hook)
        model(**inputs).loss.backward()
        for handle in handles:
            handle.remove()
        return seen

    stock = watch()
    bertgpt.patch(model)
    ours = watch()
    keep = inputs["attention_mask"].bool()
    assert set(ours) == set(stock) == set(places) - {"attn.attn_dropout"}
    for place, seen in stock.items():
        theirs = seen[0] if isinstance(seen, tuple) else seen
        mine = ours[place][0] if isinstance(ours[place], tuple) else ours[place]
        assert mine.shape == theirs.shape, place
        assert (mine - theirs).abs()[keep].max() <= TOLERANCE, place


def test_a_hook_that_changes_something(model):
    inputs = ragged("right")
    inner = blocks(model)[0].get_submodule("output" if hasattr(model, "bert") else "mlp")
    report = bertgpt.patch(model)
    plain = model(**inputs).logits
    handle = inner.register_forward_hook(lambda m, i, o: o * 1.5)
    ours = model(**inputs).logits
    (left,) = set(bertgpt.patch(model).skipped) - set(report.skipped)
    assert "it has forward hooks" in left.reason
    bertgpt.unpatch(model)
    stock = model(**inputs).logits
    handle.remove()
    keep = inputs["attention_mask"].bool()
    assert (ours - stock).abs()[keep].max() <= TOLERANCE
    assert (plain - stock).abs()[keep].max() > 0.1


def test_a_forward_on_the_instance_runs(model):
    inputs = ragged("right")
    block = blocks(model)[0]
    inner = block.get_submodule("output" if hasattr(model, "bert") else "mlp")
    original = inner.forward
    inner.forward = lambda *args: original(*args) * 1.5
    stock = model(**inputs)
    report = bertgpt.patch(model)
    assert "its forward is replaced on the instance" in report.skipped[0].reason
    assert_close(model(**inputs), stock, inputs["attention_mask"])


class Adapter(nn.Module):
    """Stands in a linear layer's place, as adapters do."""

    def __init__(self, base):
        super().__init__()
        self.base, self.in_features, self.out_features = base, 1, 1
        self.scale = nn.Parameter(torch.full((1,), 1.5))

    def forward(self, x):
        return self.base(x) * self.scale


class Unknown(Adapter):
    def __init__(self, base):
        super().__init__(base)
        del self.in_features


@pytest.mark.parametrize("kind", [Adapter, Unknown])
def test_what_stands_in_a_linear_layers_place_is_called(model, kind):
    inputs = inputs_for("LMHead", "left")
    encoder = hasattr(model, "bert")
    places = ("attention.self.query", "output.dense") if encoder else ("attn.c_attn", "mlp.c_fc")
    for place in places:
        parent, _, name = place.rpartition(".")
        parent = blocks(model)[0].get_submodule(parent)
        setattr(parent, name, kind(getattr(parent, name)))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    stock, expected = model(**inputs), gradients(model.train(), inputs)
    report = bertgpt.patch(model)
    assert len(report.skipped) == 2
    assert all(kind.__name__ in item.reason for item in report.skipped)
    with rows_seen() as seen:
        assert_close(model(**inputs), stock, inputs["attention_mask"])
    assert all(len(shape) == (1 if kind is Adapter else 2) for shape in seen)
    ours = gradients(model, inputs)
    assert any("scale" in name for name in ours)
    assert_same_gradients(ours, expected)


class Quantised(nn.Parameter):
    """A weight of another kind in a plain linear layer: only `linear` knows what it holds."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            if function is nn.functional.linear:
                x, weight, *rest = args
                return function(x, weight * 2, *rest, **(kwargs or {}))
            return function(*args, **(kwargs or {}))


def test_weights_of_another_kind():
    model, inputs = bert(), ragged("right")
    dense = model.encoder.layer[0].intermediate.dense
    plain = model(**inputs).last_hidden_state
    dense.weight = Quantised(dense.weight.detach())
    stock = model(**inputs)
    assert (stock.last_hidden_state - plain).abs().max() > 0.1
    bertgpt.patch(model)
    with torch.no_grad():
        assert_close(model(**inputs), stock, inputs["attention_mask"])


def test_parametrised_and_tied_weights(model):
    encoder = hasattr(model, "bert")
    inputs, block = ragged("left"), blocks(model)[0]
    inner = block.intermediate.dense if encoder else block.mlp.c_fc
    nn.utils.parametrizations.weight_norm(inner)
    inner.parametrizations.weight.original0.data.mul_(1.5)
    if encoder:
        block.attention.self.query.weight = block.attention.self.key.weight
        other = blocks(model)[1]
        other.intermediate.dense.weight = nn.Parameter(other.output.dense.weight.detach().T)
    stock = model(**inputs)
    report = bertgpt.patch(model)
    assert any("Parametrized" in item.reason for item in report.skipped)
    assert_close(model(**inputs), stock, inputs["attention_mask"])


@pytest.mark.parametrize("left_alone", [True, False])
def test_ops_are_around_their_torch_backend_where_something_watches(left_alone, monkeypatch):
    model, called = bert(), []
    bertgpt.patch(model)

    def spy(op, *args, **options):
        called.append(1)
        return op(*args, **options)

    for name in ("gelu_ffn", "add_layer_norm"):
        monkeypatch.setattr(ops, name, partial(spy, getattr(ops, name)))
    watching = nullcontext() if left_alone else FlopCounterMode(display=False)
    with torch.no_grad(), watching, rows_seen() as seen:
        model(**ragged())
    assert len(seen) == 4
    assert len(called) == (0 if left_alone else 6)
