"""`bertgpt pretrain`: text in, a folder that stock transformers loads out; and what it refuses."""

import json
import random
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers

pytest.importorskip("accelerate")

from models import BERT, needs_minilm

from bertgpt import BertForPreTraining, cli, pack
from bertgpt.benchmarks import train_pretrain_cpu
from bertgpt.objectives import IGNORE
from bertgpt.recipes import loop, state
from bertgpt.recipes.pretrain import BertPretraining, PairBatches, Size
from bertgpt.recipes.settings import Settings
from bertgpt.recipes.text import Document, copy_tokenizer, hold_out, read_documents
from bertgpt.text import load_tokenizer

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["the", "bank", "raised", "rates", "goal", "late", "a", "scored", "cut", "."]


@pytest.fixture
def wordpiece(tmp_path) -> Path:
    folder = tmp_path / "wordpiece"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join([*SPECIAL, *WORDS]) + "\n")
    return folder


@pytest.fixture
def bpe(tmp_path) -> Path:
    from tokenizers.implementations import ByteLevelBPETokenizer

    maker = ByteLevelBPETokenizer()
    special = ["<|endoftext|>"]
    maker.train_from_iterator(WORDS, vocab_size=300, special_tokens=special, show_progress=False)
    maker.save(str(tmp_path / "words.json"))
    return tmp_path / "words.json"


