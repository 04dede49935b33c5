"""`attn_implementation="bertgpt"` against eager attention: masks of every kind, packed rows."""

import re
from pathlib import Path

import pytest
import torch
import transformers
from models import TOLERANCE, ragged_mask, random_ids
from patching import SIDES, assert_close, build, gpt2, ragged

import bertgpt
from bertgpt.integrations import register as registered
from bertgpt.integrations.padding import ops

LLAMA = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 40,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
SMALL = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 40,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
GPT2 = {"vocab_size": 61, "n_positions": 40, "n_embd": 24, "n_layer": 2, "n_head": 3}
MODERN = {
    **SMALL,
    "local_attention": 6,
    "global_attn_every_n_layers": 2,
    "reference_compile": False,
}
MODELS = {
    "BertModel": SMALL,
    "DistilBertModel": {"vocab_size": 61, "dim": 24, "n_layers": 2, "n_heads": 3, "hidden_dim": 40},
    "MPNetModel": SMALL,  # it adds the mask to scores of its own
    "ModernBertModel": MODERN,
    "GPT2Model": GPT2,
    "LlamaModel": LLAMA,
    "MistralModel": {**LLAMA, "sliding_window": 3},
}


@pytest.fixture(autouse=True)
def _registered():
    assert bertgpt.register() == "bertgpt"


def own(model, name):
    """A model whose configuration is its own, since the implementation's name is kept there."""
    config = type(model.config).from_dict(model.config.to_dict())
    other = type(model)(config).eval()
    other.load_state_dict(model.state_dict())
    other.set_attn_implementation(name)
    return other


@pytest.fixture
def masks(monkeypatch):
    """The masks that the op is given."""
    seen = []
    original = ops.attention

    def spy(*args, **kwargs):
        seen.append(kwargs.get("mask"))
        return original(*args, **kwargs)

    monkeypatch.setattr(ops, "attention", spy)
    return seen


@pytest.mark.parametrize("side", [None, *SIDES])
@pytest.mark.parametrize("name", MODELS)
def test_padding_is_never_ignored(name, side, masks):
    stock = build(name, "eager", **MODELS[name])
    ours = own(stock, "bertgpt")
    inputs = ragged(side) if side else {"input_ids": random_ids(4, 12)}
    keep = inputs.get("attention_mask", torch.ones(4, 12))
    assert_close(ours(**inputs), stock(**inputs), keep)
    if name == "MPNetModel":
        assert masks == []
    else:
        fast = side in (None, "right")
        assert masks
        assert all((mask is None) == fast for mask in masks), "known masks are not read"


@pytest.mark.parametrize("how", ["dynamic", "static", "beams", "sampling"])
@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "LlamaForCausalLM", "MistralForCausalLM"])
def test_generate(name, how):
    values = {**MODELS.get(name.replace("ForCausalLM", "Model"), GPT2), "pad_token_id": 0}
    stock = build(name, "eager", **values)
    ours = own(stock, "bertgpt")
    options = {
        "static": {"cache_implementation": "static", "disable_compile": True},
        "beams": {"num_beams": 3},
        "sampling": {"do_sample": True, "top_k": 20},
    }.get(how, {})
    options = {"do_sample": False, **options, "max_new_tokens": 8, "pad_token_id": 0}
    # A window of padding alone: eager attention takes its mean, and this library gives zero.
    for side in ("left",) if name.startswith("Mistral") else ("left", "right"):
        inputs = ragged(side)
        made = []
        for model in (stock, ours):
            torch.manual_seed(1)
            made.append(model.generate(**inputs, **options))
        assert torch.equal(*made)


def packed_rows(lengths=(7, 1, 4)):
    ids = [random_ids(1, length) for length in lengths]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    return ids, torch.cat(ids, 1), positions, bounds


@pytest.mark.parametrize("name", ["GPT2Model", "LlamaModel", "MistralModel"])
@pytest.mark.parametrize("rows", [1, 2])
def test_positions_that_start_again(name, rows, masks):
    ours = own(build(name, "eager", **MODELS[name]), "bertgpt")
    ids, row, positions, _ = packed_rows()
    hidden = ours(
        row.repeat(rows, 1), position_ids=positions.repeat(rows, 1), use_cache=False
    ).last_hidden_state
    assert masks
    assert all(mask is None for mask in masks)
    alone = torch.cat([ours(part).last_hidden_state for part in ids], 1)
    assert (hidden - alone).abs().max() <= TOLERANCE


@pytest.mark.parametrize("name", ["BertModel", "GPT2Model", "LlamaModel"])
def test_bounds_of_packed_rows(name):
    ours = own(build(name, "eager", **MODELS[name]), "bertgpt")
    ids, row, positions, bounds = packed_rows()
    hidden = ours(
        row,
        position_ids=positions,
        cu_seq_lens_q=bounds,
        cu_seq_lens_k=bounds,
        max_length_q=7,
        max_length_k=7,
    ).last_hidden_state
    alone = torch.cat([ours(part).last_hidden_state for part in ids], 1)
    assert (hidden - alone).abs().max() <= TOLERANCE


