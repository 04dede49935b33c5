"""Folders of RoBERTa, ALBERT, DistilBERT and ERNIE: bit for bit both ways; stock's arguments."""

import inspect
import json
import warnings

import pytest
import torch
import transformers
from families import (
    BODIES,
    CONFIGS,
    NAMES,
    PAIRS,
    SEQUENCES,
    WORDS,
    family_of,
    family_twins,
)
from models import TOLERANCE, largest_difference, random_ids
from safetensors.torch import load_file, save_file

import bertgpt

WEIGHTS = "model.safetensors"


def assert_same_state(ours, theirs):
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert ours[name].equal(tensor), name


@pytest.mark.parametrize("name", NAMES)
def test_round_trips_are_bitwise(name, tmp_path):
    model, stock = family_twins(name)
    assert_same_state(model.state_dict(), stock.state_dict())
    model.save_pretrained(tmp_path / "ours")
    stock.save_pretrained(tmp_path / "stock")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing may be missing
        back = type(model).from_pretrained(tmp_path / "stock")
    assert_same_state(back.state_dict(), stock.state_dict())
    reread, report = type(stock).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    assert_same_state(reread.state_dict(), stock.state_dict())
    stored = [load_file(tmp_path / side / WEIGHTS).keys() for side in ("ours", "stock")]
    assert stored[0] == stored[1]  # tied weights are stored once
    auto = transformers.AutoConfig.from_pretrained(tmp_path / "ours")
    assert type(auto) is stock.config_class
    ids = random_ids(2, 2, 5) if "Choice" in name else random_ids(2, 5)
    assert largest_difference(back(ids)[0], reread(ids)[0]) <= TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_forward_takes_stocks_arguments_in_stocks_order(name):
    def arguments(model_class):
        return [n for n in inspect.signature(model_class.forward).parameters if n != "kwargs"]

    stock = arguments(getattr(transformers, name))
    found = arguments(getattr(bertgpt, name))
    assert found[: len(stock)] == stock
    # What stock takes as keywords.
    assert {"output_attentions", "output_hidden_states", "return_dict"} <= {*found[len(stock) :]}


@pytest.mark.parametrize("name", [*CONFIGS, "XLMRoberta", "Camembert"])
def test_our_defaults_are_stocks(name):
    ours = getattr(bertgpt, f"{name}Config")()
    theirs = getattr(transformers, f"{name}Config")()
    for field, value in ours.to_dict().items():
        if field not in ("position_embedding_type", "output_attentions", "id2label", "label2id"):
            assert value == getattr(theirs, field), field


@pytest.mark.parametrize("family", CONFIGS)
def test_a_bare_checkpoint_fills_a_head_and_the_reverse(family, tmp_path):
    bare, _ = family_twins(f"{family}Model")
    bare.save_pretrained(tmp_path / "bare")
    head_class = getattr(bertgpt, f"{family}ForMaskedLM")
    with pytest.warns(UserWarning, match="has no weights for .*dense|vocab_transform"):
        headed = head_class.from_pretrained(tmp_path / "bare")
    words = headed.get_input_embeddings().weight
    assert words.equal(bare.get_input_embeddings().weight)  # also where the decoder is tied to it
    assert headed.get_output_embeddings().weight is words
    headed.save_pretrained(tmp_path / "headed")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*has no weights for pooler")
        again = type(bare).from_pretrained(tmp_path / "headed")
    kept = {k: v for k, v in bare.state_dict().items() if not k.startswith("pooler.")}
    assert_same_state({k: v for k, v in again.state_dict().items() if k in kept}, kept)
    classes = getattr(bertgpt, f"{family}ForSequenceClassification")
    with pytest.warns(UserWarning, match="classifier"):
        fresh = classes.from_pretrained(tmp_path / "bare", num_labels=4)
    assert fresh(random_ids(2, 5)).logits.shape == (2, 4)


