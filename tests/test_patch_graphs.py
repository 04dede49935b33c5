"""Patched models in graphs: torch.compile, export, trace, and shapes without values."""

import pytest
import torch
from models import TOLERANCE
from patching import (
    NO_DROPOUT,
    assert_same_gradients,
    bert,
    gpt2,
    gradients,
    inputs_for,
    ragged,
)
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode

import bertgpt

MODELS = {  # one layer: compilers take their time
    "bert": lambda: bert(num_hidden_layers=1),
    "gpt2": lambda: gpt2("GPT2Model", use_cache=False, n_layer=1),
}


@pytest.fixture(params=MODELS)
def patched(request):
    model = MODELS[request.param]()
    bertgpt.patch(model)
    return model


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    counters.clear()


def narrower(inputs, width):
    return {name: value[:, -width:].contiguous() for name, value in inputs.items()}


def assert_alike(ours, expected, inputs):
    keep = inputs["attention_mask"].bool()
    assert (ours - expected).abs()[keep].max() <= TOLERANCE


def test_one_graph_for_every_shape(patched):
    inputs = ragged("left")
    compiled = torch.compile(patched, backend="eager", fullgraph=True, dynamic=True)
    parts = [narrower(inputs, width) for width in (12, 9, 11)]
    with torch.no_grad():
        expected = [patched(**part).last_hidden_state for part in parts]
        graphs = []
        for part, hidden in zip(parts, expected, strict=True):
            assert_alike(compiled(**part).last_hidden_state, hidden, part)
            graphs.append(counters["stats"]["unique_graphs"])
        assert graphs[1] <= 2, "one more than one is stock's: its collector becomes a global"
        assert graphs[2] == graphs[1]
        bertgpt.unpatch(patched)
        assert_alike(compiled(**inputs).last_hidden_state, patched(**inputs)[0], inputs)
    assert counters["stats"]["unique_graphs"] == graphs[2] + 1, "the stock classes are traced anew"


def test_compiled_training():
    name = "BertForMaskedLM"
    model, inputs = bert(name, num_hidden_layers=1, **NO_DROPOUT), inputs_for(name, "left")
    expected = gradients(model.train(), inputs)
    bertgpt.patch(model)
    model.forward = torch.compile(model.forward, backend="aot_eager", fullgraph=True)
    assert_same_gradients(gradients(model, inputs), expected)


def test_a_hook_in_a_compiled_model():
    model, inputs = bert(num_hidden_layers=1), ragged("right")
    bertgpt.patch(model)
    dense = model.encoder.layer[0].output.dense
    dense.register_forward_hook(lambda module, args, output: output * 1.5)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert_alike(compiled(**inputs).last_hidden_state, model(**inputs)[0], inputs)


def test_export(patched):
    inputs = ragged("right")
    shapes = {name: {1: torch.export.Dim("length", min=2, max=20)} for name in inputs}
    with torch.no_grad():
        program = torch.export.export(patched, (), inputs, dynamic_shapes=shapes).module()
        part = narrower(ragged("left"), 9)
        assert_alike(program(**part).last_hidden_state, patched(**part)[0], part)


def test_trace(patched):
    inputs = ragged("right")
    example = (inputs["input_ids"], inputs["attention_mask"])

    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = patched

        def forward(self, ids, mask):
            return self.model(input_ids=ids, attention_mask=mask).last_hidden_state

    with torch.no_grad():
        traced = torch.jit.trace(Wrapped(), example, check_trace=False)
        other = ragged("left")
        ours = traced(other["input_ids"], other["attention_mask"])
        assert_alike(ours, patched(**other).last_hidden_state, other)


def test_shapes_without_values(patched):
    inputs = ragged("right")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {name: mode.from_tensor(value) for name, value in inputs.items()}
        assert patched(**fake).last_hidden_state.shape == (4, 12, 24)
    if not hasattr(patched, "encoder"):
        return  # stock GPT-2 asks for the values of its positions
    patched.to("meta")  # without a mask, whose values stock code asks for
    assert patched(inputs["input_ids"].to("meta")).last_hidden_state.shape == (4, 12, 24)


def test_functional_call_takes_other_weights(patched):
    inputs = ragged("right")
    weights = {name: p.detach() * 1.1 for name, p in patched.named_parameters()}
    ours = torch.func.functional_call(patched, weights, (), inputs).last_hidden_state
    bertgpt.unpatch(patched)
    stock = torch.func.functional_call(patched, weights, (), inputs).last_hidden_state
    assert_alike(ours, stock, inputs)
