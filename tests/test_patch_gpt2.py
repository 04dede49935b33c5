"""Patched decoders against stock: every head, any padding, gradients, and stock's `generate`."""

import pytest
import torch
import transformers
from models import TOLERANCE, genera_ids, needs_genera, padded
from patching import (
    NO_GPT_DROPOUT,
    SIDES,
    assert_close,
    assert_same_gradients,
    differences,
    gpt2,
    gradients,
    inputs_for,
    ragged,
    rows_seen,
)

import bertgpt
from bertgpt import demo_data

HEADS = (
    "GPT2Model",
    "GPT2LMHeadModel",
    "GPT2ForSequenceClassification",
    "GPT2ForTokenClassification",
    "GPT2ForQuestionAnswering",
)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("side", SIDES)
def test_every_head_under_any_padding(name, side):
    model, inputs = gpt2(name, num_labels=3), inputs_for(name, side)
    stock = model(**inputs)
    bertgpt.patch(model)
    with rows_seen() as seen:
        ours = model(**inputs)
    assert_close(ours, stock, inputs["attention_mask"])
    assert set(seen) == {(24,)}, "the ragged batch holds 24 tokens"


def test_the_double_head():
    model, inputs = gpt2("GPT2DoubleHeadsModel", num_labels=1), ragged("right")
    inputs = {key: torch.stack([value, value], 1) for key, value in inputs.items()}
    inputs["mc_token_ids"] = inputs["attention_mask"].sum(-1) - 1
    stock = model(**inputs)
    bertgpt.patch(model)
    assert_close(model(**inputs), stock, inputs["attention_mask"])


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients(name, checkpointing):
    model = gpt2(name, num_labels=3, **NO_GPT_DROPOUT).train()
    inputs = inputs_for(name, "left")
    stock = gradients(model, inputs)
    bertgpt.patch(model)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    with rows_seen() as seen:
        ours = gradients(model, inputs)
    assert set(seen) == {(24,)}
    assert len(seen) == (4 if checkpointing else 2)
    assert_same_gradients(ours, stock)


def test_dropout_falls_as_the_modules_say():
    model, inputs = gpt2("GPT2Model"), ragged("right")
    bertgpt.patch(model)
    still = model(**inputs).last_hidden_state
    assert torch.equal(still, model(**inputs).last_hidden_state)
    block = model.h[0]
    for dropout in (block.attn.resid_dropout, block.mlp.dropout, model.drop):
        dropout.train().p = 0.5
        assert not torch.equal(still, model(**inputs).last_hidden_state)
        dropout.eval()
    block.attn.train()
    block.attn.resid_dropout.eval()
    block.attn.attn_dropout.p = 0.5
    assert not torch.equal(still, model(**inputs).last_hidden_state)


@pytest.mark.parametrize("extra", [{}, {"token_type_ids": 1}, {"position_ids": 1}])
def test_embeddings_of_every_kind(extra):
    model, inputs = gpt2("GPT2Model"), ragged("both")
    if "token_type_ids" in extra:
        inputs["token_type_ids"] = torch.arange(12).expand(4, 12) % 3
    if "position_ids" in extra:
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    given = dict(inputs)
    given["inputs_embeds"] = model.wte(given.pop("input_ids"))
    stock, embedded = model(**inputs), model(**given, return_dict=False)
    bertgpt.patch(model)
    assert_close(model(**inputs), stock, inputs["attention_mask"])
    ours = model(**given, return_dict=False)
    assert isinstance(ours, tuple)
    assert len(ours) == len(embedded)
    keep = inputs["attention_mask"].bool()
    assert (ours[0] - embedded[0]).abs()[keep].max() <= TOLERANCE


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_hidden_states_and_attention_weights_are_stocks(attention):
    model, inputs = gpt2("GPT2Model", attention), ragged("left")
    asked = {"output_hidden_states": True, "output_attentions": attention == "eager"}
    stock = model(**inputs, **asked)
    bertgpt.patch(model)
    ours = model(**inputs, **asked)
    assert len(ours.hidden_states) == 3
    assert_close(ours, stock, inputs["attention_mask"])
    with rows_seen() as seen:
        model(**inputs)
    assert set(seen) == {(24,)}


