"""`bertgpt generate`: ids, text as it comes, every option and family, and what is wrong."""

from pathlib import Path

import pytest
import typer
from test_cli import WORDS

from bertgpt.bert import BertConfig, BertModel
from bertgpt.generation import NewToken
from bertgpt.gpt import GPT2Config, GPT2LMHeadModel
from bertgpt.gpt_neo import GPTNeoConfig, GPTNeoForCausalLM
from bertgpt.openai_gpt import OpenAIGPTConfig, OpenAIGPTLMHeadModel
from bertgpt.text import StopStrings


@pytest.fixture
def gpt(tmp_path: Path) -> Path:
    folder = tmp_path / "gpt"
    config = GPT2Config(
        vocab_size=len(WORDS), n_embd=8, n_layer=1, n_head=2, n_positions=80,
        bos_token_id=None, eos_token_id=None, initializer_range=0.5,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def test_generate_continues_ids(run, gpt):
    code, out, err = run("generate", gpt, "--prompt-ids", "5,6", "--max-new-tokens", 7)
    assert code == 0, err
    expected = GPT2LMHeadModel.from_pretrained(gpt).generate([[5, 6]], 7)[0]
    assert [int(token) for token in out.strip().split(",")] == expected
    stop = expected[4]
    end = expected.index(stop, 2) + 1
    out = run("generate", gpt, "--prompt-ids", "5,6", "--stop-token", stop)[1]
    assert [int(token) for token in out.strip().split(",")] == expected[:end]


def test_generate_continues_text(run, gpt):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(gpt / "tokenizer.json"))
    code, out, err = run("generate", gpt, "--prompt", "a bank", "--max-new-tokens", 5)
    assert code == 0, err
    expected = GPT2LMHeadModel.from_pretrained(gpt).generate([[5, 6]], 5)[0]
    assert out.strip() == words.decode(expected)


def test_generate_adds_what_there_is_room_for_unless_told(run, gpt):
    prompt = ",".join("5" * 70)
    code, out, err = run("generate", gpt, "--prompt-ids", prompt)
    assert code == 0, err
    assert len(out.split(",")) == 80
    assert len(run("generate", gpt, "--prompt-ids", "5")[1].split(",")) == 65


def test_generate_takes_every_option(run, gpt):
    model = GPT2LMHeadModel.from_pretrained(gpt)
    drawn = {"temperature": 1.5, "top_k": 7, "top_p": 0.9, "min_p": 0.01, "seed": 3}
    drawn |= {"repetition_penalty": 1.2}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in drawn.items()]
    command = ("generate", gpt, "--prompt-ids", "5,6", "--max-new-tokens", 9, "--do-sample")
    for count in (1, 3):
        expected = model.generate([[5, 6]], 9, do_sample=True, num_return_sequences=count, **drawn)
        code, out, err = run(*command, *options, "--num-return-sequences", count)
        assert code == 0, err
        assert [[*map(int, line.split(","))] for line in out.split()] == expected
    assert run(*command)[1] != run(*command)[1]
    beams = {"num_beams": 3, "length_penalty": 0.5, "early_stopping": True}
    expected = model.generate([[5, 6]], 9, **beams, eos_token_id=[4, 7])
    options = ("--num-beams=3", "--length-penalty=0.5", "--early-stopping")
    options += ("--stop-token=4", "--stop-token=7", "--max-new-tokens=9")
    out = run("generate", gpt, "--prompt-ids", "5,6", *options)[1]
    assert [[*map(int, line.split(","))] for line in out.split()] == expected


