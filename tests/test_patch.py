"""What patching does to a live model, and what it leaves alone."""

import copy
import inspect
import io
import pickle
import threading

import pytest
import torch
import transformers
from models import TOLERANCE
from patching import (
    MODELS,
    NO_DROPOUT,
    assert_close,
    assert_same_state,
    bert,
    blocks,
    frozen,
    gpt2,
    gradients,
    inputs_for,
    ragged,
    rows_seen,
)
from torch import nn

import bertgpt
from bertgpt.integrations import versions
from bertgpt.integrations.blocks import Patched


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param](request.param)


def test_only_classes_change_and_change_back(model):
    state, parts = frozen(model), dict(model.named_modules())
    classes = {path: type(module) for path, module in parts.items()}
    storage = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    inputs = ragged("left")
    stock = model(**inputs)
    report = bertgpt.patch(model)
    assert [item.path for item in report.replaced] == [
        path for path, module in parts.items() if type(module) is not classes[path]
    ]
    assert len(report.replaced) == 3
    assert report.skipped == ()
    for path, module in model.named_modules():
        assert module is parts[path]
        assert isinstance(module, classes[path])
        assert type(module).__name__ == classes[path].__name__
    model(**inputs)
    assert_same_state(model, state)
    assert {n: t.data_ptr() for n, t in model.state_dict().items()} == storage
    assert [item.path for item in bertgpt.unpatch(model).skipped] == [
        item.path for item in report.replaced
    ]
    assert {path: type(module) for path, module in model.named_modules()} == classes
    assert_same_state(model, state)
    again = model(**inputs)
    assert torch.equal(again.logits, stock.logits)


def test_another_instance_is_left_alone(model):
    other = copy.deepcopy(model)
    before = [type(module) for module in other.modules()]
    bertgpt.patch(model)
    assert [type(module) for module in other.modules()] == before


def test_patching_again_and_half_patched_models(model):
    inputs = ragged("right")
    stock = model(**inputs)
    report = bertgpt.patch(model)
    assert bertgpt.patch(model) == report
    part = blocks(model)
    bertgpt.unpatch(part[1])
    with rows_seen() as seen:
        assert_close(model(**inputs), stock, inputs["attention_mask"])
    assert set(seen) == {(4, 12)}, "beside a stock block all tokens go padded"
    assert bertgpt.patch(model) == report
    bertgpt.unpatch(model)
    bertgpt.unpatch(model)
    assert torch.equal(model(**inputs).logits, stock.logits)


def test_copies_and_pickles_stay_patched(model, tmp_path):
    inputs = ragged("left")
    bertgpt.patch(model)
    ours = model(**inputs)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
        assert torch.equal(twin(**inputs).logits, ours.logits)


def test_saved_folders_are_stocks(model, tmp_path):
    stock = type(model)
    bertgpt.patch(model)
    model.save_pretrained(tmp_path)
    loaded = stock.from_pretrained(tmp_path)
    assert loaded.config.architectures == [stock.__name__]
    assert_same_state(loaded, model.state_dict())
    base = model.base_model
    base.save_pretrained(tmp_path / "base")
    assert transformers.AutoModel.from_pretrained(tmp_path / "base").config.architectures == [
        {"bert": "BertModel", "gpt2": "GPT2Model"}[model.config.model_type]
    ]


