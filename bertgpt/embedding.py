"""Sentences to vectors, as a sentence-transformers folder describes: tokenize, encode, pool.

A plain folder of BERT or a family like it works too: the mean over all tokens, scaled to length 1.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from bertgpt import ops
from bertgpt.auto import encoder_class
from bertgpt.bert_encoder import Encoder
from bertgpt.checkpoint import read_json
from bertgpt.packing import PackedBatch, pack
from bertgpt.text import load_tokenizer, read_settings

_TOKENS_PER_BATCH = 8192  # bounds the memory of activations: 8192 · 4 · hidden floats in the FFN
_SWITCHES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
}


@dataclass(frozen=True)
class SentenceEncoder:
    """An encoder, its tokenizer, and how token states become one vector a sentence.

    Attributes:
        model: The encoder.
        tokenizer: One of the `tokenizers` library.
        pooling: "mean", "max" or "cls".
        normalize: Whether vectors are scaled to length 1.
        max_length: Longest input in tokens; what is longer is cut there.
    """

    model: Encoder
    tokenizer: Any
    pooling: str
    normalize: bool
    max_length: int

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, device: str | torch.device = "cpu"
    ) -> SentenceEncoder:
        """Loads config.json, model.safetensors, the tokenizer and, if there, the pooling.

        Raises:
            FileNotFoundError: A file is missing.
            ValueError: A file is broken, or asks for what is not done here.
        """
        folder = Path(folder)
        pooling, normalize = _read_modules(folder)
        tokenizer = load_tokenizer(folder)
        with warnings.catch_warnings():
            # Many such checkpoints hold no pooler, and vectors do not come from it.
            warnings.filterwarnings("ignore", message=".* has no weights for pooler")
            model = encoder_class(folder).from_pretrained(folder).to(device)
        model.pooler = None
        words, vocabulary = model.config.vocab_size, tokenizer.get_vocab_size()
        if vocabulary > words:
            raise ValueError(
                f"{folder}: its tokenizer has {vocabulary} tokens, but its model embeds {words}; "
                "one of them belongs to another folder"
            )
        limit = model.limits.longest
        max_length = min(limit, _read_longest(folder / "sentence_bert_config.json") or limit)
        tokenizer.enable_truncation(max_length)
        return cls(model, tokenizer, pooling, normalize, max_length)

    def encode(self, texts: str | Sequence[str], *, progress: bool = False) -> Tensor:
        """One vector a text.

        Args:
            texts: Any number of texts, or one.
            progress: Whether to show a progress bar, on stderr.

        Returns:
            Float32 `[texts, E]` on the CPU, in the order given; `[E]` for one text.

        Raises:
            TypeError: A text is no string.
        """
        if isinstance(texts, str):
            return self.encode([texts], progress=progress)[0]
        token_ids = self.tokenize(texts)
        with Progress(console=Console(stderr=True), transient=True, disable=not progress) as bar:
            task = bar.add_task("Embedding", total=len(token_ids))
            return self.encode_ids(token_ids, lambda count: bar.advance(task, count))

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, special tokens included.

        Raises:
            TypeError: A text is no string.
        """
        texts = list(texts)
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(f"text {i} is no string but {type(text).__name__}")
        return [encoding.ids for encoding in self.tokenizer.encode_batch(texts)]

    @torch.inference_mode()
    def encode_ids(
        self, token_ids: Sequence[list[int]], done: Callable[[int], object] = lambda count: None
    ) -> Tensor:
        """One vector a tokenized text.

        Args:
            token_ids: As `tokenize` returns them.
            done: Called with the number of texts finished after each batch.

        Returns:
            Float32 `[texts, E]` on the CPU, in the order given.
        """
        # Neighbours in length share a batch, and within it their attention needs few buckets.
        order = sorted(range(len(token_ids)), key=lambda i: len(token_ids[i]))
        vectors = torch.empty(len(token_ids), self.model.config.hidden_size)
        for indices in batches_by_length(order, [len(ids) for ids in token_ids]):
            batch = pack([token_ids[i] for i in indices], device=self.model.device)
            hidden_TE = self.model(batch, return_dict=True).last_hidden_state
            vectors[indices] = self.pool(hidden_TE, batch).float().cpu()
            done(len(indices))
        return vectors

    def pool(self, hidden_TE: Tensor, batch: PackedBatch) -> Tensor:
        """Token states `[T, E]` to sentence vectors `[B, E]`."""
        return ops.pool(hidden_TE, batch.cu_seqlens, pooling=self.pooling, normalize=self.normalize)


def batches_by_length(order: list[int], lengths: list[int]) -> list[list[int]]:
    """Splits `order` so that no part exceeds the token budget, single texts aside."""
    parts: list[list[int]] = []
    tokens = 0
    for i in order:
        tokens += lengths[i]
        if not parts or tokens > _TOKENS_PER_BATCH:
            parts.append([])
            tokens = lengths[i]
        parts[-1].append(i)
    return parts


def _read_longest(file: Path) -> int | None:
    """Most tokens of a text, if the folder says."""
    longest = read_settings(file).get("max_seq_length")
    if longest is not None and (type(longest) is not int or longest < 2):
        raise ValueError(
            f"{file}: max_seq_length must be a number of tokens, 2 or more, not {longest!r}"
        )
    return longest


def _read_modules(folder: Path) -> tuple[str, bool]:
    """Pooling and normalisation that modules.json names; the mean, scaled, where it is absent."""
    file = folder / "modules.json"
    if not file.is_file():
        return "mean", True
    modules = read_json(file, "", list)
    try:
        paths = {m["type"].rpartition(".")[2]: folder / m["path"] for m in modules}
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{file} must list modules with a type and a path each") from error
    unknown = set(paths) - {"Transformer", "Pooling", "Normalize"}
    if unknown:
        raise ValueError(
            f"{file} asks for {', '.join(sorted(unknown))}: only Transformer, Pooling and "
            "Normalize are done here"
        )
    if "Pooling" not in paths:
        raise ValueError(f"{file} names no Pooling: add one, or remove the file to take the mean")
    settings = paths["Pooling"] / "config.json"
    return _read_pooling(settings), "Normalize" in paths


def _read_pooling(file: Path) -> str:
    settings = read_settings(file)
    if "pooling_mode" in settings:  # newer folders name it, older ones have a switch for each
        chosen = [settings["pooling_mode"]]
    else:
        on = [key for key in settings if key.startswith("pooling_mode_") and settings[key]]
        chosen = [_SWITCHES.get(key, key) for key in on]
    if len(chosen) != 1 or chosen[0] not in list(_SWITCHES.values()):
        raise ValueError(
            f"{file} asks to pool by {' and '.join(map(str, chosen)) or 'nothing'}: choose one of "
            f"{', '.join(_SWITCHES.values())}"
        )
    return chosen[0]
