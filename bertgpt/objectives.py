"""What BERT and GPT-2 learn from: inputs of the objectives, and losses over real tokens only.

Losses are float32 means, as transformers computes them; −100 marks a token without a label. Shapes
are packed: one row per token `[T, ...]` or per sequence `[B, ...]`. Random inputs come from the
generator that is given and from nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bertgpt.packing import PackedBatch, pad

IGNORE = -100


def check_labels(name: str, labels: Any, beside: Tensor) -> Tensor:
    """`labels` is a tensor on the device of `beside`.

    Raises:
        TypeError: it is no tensor.
        ValueError: it lies elsewhere.
    """
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(labels).__name__}")
    if labels.device != beside.device:
        raise ValueError(f"{name} is on {labels.device}, but the model is on {beside.device}")
    return labels


def token_labels(name: str, labels: Tensor, batch: PackedBatch) -> Tensor:
    """Labels of a batch's tokens `[T]`, from `[T]`, or from the padded `[B, L]` it came from.

    Raises:
        TypeError: the labels are no tensor.
        ValueError: the labels have the shape of neither, or lie on another device.
    """
    labels = check_labels(name, labels, batch.values)
    tokens = batch.values.shape[0]
    if batch.grid is not None and labels.shape == batch.grid.shape:
        return batch.grid.select(labels)
    if batch.grid is None and labels.shape == (tokens,):
        return labels
    expected = [tokens] if batch.grid is None else list(batch.grid.shape)
    raise ValueError(f"{name} must have shape {expected}, not {list(labels.shape)}")


def cross_entropy(logits: Tensor, labels: Tensor, name: str = "labels") -> Tensor:
    """Mean cross-entropy of `logits` `[N, C]` against `labels`, N of them, −100 ignored.

    Where all are ignored it is 0, with zero gradients; transformers gives NaN there.

    Raises:
        TypeError: labels that are no integers.
        ValueError: not one label a row, or labels on another device.
        IndexError: a label outside 0 … C − 1 on a CPU (on a GPU, PyTorch's own assertion).
    """
    labels = check_labels(name, labels, logits)
    if labels.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, not {labels.dtype}")
    if labels.numel() != logits.shape[0]:
        raise ValueError(f"{name} must have shape {[logits.shape[0]]}, not {list(labels.shape)}")
    labels = labels.reshape(-1)
    classes = logits.shape[1]
    if labels.device.type == "cpu":
        odd = labels[((labels < 0) | (labels >= classes)) & (labels != IGNORE)]
        if odd.numel():
            raise IndexError(f"{name} holds {int(odd[0])}, outside 0 … {classes - 1} and not −100")
    return _mean_loss(_widened(logits), labels.long())


def _widened(logits: Tensor) -> Tensor:
    """In float32 at least."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _mean_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Mean over the labelled rows; 0, with zero gradients, where there is none."""
    total = F.cross_entropy(scores, labels, ignore_index=IGNORE, reduction="sum")
    return total / (labels != IGNORE).sum().clamp(min=1)


def next_token_labels(labels: Tensor, batch: PackedBatch) -> Tensor:
    """Each token's successor's label `[T]`; a sequence's last token has none."""
    successors = torch.full_like(labels, IGNORE)
    successors[:-1] = labels[1:]
    if labels.numel():
        # An empty sequence names its predecessor's end again, or −1: the end of the whole batch.
        successors[batch.cu_seqlens[1:].long() - 1] = IGNORE
    return successors


def classification_loss(config: Any, logits: Tensor, labels: Tensor) -> Tensor:
    """Regression, single-label or multi-label loss of `logits` `[B, num_labels]`.

    `config.problem_type` says which; where it is None, one label means regression, and integer
    labels mean a single label. What was found is written there, as stock does, so that a saved
    model is read by others as it was trained.

    Raises:
        TypeError: labels of the wrong kind.
        ValueError: `config.problem_type` is none of the three, or labels of another shape.
    """
    labels = check_labels("labels", labels, logits)
    problem = config.problem_type
    if problem is None:
        integers = labels.dtype in (torch.int32, torch.int64)
        single = "single_label_classification" if integers else "multi_label_classification"
        problem = "regression" if config.num_labels == 1 else single
        config.problem_type = problem
    if problem == "regression":
        if labels.squeeze().shape != logits.squeeze().shape:
            raise ValueError(
                f"labels must have shape {list(logits.shape)}, not {list(labels.shape)}"
            )
        scores = _widened(logits)
        return F.mse_loss(scores.squeeze(), labels.squeeze().to(scores.dtype))
    if problem == "single_label_classification":
        return cross_entropy(logits, labels)
    if problem == "multi_label_classification":
        scores = _widened(logits)
        return F.binary_cross_entropy_with_logits(scores, labels.to(scores.dtype))
    raise ValueError(
        f"config.problem_type {problem!r} is unknown: use regression, single_label_classification "
        "or multi_label_classification"
    )


def span_loss(
    logits: Tensor, start_positions: Tensor, end_positions: Tensor, batch: PackedBatch
) -> Tensor:
    """Mean of both ends' cross-entropy over each sequence's own tokens.

    Args:
        logits: `[T, 2]`, scores as start and as end.
        start_positions: `[B]` (or `[B, 1]`) columns of the padded row, or positions in the packed
            sequence; outside the row, or where it holds no token, they are ignored.
        end_positions: likewise.
        batch: the tokens' batch.

    Raises:
        TypeError: positions that are no integers.
        ValueError: not one position a sequence.
    """
    logits = _widened(logits)
    scores = pad(logits, batch, fill=torch.finfo(torch.float32).min)
    real = pad(torch.ones_like(logits[:, 0], dtype=torch.bool), batch)
    rows, length = real.shape
    losses = []
    for i, (name, given) in enumerate(
        (("start_positions", start_positions), ("end_positions", end_positions))
    ):
        given = check_labels(name, given, logits)
        if given.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} must be int32 or int64, not {given.dtype}")
        if given.numel() != rows:
            raise ValueError(f"{name} must hold {rows} positions, not {list(given.shape)}")
        place = given.reshape(-1, 1).long().clamp(min=0)
        inside = place < length
        inside &= real.gather(1, place.clamp(max=max(length - 1, 0))) if length else inside
        target = place.masked_fill(~inside, IGNORE).view(-1)
        losses.append(_mean_loss(scores[..., i], target))
    return (losses[0] + losses[1]) / 2