def test_a_loaded_state_is_the_one_that_runs(model):
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    inputs = ragged("right")
    bertgpt.patch(model)
    model.load_state_dict(other.state_dict())
    assert_close(model(**inputs), other(**inputs), inputs["attention_mask"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_another_dtype_after_patching(model, dtype):
    inputs = ragged("left")
    bertgpt.patch(model)
    model.to(dtype)
    with rows_seen() as seen:
        ours = model(**inputs).logits
    assert all(len(shape) == 1 for shape in seen)
    bertgpt.unpatch(model)
    stock = model(**inputs).logits
    assert ours.dtype == stock.dtype == dtype
    keep = inputs["attention_mask"].bool()
    bound = {torch.float64: 1e-10, torch.float16: 2e-2, torch.bfloat16: 2e-1}[dtype]
    scale = max(1.0, stock[keep].abs().max().item())
    assert (ours - stock).abs()[keep].max() <= bound * scale


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(model, dtype):
    inputs = ragged("right")
    keep = inputs["attention_mask"].bool()
    exact = model.base_model(**inputs).last_hidden_state
    with torch.autocast("cpu", dtype):
        stock = model.base_model(**inputs).last_hidden_state
        bertgpt.patch(model)
        ours = model.base_model(**inputs).last_hidden_state
    assert ours.dtype == stock.dtype == torch.float32
    ours_off, stock_off = ((h - exact).abs()[keep].mean() for h in (ours, stock))
    assert 0 < ours_off <= 1.5 * stock_off


def test_modules_may_be_moved_and_frozen(model):
    inputs = inputs_for("LMHead", "right")
    bertgpt.patch(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    blocks(model)[0].requires_grad_(True)
    model(**inputs).loss.backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None}
    inside = {n for n, _ in model.named_parameters() if ".layer.0." in n or ".h.0." in n}
    assert trained == inside


def test_two_threads_run_one_model(model):
    bertgpt.patch(model)
    inputs = [ragged(side) for side in ("right", "left", "both")]
    expected = [model(**given).logits for given in inputs]
    failures = []

    def work(given, result):
        for _ in range(5):
            asked = {"output_hidden_states": True} if given is inputs[2] else {}
            if not torch.allclose(model(**given, **asked).logits, result, atol=TOLERANCE):
                failures.append(given)

    threads = [
        threading.Thread(target=work, args=pair) for pair in zip(inputs[:2], expected, strict=False)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_memory():
    model = bert(hidden_size=96, intermediate_size=384, num_attention_heads=4, vocab_size=2000)
    elements = sum(t.numel() for t in model.state_dict().values())
    before = {id(t) for t in model.parameters()} | {id(t) for t in model.buffers()}
    bertgpt.patch(model)
    model(**ragged("right"))
    after = {id(t) for t in model.parameters()} | {id(t) for t in model.buffers()}
    kept = [v for m in model.modules() for v in vars(m).values() if isinstance(v, torch.Tensor)]
    assert after == before
    assert not kept
    assert sum(t.numel() for t in model.state_dict().values()) == elements


def test_head_masks_are_refused(model):
    bertgpt.patch(model)
    with pytest.raises(ValueError, match="head_mask is ignored by transformers"):
        model(**ragged("right"), head_mask=torch.ones(2, 3))


def test_what_is_no_model():
    with pytest.raises(TypeError, match="patch takes a torch module, not str"):
        bertgpt.patch("bert-base-uncased")
    with pytest.raises(TypeError, match="unpatch takes a torch module, not dict"):
        bertgpt.unpatch({})
    with pytest.raises(ValueError, match=r"Linear holds no block that is known.*bert, .*gpt2"):
        bertgpt.patch(nn.Linear(2, 2))


def test_a_block_of_another_class_is_not_known():
    class BertLayer(transformers.models.bert.modeling_bert.BertLayer):
        pass

    model = bert()
    model.encoder.layer[0].__class__ = BertLayer
    inputs = ragged("right")
    stock = model(**inputs)
    paths = [item.path for item in bertgpt.patch(model).replaced]
    assert paths == ["encoder", "encoder.layer.1"]
    assert_close(model(**inputs), stock, inputs["attention_mask"])


@pytest.mark.parametrize("part", ["query", "dense", "LayerNorm"])
def test_a_bias_of_another_dtype_is_refused_without_gradients_too(part):
    model = bert().eval()
    bertgpt.patch(model)
    for name, module in model.named_modules():
        if name.endswith((f"layer.0.attention.self.{part}", f"layer.0.output.{part}")):
            module.bias.data = module.bias.data.double()
    with torch.no_grad(), pytest.raises((TypeError, RuntimeError), match=r"float64|double|dtype"):
        model(torch.tensor([[3, 4, 5, 6]]))


@pytest.mark.parametrize("version", ["4.57.1", "5.22.2", "5.25.0", "6.0.0"])
def test_versions_that_are_not_known(version, monkeypatch):
    model = bert()
    monkeypatch.setattr(versions.transformers, "__version__", version)
    for call in (lambda: bertgpt.patch(model), bertgpt.register):
        with pytest.raises(
            RuntimeError, match=rf"{version} is not known here.*from 5\.23 up to 5\.25"
        ):
            call()
    assert not any(isinstance(m, Patched) for m in model.modules())


def test_a_patched_block_that_became_something_else():
    model = bert()
    bertgpt.patch(model)
    layer = model.encoder.layer[1]
    layer.__class__ = type("Sharded", (type(layer),), {})
    with pytest.raises(ValueError, match=r"encoder\.layer\.1 was patched and has become a Sharded"):
        bertgpt.unpatch(model)
    assert isinstance(model.encoder, Patched), "nothing has changed"


def test_the_report_is_a_table():
    model = bert(num_hidden_layers=3)
    model.encoder.layer[0].output.register_forward_hook(lambda *_: None)
    text = str(bertgpt.patch(model))
    assert "BertEncoder" in text
    assert "encoder.layer.0 … encoder.layer.2 (3)" in text
    assert "BertOutput: it has forward hooks" in text
    assert "encoder.layer.0.feed_forward" in text


@pytest.mark.parametrize("name", ["BertModel", "GPT2Model"])
def test_signatures_are_stocks(name):
    model = bert() if name == "BertModel" else gpt2(name)
    before = inspect.signature(model.forward)
    bertgpt.patch(model)
    assert inspect.signature(model.forward) == before


def test_dropout_in_training_is_on():
    model, inputs = bert("BertForMaskedLM").train(), inputs_for("MaskedLM", "right")
    bertgpt.patch(model)
    torch.manual_seed(0)
    first = gradients(model, inputs)
    second = gradients(model, inputs)
    torch.manual_seed(0)
    third = gradients(model, inputs)
    name = "bert.encoder.layer.0.output.dense.weight"
    assert not torch.equal(first[name], second[name])
    assert torch.equal(first[name], third[name])
    still = bert("BertForMaskedLM", **NO_DROPOUT).train()
    bertgpt.patch(still)
    assert torch.equal(gradients(still, inputs)[name], gradients(still, inputs)[name])