@pytest.fixture
def text(tmp_path) -> Path:
    """Eight documents of sentences that each begin with a capital, in two folders; one is short."""
    draw = random.Random(0)
    for d in range(8):
        sentences = [
            " ".join(["The", *draw.choices(WORDS[1:-1], k=draw.randint(2, 9))]) + "."
            for _ in range(12)
        ]
        paragraphs = [" ".join(sentences[i : i + 4]) for i in (0, 4, 8)]
        file = tmp_path / "text" / f"part{d % 2}" / f"{d}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n\n".join(paragraphs if d != 3 else ["The goal."]))
    return tmp_path / "text"


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command in this process: (exit code, stdout and stderr)."""

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["bertgpt", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "250")
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        return code, "".join(capsys.readouterr())

    return run


def options(text, tokenizer, output, *more):
    sizes = ("--width", 16, "--heads", 2, "--length", 24, "--cpu", "--held-out", 0.25)
    run = ("--batch-size", 8, "--learning-rate", 0.02)
    files = ("--data", text, "--tokenizer", tokenizer, "--output", output)
    return (*files, *sizes, *run, *(more or ("--max-steps", 12)))


def test_bert_from_text(run, text, wordpiece, tmp_path):
    code, said = run("pretrain", "bert", *options(text, wordpiece, tmp_path / "out"))
    assert code == 0, said
    assert "part1/3.txt: too short for a pair, left out" in said.replace("\n", "")
    before, after = said.split("held-out masked_lm: ")[1].splitlines()[0].split(" → ")
    assert float(after) < float(before)
    left = {file.name for file in (tmp_path / "out").iterdir()}
    assert left == {"config.json", "model.safetensors", "vocab.txt", "log.jsonl", "loss.png"}
    stock = transformers.BertForPreTraining.from_pretrained(tmp_path / "out").eval()
    ours = BertForPreTraining.from_pretrained(tmp_path / "out")
    ids = torch.tensor([[2, 5, 6, 4, 8, 3]])
    with torch.no_grad():
        found, expected = ours(ids).prediction_logits, stock(ids).prediction_logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert words("the bank raised rates").input_ids == [2, 5, 6, 7, 8, 3]


def test_gpt_from_text_and_its_words(run, text, bpe, tmp_path):
    code, said = run("pretrain", "gpt", *options(text, bpe, tmp_path / "out"))
    assert code == 0, said
    before, after = said.split("held-out loss: ")[1].splitlines()[0].split(" → ")
    assert float(after) < float(before)
    tokenizer = load_tokenizer(tmp_path / "out")
    stock = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out").eval()
    (written,) = (part for part in said.split("\n\n") if part.startswith("The "))
    held = hold_out(read_documents(text), 0.25, 0)[1]
    prompt = tokenizer.encode("\n\n".join(held[0].paragraphs)).ids[:8]
    greedy = stock.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)
    assert written.strip() == tokenizer.decode(greedy[0].tolist()).strip()


def test_a_signal_ends_in_one_line_and_resumes(run, text, bpe, tmp_path, monkeypatch):
    out = tmp_path / "out"
    interrupted = loop.Interrupted("SIGTERM after step 3: resume", 15)

    def save_then_stop(self, step, *rest):
        if step == 3:
            self._save(3)
            raise interrupted
        return step_(self, step, *rest)

    step_ = loop._Run._step
    monkeypatch.setattr(loop._Run, "_step", save_then_stop)
    code, said = run("pretrain", "gpt", *options(text, bpe, out))
    assert (code, said.splitlines()[-1].strip()) == (143, "SIGTERM after step 3: resume")
    assert state.read_facts(out)["done"] == 3
    monkeypatch.undo()
    monkeypatch.setattr(loop._Run, "_step", step_)
    code, said = run("pretrain", "gpt", *options(text, bpe, out, "--max-steps", 12, "--resume"))
    assert code == 0
    assert len((out / "log.jsonl").read_text().splitlines()) == 12


def test_a_lost_loss_ends_in_one_line(run, text, bpe, tmp_path):
    more = ("--max-steps", 12, "--clip-norm", "inf", "--learning-rate", 1e30)
    code, said = run("pretrain", "gpt", *options(text, bpe, tmp_path / "out", *more))
    assert code == 1
    assert "error: the " in said
    assert " at step " in said


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda file: file.write_bytes(b""), r"0.txt is empty"),
        (lambda file: file.write_text(" \n\n"), r"0.txt is empty"),
        (lambda file: file.write_bytes(b"The b\xe9."), "0.txt is not UTF-8 text: invalid"),
        (lambda file: file.write_bytes(b"The b\xe9."), "at byte 5"),
    ],
)
def test_a_bad_file_is_named(run, text, bpe, tmp_path, spoil, message):
    spoil(text / "part0" / "0.txt")
    code, said = run("pretrain", "gpt", *options(text, bpe, tmp_path / "out"))
    assert code == 1
    assert message in said
    assert not (tmp_path / "out").exists()


def test_missing_text_is_named(run, text, bpe, tmp_path):
    code, said = run("pretrain", "gpt", *options(tmp_path / "absent", bpe, tmp_path / "out"))
    assert code == 2
    assert "absent' does not exist" in said
    (tmp_path / "bare").mkdir()
    with pytest.raises(FileNotFoundError, match=r"bare has no \.txt file"):
        read_documents(tmp_path / "bare")
    with pytest.raises(FileNotFoundError, match=r"absent\.txt does not exist"):
        read_documents(tmp_path / "absent.txt")


def test_a_tokenizer_without_its_marks_is_named(run, text, bpe, wordpiece, tmp_path):
    code, said = run("pretrain", "bert", *options(text, bpe, tmp_path / "out"))
    assert (code, "the tokenizer has no token [CLS]" in said) == (1, True)
    code, said = run("pretrain", "gpt", *options(text, wordpiece, tmp_path / "out"))
    assert (code, "the tokenizer has no token <|endoftext|> or </s>" in said) == (1, True)


def test_text_that_makes_no_pairs_is_named(run, wordpiece, tmp_path):
    (tmp_path / "short").mkdir()
    for name in "abcd":
        (tmp_path / "short" / f"{name}.txt").write_text("The goal.")
    code, said = run("pretrain", "bert", *options(tmp_path / "short", wordpiece, tmp_path / "out"))
    assert code == 1
    assert "next-sentence pairs need two documents of two sentences; 2 of 2 are shorter" in said


def test_bert_from_one_file(run, text, wordpiece, tmp_path):
    """Its paragraphs are the documents."""
    parts = [file.read_text() for file in sorted(text.rglob("*.txt"))]
    (tmp_path / "one.txt").write_text("\n\n".join(parts))
    more = ("--max-steps", 2)
    code, said = run(
        "pretrain", "bert", *options(tmp_path / "one.txt", wordpiece, tmp_path / "out", *more)
    )
    assert code == 0, said
    kept, held = hold_out(read_documents(tmp_path / "one.txt"), 0.25, 0, least=2)
    assert (len(kept), len(held)) == (16, 6)
    assert all(len(document.paragraphs) == 1 for document in [*kept, *held])


@pytest.mark.parametrize("length", [0, 1])
def test_blocks_too_short_to_predict_in_are_refused(run, text, bpe, tmp_path, length):
    more = ("--max-steps", 2, "--length", length)
    code, said = run("pretrain", "gpt", *options(text, bpe, tmp_path / "out", *more))
    assert code == 1
    assert f"length must be 2 or more, for a word and its next, not {length}" in said
    assert not (tmp_path / "out").exists()


def test_a_tokenizers_one_file_gets_the_name_that_is_looked_for(wordpiece, tmp_path):
    alone = (wordpiece / "vocab.txt").rename(tmp_path / "words.txt")
    (tmp_path / "out").mkdir()
    copy_tokenizer(alone, tmp_path / "out")
    ids = load_tokenizer(tmp_path / "out").encode("the bank").ids
    assert ids == load_tokenizer(alone).encode("the bank").ids == [2, 5, 6, 3]


def test_documents_have_paragraphs(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffOne\r\nline.\r\n\r\n \r\nTwo.\n\n\n".encode())
    (document,) = read_documents(tmp_path)
    assert document.paragraphs == ("One\nline.", "Two.")


def _documents(count, paragraphs=1):
    parts = tuple(f"Part {i}." for i in range(paragraphs))
    return [Document(Path(f"{i}.txt"), parts) for i in range(count)]


def test_held_out_documents_are_drawn_by_the_seed():
    documents = _documents(40)
    kept, held = hold_out(documents, 0.1, 0)
    assert len(held) == 4
    assert sorted(d.file for d in [*kept, *held]) == sorted(d.file for d in documents)
    assert (kept, held) == hold_out(documents, 0.1, 0)
    assert held != hold_out(documents, 0.1, 1)[1]
    kept, held = hold_out(_documents(1, 10), 0.25, 0)
    assert kept[0].paragraphs + held[0].paragraphs == _documents(1, 10)[0].paragraphs
    assert len(held[0].paragraphs) == 2


@pytest.mark.parametrize(
    ("documents", "fraction", "message"),
    [
        (_documents(3), 0.0, "held-out fraction must lie between 0 and 1, not 0"),
        (_documents(3), 1.0, "held-out fraction must lie between 0 and 1, not 1"),
        (_documents(1), 0.1, r"0\.txt is one paragraph"),
        (_documents(3), 0.1, "3 documents are too few to hold 2 out"),
    ],
)
def test_what_cannot_be_split_is_named(documents, fraction, message):
    with pytest.raises(ValueError, match=message):
        hold_out(documents, fraction, 0, least=2)


def test_both_halves_of_berts_loss_are_its_joint_loss():
    """And a part without a masked token has no gradient of them, rather than no number."""
    torch.manual_seed(0)
    model = BertForPreTraining(BertForPreTraining.config_class(**BERT)).eval()
    task = BertPretraining(model, PairBatches(20, 2, 3, 4, (0, 2, 3, 4), 61))
    batch = pack([[2, 9, 8, 3, 7, 3], [2, 5, 3, 6, 3]])
    labels = torch.tensor([IGNORE, 9, IGNORE, IGNORE, 7, *[IGNORE] * 6])
    following = torch.tensor([0, 1])
    given = {"labels": labels, "next_sentence_label": following}
    losses = task(loop.Batch(batch, given))
    joint = model(batch, **given).loss
    torch.testing.assert_close(losses["masked_lm"] + losses["next_sentence"], joint)
    alone = model(batch, **given).prediction_logits[[1, 4]]
    expected = torch.nn.functional.cross_entropy(alone, torch.tensor([9, 7]))
    torch.testing.assert_close(losses["masked_lm"], expected)
    unlabelled = task(loop.Batch(batch, given | {"labels": torch.full_like(labels, IGNORE)}))
    counts = {"masked_lm": 0, "next_sentence": 2}
    totals = {"masked_lm": 5, "next_sentence": 4}
    shares = loop._weighted(unlabelled, counts, totals)
    assert shares["masked_lm"] == 0
    torch.testing.assert_close(shares["next_sentence"], losses["next_sentence"] / 2)
    sum(shares.values()).backward()
    assert all(bool(w.grad.isfinite().all()) for w in model.parameters() if w.grad is not None)


@needs_minilm
def test_small_models_learn_real_news_as_stock_does(tmp_path):
    """The short version of benchmarks/train_pretrain_cpu.py."""
    (tmp_path / "text").mkdir()
    documents = train_pretrain_cpu.news(tmp_path / "text", 60)
    for kind in ("bert", "gpt"):
        settings = Settings(
            tmp_path / kind, learning_rate=5e-3, batch_size=8, max_steps=8, cpu=True
        )
        found = train_pretrain_cpu.compare(kind, documents, Size(32, 1, 2, 32), settings)
        assert train_pretrain_cpu.verdict(found) == []
        assert found["ours"]["after"]["loss"] < found["ours"]["before"]["loss"] - 0.2
    worse = {"before": {"loss": 9.0}, "after": {"loss": 6.0}}
    assert train_pretrain_cpu.verdict({"ours": worse, "stock": found["stock"]})
    assert train_pretrain_cpu.verdict(
        {"ours": {**worse, "before": {"loss": 5.0}}, "stock": {**worse}}
    ) == ["the held-out loss did not fall"]


@pytest.mark.parametrize("kind", ["bert", "gpt"])
def test_the_figures_in_the_docs_are_those_of_the_results_file(kind):
    found = json.loads((train_pretrain_cpu.RESULTS / f"pretrain_{kind}_cpu.json").read_text())
    assert train_pretrain_cpu.verdict(found) == []
    page = (Path(__file__).resolve().parent.parent / "docs" / "training.md").read_text()
    model = {"bert": "BERT", "gpt": "GPT-2"}[kind]
    rows = [row for row in page.splitlines() if row.startswith(f"| {model} | ")]
    names = [name for name in found["ours"]["after"] if name != "loss"] or ["loss"]
    figures = (found["ours"]["before"], found["ours"]["after"], found["stock"]["after"])
    for row, name in zip(rows, names, strict=True):
        assert f"| {found['settings']['max_steps']} |" in row
        assert row.endswith("| " + " | ".join(f"{side[name]:.3f}" for side in figures) + " |")


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_stock_reads_a_lone_tokenizer_as_it_is(tmp_path, kind):
    """Words as they are written, parted by spaces: no rule of BERT's or GPT-2's."""
    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<eos>"]
    words = {word: i for i, word in enumerate([*marks, "Good", "bob", "good"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(marks)
    tokenizer.save(str(tmp_path / "mine.json"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text(json.dumps({"model_type": kind}))
    copy_tokenizer(tmp_path / "mine.json", tmp_path / "out")
    stock = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert stock("Good bob").input_ids == tokenizer.encode("Good bob").ids == [6, 7]
    assert (stock.mask_token, stock.pad_token, stock.eos_token) == ("[MASK]", "[PAD]", "<eos>")
    assert len(stock) == len(words)