@pytest.mark.parametrize("name", ["BertModel", "GPT2Model", "LlamaModel"])
def test_masks_of_the_callers_own(name, masks):
    stock = build(name, "eager", **MODELS[name])
    ours = own(stock, "bertgpt")
    band = (torch.arange(12)[:, None] - torch.arange(12)).abs() <= 2
    allowed = (ragged_mask("right")[:, None, None, :] == 1) & band
    additive = torch.zeros(4, 1, 12, 12).masked_fill(~allowed, torch.finfo(torch.float32).min)
    ids = random_ids(4, 12)
    theirs = stock(ids, attention_mask=additive)
    assert_close(ours(ids, attention_mask=additive), theirs, ragged_mask("right"))
    assert_close(ours(ids, attention_mask=allowed), theirs, ragged_mask("right"))
    assert all(mask is not None for mask in masks)


def test_composed_masks_are_dense(masks):
    config = build("LlamaModel", "eager", **LLAMA).config
    config._attn_implementation = "bertgpt"
    hidden = torch.randn(2, 6, 24)

    def prefix(batch, head, query, key):
        return key < 3

    mask = transformers.masking_utils.create_causal_mask(
        config, hidden, None, None, or_mask_function=prefix
    )
    expected = torch.ones(6, 6).tril().bool() | (torch.arange(6) < 3)
    assert registered.mask_rules.rule_of(mask) is None
    assert torch.equal(mask == 0, expected.expand(2, 1, 6, 6))


def test_gradients_with_dropout_off():
    stock = build("BertForMaskedLM", "eager", **SMALL)
    ours = own(stock, "bertgpt")
    inputs = ragged("right")
    labels = random_ids(4, 12).masked_fill(inputs["attention_mask"] == 0, -100)
    for model in (stock, ours):
        model(**inputs, labels=labels).loss.backward()
    for (name, a), b in zip(ours.named_parameters(), stock.parameters(), strict=True):
        assert (a.grad - b.grad).abs().max() <= 1e-3, name


def test_dropout_falls_in_training():
    ours = own(build("BertModel", "eager", **SMALL), "bertgpt").train()
    for module in ours.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    inputs = ragged("right")
    assert torch.equal(*(ours(**inputs).last_hidden_state for _ in range(2)))
    ours.encoder.layer[0].attention.self.dropout.p = 0.5
    assert not torch.equal(*(ours(**inputs).last_hidden_state for _ in range(2)))


@pytest.mark.parametrize("bias", [False, True])
def test_position_bias(bias):
    module = torch.nn.Module()
    module.is_causal = True
    q, k, v = (torch.randn(2, 3, 5, 4) for _ in range(3))
    added = torch.randn(1, 3, 5, 5) if bias else None
    out, weights = registered.attention(module, q, k, v, None, position_bias=added)
    scores = q @ k.transpose(2, 3) * 0.5 + (added if bias else 0.0)
    scores = scores.masked_fill(~torch.ones(5, 5).tril().bool(), float("-inf"))
    assert weights is None
    assert (out - (scores.softmax(-1) @ v).transpose(1, 2)).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"output_attentions": True}, "never forms attention weights"),
        ({"softcap": 30.0}, "capped scores"),
        ({"s_aux": torch.zeros(3)}, "attention sinks"),
        ({"cache": object()}, "continuous batching"),
    ],
)
def test_what_is_refused_by_name(values, message):
    q = torch.zeros(1, 3, 2, 4)
    with pytest.raises(ValueError, match=message):
        registered.attention(torch.nn.Module(), q, q, q, None, **values)


@pytest.mark.parametrize("name", ["BertModel", "GPT2Model"])
def test_attention_weights_are_refused(name):
    ours = own(build(name, "eager", **MODELS[name]), "bertgpt")
    with pytest.raises(ValueError, match="never forms attention weights"):
        ours(**ragged("right"), output_attentions=True)


def test_continuous_batching_is_refused():
    ours = own(gpt2(), "bertgpt")
    with pytest.raises(ValueError, match="bertgpt is not supported for continuous batching"):
        ours.generate_batch([[5, 6, 7]], progress_bar=False)


@pytest.mark.parametrize("name", ["BertModel", "GPT2LMHeadModel"])
def test_patched_and_registered_together(name):
    stock = build(name, "eager", **MODELS.get(name, GPT2))
    ours = own(stock, "bertgpt")
    bertgpt.patch(ours)
    for side in SIDES:
        inputs = ragged(side)
        assert_close(ours(**inputs), stock(**inputs), inputs["attention_mask"])


def test_saved_models_load_with_the_name_as_the_page_shows(tmp_path, monkeypatch):
    stock = build("BertModel", "eager", **SMALL)
    stock.save_pretrained(tmp_path)
    calls, attend = [], ops.attention
    monkeypatch.setattr(ops, "attention", lambda *a, **k: calls.append(1) or attend(*a, **k))
    page = Path(__file__).resolve().parent.parent / "docs" / "drop_in.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    (shown,) = (block for block in blocks if "register()" in block)
    names = {"bertgpt": bertgpt, "folder": tmp_path}
    exec(shown, names)
    inputs = ragged("left")
    found = names["model"].eval()(**inputs)
    assert len(calls) == SMALL["num_hidden_layers"]
    assert_close(found, stock(**inputs), inputs["attention_mask"])
