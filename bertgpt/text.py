"""Text to token ids and back, by the tokenizer that lies in a model's folder."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bertgpt.checkpoint import read_json

_ENDS = re.compile(r'(?:(?<=[.!?])|(?<=[.!?]"))\s+(?=["A-Z])')
_WANTED = "tokenizer.json, vocab.txt (WordPiece), or vocab.json with merges.txt (byte-level BPE)"


def load_tokenizer(place: Path) -> Any:
    """Opens a folder's tokenizer, its own padding and truncation switched off.

    Args:
        place: A model folder; or a tokenizer.json, or a vocab.txt (WordPiece), by itself.

    Returns:
        A tokenizer of the `tokenizers` library.

    Raises:
        FileNotFoundError: There is no tokenizer.
        ValueError: A tokenizer file cannot be read.
        ModuleNotFoundError: The `tokenizers` library is not installed.
    """
    try:
        from tokenizers import Tokenizer
        from tokenizers.implementations import BertWordPieceTokenizer, ByteLevelBPETokenizer
    except ModuleNotFoundError as missing:
        message = "text needs the tokenizers library: pip install tokenizers"
        raise ModuleNotFoundError(message, name="tokenizers") from missing

    alone = place.suffix if place.is_file() else ""
    whole = place if alone == ".json" else place / "tokenizer.json"
    words = place if alone == ".txt" else place / "vocab.txt"
    pairs, merges = place / "vocab.json", place / "merges.txt"
    load: Callable[[], Any]
    if whole.is_file():
        file, load = whole, lambda: Tokenizer.from_file(str(whole))
    elif words.is_file():
        settings_file = words.parent / "tokenizer_config.json"
        settings = read_settings(settings_file)
        lowercase = settings.get("do_lower_case", True)
        if not isinstance(lowercase, bool):
            raise ValueError(
                f"{settings_file}: do_lower_case must be true or false, not {lowercase!r}"
            )
        file, load = words, lambda: BertWordPieceTokenizer(str(words), lowercase=lowercase)
    elif pairs.is_file() and merges.is_file():
        file, load = pairs, lambda: ByteLevelBPETokenizer.from_file(str(pairs), str(merges))
    else:
        raise FileNotFoundError(f"{place} has no tokenizer: put {_WANTED} there")
    try:
        tokenizer = load()
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{file} cannot be read as a tokenizer: {error}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def read_settings(file: Path) -> dict[str, Any]:
    """The object in an optional JSON file, empty where the file is absent.

    Raises:
        ValueError: The file holds something else.
    """
    return read_json(file, "") if file.is_file() else {}


def sentences(paragraph: str) -> list[str]:
    """A paragraph cut after full stops, question and exclamation marks that a capital follows."""
    return [sentence for sentence in _ENDS.split(paragraph.strip()) if sentence]