@pytest.mark.parametrize("family", ["openai-gpt", "gpt_neo", "bert"])
def test_generate_takes_every_family(run, tmp_path, family):
    if family == "openai-gpt":
        shape = OpenAIGPTConfig(vocab_size=10, n_embd=8, n_layer=1, n_head=2, n_positions=20)
        model = OpenAIGPTLMHeadModel(shape).eval()
    elif family == "gpt_neo":
        shape = GPTNeoConfig(
            vocab_size=10, hidden_size=8, num_layers=2, num_heads=2, max_position_embeddings=20,
            attention_types=[[["global", "local"], 1]], window_size=4, eos_token_id=None,
        )  # fmt: skip
        model = GPTNeoForCausalLM(shape).eval()
    else:
        shape = BertConfig(vocab_size=10, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
        model = BertModel(shape)
    model.save_pretrained(tmp_path)
    code, out, err = run("generate", tmp_path, "--prompt-ids", "5,6")
    if family == "bert":
        assert (code, out) == (1, "")
        assert "model_type is 'bert'; text is written by gpt2, openai-gpt, gpt_neo" in err
    else:
        assert code == 0, err
        assert [[*map(int, out.split(","))]] == model.generate([[5, 6]], 18)


def test_generate_streams_text(run, gpt, monkeypatch):
    """Byte-level BPE whose characters may take several tokens; a stop string ends it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = dict.fromkeys([*"abcdefg", "\u00c3", "\u00a9", "\u0120"])
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    pairs = Tokenizer(models.BPE(vocabulary, []))
    pairs.pre_tokenizer, pairs.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    pairs.save(str(gpt / "tokenizer.json"))
    written = [0, 7, 8, 9, 1, 7, 8, 2, 3]

    def stream(model, prompts, **options):
        detector = StopStrings(options["tokenizer"], options["stop_strings"], prompts[0])
        for token in written:
            yield NewToken(0, token, None, None)
            if detector.push(token):
                return

    monkeypatch.setattr(GPT2LMHeadModel, "stream", stream)
    pieces = []
    monkeypatch.setattr(typer, "echo", lambda text="", **_: pieces.append(text))
    code, _, err = run("generate", gpt, "--prompt", "bad", "--stop-string", "\u00e9c")
    assert code == 0, err
    assert pieces == ["bad", "a", "", "\u00e9", " ", "b", "", "\u00e9", "c", "", ""]
    pieces.clear()
    written[:] = [0, 7]
    run("generate", gpt, "--prompt", "bad", "--stop-string", "x")
    assert "".join(pieces) == "bada\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--prompt", "a"), "has no tokenizer"),
        (("--prompt-ids", "99"), "input_ids"),
        (("--prompt-ids", "99999999999999999999"), "64 bits"),
        (("--prompt-ids", "1", "--max-new-tokens", "99"), "position table of 80"),
        (("--prompt-ids", ",".join("1" * 80)), "leaves room for 0 more"),
        (("--prompt-ids", "1", "--stop-token", "10"), "eos_token_id holds 10, outside"),
        (("--prompt-ids", "1", "--do-sample", "--top-p", "0"), "top_p must lie in (0, 1]"),
        (("--prompt-ids", "1", "--top-p", "0.5"), "top_p=0.5 goes with do_sample=True"),
        (("--prompt-ids", "1", "--seed", "3"), "seed=3 goes with do_sample=True"),
        (("--prompt-ids", "1", "--num-return-sequences", "2"), "goes with do_sample=True or"),
        (("--prompt-ids", "1", "--num-beams", "2", "--do-sample"), "exclude each other"),
    ],
)
def test_generate_names_what_is_wrong(run, gpt, arguments, words):
    code, out, err = run("generate", gpt, *arguments)
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert words in err


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--prompt", "a", "--prompt-ids", "1"),
        ("--prompt-ids", "1,two"),
        ("--prompt-ids", "1", "--max-new-tokens", "0"),
        ("--prompt-ids", "1", "--stop-string", "a"),
        ("--prompt-ids", "1", "--length-penalty", "2"),
        ("--prompt-ids", "1", "--early-stopping"),
    ],
)
def test_a_wrong_command_line_exits_with_2(run, gpt, arguments):
    code, out, err = run("generate", gpt, *arguments)
    assert (code, out) == (2, "")
    assert "Usage:" in err
    assert "Traceback" not in err
