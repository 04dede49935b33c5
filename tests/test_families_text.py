"""Folders of BERT's families where text goes in: sentence vectors, fine-tuning, the right class."""

import json

import pytest
import torch
import transformers
from families import CONFIGS, family_twins
from finetune_data import WORDS, write, write_questions
from models import TOLERANCE, padded

import bertgpt
from bertgpt import SentenceEncoder
from bertgpt.auto import encoder_class
from bertgpt.recipes.datasets import Sentence, Text
from bertgpt.recipes.finetune import Columns, Predictor, finetune, new_recipe
from bertgpt.recipes.settings import Settings
from bertgpt.text import load_tokenizer

pytest.importorskip("accelerate")

TEXTS = ["we saw the team in new york", "rates", "the bank was very today they said in oslo ?"]
MARKS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def write_vocabulary(folder, family, whole=True):
    """WordPiece for families like BERT; for RoBERTa byte-level BPE, `whole` or in two files."""
    folder.mkdir(exist_ok=True)
    if family != "Roberta":
        (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
        return len(WORDS)
    from tokenizers.implementations import ByteLevelBPETokenizer

    pairs = ByteLevelBPETokenizer()
    text = [" ".join(WORDS)] * 9
    pairs.train_from_iterator(text, vocab_size=300, special_tokens=MARKS, show_progress=False)
    pairs.save_model(str(folder))
    if whole:
        files = {"vocab": folder / "vocab.json", "merges": folder / "merges.txt"}
        stock = transformers.RobertaTokenizer(**{k: str(file) for k, file in files.items()})
        stock.save_pretrained(folder)
        for file in files.values():
            file.unlink()
    return pairs.get_vocab_size()


def write_model(folder, family, **extra):
    """A family's encoder and its tokenizer."""
    words = write_vocabulary(folder, family)
    padding = {"pad_token_id": 1} if family == "Roberta" else {}
    _, stock = family_twins(f"{family}Model", vocab_size=words, **padding, **extra)
    stock.save_pretrained(folder)
    return stock


@pytest.mark.parametrize("family", CONFIGS)
def test_sentence_vectors_are_stocks(family, tmp_path):
    stock = write_model(tmp_path, family)
    encoder = SentenceEncoder.from_pretrained(tmp_path)
    assert type(encoder.model) is getattr(bertgpt, f"{family}Model")
    assert encoder.max_length == (18 if family == "Roberta" else 20)
    vectors = encoder.encode([*TEXTS, " ".join(TEXTS * 5)])  # the last is cut
    rows = encoder.tokenize([*TEXTS, " ".join(TEXTS * 5)])
    assert max(map(len, rows)) == encoder.max_length
    ids, mask = padded(rows, fill=stock.config.pad_token_id)
    with torch.no_grad():
        states = stock(ids, attention_mask=mask)[0] * mask[..., None]
    means = torch.nn.functional.normalize(states.sum(1), dim=1)
    torch.testing.assert_close(vectors, means, atol=TOLERANCE, rtol=0)


def test_robertas_two_files_are_its_tokenizer(tmp_path):
    write_vocabulary(tmp_path, "Roberta", whole=False)
    files = {"vocab": str(tmp_path / "vocab.json"), "merges": str(tmp_path / "merges.txt")}
    stock, ours = transformers.RobertaTokenizer(**files), load_tokenizer(tmp_path)
    for texts in (TEXTS[:1], TEXTS[:2]):
        assert ours.encode(*texts).ids == stock(*texts)["input_ids"]
    assert ours.encode(TEXTS[0]).tokens[0] == "<s>"


@pytest.mark.parametrize(
    ("family", "task"),
    [("Roberta", "tag"), ("DistilBert", "pair"), ("Albert", "qa"), ("Ernie", "classify")],
)
def test_a_family_is_tuned_and_stock_loads_it(family, task, tmp_path):
    stock = write_model(tmp_path / "base", family, max_position_embeddings=64)
    data = write_questions(tmp_path / "a.json", 20) if task == "qa" else write(task, tmp_path)
    settings = Settings(tmp_path / "tuned", max_steps=3, cpu=True, learning_rate=1e-3)
    columns = Columns("sentence1", "sentence2") if task == "pair" else None
    folder = tmp_path / "base"
    _, report, _ = finetune(task, folder, data, settings, columns=columns, max_length=48)
    assert report.after
    predictor = Predictor.from_folder(tmp_path / "tuned")
    model = predictor.recipe.model
    assert len(list(predictor.predict(data))) == (20 if task == "qa" else 100)
    reread = getattr(transformers, type(model).__name__).from_pretrained(tmp_path / "tuned").eval()
    name = type(model).__name__.removeprefix(family)
    assert reread.config.architectures == [f"{family}{name}"]
    assert type(reread.base_model) is type(stock)
    ids = torch.randint(5, 30, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(model(ids)[0], reread(ids)[0], atol=TOLERANCE, rtol=0)
    assert reread.config.id2label == model.config.id2label or task == "qa"


def test_types_are_given_to_models_that_tell_them_apart(tmp_path):
    pairs = [Text("we saw the team", "in oslo", label, "x:1") for label in "ab"]
    for family, types in (("DistilBert", None), ("Ernie", [0] * 6 + [1] * 3)):
        write_model(tmp_path / family, family)
        recipe = new_recipe("pair", tmp_path / family, pairs, 17)
        found = recipe.collate(recipe.encode(pairs), [0] * 2).tokens.token_type_ids
        assert (found is None) if types is None else found.tolist() == types * 2


def test_words_of_a_tagged_sentence_follow_a_space(tmp_path):
    write_model(tmp_path, "Roberta")
    sentence = Sentence(("york", "saw", "rates"), ("B-place", "O", "O"), "x:1")
    (item,) = new_recipe("tag", tmp_path, [sentence], 17).encode([sentence])
    stock = transformers.AutoTokenizer.from_pretrained(tmp_path, add_prefix_space=True)
    assert item.ids == stock(list(sentence.words), is_split_into_words=True)["input_ids"]


@pytest.mark.parametrize(
    ("kind", "head", "name"),
    [
        ("xlm-roberta", "ForMaskedLM", "RobertaForMaskedLM"),
        ("camembert", "Model", "RobertaModel"),
        ("albert", "ForPreTraining", "AlbertForPreTraining"),
        (None, "ForTokenClassification", "BertForTokenClassification"),
    ],
)
def test_the_class_for_a_folder(kind, head, name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind} if kind else {}))
    assert encoder_class(tmp_path, head) is getattr(bertgpt, name)


def test_families_and_heads_that_are_not_there_are_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match=r"config.json: model_type is 'gpt2'; encoders are bert, "):
        encoder_class(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "distilbert"}')
    with pytest.raises(ValueError, match="DistilBert has no ForPreTraining"):
        encoder_class(tmp_path, "ForPreTraining")
