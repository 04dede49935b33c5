"""Hugging Face folders: bitwise both ways, and every kind of broken one refused by name."""

import inspect
import json
import warnings

import pytest
import torch
import transformers
from models import BERT, GPT2, largest_difference, needs_minilm, random_ids, twins
from safetensors.torch import load_file, save_file

from bertgpt import bert, checkpoint, demo_data, gpt

HEADS = [
    *((bert, name, BERT) for name in bert.__all__ if name.startswith(("BertFor", "BertModel"))),
    *((gpt, name, GPT2) for name in gpt.__all__ if name in ("GPT2LMHeadModel", "GPT2Model")),
    (gpt, "GPT2ForSequenceClassification", GPT2),
]
WEIGHTS = "model.safetensors"


def assert_same_state(ours, theirs):
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        assert ours[name].equal(tensor), name


@pytest.mark.parametrize(("ours", "name", "values"), HEADS, ids=lambda value: str(value)[:40])
def test_round_trips_are_bitwise(ours, name, values, tmp_path):
    model, stock = twins(ours, name, values)
    assert_same_state(model.state_dict(), stock.state_dict())
    model.save_pretrained(tmp_path / "ours")
    stock.save_pretrained(tmp_path / "stock")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing may be missing
        back = type(model).from_pretrained(tmp_path / "stock")
    assert_same_state(back.state_dict(), stock.state_dict())
    assert not back.training
    reread, report = type(stock).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    assert_same_state(reread.state_dict(), stock.state_dict())
    assert (
        load_file(tmp_path / "ours" / WEIGHTS).keys()
        == load_file(tmp_path / "stock" / WEIGHTS).keys()
    )  # tied weights are stored once


@pytest.mark.parametrize(("ours", "name", "values"), HEADS, ids=lambda value: str(value)[:40])
def test_forward_takes_stocks_arguments_in_stocks_order(ours, name, values):
    def arguments(model_class):
        return [n for n in inspect.signature(model_class.forward).parameters if n != "kwargs"]

    stock = arguments(getattr(transformers, name))
    found = arguments(getattr(ours, name))
    assert found[: len(stock)] == stock
    # What stock takes as keywords.
    assert {"output_attentions", "output_hidden_states", "return_dict"} <= {*found[len(stock) :]}


def test_our_own_state_loads_where_it_came_from():
    model, _ = twins(gpt, "GPT2LMHeadModel", GPT2)
    other = gpt.GPT2LMHeadModel(gpt.GPT2Config(**GPT2))
    assert str(other.load_state_dict(model.state_dict())) == "<All keys matched successfully>"
    assert_same_state(other.state_dict(), model.state_dict())
    with pytest.raises(RuntimeError, match="wrong"):
        other.load_state_dict({**model.state_dict(), "transformer.h.0.wrong": torch.ones(1)})


def test_configuration_survives_with_keys_unknown_here(tmp_path):
    values = {
        **BERT,
        "id2label": {"0": "no", "1": "yes", "2": "maybe"},
        "label2id": {"no": 0, "yes": 1, "maybe": 2},
        "problem_type": "single_label_classification",
        "made_up": {"kept": [1]},
    }
    config = bert.BertConfig.from_dict({**values, "model_type": "bert"})
    assert (config.num_labels, config.made_up) == (3, {"kept": [1]})
    bert.BertForSequenceClassification(config).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert {key: written[key] for key in values} == values
    assert written["architectures"] == ["BertForSequenceClassification"]
    assert (written["model_type"], written["dtype"]) == ("bert", "float32")
    assert transformers.AutoConfig.from_pretrained(tmp_path).id2label[2] == "maybe"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert model.classifier.weight.shape == (3, 24)


def test_our_defaults_are_stocks():
    for ours, theirs in ((bert.BertConfig(), transformers.BertConfig()),
                         (gpt.GPT2Config(), transformers.GPT2Config())):  # fmt: skip
        for name, value in ours.to_dict().items():
            if name not in ("position_embedding_type", "output_attentions", "id2label", "label2id"):
                assert value == getattr(theirs, name), name


@needs_minilm
def test_the_real_checkpoint_loads_whole():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = bert.BertModel.from_pretrained(demo_data.minilm_folder())
    stored = load_file(demo_data.minilm_folder() / WEIGHTS)
    state = model.state_dict()
    assert stored.keys() - state.keys() == {"embeddings.position_ids"}
    assert all(state[name].equal(stored[name]) for name in state)


def test_a_bare_checkpoint_fills_a_head_and_the_reverse(tmp_path):
    bare, _ = twins(bert, "BertModel", BERT)
    bare.save_pretrained(tmp_path / "bare")
    with pytest.warns(UserWarning, match=r"classifier\.weight, classifier\.bias"):
        headed = bert.BertForSequenceClassification.from_pretrained(tmp_path / "bare", num_labels=4)
    assert headed.classifier.weight.shape == (4, 24)
    assert 0.1 < headed.classifier.weight.std() < 0.5  # config.initializer_range is 0.3
    assert_same_state(headed.bert.state_dict(), bare.state_dict())
    headed.save_pretrained(tmp_path / "headed")
    assert_same_state(
        bert.BertModel.from_pretrained(tmp_path / "headed").state_dict(), bare.state_dict()
    )