GENERATION = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 0.8},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "beam sampling": {"do_sample": True, "num_beams": 2},
    "static": {"do_sample": False, "cache_implementation": "static", "disable_compile": True},
    "no cache": {"do_sample": False, "use_cache": False},
}


@pytest.mark.parametrize("how", list(GENERATION))
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_stocks_generate(how, attention):
    model, inputs = gpt2(attention=attention), ragged("left")
    options = {"max_new_tokens": 10, "output_logits": True, "return_dict_in_generate": True}
    options |= GENERATION[how]
    torch.manual_seed(7)
    stock = model.generate(**inputs, **options)
    bertgpt.patch(model)
    torch.manual_seed(7)
    with rows_seen() as seen:
        ours = model.generate(**inputs, **options)
    assert torch.equal(ours.sequences, stock.sequences)
    for a, b in zip(ours.logits, stock.logits, strict=True):
        assert (a - b).abs().max() <= TOLERANCE
    if how != "static":  # there, stock makes a mask of four dimensions before the model is called
        copies = GENERATION[how].get("num_beams", 1)
        assert seen[0] == (24 * copies,), "the prompts' padding went through the blocks"


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_goes_on_where_it_stopped(kind):
    model, inputs = gpt2(), ragged("left")
    bertgpt.patch(model)
    whole = model(**inputs).logits
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    cache = transformers.DynamicCache(config=model.config)
    if kind == "static":
        cache = transformers.StaticCache(config=model.config, max_cache_len=16)
    pieces = [
        model(ids[:, a:b], attention_mask=mask[:, :b], past_key_values=cache).logits
        for a, b in ((0, 5), (5, 11), (11, 12))
    ]
    keep = mask.bool()
    assert (torch.cat(pieces, 1) - whole).abs()[keep].max() <= TOLERANCE


def test_a_static_cache_without_padding():
    model, ids = gpt2(), torch.arange(12).view(2, 6) + 3
    caches = [transformers.StaticCache(config=model.config, max_cache_len=9) for _ in range(2)]
    stock = model(ids, past_key_values=caches[0]).logits
    bertgpt.patch(model)
    assert (model(ids, past_key_values=caches[1]).logits - stock).abs().max() <= TOLERANCE


def test_a_mask_without_the_cached_tokens():
    model, inputs = gpt2(), ragged("right")
    caches = [transformers.DynamicCache(config=model.config) for _ in range(2)]
    ids, mask = inputs["input_ids"][:, :6], inputs["attention_mask"][:, :6]
    for cache in caches:
        model(ids, past_key_values=cache)
    stock = model(ids, attention_mask=mask, past_key_values=caches[0]).logits
    bertgpt.patch(model)
    ours = model(ids, attention_mask=mask, past_key_values=caches[1]).logits
    assert (ours - stock).abs().max() <= TOLERANCE


def test_scales_by_layer_and_cross_attention():
    model, inputs = gpt2(scale_attn_by_inverse_layer_idx=True), ragged("right")
    stock = model(**inputs)
    bertgpt.patch(model)
    assert_close(model(**inputs), stock, inputs["attention_mask"])
    model = gpt2(add_cross_attention=True)
    inputs["encoder_hidden_states"] = torch.randn(4, 5, 24)
    stock = model(**inputs)
    report = bertgpt.patch(model)
    assert {item.reason for item in report.skipped} == {"it has cross-attention"}
    assert_close(model(**inputs), stock, inputs["attention_mask"])


@needs_genera
def test_real_checkpoint_on_real_text():
    folder = demo_data.genus_model().folder
    model = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    ids, mask = padded(genera_ids(), "left")
    with torch.no_grad():
        stock = model(ids, attention_mask=mask)
        bertgpt.patch(model)
        ours = model(ids, attention_mask=mask)
    assert max(differences(ours, stock, mask).values()) <= TOLERANCE