@pytest.mark.parametrize("name", [*WORDS, *PAIRS])
def test_decoders_stored_apart_stay_apart(name, tmp_path):
    model, stock = family_twins(name, tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    back = type(model).from_pretrained(tmp_path)
    assert_same_state(back.state_dict(), stock.state_dict())
    assert back.get_output_embeddings().weight is not back.get_input_embeddings().weight


@pytest.mark.parametrize("kind", ["XLMRoberta", "Camembert"])
@pytest.mark.parametrize("head", ["Model", "ForMaskedLM", "ForSequenceClassification"])
def test_xlm_r_and_camembert_are_roberta_by_another_name(kind, head, tmp_path):
    stock_class = getattr(transformers, f"{kind}{head}")
    config = stock_class.config_class(**CONFIGS["Roberta"], attn_implementation="eager")
    stock = stock_class(config).eval()
    stock.save_pretrained(tmp_path / "stock")
    model = getattr(bertgpt, f"Roberta{head}").from_pretrained(tmp_path / "stock")
    assert type(model.config) is getattr(bertgpt, f"{kind}Config")
    ids = random_ids(3, 9)
    assert largest_difference(model(ids)[0], stock(ids)[0]) <= TOLERANCE
    model.save_pretrained(tmp_path / "ours")
    again, report = stock_class.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    assert_same_state(again.state_dict(), stock.state_dict())
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert written["model_type"] == config.model_type


def test_another_familys_folder_is_named(tmp_path):
    bertgpt.RobertaConfig(**CONFIGS["Roberta"]).save_pretrained(tmp_path)
    for family in ("Albert", "DistilBert", "Ernie", "Bert", "XLMRoberta"):
        with pytest.raises(ValueError, match="model_type is 'roberta', not"):
            getattr(bertgpt, f"{family}Config").from_pretrained(tmp_path)


@pytest.mark.parametrize("name", BODIES)
def test_files_of_older_versions_load_whole(name, tmp_path):
    """They hold buffers and old names of norms."""
    _, stock = family_twins(name)
    stock.save_pretrained(tmp_path)
    state = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): value
        for key, value in load_file(tmp_path / WEIGHTS).items()
    }
    state["embeddings.position_ids"] = torch.arange(20)[None]
    state["embeddings.token_type_ids"] = torch.zeros(1, 20, dtype=torch.long)
    save_file(state, tmp_path / WEIGHTS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = getattr(bertgpt, name).from_pretrained(tmp_path)
    assert_same_state(model.state_dict(), stock.state_dict())


@pytest.mark.parametrize("name", BODIES)
def test_layers_that_are_not_stored_are_named(name, tmp_path):
    model, _ = family_twins(name)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    fields = {"Albert": ["num_hidden_groups", "inner_group_num"], "DistilBert": ["n_layers"]}
    for field in fields.get(family_of(name), ["num_hidden_layers"]):
        changed = {**config, field: 10**9}
        (tmp_path / "config.json").write_text(json.dumps(changed))
        stored = len(model.layers)
        with pytest.raises(ValueError, match=f"holds {stored} layers, but config.json asks for"):
            type(model).from_pretrained(tmp_path)


@pytest.mark.parametrize("name", SEQUENCES)
def test_weights_start_as_stock_starts_them(name):
    family = family_of(name)
    more = {"dim": 192} if family == "DistilBert" else {"hidden_size": 192}
    config = getattr(bertgpt, name).config_class(**{**CONFIGS[family], **more})
    model = getattr(bertgpt, name)(config)
    padding = config.pad_token_id
    embeddings = model.base_model.embeddings
    assert embeddings.word_embeddings.weight[padding].eq(0).all()
    assert embeddings.position_embeddings.weight[padding].eq(0).all() == (family == "Roberta")
    assert model.classifier.weight.std().item() == pytest.approx(0.3, rel=0.2)
    for layer in model.base_model.layers:
        assert layer.attention.qkv.weight.std().item() == pytest.approx(0.3, rel=0.05)
        assert layer.feed_forward_norm.weight.eq(1).all()
