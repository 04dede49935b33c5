"""The command line: what it prints, what it writes, and how it says that the caller is wrong."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bertgpt import cli, doctor, validate
from bertgpt.bert import BertConfig, BertModel

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "bank", "raised", "rates", "goal"]
CLS, SEP = WORDS.index("[CLS]"), WORDS.index("[SEP]")


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    folder = tmp_path / "bert"
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=12, initializer_range=0.5,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return folder


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    file = tmp_path / "lines.txt"
    file.write_text("a bank raised rates\n\na goal\n")
    return file


IDS = [[CLS, 5, 6, 7, 8, SEP], [CLS, SEP], [CLS, 5, 9, SEP]]
POOL = {"cls": lambda h: h[0], "mean": lambda h: h.mean(0), "max": lambda h: h.amax(0)}


def _expected(folder: Path, pooling: str, normalise: bool) -> np.ndarray:
    """Each line alone, pooled by hand."""
    model = BertModel.from_pretrained(folder)
    with torch.no_grad():
        rows = [POOL[pooling](model(torch.tensor([ids])).last_hidden_state[0]) for ids in IDS]
    vectors = torch.stack(rows)
    return (vectors / vectors.norm(dim=1, keepdim=True) if normalise else vectors).numpy()


def _describe(folder: Path, pooling: dict, normalise: bool) -> None:
    """Adds the files by which sentence-transformers says how to pool."""
    kinds = ["Transformer", "Pooling"] + ["Normalize"] * normalise
    modules = [
        {"type": f"sentence_transformers.models.{kind}", "path": f"{i}_{kind}" if i else ""}
        for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))


def test_embed_takes_the_scaled_mean_of_a_plain_bert(run, bert, lines):
    code, out, err = run("embed", bert, lines, "--device", "cpu")
    assert code == 0, err
    found = np.loadtxt(out.splitlines())
    np.testing.assert_allclose(found, _expected(bert, "mean", True), atol=1e-5)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("pooling", list(POOL))
@pytest.mark.parametrize("style", ["switches", "name"])
def test_embed_pools_as_the_folder_says(run, bert, lines, tmp_path, pooling, normalise, style):
    switch = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens"}[pooling]
    switches = {"pooling_mode_mean_tokens": False, f"pooling_mode_{switch}": True}
    _describe(bert, switches if style == "switches" else {"pooling_mode": pooling}, normalise)
    output = tmp_path / "vectors.npy"
    code, out, err = run("embed", bert, lines, "--output", output, "--device", "cpu")
    assert (code, out) == (0, ""), err
    found = np.load(output)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, _expected(bert, pooling, normalise), atol=1e-5)


def test_a_line_ends_where_an_editor_ends_it(run, bert, tmp_path):
    text = tmp_path / "odd.txt"
    text.write_bytes("a\x0bbank\nrates\u2028goal\r\na\x0cgoal".encode())
    output = tmp_path / "odd.npy"
    assert run("embed", bert, text, "--output", output, "--device", "cpu")[0] == 0
    assert len(np.load(output)) == 3


def test_embed_keeps_the_old_file_until_the_new_one_is_whole(
    run, bert, lines, tmp_path, monkeypatch
):
    output = tmp_path / "vectors.npy"
    output.write_bytes(b"old")

    def full(file, vectors):
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(np, "save", full)
    code, _, err = run("embed", bert, lines, "--output", output, "--device", "cpu")
    assert code == 1
    assert "no space left" in err
    assert output.read_bytes() == b"old"
    assert [file.name for file in tmp_path.glob(".*partial")] == []


def test_embed_of_a_model_that_returns_tuples(run, bert, lines):
    _configure(bert, return_dict=False)
    assert run("embed", bert, lines, "--device", "cpu")[0] == 0


def test_embed_cuts_long_lines_and_says_so(run, bert, tmp_path):
    (bert / "sentence_bert_config.json").write_text('{"max_seq_length": 5}')
    long, short = tmp_path / "long.txt", tmp_path / "short.txt"
    long.write_text("a bank raised rates a goal\n")
    short.write_text("a bank raised\n")
    code, out, err = run("embed", bert, long, "--device", "cpu")
    assert code == 0
    assert "1 of 1 lines reach 5 tokens" in err
    assert out == run("embed", bert, short, "--device", "cpu")[1]


def _configure(folder: Path, **changed: object) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **changed}))


def _break(folder: Path, lines: Path, how: str) -> None:
    if how == "no tokenizer":
        (folder / "vocab.txt").unlink()
    elif how == "no weights":
        (folder / "model.safetensors").unlink()
    elif how == "no config":
        (folder / "config.json").unlink()
    elif how == "cut weights":
        whole = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    elif how == "other model":
        (folder / "config.json").write_text('{"model_type": "gpt2"}')
    elif how == "bad tokenizer":
        (folder / "tokenizer.json").write_text("{}")
    elif how == "bad modules":
        (folder / "modules.json").write_text("[{}]")
    elif how == "unknown module":
        _describe(folder, {"pooling_mode": "mean"}, False)
        file = folder / "modules.json"
        file.write_text(file.read_text().replace("Transformer", "Dense"))
    elif how == "unknown pooling":
        _describe(folder, {"pooling_mode_mean_sqrt_len_tokens": True}, False)
    elif how == "listed modules":
        (folder / "modules.json").write_text('{"type": 1}')
    elif how == "odd length":
        (folder / "sentence_bert_config.json").write_text('{"max_seq_length": "128"}')
    elif how == "listed settings":
        (folder / "sentence_bert_config.json").write_text("[128]")
    elif how == "odd tokenizer settings":
        (folder / "tokenizer_config.json").write_text('{"do_lower_case": "yes"}')
    elif how == "listed tokenizer settings":
        (folder / "tokenizer_config.json").write_text("[]")
    elif how == "listed pooling":
        _describe(folder, {"pooling_mode": ["mean"]}, False)
    elif how == "padding token":
        _configure(folder, pad_token_id=99999)
    elif how == "odd padding token":
        _configure(folder, pad_token_id="x")
    elif how == "odd tie":
        _configure(folder, tie_word_embeddings="no")
    elif how == "odd key":
        _configure(folder, __class__="x")
    elif how == "odd labels":
        _configure(folder, num_labels=2.5)
    elif how == "deep config":
        (folder / "config.json").write_text("[" * 100_000)
    elif how == "binary text":
        lines.write_bytes(b"\xff\xfe\x00")
    elif how == "empty text":
        lines.write_text("")


@pytest.mark.parametrize(
    ("how", "words"),
    {
        "no tokenizer": ("has no tokenizer", "vocab.txt"),
        "no weights": ("has no model.safetensors",),
        "no config": ("has no config.json",),
        "cut weights": ("model.safetensors is no whole safetensors file", "again"),
        "other model": ("config.json", "model_type is 'gpt2'; encoders are bert"),
        "bad tokenizer": ("tokenizer.json cannot be read",),
        "bad modules": ("modules.json must list",),
        "unknown module": ("modules.json asks for Dense",),
        "unknown pooling": ("1_Pooling/config.json asks to pool by", "mean_sqrt_len"),
        "listed modules": ("modules.json must hold a JSON list",),
        "odd length": ("sentence_bert_config.json", "max_seq_length", "'128'"),
        "listed settings": ("sentence_bert_config.json must hold a JSON object",),
        "odd tokenizer settings": ("tokenizer_config.json", "do_lower_case", "'yes'"),
        "listed tokenizer settings": ("tokenizer_config.json must hold a JSON object",),
        "listed pooling": ("1_Pooling/config.json asks to pool by",),
        "padding token": ("pad_token_id=99999", "the vocabulary has"),
        "odd padding token": ("pad_token_id='x'", "token id"),
        "odd tie": ("tie_word_embeddings='no'", "true or false"),
        "odd key": ("config.json", "'__class__' is no field"),
        "odd labels": ("config.json", "num_labels", "2.5"),
        "deep config": ("config.json is not valid JSON",),
        "binary text": ("lines.txt is not UTF-8", "convert"),
        "empty text": ("lines.txt holds no text",),
    }.items(),
)
def test_embed_names_what_is_wrong(run, bert, lines, how, words):
    _break(bert, lines, how)
    code, out, err = run("embed", bert, lines, "--device", "cpu")
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert all(word in err for word in words), err


@pytest.mark.parametrize(
    "arguments",
    [
        ("embed",),
        ("embed", "{bert}", "absent.txt"),
        ("embed", "absent", "{lines}"),
        ("embed", "{bert}", "{lines}", "--output", "vectors.txt"),
        ("embed", "{bert}", "{lines}", "--output", "no/such/folder/vectors.npy"),
        ("embed", "{bert}", "{lines}", "--device", "abacus"),
        ("embed", "{bert}", "{lines}", "--device", "meta"),
        ("juggle",),
    ],
)
def test_a_wrong_command_line_exits_with_2(run, bert, lines, arguments):
    code, out, err = run(*(a.format(bert=bert, lines=lines) for a in arguments))
    assert (code, out) == (2, "")
    assert "Usage:" in err
    assert "Traceback" not in err


def test_validate_fails_when_a_row_does(run, monkeypatch):
    asked = []

    def measured(op, device):
        asked.append((op, device))
        return rows

    monkeypatch.setattr(validate, "run", measured)
    rows = [validate.Row("attention", "torch", "fp32", cases=1)]
    assert run("validate", "--op", "attention", "--device", "cpu")[0] == 0
    assert asked == [("attention", "cpu")]
    rows.append(validate.Row("attention", "torch", "fp16", cases=1, failures=["too far"]))
    code, out, _ = run("validate")
    assert code == 1
    assert "too far" in out


def test_validate_names_an_unknown_op(run):
    code, _, err = run("validate", "--op", "convolution")
    assert code == 1
    assert "unknown op 'convolution'" in err


def test_doctor_covers_every_op_and_refusal(run):
    code, out, _ = run("doctor")
    assert code == 0
    for word in ("Python", "torch", "triton", "GPU", "nvcc", "C compiler", "Refusals"):
        assert word in out
    for op in ("attention", "linear_gelu", "gelu_ffn", "add_layer_norm"):
        assert op in out
    assert {e.op for e in doctor.explain_ops("cpu")} >= {"paged_write", "paged_attention"}
    assert "has no CUDA C++ kernel" in out


def test_doctor_says_what_is_missing_and_what_that_costs(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    findings = {finding.part: finding for finding in doctor.inspect_machine()}
    assert "pip install triton" in findings["triton"].cost
    assert "install gcc" in findings["C compiler"].cost
    assert "pip install tokenizers" in findings["tokenizers"].cost
    assert findings["nvcc"].cost == ""


def test_the_command_starts_without_torch():
    code = "import sys, bertgpt.cli; assert not {'torch', 'transformers'} & set(sys.modules)"
    root = Path(cli.__file__).parent.parent
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
