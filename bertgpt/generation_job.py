"""What a call of `generate` asks for, checked as a whole before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

from bertgpt.door import enter
from bertgpt.packing import PackedBatch, pack, unpad
from bertgpt.sampling import SamplingOptions
from bertgpt.text import StopStrings, check_stop_strings

if TYPE_CHECKING:
    from bertgpt.generation import GenerationMixin


@dataclass(frozen=True)
class Length:
    """Up to where texts may grow; one of the two is given.

    Attributes:
        max_new_tokens: most tokens to add to each prompt.
        max_length: most tokens of a prompt and its text together; of a padded prompt the padding
            counts, as in transformers.
    """

    max_new_tokens: int | None
    max_length: int | None

    def __post_init__(self) -> None:
        if (self.max_new_tokens is None) == (self.max_length is None):
            raise ValueError("give one of max_new_tokens and max_length")
        for name, value in vars(self).items():
            if value is not None:
                _check_count(name, value)

    def limits(self, lengths: Sequence[int]) -> list[int]:
        """Most tokens to add to prompts of these lengths."""
        if self.max_length is None:
            assert self.max_new_tokens is not None
            return [self.max_new_tokens] * len(lengths)
        for row, length in enumerate(lengths):
            if length >= self.max_length:
                raise ValueError(
                    f"prompt {row} has {length} tokens already: max_length={self.max_length} "
                    "leaves no room for one more"
                )
        return [self.max_length - length for length in lengths]


@dataclass(frozen=True)
class BeamOptions:
    """How beam search goes, under transformers' names.

    Attributes:
        num_beams: texts that are followed at once; 1 is no beam search.
        length_penalty: a text's score is its log-probability divided by (its number of tokens) to
            this power, from −32 to 32.
        early_stopping: True ends a search when `num_beams` texts have ended; False when none that
            goes on could beat them at its present length; "never" when none could at any length.
    """

    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False

    def __post_init__(self) -> None:
        _check_count("num_beams", self.num_beams)
        penalty, early = self.length_penalty, self.early_stopping
        if not isinstance(penalty, int | float) or isinstance(penalty, bool):
            raise TypeError(f"length_penalty must be a number, not {penalty!r}")
        if not abs(penalty) <= 32:  # so that no score overflows
            raise ValueError(f"length_penalty must lie in -32 … 32, not {penalty}")
        if not isinstance(early, bool) and early != "never":
            raise ValueError(f'early_stopping must be True, False or "never", not {early!r}')
        if self.num_beams == 1 and (penalty != 1.0 or early is not False):
            name = "length_penalty" if penalty != 1.0 else "early_stopping"
            raise ValueError(f"{name}={getattr(self, name)!r} goes with num_beams above 1")


@dataclass(frozen=True)
class StopWhen:
    """What ends a text beside its length.

    Attributes:
        tokens: the tokens that end it, kept in it.
        strings: the strings that do, kept in it too.
        tokenizer: what decodes tokens for `strings`.
    """

    tokens: list[int]
    strings: tuple[str, ...]
    tokenizer: Any

    def detector(self, prompt: Sequence[int]) -> StopStrings | None:
        """A detector for one text, if there is a string to find."""
        return StopStrings(self.tokenizer, self.strings, prompt) if self.strings else None


@dataclass(frozen=True)
class Job:
    """One call of `generate`.

    Attributes:
        batch: the B prompts, where they were given: lists on the host.
        limits: most tokens to add to each.
        stop: what ends a text earlier.
        sampling: each prompt's options; those that draw may have no seed yet.
        beams: the beam search's.
        samples: texts to return for each prompt, n.
        pad_token_id: fills rows of a returned tensor.
        log_probs: whether the tokens' log-probabilities are wanted.
    """

    batch: PackedBatch
    limits: list[int]
    stop: StopWhen
    sampling: list[SamplingOptions]
    beams: BeamOptions
    samples: int
    pad_token_id: int | None
    log_probs: bool

    def prompts(self) -> list[list[int]]:
        """The prompts' token ids, on the host."""
        values = self.batch.values.tolist()
        ends = torch.tensor(self.batch.lengths).cumsum(0).tolist()
        return [values[end - n : end] for end, n in zip(ends, self.batch.lengths, strict=True)]

    def seeded(self) -> Job:
        """The same, with a seed for every prompt that draws and has none."""
        return replace(self, sampling=[one.seeded() for one in self.sampling])