def test_a_missing_pooler_starts_fresh_and_ties_stay(tmp_path):
    masked, _ = twins(bert, "BertForMaskedLM", BERT)
    masked.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"pooler\.dense\.weight, pooler\.dense\.bias"):
        model = bert.BertModel.from_pretrained(tmp_path)
    assert model.pooler.bias.eq(0).all()
    with pytest.warns(UserWarning, match="seq_relationship"):
        whole = bert.BertForPreTraining.from_pretrained(tmp_path)
    words = whole.get_input_embeddings().weight
    assert words.equal(masked.get_input_embeddings().weight)
    assert whole.get_output_embeddings().weight is words


def test_old_names_and_buffers(tmp_path):
    model, _ = twins(bert, "BertModel", BERT)
    model.save_pretrained(tmp_path)
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for name, tensor in load_file(tmp_path / WEIGHTS).items()
    }
    assert any("gamma" in name for name in old)
    save_file({**old, "embeddings.position_ids": torch.arange(20)}, tmp_path / WEIGHTS)
    assert_same_state(bert.BertModel.from_pretrained(tmp_path).state_dict(), model.state_dict())


def test_decoder_stored_apart_stays_apart(tmp_path):
    model, _ = twins(gpt, "GPT2LMHeadModel", GPT2, tie_word_embeddings=False)
    model.config.tie_word_embeddings = True  # as some checkpoints wrongly say
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path)
    save_file(state, tmp_path / WEIGHTS, metadata={"format": "pt"})
    again = gpt.GPT2LMHeadModel.from_pretrained(tmp_path)
    stock = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    ids = random_ids(1, 5)
    assert largest_difference(again(ids).logits, stock(ids).logits) <= 1e-4
    assert again.config.tie_word_embeddings is False


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtypes(dtype, tmp_path):
    model, _ = twins(bert, "BertModel", BERT)
    model.to(dtype).save_pretrained(tmp_path)
    assert bert.BertModel.from_pretrained(tmp_path).dtype == dtype
    assert bert.BertModel.from_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32
    assert transformers.BertModel.from_pretrained(tmp_path).dtype == dtype


def test_dtypes_by_name(tmp_path):
    model, _ = twins(bert, "BertModel", BERT)
    model.half().save_pretrained(tmp_path)
    for name, dtype in (("bfloat16", torch.bfloat16), ("auto", torch.float16)):
        assert bert.BertModel.from_pretrained(tmp_path, dtype=name).dtype == dtype
    for wrong in ("half", torch.int8, 16):
        with pytest.raises(TypeError, match=r"dtype=.*choose one of float32"):
            bert.BertModel.from_pretrained(tmp_path, dtype=wrong)


def test_layers_that_the_config_has_no_place_for_are_named(tmp_path):
    deep, _ = twins(bert, "BertForMaskedLM", BERT)
    deep.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*start fresh")
        for loaded in (bert.BertModel, bert.BertForTokenClassification):
            with pytest.warns(UserWarning, match=r"holds bert\.encoder\.layer\.1\..* left out"):
                shallow = loaded.from_pretrained(tmp_path, num_hidden_layers=1)
            assert len(shallow.base_model.layers) == 1
        warnings.filterwarnings("error", message=".*left out")  # another model's head is no surplus
        bert.BertForTokenClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["safetensors", "pickle"])
def test_shards(kind, tmp_path):
    model, stock = twins(gpt, "GPT2LMHeadModel", GPT2)
    if kind == "safetensors":
        stock.save_pretrained(tmp_path, max_shard_size="20KB")
    else:
        model.config.save_pretrained(tmp_path)
        state = list(model.state_dict().items())
        parts = {"pytorch_model-1.bin": dict(state[::2]), "pytorch_model-2.bin": dict(state[1::2])}
        for name, part in parts.items():
            torch.save(part, tmp_path / name)
        where = {key: name for name, part in parts.items() for key in part}
        index = tmp_path / "pytorch_model.bin.index.json"
        index.write_text(json.dumps({"weight_map": where}))
    assert not (tmp_path / WEIGHTS).exists()
    back = gpt.GPT2LMHeadModel.from_pretrained(tmp_path, allow_pickle=kind == "pickle")
    assert_same_state(back.state_dict(), stock.state_dict())


@pytest.fixture
def folder(tmp_path):
    twins(bert, "BertModel", BERT)[0].save_pretrained(tmp_path)
    return tmp_path


def change(folder, edit):
    state = load_file(folder / WEIGHTS)
    edit(state)
    save_file(state, folder / WEIGHTS)


def no_config(folder):
    (folder / "config.json").unlink()


def broken_config(folder):
    (folder / "config.json").write_text("{")


def listed_config(folder):
    (folder / "config.json").write_text("[]")


def other_model(folder):
    (folder / "config.json").write_text('{"model_type": "gpt2"}')