def mask_tokens(
    tokens: Tensor,
    *,
    mask_token: int,
    vocab_size: int,
    special_tokens: Sequence[int],
    generator: torch.Generator | int,
    probability: float = 0.15,
) -> tuple[Tensor, Tensor]:
    """Inputs and labels of the masked language model.

    Each token that is not special is chosen with `probability`, independently. A chosen one is
    replaced by the mask token (80%), by a random token that is not special (10%), or kept (10%).
    Source: Devlin et al., "BERT", 2019, section 3.1.

    Args:
        tokens: ids of any shape (packed: `[T]`), int32 or int64, on any device.
        mask_token: id of [MASK].
        vocab_size: V.
        special_tokens: ids that are neither chosen nor drawn, the mask token among them.
        generator: on the tokens' device; or a seed.
        probability: of being chosen.

    Returns:
        Inputs, and labels: the token itself where it was chosen, −100 elsewhere. Both like
        `tokens`, which stay as they are.

    Raises:
        TypeError: tokens that are no integers.
        ValueError: a probability outside [0, 1], or nothing but special tokens to draw from.
        IndexError: a special token, or the mask token, outside the vocabulary.
    """
    if not isinstance(tokens, Tensor) or tokens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"tokens must be a tensor of int32 or int64, not {_kind(tokens)}")
    if not 0.0 <= probability <= 1.0:
        raise ValueError(f"probability must lie in [0, 1], not {probability}")
    special = sorted({*special_tokens, mask_token})
    if special[0] < 0 or special[-1] >= vocab_size:
        raise IndexError(f"special tokens {special} must lie in 0 … {vocab_size - 1}")
    if len(special) == vocab_size:
        raise ValueError("every token of the vocabulary is special: nothing is left to draw")
    if isinstance(generator, int):
        generator = torch.Generator(tokens.device).manual_seed(generator)
    device, shape = tokens.device, tokens.shape
    draws = torch.rand((2, *shape), generator=generator, device=device)
    words = torch.randint(vocab_size - len(special), shape, generator=generator, device=device)
    for token in special:  # in rising order: what is drawn steps over each of them
        words += words >= token
    known = torch.tensor(special, dtype=tokens.dtype, device=device)
    chosen = (draws[0] < probability) & ~torch.isin(tokens, known)
    inputs = tokens.masked_fill(chosen & (draws[1] < 0.8), mask_token)
    inputs = torch.where(chosen & (draws[1] >= 0.9), words.to(tokens.dtype), inputs)
    return inputs, tokens.masked_fill(~chosen, IGNORE)


