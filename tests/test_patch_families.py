"""The other families that patching knows, against stock: outputs, gradients, and the way back."""

import pytest
import torch
from models import TOLERANCE
from patching import (
    SIDES,
    assert_close,
    assert_same_gradients,
    assert_same_state,
    build,
    frozen,
    gradients,
    inputs_for,
    ragged,
    rows_seen,
)

import bertgpt

SMALL = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 20,
    "initializer_range": 0.3,
}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
DISTIL = {
    "vocab_size": 61,
    "dim": 24,
    "n_layers": 3,
    "n_heads": 3,
    "hidden_dim": 40,
    "max_position_embeddings": 20,
    "initializer_range": 0.3,
}
GPT = {"vocab_size": 61, "n_positions": 20, "n_embd": 24, "n_layer": 3, "n_head": 3}
NEO = {
    "vocab_size": 61,
    "max_position_embeddings": 20,
    "hidden_size": 24,
    "num_layers": 3,
    "attention_types": [[["global", "local"], 1], [["local"], 1]],
    "num_heads": 3,
    "intermediate_size": 40,
    "window_size": 3,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
HEADS = {
    "Model": "",
    "ForMaskedLM": "",
    "ForSequenceClassification": "",
    "ForTokenClassification": "",
    "ForQuestionAnswering": "",
    "ForMultipleChoice": "",
}
ROBERTA = {**SMALL, "max_position_embeddings": 24, "pad_token_id": 0}
# Prefix of the class names: configuration, what silences dropout, and heads beyond the usual.
FAMILIES = {
    "Roberta": (ROBERTA, STILL, ()),
    "XLMRoberta": (ROBERTA, STILL, ()),
    "Camembert": (ROBERTA, STILL, ()),
    "Electra": (
        {**SMALL, "embedding_size": 16},
        {**STILL, "classifier_dropout": 0.0, "summary_last_dropout": 0.0},
        ("ForPreTraining",),
    ),
    "Ernie": (SMALL, STILL, ("ForPreTraining", "ForNextSentencePrediction")),
    "DistilBert": (
        DISTIL,
        {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0, "qa_dropout": 0.0},
        (),
    ),
    "Albert": (
        {**SMALL, "embedding_size": 16, "num_hidden_groups": 2, "num_hidden_layers": 4},
        {**STILL, "classifier_dropout_prob": 0.0},
        ("ForPreTraining",),
    ),
    "MPNet": ({**SMALL, "max_position_embeddings": 24}, STILL, ()),
}
ENCODERS = [
    f"{family}{head}"
    for family, (_, _, more) in FAMILIES.items()
    for head in ("Model", "ForSequenceClassification", *more)
] + [f"{family}{head}" for family in ("Roberta", "DistilBert", "Albert", "MPNet") for head in HEADS]
DECODERS = {
    "GPTNeoModel": NEO,
    "GPTNeoForCausalLM": NEO,
    "GPTNeoForSequenceClassification": NEO,
    "GPTNeoForTokenClassification": NEO,
    "OpenAIGPTModel": GPT,
    "OpenAIGPTLMHeadModel": GPT,
    "OpenAIGPTForSequenceClassification": {**GPT, "pad_token_id": 0},
}
SILENT = {
    "GPTNeo": {"resid_dropout": 0.0, "embed_dropout": 0.0, "attention_dropout": 0.0},
    "OpenAI": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}


def encoder(name, **extra):
    family = max((f for f in FAMILIES if name.startswith(f)), key=len)
    values, silent, _ = FAMILIES[family]
    attention = "eager" if family == "MPNet" else "sdpa"
    count = 2 if name == "AlbertForPreTraining" else 3
    return build(name, attention, **{**values, **silent, "num_labels": count, **extra})


def decoder(name, **extra):
    silent = next(v for k, v in SILENT.items() if name.startswith(k))
    model = build(name, "eager", **{**DECODERS[name], **silent, "num_labels": 3, **extra})
    if name.startswith("OpenAI"):
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("name", sorted(set(ENCODERS)))
def test_encoders(name):
    for side in SIDES:
        model, inputs = encoder(name), inputs_for(name, side)
        stock = model(**inputs)
        bertgpt.patch(model)
        with rows_seen() as seen:
            assert_close(model(**inputs), stock, inputs["attention_mask"])
        assert seen
        assert all(len(shape) == 1 for shape in seen), "padded tokens went through the layers"


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_and_state(family):
    name = f"{family}ForMaskedLM"
    model, inputs = encoder(name).train(), inputs_for(name, "left")
    state, expected = frozen(model), gradients(model, inputs)
    classes = [type(module) for module in model.modules()]
    report = bertgpt.patch(model)
    assert report.skipped == ()
    assert_same_gradients(gradients(model, inputs), expected)
    bertgpt.unpatch(model)
    assert [type(module) for module in model.modules()] == classes
    assert_same_state(model, state)


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_and_hooks(family):
    model, inputs = encoder(f"{family}Model"), ragged("both")
    stock = model(**inputs, output_hidden_states=True)
    bertgpt.patch(model)
    everywhere = torch.ones_like(inputs["attention_mask"])
    assert_close(model(**inputs, output_hidden_states=True), stock, everywhere)
    linear = next(m for m in reversed(list(model.modules())) if isinstance(m, torch.nn.Linear))
    inner = {"Albert": "encoder.albert_layer_groups.0.albert_layers.0.ffn_output"}.get(family)
    hooked = linear if inner is None else model.get_submodule(inner)
    if family != "Albert" and hasattr(model, "encoder"):
        hooked = model.encoder.layer[1].output.dense
    shapes = []
    hooked.register_forward_hook(lambda m, i, o: shapes.append(o.shape[:2]))
    assert_close(model(**inputs), model(**inputs), everywhere)
    assert set(shapes) == {(4, 12)}


@pytest.mark.parametrize("name", DECODERS)
def test_decoders(name):
    for side in SIDES:
        model, inputs = decoder(name), inputs_for(name, side)
        stock = model(**inputs)
        bertgpt.patch(model)
        with rows_seen() as seen:
            ours = model(**inputs)
        assert_close(ours, stock, inputs["attention_mask"])
        windows = name.startswith("GPTNeo")  # they count the padding between tokens
        assert set(seen) == {(4, 12) if windows and side == "holes" else (24,)}
        bertgpt.unpatch(model)
        asked = {"output_hidden_states": True, "output_attentions": True}
        stock = model(**inputs, **asked)
        bertgpt.patch(model)
        assert_close(model(**inputs, **asked), stock, inputs["attention_mask"])


@pytest.mark.parametrize("name", ["GPTNeoForCausalLM", "OpenAIGPTLMHeadModel"])
def test_decoders_gradients_and_state(name):
    model, inputs = decoder(name).train(), inputs_for(name, "left")
    state, expected = frozen(model), gradients(model, inputs)
    bertgpt.patch(model)
    with rows_seen() as seen:
        ours = gradients(model, inputs)
    assert set(seen) == {(24,)}
    assert_same_gradients(ours, expected)
    bertgpt.unpatch(model)
    assert_same_state(model, state)


@pytest.mark.parametrize("name", ["GPTNeoForCausalLM", "OpenAIGPTLMHeadModel"])
@pytest.mark.parametrize("beams", [1, 3])
def test_decoders_generate(name, beams):
    model, inputs = decoder(name), ragged("left")
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    stock = model.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True)
    bertgpt.patch(model)
    ours = model.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True)
    assert torch.equal(ours.sequences, stock.sequences)
    for a, b in zip(ours.logits, stock.logits, strict=True):
        assert (a - b).abs().max() <= TOLERANCE