def make_job(
    model: GenerationMixin,
    prompts: Sequence[Sequence[int]] | Tensor,
    length: Length,
    *,
    attention_mask: Tensor | None,
    eos_token_id: int | Sequence[int] | None,
    pad_token_id: int | None,
    stop_strings: str | Sequence[str] | None,
    tokenizer: Any,
    sampling: SamplingOptions,
    seed: int | Sequence[int] | None,
    beams: BeamOptions,
    num_return_sequences: int,
    return_log_probs: bool,
) -> Job:
    """Checks the arguments of `GenerationMixin.generate`, described there; `seeded` draws later."""
    if not isinstance(sampling, SamplingOptions):
        raise TypeError(f"sampling must be SamplingOptions, not {sampling!r}")
    tokens = _stop_tokens(eos_token_id, model.config)
    strings: tuple[str, ...] = ()
    if stop_strings is not None:
        strings = check_stop_strings(tokenizer, stop_strings)
    if pad_token_id is None:
        pad_token_id = model.config.pad_token_id
    elif not is_int(pad_token_id):
        raise TypeError(f"pad_token_id must be a token id, not {pad_token_id!r}")
    elif not 0 <= pad_token_id < 2**63:
        raise ValueError(f"pad_token_id must lie in 0 … 2**63 - 1, not {pad_token_id}")
    _check_count("num_return_sequences", num_return_sequences)
    _check_together(sampling, beams, num_return_sequences)
    if not isinstance(return_log_probs, bool):
        raise TypeError(f"return_log_probs must be True or False, not {return_log_probs!r}")
    batch = _pack_prompts(prompts, attention_mask, pad_token_id, tokens)
    if min(batch.lengths, default=1) == 0:
        raise ValueError(f"prompt {batch.lengths.index(0)} is empty: start it with a token")
    columns = [prompts.shape[1]] * len(batch) if isinstance(prompts, Tensor) else batch.lengths
    limits = length.limits(columns)
    _check_room(batch, limits, model.config.max_position_embeddings)
    enter(model.transformer.limits, batch)
    if beams.num_beams > 1 and model.config.vocab_size < max(2, 1 + len(tokens)):
        raise ValueError(f"a vocabulary of {model.config.vocab_size} is too small for beam search")
    seed = sampling.seed if seed is None else seed
    if model.mesh is not None and sampling.do_sample and seed is None:
        raise ValueError("seed must be given: ranks that share a model would each draw their own")
    seeds = _seeds(seed, len(batch))
    return Job(
        batch=batch,
        limits=limits,
        stop=StopWhen(tokens, strings, tokenizer),
        sampling=[sampling.with_seed(one) for one in seeds],
        beams=beams,
        samples=num_return_sequences,
        pad_token_id=pad_token_id,
        log_probs=return_log_probs,
    )


def is_int(value: object) -> TypeGuard[int]:
    """Whether a value is an integer and no bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _check_count(name: str, value: object) -> None:
    if not is_int(value):
        raise TypeError(f"{name} must be an integer, not {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, not {value}")


def _check_together(sampling: SamplingOptions, beams: BeamOptions, texts: int) -> None:
    if beams.num_beams > 1:
        if sampling.do_sample:
            raise ValueError("do_sample=True and num_beams above 1 exclude each other")
        if texts > beams.num_beams:
            raise ValueError(
                f"num_return_sequences={texts} is more than num_beams={beams.num_beams}"
            )
    elif texts > 1 and not sampling.do_sample:
        raise ValueError(
            f"num_return_sequences={texts} goes with do_sample=True or num_beams above 1: the "
            "likeliest tokens are the same each time"
        )


def _stop_tokens(given: int | Sequence[int] | None, config: Any) -> list[int]:
    stops = config.eos_token_id if given is None else given
    if stops is None:
        return []
    tokens = list(stops) if isinstance(stops, Sequence) else [stops]
    if not all(is_int(token) for token in tokens):
        raise TypeError(f"eos_token_id must be a token id or a sequence of them, not {stops!r}")
    unknown = [token for token in tokens if not 0 <= token < config.vocab_size]
    if unknown and given is not None:
        raise IndexError(
            f"eos_token_id holds {unknown[0]}, outside the vocabulary, 0 … {config.vocab_size - 1}"
        )
    return tokens


def _pack_prompts(
    prompts: Sequence[Sequence[int]] | Tensor,
    attention_mask: Tensor | None,
    pad_token_id: int | None,
    stops: list[int],
) -> PackedBatch:
    if not isinstance(prompts, Tensor):
        if attention_mask is not None:
            raise ValueError("attention_mask goes with a padded tensor, not with lists")
        return pack(prompts)
    if prompts.ndim != 2:
        raise ValueError(f"prompts must be [B, L] or lists, not {list(prompts.shape)}")
    if attention_mask is None:
        attention_mask = torch.ones_like(prompts)
        if pad_token_id is not None and pad_token_id not in stops:
            attention_mask = (prompts != pad_token_id).long()
    return unpad(prompts, attention_mask)


def _check_room(batch: PackedBatch, limits: list[int], positions: int) -> None:
    for length, limit in zip(batch.lengths, limits, strict=True):
        room = positions - length
        if limit > room:
            raise ValueError(
                f"a prompt of {length} tokens leaves room for {max(room, 0)} more in the position "
                f"table of {positions}, not {limit}"
            )


def _seeds(seed: int | Sequence[int] | None, prompts: int) -> Sequence[int | None]:
    """The seed given for each prompt."""
    if not isinstance(seed, Sequence) or isinstance(seed, str):
        return [seed] * prompts
    if len(seed) != prompts:
        raise ValueError(f"{len(seed)} seeds for {prompts} prompts: give one each, or one for all")
    if None in seed:
        raise TypeError("each seed must be an integer, not None")
    return list(seed)
