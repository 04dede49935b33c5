"""Pretraining from nothing: BERT on masked words and next sentences, GPT-2 on next words."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from bertgpt.bert import BertConfig, BertForPreTraining
from bertgpt.gpt import GPT2Config, GPT2LMHeadModel
from bertgpt.objectives import (
    Passage,
    cross_entropy,
    mask_tokens,
    next_sentence_pair,
    passages,
)
from bertgpt.packing import pack
from bertgpt.recipes.loop import Result, train
from bertgpt.recipes.settings import Settings
from bertgpt.recipes.task import Batch, Task
from bertgpt.recipes.text import Document, copy_tokenizer, hold_out, read_documents
from bertgpt.text import load_tokenizer, sentences

_END_TOKENS = ("<|endoftext|>", "</s>", "<eos>")
_PROMPT_TOKENS, _SAMPLE_TOKENS = 8, 48
_NOTES = 3  # of what was left out are shown


@dataclass(frozen=True)
class Size:
    """A model's shape.

    Attributes:
        width: E, the hidden size.
        layers: how many.
        heads: of each layer's attention.
        length: longest sequence in tokens.
    """

    width: int = 128
    layers: int = 2
    heads: int = 2
    length: int = 128


@dataclass(frozen=True)
class Pretraining:
    """All that a run needs: a task with its fresh model, and examples made of the text.

    Attributes:
        task: the model and its batches.
        examples: what is trained on.
        held_out: what is not.
        notes: what the text lost on its way, in words.
    """

    task: Task
    examples: Sequence[Any]
    held_out: Sequence[Any]
    notes: Sequence[str]


class BertPretraining(Task):
    """BERT's joint loss, taken apart: each half has labels of its own to be averaged over."""

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Mean losses of masked words and of next sentences."""
        output = self.model(batch.tokens, **batch.labels, return_dict=True, skip_logits=True)
        following = batch.labels["next_sentence_label"]
        pairs = cross_entropy(output.seq_relationship_logits, following)
        return {"masked_lm": output.loss - pairs, "next_sentence": pairs}


@dataclass(frozen=True)
class PairBatches:
    """Makes masked pairs of passages; an example is a passage and those to draw others from.

    Attributes:
        length: longest pair.
        cls_token: id of [CLS].
        sep_token: id of [SEP].
        mask_token: id of [MASK].
        special_tokens: ids that are never masked.
        vocab_size: V.
    """

    length: int
    cls_token: int
    sep_token: int
    mask_token: int
    special_tokens: tuple[int, ...]
    vocab_size: int

    def __call__(
        self, examples: Sequence[tuple[Passage, Sequence[Passage]]], seeds: Sequence[int]
    ) -> Batch:
        """One batch; each example's segments and masks follow its seed."""
        inputs, types, words, follows = [], [], [], []
        for (passage, others), seed in zip(examples, seeds, strict=True):
            generator = torch.Generator().manual_seed(seed)
            ids, kinds, label = next_sentence_pair(
                passage,
                others,
                length=self.length,
                cls_token=self.cls_token,
                sep_token=self.sep_token,
                generator=generator,
            )
            masked, labels = mask_tokens(
                torch.tensor(ids),
                mask_token=self.mask_token,
                vocab_size=self.vocab_size,
                special_tokens=self.special_tokens,
                generator=generator,
            )
            inputs.append(masked)
            types.append(kinds)
            words.append(labels)
            follows.append(label)
        labels = torch.cat(words)
        return Batch(
            pack(inputs, token_type_ids=types),
            {"labels": labels, "next_sentence_label": torch.tensor(follows)},
            {"masked_lm": int((labels >= 0).sum()), "next_sentence": len(follows)},
        )


def bert(
    documents: Sequence[Document], tokenizer: Any, size: Size, settings: Settings, held_out: float
) -> Pretraining:
    """A fresh BERT and pairs of passages to train it on.

    Args:
        documents: the text.
        tokenizer: one of the `tokenizers` library, with [CLS], [SEP], [MASK] and [PAD].
        size: the model's shape.
        settings: of the run; its seed makes the weights and the split.
        held_out: fraction of the documents to measure on.

    Raises:
        ValueError: the tokenizer lacks a token, or the text is too short for pairs.
    """
    marks = {name: _token_id(tokenizer, (f"[{name}]",)) for name in ("CLS", "SEP", "MASK", "PAD")}
    pools: list[list[tuple[Passage, list[Passage]]]] = []
    notes: list[str] = []
    for share in hold_out(documents, held_out, settings.seed, least=2):
        found, short = passages([_tokenised(d, tokenizer) for d in share], size.length)
        pools.append([(passage, found) for passage in found])
        notes += [f"{share[i].file}: too short for a pair, left out" for i in short]
    vocab_size = tokenizer.get_vocab_size()
    config = BertConfig(
        vocab_size=vocab_size,
        hidden_size=size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        intermediate_size=4 * size.width,
        max_position_embeddings=size.length,
        pad_token_id=marks["PAD"],
    )
    batches = PairBatches(
        size.length,
        marks["CLS"],
        marks["SEP"],
        marks["MASK"],
        _special_tokens(tokenizer, marks.values()),
        vocab_size,
    )
    torch.manual_seed(settings.seed)
    task = BertPretraining(BertForPreTraining(config), batches)
    return Pretraining(task, pools[0], pools[1], notes)


def _tokenised(document: Document, tokenizer: Any) -> list[array[int]]:
    """Token ids of a document's sentences."""
    texts = [sentence for part in document.paragraphs for sentence in sentences(part)]
    encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
    return [array("i", encoding.ids) for encoding in encoded]


