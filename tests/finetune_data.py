"""Tiny labelled data, a BERT that can learn it in seconds, and what stock makes of the result."""

import json
import random
from pathlib import Path

import torch

from bertgpt import BertConfig, BertModel

PLACES = ["london", "paris", "new york", "oslo"]
TOPICS = {"sport": ["goal", "team", "match"], "money": ["bank", "rates", "shares"]}
FILLER = ["the", "a", "we", "saw", "in", "today", "they", "said", "was", "very"]
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "##ly", "##ing", "where", "?", ".", "new"]
WORDS = [*PIECES, "london", "paris", "york", "oslo", *FILLER, *TOPICS["sport"], *TOPICS["money"]]


def tiny_bert(folder: Path) -> Path:
    """A BERT of one layer, with weights large enough to learn fast, and its vocabulary."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=48, max_position_embeddings=64, initializer_range=0.1,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    return folder


def _filler(draw: random.Random) -> list[str]:
    return draw.choices(FILLER, k=draw.randint(3, 8))


def write_topics(path: Path, count: int = 100) -> Path:
    """Texts whose class one word gives away."""
    draw = random.Random(0)
    lines = ["text,label"]
    for i in range(count):
        topic = list(TOPICS)[i % 5 > 2]
        words = [*_filler(draw), draw.choice(TOPICS[topic]), *_filler(draw)]
        lines.append(f'"{" ".join(words)}",{topic}')
    path.write_text("\n".join(lines) + "\n")
    return path


def write_pairs(path: Path, count: int = 100) -> Path:
    """Pairs whose second text gives the class away; the first says the opposite half the time."""
    draw = random.Random(0)
    rows = []
    for i in range(count):
        topic = list(TOPICS)[i % 5 > 2]
        first = [*_filler(draw), draw.choice(TOPICS[draw.choice(list(TOPICS))])]
        second = [draw.choice(TOPICS[topic]), *_filler(draw)]
        row = {"sentence1": " ".join(first), "sentence2": " ".join(second), "label": i % 5 > 2}
        rows.append(json.dumps({**row, "label": int(row["label"])}))
    path.write_text("\n".join(rows) + "\n")
    return path


def write_tags(path: Path, count: int = 100) -> Path:
    """Sentences with places of one or two words, and words of several pieces."""
    draw = random.Random(0)
    blocks = []
    for _ in range(count):
        place = draw.choice(PLACES).split()
        lines = [f"{word}\tO" for word in [*_filler(draw), "sayly"]]
        lines += [f"{word}\t{'I' if i else 'B'}-place" for i, word in enumerate(place)]
        blocks.append("\n".join([*lines, *(f"{word}\tO" for word in _filler(draw))]))
    path.write_text("\n\n".join(blocks) + "\n")
    return path


def write_questions(path: Path, count: int = 100, equal: bool = False) -> Path:
    """Questions answered by the one place in the text; an article each, maybe `equal` in length."""
    draw = random.Random(0)
    articles = []
    for i in range(count):
        place = draw.choice(PLACES[:2] if equal else PLACES)
        parts = [draw.choices(FILLER, k=4) if equal else _filler(draw) for _ in range(2)]
        context = " ".join([*parts[0], place, *parts[1], "."])
        answer = {"text": place, "answer_start": context.index(place)}
        entry = {"id": f"q{i}", "question": "where was the team ?", "answers": [answer]}
        paragraph = {"context": context, "qas": [entry]}
        articles.append({"title": f"article {i}", "paragraphs": [paragraph]})
    path.write_text(json.dumps({"version": "1.1", "data": articles}))
    return path


WRITERS = {
    "classify": ("topics.csv", write_topics),
    "pair": ("pairs.jsonl", write_pairs),
    "tag": ("tags.txt", write_tags),
    "qa": ("squad.json", write_questions),
}


def write(task: str, folder: Path) -> Path:
    """Data of a task, in the format that it reads."""
    name, writer = WRITERS[task]
    return writer(folder / name)