def _kind(value: Any) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


@dataclass(frozen=True)
class Passage:
    """Sentences that follow each other in a document, at least two, each a list of token ids."""

    document: int
    sentences: tuple[Sequence[int], ...]


def passages(
    documents: Sequence[Sequence[Sequence[int]]], length: int
) -> tuple[list[Passage], list[int]]:
    """Splits documents into passages for next-sentence pairs.

    Args:
        documents: of each document its sentences' token ids, without special tokens. Empty
            sentences are passed over.
        length: longest pair in tokens, its three special tokens counted.

    Returns:
        Passages that end as soon as they fill a pair (a last sentence alone is left out); and the
        places of documents too short to give any, with fewer than two sentences.

    Raises:
        ValueError: a length without room for a token in each segment, or fewer than two documents
            with passages, so that none could be drawn from another.
    """
    if length < 5:
        raise ValueError(f"length must be 5 or more, for a pair and its marks, not {length}")
    found: list[Passage] = []
    short = []
    for place, document in enumerate(documents):
        before = len(found)
        sentences: list[Sequence[int]] = []
        for sentence in (*filter(None, document), None):
            full = sum(map(len, sentences)) >= length - 3
            if len(sentences) > 1 and (full or sentence is None):
                found.append(Passage(place, tuple(sentences)))
                sentences = []
            if sentence is not None:
                sentences.append(sentence)
        if len(found) == before:
            short.append(place)
    if len({passage.document for passage in found}) < 2:
        raise ValueError(
            f"next-sentence pairs need two documents of two sentences; {len(short)} of "
            f"{len(documents)} are shorter: give more text, with blank lines between paragraphs"
        )
    return found, short


def next_sentence_pair(
    here: Passage,
    passages: Sequence[Passage],
    *,
    length: int,
    cls_token: int,
    sep_token: int,
    generator: torch.Generator,
) -> tuple[list[int], list[int], int]:
    """A pair of segments, the second of which follows the first with probability ½.

    The passage is cut between two of its sentences, at random. Where the second half is not taken,
    the end of a random passage of another document is. The longer segment loses its last tokens
    until the pair fits.

    Args:
        here: the passage.
        passages: where others are drawn from, of two documents or more; see `passages`.
        length: longest pair in tokens.
        cls_token: id that opens the pair.
        sep_token: id that ends each segment.
        generator: of a CPU.

    Returns:
        `[CLS] first [SEP] second [SEP]`; token types, 0 up to the first [SEP] and 1 after; and the
        label, 0 where the second follows, 1 where it comes from elsewhere.
    """

    def draw(high: int) -> int:
        return int(torch.randint(high, (), generator=generator))

    cut = 1 + draw(len(here.sentences) - 1)
    first, second = here.sentences[:cut], here.sentences[cut:]
    label = draw(2)
    if label:
        other = here
        while other.document == here.document:
            other = passages[draw(len(passages))]
        second = other.sentences[1 + draw(len(other.sentences) - 1) :]
    segments = [[token for sentence in half for token in sentence] for half in (first, second)]
    room = length - 3
    shorter = min(map(len, segments))
    most = max(room - shorter, room - room // 2)  # of the longer; if both are long, half each
    a = segments[0][:most]
    b = segments[1][: min(most, room - len(a))]
    ids = [cls_token, *a, sep_token, *b, sep_token]
    return ids, [0] * (len(a) + 2) + [1] * (len(b) + 1), label
