"""Text to token ids and back, by the tokenizer that lies in a model's folder."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bertgpt.checkpoint import read_json

_CONTEXT = 6  # tokens that decide how the next one is written, spaces and split characters
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
        from tokenizers.implementations import BertWordPieceTokenizer
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
        file, load = pairs, lambda: _byte_level(pairs, merges)
    else:
        raise FileNotFoundError(f"{place} has no tokenizer: put {_WANTED} there")
    try:
        tokenizer = load()
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{file} cannot be read as a tokenizer: {error}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _byte_level(pairs: Path, merges: Path) -> Any:
    """GPT-2's kind of tokenizer; or RoBERTa's, which puts marks around texts."""
    from tokenizers.implementations import ByteLevelBPETokenizer
    from tokenizers.processors import RobertaProcessing

    tokenizer = ByteLevelBPETokenizer.from_file(str(pairs), str(merges))
    end, start = ((mark, tokenizer.token_to_id(mark)) for mark in ("</s>", "<s>"))
    if None not in (*end, *start):
        tokenizer.post_processor = RobertaProcessing(end, start, add_prefix_space=False)
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


_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what decodes a part of a character's bytes


@dataclass
class TextStream:
    """Token ids to text, one at a time.

    Text is handed out when it can no longer change: a character whose bytes are spread over tokens
    comes with the last of them. What is handed out, end to end, is the text of all tokens.

    Args:
        tokenizer: Anything with `decode(ids) -> str`.
        context: Token ids before the first one, the prompt's, which decide on spaces.
    """

    tokenizer: Any
    context: Sequence[int] = ()

    def __post_init__(self) -> None:
        self._tokens = list(self.context)[-_CONTEXT:]
        self._shown = self.tokenizer.decode(self._tokens)

    @property
    def pending(self) -> str:
        """Text of the tokens so far that was not handed out, its last character incomplete."""
        return self.tokenizer.decode(self._tokens)[len(self._shown) :]

    def push(self, token: int) -> str:
        """The text that one more token makes sure of, often empty."""
        self._tokens.append(token)
        text = self.tokenizer.decode(self._tokens)
        if text.endswith(_INCOMPLETE):
            return ""
        new = text[len(self._shown) :]
        if new:
            self._tokens = self._tokens[-_CONTEXT:]
            self._shown = self.tokenizer.decode(self._tokens)
        return new

    def copy(self) -> TextStream:
        """The same state, to go on from apart."""
        twin = copy.copy(self)
        twin._tokens = list(self._tokens)
        return twin


class StopStrings:
    """Tells when the text of new tokens holds one of some strings.

    Args:
        tokenizer: Anything with `decode(ids) -> str`.
        strings: The strings, or one.
        context: The prompt's token ids; its text is not searched.

    Raises:
        TypeError: `strings` is no string and no sequence of them, or `tokenizer` cannot decode.
        ValueError: A string is empty, or there is none.
    """

    def __init__(
        self, tokenizer: Any, strings: str | Sequence[str], context: Sequence[int] = ()
    ) -> None:
        self.strings = check_stop_strings(tokenizer, strings)
        self._stream = TextStream(tokenizer, context)
        self._tail = ""  # as much text as may begin a string

    def push(self, token: int) -> bool:
        """Whether the text, with one more token, has come to hold one of the strings."""
        self._tail += self._stream.push(token)
        text = self._tail + self._stream.pending
        longest = max(map(len, self.strings))
        self._tail = self._tail[len(self._tail) - min(len(self._tail), longest - 1) :]
        return any(string in text for string in self.strings)

    def copy(self) -> StopStrings:
        """The same state, to go on from apart."""
        twin = copy.copy(self)
        twin._stream = self._stream.copy()
        return twin


def check_stop_strings(tokenizer: Any, strings: str | Sequence[str]) -> tuple[str, ...]:
    """The strings as a tuple; raises as `StopStrings` does."""
    given = (strings,) if isinstance(strings, str) else strings
    if not isinstance(given, Sequence) or not all(isinstance(string, str) for string in given):
        raise TypeError(f"stop_strings must be a string or a sequence of them, not {strings!r}")
    if not given or not all(given):
        raise ValueError(f"stop_strings must hold strings that are not empty, not {strings!r}")
    if not callable(getattr(tokenizer, "decode", None)):
        raise TypeError(f"stop_strings need a tokenizer that can decode, not {tokenizer!r}")
    return tuple(given)
