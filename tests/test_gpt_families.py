"""GPT-1 and GPT-Neo against stock transformers: any padding, generation, files, and bad input."""

import json

import pytest
import torch
import transformers
from models import TOLERANCE, largest_difference, padded, ragged_mask, random_ids, twins

import bertgpt
from bertgpt import pack

GPT1 = {
    "vocab_size": 61,
    "n_positions": 24,
    "n_embd": 20,
    "n_layer": 3,
    "n_head": 4,
    "initializer_range": 0.3,
}
NEO = {
    "vocab_size": 61,
    "max_position_embeddings": 24,
    "hidden_size": 21,
    "num_layers": 3,
    "attention_types": [[["global", "local"], 1], [["local"], 1]],
    "num_heads": 3,
    "intermediate_size": 37,
    "window_size": 3,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = [("OpenAIGPTLMHeadModel", GPT1), ("GPTNeoForCausalLM", NEO)]
BODIES = [("OpenAIGPTModel", GPT1), ("GPTNeoModel", NEO)]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(("name", "values"), FAMILIES)
def test_logits_hidden_states_and_loss(name, values, side):
    model, stock = twins(bertgpt, name, values)
    ids, mask = random_ids(4, 12), ragged_mask(side)
    theirs = stock(ids, attention_mask=mask, output_hidden_states=True)
    ours = model(ids, attention_mask=mask, output_hidden_states=True)
    assert largest_difference(ours.logits, theirs.logits, mask) <= TOLERANCE
    assert len(ours.hidden_states) == len(theirs.hidden_states) == 4
    for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert largest_difference(a, b, mask) <= TOLERANCE
    if side == "right":
        labels = ids.masked_fill(mask == 0, -100)
        theirs, ours = (m(ids, attention_mask=mask, labels=labels) for m in (stock, model))
        assert largest_difference(ours.loss, theirs.loss) <= TOLERANCE
        rows = [row[keep] for row, keep in zip(ids, mask.bool(), strict=True)]
        assert largest_difference(model(pack(rows)).logits, ours.logits[mask.bool()]) <= TOLERANCE


@pytest.mark.parametrize(("name", "values"), BODIES)
def test_bodies_take_types_positions_and_embeddings(name, values):
    model, stock = twins(bertgpt, name, values)
    ids, types, places = random_ids(2, 5), random_ids(2, 5), torch.tensor([[4, 3, 2, 1, 0]])
    inputs = {"input_ids": ids, "token_type_ids": types, "position_ids": places}
    assert largest_difference(model(**inputs)[0], stock(**inputs)[0]) <= TOLERANCE
    embeds = stock.get_input_embeddings()(ids)
    assert largest_difference(model(inputs_embeds=embeds)[0], stock(ids)[0]) <= TOLERANCE
    assert model.get_input_embeddings().weight.equal(stock.get_input_embeddings().weight)


@pytest.mark.parametrize(("name", "values"), FAMILIES)
def test_greedy_tokens_are_stocks(name, values):
    model, stock = twins(bertgpt, name, values, pad_token_id=0)
    rows = [random_ids(n).tolist() for n in (7, 1, 12, 4)]
    stock.generation_config.eos_token_id = None
    ours = model.generate(rows, 12, eos_token_id=())
    beams = model.generate(rows, 12, eos_token_id=(), num_beams=3)
    for row, text, best in zip(rows, ours, beams, strict=True):  # stock's GPT-1 ignores the mask
        ids = torch.tensor([row])
        run = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
        assert stock.generate(ids, **run)[0].tolist() == text
        assert stock.generate(ids, **run, num_beams=3)[0].tolist() == best


def test_greedy_tokens_of_a_left_padded_batch_are_stocks():
    model, stock = twins(bertgpt, "GPTNeoForCausalLM", NEO, pad_token_id=0)
    ids, mask = padded([random_ids(n).tolist() for n in (7, 1, 12, 4)], "left")
    stock.generation_config.eos_token_id = None
    theirs = stock.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    assert model.generate(ids, 12, attention_mask=mask, eos_token_id=()).equal(theirs)


@pytest.mark.parametrize(("name", "values"), FAMILIES + BODIES)
def test_what_we_save_stock_loads_and_the_reverse(name, values, tmp_path):
    model, stock = twins(bertgpt, name, values)
    ids = random_ids(2, 9)
    expected = stock(ids)[0]
    stock.save_pretrained(tmp_path / "stock")
    ours = getattr(bertgpt, name).from_pretrained(tmp_path / "stock")
    assert largest_difference(ours(ids)[0], expected) <= TOLERANCE
    ours.save_pretrained(tmp_path / "ours")
    again = getattr(transformers, name).from_pretrained(tmp_path / "ours").eval()
    assert largest_difference(again(ids)[0], expected) <= TOLERANCE
    for key, weight in stock.state_dict().items():
        assert again.state_dict()[key].equal(weight), key
    back = getattr(bertgpt, name).from_pretrained(tmp_path / "ours")
    assert all(a.equal(b) for a, b in zip(back.parameters(), ours.parameters(), strict=True))
    assert set(model.state_dict()) == set(stock.state_dict())


@pytest.mark.filterwarnings("error")  # which would name tensors that are left out
@pytest.mark.parametrize(("name", "values"), FAMILIES)
def test_old_files_with_buffers_and_bodies_without_a_head_load(name, values, tmp_path):
    _, stock = twins(bertgpt, name, values)
    stock.base_model.save_pretrained(tmp_path)
    from safetensors.torch import load_file, save_file

    state = load_file(tmp_path / "model.safetensors")
    inside = "h.0.attn.attention." if "wte.weight" in state else "h.0.attn."
    state[f"{inside}bias"] = torch.ones(1, 1, 24, 24)
    state[f"{inside}masked_bias"] = torch.tensor(-1e9)
    state["position_ids"] = torch.ones(24)
    save_file(state, tmp_path / "model.safetensors")
    ids = random_ids(1, 9)
    model = getattr(bertgpt, name).from_pretrained(tmp_path)
    assert largest_difference(model(ids).logits, stock(ids).logits) <= TOLERANCE


def test_gradients_are_stocks():
    for name, values in FAMILIES:
        model, stock = twins(bertgpt, name, values)
        ids = random_ids(3, 8)
        for each in (model, stock):
            each(ids, labels=ids).loss.backward()
        ours = model.get_input_embeddings().weight.grad
        theirs = stock.get_input_embeddings().weight.grad
        assert largest_difference(ours, theirs) <= TOLERANCE * theirs.abs().max()


RATES = {
    "OpenAIGPTModel": ("embd_pdrop", "resid_pdrop", "attn_pdrop"),
    "GPTNeoModel": ("embed_dropout", "resid_dropout", "attention_dropout"),
}


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize(("name", "values"), BODIES)
def test_dropout_falls_where_stocks_does(name, values, which):
    """At probability 1 nothing is left to chance: what dropout acts on is 0 in both."""
    rates = {rate: float(i == which) for i, rate in enumerate(RATES[name])}
    model, stock = twins(bertgpt, name, {**values, **rates})
    ids = random_ids(2, 6)
    ours, theirs = model.train()(ids)[0], stock.train()(ids)[0]
    assert largest_difference(ours, theirs) <= TOLERANCE
    assert largest_difference(ours, stock.eval()(ids)[0]) > 100 * TOLERANCE


def test_a_local_layer_sees_its_window_only():
    values = {**NEO, "attention_types": [[["local"], 3]]}
    model, _ = twins(bertgpt, "GPTNeoModel", values)
    ids = random_ids(1, 20)
    changed = ids.clone()
    changed[0, 3] += 1
    moved = (model(ids)[0] - model(changed)[0]).abs().amax(-1)[0]
    assert moved[:3].max() == 0
    assert moved[3:10].min() > 0  # three layers of a token and the two before it: six tokens on
    assert moved[10:].max() == 0


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("OpenAIGPTModel", {"afn": "relu"}, "afn='relu'.*choose one of gelu"),
        ("OpenAIGPTModel", {"n_head": 3}, "num_attention_heads=3"),
        ("GPTNeoModel", {"num_layers": 4}, "attention_types.*3 layers a kind, and num_layers is 4"),
        ("GPTNeoModel", {"attention_types": [[["far"], 3]]}, "attention_types.*must hold pairs"),
        ("GPTNeoModel", {"attention_types": [3]}, "attention_types=.*must hold pairs"),
        ("GPTNeoModel", {"window_size": 0}, "window_size=0"),
        ("GPTNeoModel", {"activation_function": "relu"}, "activation_function='relu'"),
        ("GPTNeoModel", {"resid_dropout": 1.5}, "resid_dropout=1.5.*probability"),
    ],
)
def test_what_a_configuration_asks_in_vain_is_named(name, values, message):
    family = getattr(bertgpt, name)
    base = GPT1 if name == "OpenAIGPTModel" else NEO
    with pytest.raises(ValueError, match=message):
        family(family.config_class(**{**base, **values}))


