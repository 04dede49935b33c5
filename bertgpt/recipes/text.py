"""Text files as documents of paragraphs, and the tokenizer files that go with a model."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bertgpt.text import load_tokenizer

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
)
# What marks of their own transformers' tokenizers have, and what they are called in a vocabulary.
_ROLES = (
    ("unk_token", ("[UNK]", "<unk>")),
    ("cls_token", ("[CLS]",)),
    ("sep_token", ("[SEP]",)),
    ("pad_token", ("[PAD]", "<pad>")),
    ("mask_token", ("[MASK]", "<mask>")),
    ("bos_token", ("<|endoftext|>", "<s>")),
    ("eos_token", ("<|endoftext|>", "</s>", "<eos>")),
)


@dataclass(frozen=True)
class Document:
    """One text file.

    Attributes:
        file: where it was read.
        paragraphs: its parts between blank lines, in order, none empty.
    """

    file: Path
    paragraphs: tuple[str, ...]


def read_documents(path: Path) -> list[Document]:
    """Reads a .txt file, or every one in a folder and the folders in it, in the order of names.

    Raises:
        FileNotFoundError: there is no such file, or none in the folder.
        ValueError: a file is empty or not UTF-8.
    """
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    if not files:
        raise FileNotFoundError(f"{path} has no .txt file in it: put the text there")
    return [_read_document(file) for file in files]


def _read_document(file: Path) -> Document:
    text = read_text(file)
    lines = text.removeprefix("\ufeff").splitlines()
    paragraphs = re.split(r"\n(?:\s*\n)+", "\n".join(lines))
    return Document(file, tuple(part.strip() for part in paragraphs if part.strip()))


def read_text(file: Path) -> str:
    """A file's text.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it holds no text, or is not UTF-8; the message names the first bad byte.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist, or is no file: name a text file")
    try:
        text = file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} is not UTF-8 text: {error.reason} at byte {error.start}; convert it first"
        ) from error
    if not text.strip():
        raise ValueError(f"{file} is empty: put text in it, or leave it out")
    return text


def hold_out(
    documents: Sequence[Document], fraction: float, seed: int, least: int = 1
) -> tuple[list[Document], list[Document]]:
    """Splits documents, at random, into those to train on and those to measure on.

    A document that is alone is split instead: its last paragraphs are held out, or, where more
    than one document is needed on a side, its paragraphs are the documents.

    Args:
        documents: what was read.
        fraction: share to hold out, of documents (or paragraphs).
        seed: of the draw.
        least: fewest documents on either side.

    Raises:
        ValueError: a fraction outside (0, 1), or too few documents.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"the held-out fraction must lie between 0 and 1, not {fraction}")
    if len(documents) == 1:
        (whole,) = documents
        paragraphs = whole.paragraphs
        if least > 1 and len(paragraphs) > 1:
            documents = [replace(whole, paragraphs=(part,)) for part in paragraphs]
            return hold_out(documents, fraction, seed, least)
        cut = len(paragraphs) - max(1, round(fraction * len(paragraphs)))
        if cut < 1:
            raise ValueError(f"{whole.file} is one paragraph: blank lines must part it in two")
        parts = (paragraphs[:cut], paragraphs[cut:])
        train, test = (replace(whole, paragraphs=part) for part in parts)
        return [train], [test]
    count = max(least, round(fraction * len(documents)))
    if len(documents) - count < least:
        raise ValueError(f"{len(documents)} documents are too few to hold {count} out: give more")
    chosen = set(random.Random(seed).sample(range(len(documents)), count))
    kept = [document for i, document in enumerate(documents) if i not in chosen]
    return kept, [documents[i] for i in sorted(chosen)]


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copies a tokenizer's files, from its folder or its one file, beside a model.

    A tokenizer.json alone gets settings that make transformers read it as it is: by the model's
    kind it would put that kind's own rules and marks in the place of the file's.
    """
    files = {name: source / name for name in _TOKENIZER_FILES}
    if not source.is_dir():  # as `text.load_tokenizer` tells them apart
        files = {"vocab.txt" if source.suffix == ".txt" else "tokenizer.json": source}
    for name, file in files.items():
        if file.is_file():
            shutil.copyfile(file, folder / name)
    settings = folder / "tokenizer_config.json"
    if (folder / "tokenizer.json").is_file() and not settings.is_file():
        words = load_tokenizer(folder).get_vocab()
        roles = {role: next((n for n in names if n in words), None) for role, names in _ROLES}
        found = {role: name for role, name in roles.items() if name is not None}
        text = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **found}, indent=2)
        settings.write_text(text + "\n", "utf-8")