def no_weights(folder):
    (folder / WEIGHTS).unlink()


def truncated(folder):
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:-7])


def truncated_header(folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:50])


def huge_header(folder):
    (folder / WEIGHTS).write_bytes((2**62).to_bytes(8, "little") + b"{}")


def empty_file(folder):
    (folder / WEIGHTS).write_bytes(b"")


def misshapen(folder):
    change(folder, lambda state: state.update({"pooler.dense.weight": torch.ones(24, 23)}))


def quantised(folder):
    weight = torch.ones(24, 24, dtype=torch.int8)
    change(folder, lambda state: state.update({"pooler.dense.weight": weight}))


def incomplete(folder):
    change(folder, lambda state: state.pop("encoder.layer.1.attention.self.key.bias"))


def endless(folder):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "num_hidden_layers": 10**9}))


def only_a_pickle(folder):
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    no_weights(folder)


def shard_missing(folder):
    no_weights(folder)
    index = {"weight_map": {"pooler.dense.weight": "model-00001-of-00002.safetensors"}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


def shard_outside(folder):
    (folder / WEIGHTS).rename(folder / "elsewhere")
    index = {"weight_map": {"pooler.dense.weight": "../elsewhere"}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


def index_without_map(folder):
    no_weights(folder)
    (folder / f"{WEIGHTS}.index.json").write_text("{}")


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (no_config, FileNotFoundError, "config.json"),
        (broken_config, ValueError, "config.json is not valid JSON"),
        (listed_config, ValueError, "JSON object"),
        (other_model, ValueError, "config.json: .*model_type is 'gpt2'"),
        (no_weights, FileNotFoundError, "no model.safetensors"),
        (truncated, ValueError, "model.safetensors is no whole safetensors"),
        (truncated_header, ValueError, "model.safetensors is no whole safetensors"),
        (huge_header, ValueError, "model.safetensors is no whole safetensors"),
        (empty_file, ValueError, "model.safetensors is no whole safetensors"),
        (misshapen, ValueError, r"pooler.dense.weight has shape \[24, 23\].*\[24, 24\]"),
        (quantised, ValueError, "pooler.dense.weight is not float"),
        (incomplete, ValueError, "lacks encoder.layer.1.attention.self.key.bias"),
        (endless, ValueError, "holds 2 layers, but config.json asks for 1000000000"),
        (only_a_pickle, ValueError, "allow_pickle=True"),
        (shard_missing, FileNotFoundError, "no model-00001-of-00002.safetensors"),
        (shard_outside, ValueError, "not a file of its own folder"),
        (index_without_map, ValueError, "weight_map"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_broken_folders_are_refused_by_name(folder, spoil, error, message):
    spoil(folder)
    with pytest.raises(error, match=message):
        bert.BertModel.from_pretrained(folder)


def test_a_pickle_with_code_in_it_is_not_run(folder, tmp_path):
    class Bomb:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    no_weights(folder)
    torch.save({"pooler.dense.bias": Bomb()}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin"):
        bert.BertModel.from_pretrained(folder, allow_pickle=True)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["no/such/folder", "./nothing", "/nothing/here"])
def test_a_path_that_is_no_folder(name):
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        bert.BertModel.from_pretrained(name)


def test_an_id_that_the_hub_cannot_give_offline():
    with pytest.raises(FileNotFoundError, match="no-one/no-model is neither"):
        bert.BertModel.from_pretrained("no-one/no-model")


def test_an_unknown_override_is_named(folder):
    with pytest.raises(TypeError, match="hidden_sizes"):
        bert.BertModel.from_pretrained(folder, hidden_sizes=3)
    with pytest.raises(TypeError, match="'torch_dtype' is no field of BertConfig: it is called dt"):
        bert.BertModel.from_pretrained(folder, torch_dtype="float16")


def test_a_config_and_overrides_exclude_each_other(folder):
    config = bert.BertConfig.from_pretrained(folder)
    for wrong in ({"config": config, "num_labels": 5}, {"config": {"a": 1}}):
        with pytest.raises(TypeError, match="config must be a BertConfig and alone"):
            bert.BertModel.from_pretrained(folder, **wrong)


def test_saving_replaces_whole_files(folder):
    before = {file.name for file in folder.iterdir()}
    bert.BertModel.from_pretrained(folder).save_pretrained(folder)
    assert {file.name for file in folder.iterdir()} == before == {"config.json", WEIGHTS}


def test_every_named_tensor_is_read_from_its_header_first(folder, monkeypatch):
    """A model that does not fit is refused before any tensor's data is read."""
    misshapen(folder)
    monkeypatch.setattr(checkpoint, "read_tensors", lambda entries: pytest.fail("data was read"))
    with pytest.raises(ValueError, match="pooler"):
        bert.BertModel.from_pretrained(folder)


def test_a_config_that_json_cannot_hold_leaves_no_folder(tmp_path):
    model = bert.BertModel(bert.BertConfig(**BERT, extra={1, 2}))
    with pytest.raises(TypeError, match="configuration's extra cannot be saved"):
        model.save_pretrained(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