def test_arguments_in_vain_are_named():
    model, _ = twins(bertgpt, "GPTNeoForCausalLM", NEO)
    ids = random_ids(1, 3)
    for argument in ({"past_key_values": ()}, {"use_cache": True}, {"output_attentions": True}):
        with pytest.raises(ValueError, match=next(iter(argument))):
            model(ids, **argument)
    model, _ = twins(bertgpt, "OpenAIGPTLMHeadModel", GPT1)
    with pytest.raises(ValueError, match="output_attentions"):
        model(ids, output_attentions=True)
    with pytest.raises(ValueError, match="room for 20 more"):
        model.generate([[3] * 4], 21)


def test_a_configuration_of_another_family_is_named(tmp_path):
    bertgpt.GPTNeoConfig(**NEO).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "gpt_neo"
    with pytest.raises(ValueError, match="model_type is 'gpt_neo', not 'openai-gpt'"):
        bertgpt.OpenAIGPTConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(("name", "values"), FAMILIES)
def test_the_engine_writes_what_generate_writes(name, values):
    """Prompts in chunks of eight tokens, wider than the local layers' window."""
    model, _ = twins(bertgpt, name, values)
    rows = [random_ids(n).tolist() for n in (7, 1, 12, 17)]
    engine = bertgpt.Engine(model, num_pages=12, page_size=8, prefill_tokens=8)
    expected = model.generate(rows, 6, eos_token_id=())
    assert engine.generate(rows, 6, eos_token_id=()) == expected