def next_word_batch(examples: Sequence[Sequence[int]], seeds: Sequence[int]) -> Batch:
    """Blocks of text, each token of which is to be told from those before it in its block."""
    tokens = pack(examples)
    predicted = sum(len(block) - 1 for block in examples)
    return Batch(tokens, {"labels": tokens.values}, {"next_word": predicted})


class GptPretraining(Task):
    """GPT-2's one loss."""

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Mean loss of next words."""
        output = self.model(batch.tokens, **batch.labels, return_dict=True, skip_logits=True)
        return {"next_word": output.loss}


def gpt(
    documents: Sequence[Document], tokenizer: Any, size: Size, settings: Settings, held_out: float
) -> Pretraining:
    """A fresh GPT-2 and blocks of text to train it on.

    Args:
        documents: the text; each ends with the tokenizer's end token.
        tokenizer: one of the `tokenizers` library, with a token that ends a text.
        size: the model's shape.
        settings: of the run; its seed makes the weights and the split.
        held_out: fraction of the documents to measure on.

    Raises:
        ValueError: the tokenizer has no end token, the text is too short to split, or blocks of
            `size.length` are too short to predict anything in.
    """
    if size.length < 2:
        raise ValueError(f"length must be 2 or more, for a word and its next, not {size.length}")
    end = _token_id(tokenizer, _END_TOKENS)
    shares = [
        [block for d in share for block in _blocks(d, tokenizer, size.length, end)]
        for share in hold_out(documents, held_out, settings.seed)
    ]
    config = GPT2Config(
        vocab_size=tokenizer.get_vocab_size(),
        n_positions=size.length,
        n_embd=size.width,
        n_layer=size.layers,
        n_head=size.heads,
        bos_token_id=end,
        eos_token_id=end,
    )
    torch.manual_seed(settings.seed)
    task = GptPretraining(GPT2LMHeadModel(config), next_word_batch)
    return Pretraining(task, shares[0], shares[1], [])


def _blocks(document: Document, tokenizer: Any, length: int, end: int) -> list[array[int]]:
    """A document's tokens in blocks, none too short to predict anything."""
    text = "\n\n".join(document.paragraphs)
    ids = array("i", [*tokenizer.encode(text, add_special_tokens=False).ids, end])
    return [ids[i : i + length] for i in range(0, len(ids) - 1, length)]


def _token_id(tokenizer: Any, names: Sequence[str]) -> int:
    """Id of the first of these tokens that there is."""
    for name in names:
        found = tokenizer.token_to_id(name)
        if found is not None:
            return int(found)
    raise ValueError(f"the tokenizer has no token {' or '.join(names)}: add one to it")


def _special_tokens(tokenizer: Any, marks: Iterable[int]) -> tuple[int, ...]:
    added = tokenizer.get_added_tokens_decoder()
    return tuple(sorted({*marks, *(i for i, token in added.items() if token.special)}))


def sample(model: GPT2LMHeadModel, tokenizer: Any, held_out: Sequence[Sequence[int]]) -> str:
    """A held-out text's first words and how the model goes on from them, on the paged cache."""
    prompt = list(held_out[0][:_PROMPT_TOKENS])
    room = model.config.n_positions - len(prompt)
    (tokens,) = model.generate([prompt], min(room, _SAMPLE_TOKENS))
    written: str = tokenizer.decode(tokens)
    return written


def pretrain(
    kind: str,
    data: Path,
    tokenizer: Path,
    size: Size,
    settings: Settings,
    *,
    held_out: float = 0.05,
    resume: bool = False,
    console: Console,
) -> Result:
    """Reads text, trains a fresh model on it, writes the model's folder and says how it went.

    Args:
        kind: "bert" or "gpt".
        data: a .txt file or a folder of them.
        tokenizer: a folder, tokenizer.json or vocab.txt.
        size: the model's shape.
        settings: the run.
        held_out: fraction of the text to measure on.
        resume: go on from the output folder's checkpoint.
        console: where progress and results go.

    Raises:
        FileNotFoundError: there is no text, or no tokenizer.
        ValueError: a file or a setting is not what it must be; what `loop.train` raises.
    """
    made = {"bert": bert, "gpt": gpt}[kind]
    reader = load_tokenizer(tokenizer)
    documents = read_documents(data)
    whole = made(documents, reader, size, settings, held_out)
    for note in whole.notes[:_NOTES]:
        console.print(note, style="yellow", markup=False)
    if len(whole.notes) > _NOTES:
        console.print(f"… {len(whole.notes)} documents in all were left out", style="yellow")
    weights = sum(weight.numel() for weight in whole.task.parameters())
    console.print(
        f"{len(documents)} documents: {len(whole.examples):,} examples to train on, "
        f"{len(whole.held_out):,} held out; {weights:,} weights"
    )
    result = train(
        whole.task,
        whole.examples,
        settings,
        held_out=whole.held_out,
        beside=lambda: copy_tokenizer(tokenizer, settings.output),
        resume=resume,
        console=console,
    )
    for name, after in result.after.items():
        began = f"{result.before[name]:.4f} → " if result.before else ""
        console.print(f"held-out {name}: {began}{after:.4f}")
    if isinstance(result.model, GPT2LMHeadModel):
        console.print("\n" + sample(result.model, reader, whole.held_out) + "\n", markup=False)
    console.print(f"{settings.output}: the model, its log and its loss curve")
    return result
