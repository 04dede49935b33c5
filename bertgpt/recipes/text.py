"""Text files, and the tokenizer that reads them."""

from __future__ import annotations

import shutil
from pathlib import Path

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copies a tokenizer's files, from its folder or its one file, beside a model."""
    files = [source / name for name in _TOKENIZER_FILES] if source.is_dir() else [source]
    for file in files:
        if file.is_file():
            shutil.copyfile(file, folder / file.name)
