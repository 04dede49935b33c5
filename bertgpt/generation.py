"""Continuing ragged prompts on a paged key-value cache.

Prompts are read in one packed pass, which fills the cache; then every step reads one token per
unfinished text, which attends to its own pages. The texts of one prompt share its pages. A text
that finishes gives its pages back at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bertgpt import ops
from bertgpt.beam_search import beam_search
from bertgpt.generation_job import BeamOptions, Job, Length, make_job
from bertgpt.kv_cache import PagedKVCache
from bertgpt.packing import PackedBatch
from bertgpt.paged_forward import make_cache, pages_for, read_prompts, read_tokens
from bertgpt.pretrained import PreTrainedModel
from bertgpt.sampling import (
    SamplingOptions,
    SamplingRows,
    choose,
    log_probabilities,
    seen_tokens,
)
from bertgpt.text import StopStrings

PAGE_SIZE = 16


@dataclass(frozen=True)
class NewToken:
    """One more token of a text.

    Attributes:
        text: which text: prompt · n + sample.
        token: its id.
        log_prob: its log-probability, by the scores as the model gave them; None if not asked for.
        finish_reason: None while the text goes on; else "stop_token", "stop_string" or "length".
    """

    text: int
    token: int
    log_prob: float | None
    finish_reason: str | None


@dataclass(frozen=True)
class GenerationOutput:
    """What `generate` returns when log-probabilities are asked for; T texts, n for each prompt.

    Attributes:
        sequences: each prompt with what was added: lists for lists, `[T, L + added]` for a tensor.
        log_probs: of each text's added tokens, by the scores as the model gave them.
        sequences_scores: beam search's scores, log-probabilities over length to the power of
            `length_penalty`; None without it.
    """

    sequences: Any
    log_probs: list[list[float]]
    sequences_scores: list[float] | None = None


class GenerationMixin(PreTrainedModel):
    """A language model's `generate` and `stream`.

    Attributes:
        transformer: its decoder.
        lm_head: the scores of the vocabulary.
    """

    transformer: Any
    lm_head: torch.nn.Linear

    def generate(
        self,
        prompts: Sequence[Sequence[int]] | Tensor,
        max_new_tokens: int | None = None,
        *,
        max_length: int | None = None,
        attention_mask: Tensor | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        stop_strings: str | Sequence[str] | None = None,
        tokenizer: Any = None,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | Sequence[int] | None = None,
        num_return_sequences: int = 1,
        num_beams: int = 1,
        length_penalty: float = 1.0,
        early_stopping: bool | str = False,
        return_log_probs: bool = False,
    ) -> Any:
        """Continues each prompt until a stop token, a stop string or the limit.

        By default each token is the likeliest. Put the model in eval mode first: dropout would
        apply otherwise.

        Args:
            prompts: B lists of token ids of any lengths; or a padded tensor `[B, L]`, as
                transformers takes it, whose real tokens are counted from position 0.
            max_new_tokens: most tokens to add to each prompt.
            max_length: in its place, most tokens of prompt and text together (for a tensor, most
                columns).
            attention_mask: `[B, L]` beside a tensor, nonzero for real tokens; by default the
                tokens that differ from the padding token, where that is set and is no stop token.
            eos_token_id: token or tokens that end a text (kept in it); None takes the config's, an
                empty sequence never stops.
            pad_token_id: fills rows of the returned tensor that ended early; None takes the
                config's, or else the first stop token, or else 0.
            stop_strings: string or strings that end a text with the token that completes one; the
                prompt's own text does not count.
            tokenizer: anything with `decode(ids) -> str`; needed for `stop_strings`, else not used.
            do_sample: draw each token; the next five options are `sampling.SamplingOptions`'.
            temperature: divides the scores.
            top_k: keep the so many likeliest tokens; 0 keeps all.
            top_p: keep the fewest likeliest tokens whose share reaches this, in (0, 1].
            min_p: keep tokens at least this times as likely as the likeliest, in [0, 1].
            repetition_penalty: above 1 makes tokens that prompt or text holds less likely; with or
                without `do_sample`.
            seed: 64 bits for all prompts, or a sequence with one for each; None draws one for each
                from torch's default generator. A text depends on its prompt, its seed and which of
                its prompt's n it is, and on no other prompt.
            num_return_sequences: n, texts for each prompt; they share its pages.
            num_beams: above 1, beam search over so many texts.
            length_penalty: `generation_job.BeamOptions`', as is `early_stopping`.
            early_stopping: True, False or "never".
            return_log_probs: return a `GenerationOutput`.

        Returns:
            The prompts with what was added, n for each in a row: lists for lists, a tensor
            `[B · n, L + added]` for a tensor; or a `GenerationOutput`.

        Raises:
            TypeError: an argument of the wrong type, such as a stop token that is no integer.
            ValueError: an empty prompt, a limit below 1, more tokens than the position table holds,
                an option out of its range or beside one that it excludes; or scores that hold NaN
                or +inf.
            IndexError: a token, or a stop token, outside the vocabulary.
        """
        job = make_job(
            self,
            prompts,
            Length(max_new_tokens, max_length),
            attention_mask=attention_mask,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            stop_strings=stop_strings,
            tokenizer=tokenizer,
            sampling=SamplingOptions(
                do_sample, temperature, top_k, top_p, min_p, repetition_penalty
            ),
            seed=seed,
            beams=BeamOptions(num_beams, length_penalty, early_stopping),
            num_return_sequences=num_return_sequences,
            return_log_probs=return_log_probs,
        ).seeded()
        scores = None
        if num_beams > 1:
            best = beam_search(self, job, PAGE_SIZE)
            added, log_probs = [b.tokens for b in best], [b.log_probs for b in best]
            scores = [b.score for b in best]
        else:
            added, log_probs = _collect(self, job)
        sequences = _join(prompts, added, job)
        return GenerationOutput(sequences, log_probs, scores) if return_log_probs else sequences

    def stream(
        self,
        prompts: Sequence[Sequence[int]] | Tensor,
        max_new_tokens: int | None = None,
        *,
        max_length: int | None = None,
        attention_mask: Tensor | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        stop_strings: str | Sequence[str] | None = None,
        tokenizer: Any = None,
        sampling: SamplingOptions | None = None,
        seed: int | Sequence[int] | None = None,
        num_return_sequences: int = 1,
        return_log_probs: bool = False,
    ) -> Iterator[NewToken]:
        """Continues prompts as `generate` does and hands each token over as it is chosen.

        The arguments are checked at once. Closing the iterator ends the work.

        Args:
            prompts: as in `generate`, like all that is not named here.
            max_new_tokens: most tokens to add to each prompt.
            max_length: in its place, most tokens of prompt and text together.
            attention_mask: `[B, L]`.
            eos_token_id: token or tokens that end a text.
            stop_strings: string or strings that end a text.
            tokenizer: needed for `stop_strings`.
            sampling: how tokens are chosen; by default the likeliest. `seed` replaces its own.
            seed: 64 bits for all prompts, or one for each; None takes those of `sampling`.
            num_return_sequences: n, texts for each prompt.
            return_log_probs: whether the tokens come with log-probabilities.

        Returns:
            An iterator over the new tokens: in each step one of each text that goes on.

        Raises:
            TypeError: as in `generate`.
            ValueError: as in `generate`.
            IndexError: as in `generate`.
        """
        job = make_job(
            self,
            prompts,
            Length(max_new_tokens, max_length),
            attention_mask=attention_mask,
            eos_token_id=eos_token_id,
            pad_token_id=None,
            stop_strings=stop_strings,
            tokenizer=tokenizer,
            sampling=SamplingOptions() if sampling is None else sampling,
            seed=seed,
            beams=BeamOptions(),
            num_return_sequences=num_return_sequences,
            return_log_probs=return_log_probs,
        ).seeded()
        return _decode(self, job)


@dataclass
class _Text:
    """A text that is being written."""

    index: int
    sequence: int  # of the cache
    left: int  # tokens that may still come
    stop_tokens: list[int]
    stop_strings: StopStrings | None

    def add(self, token: int) -> str | None:
        """Takes one more token; why the text ends with it, or None."""
        self.left -= 1
        if token in self.stop_tokens:
            return "stop_token"
        if self.stop_strings is not None and self.stop_strings.push(token):
            return "stop_string"
        return "length" if self.left == 0 else None


@torch.inference_mode(False)  # what one step makes, the next writes to, in whatever mode it is
@torch.no_grad()
def _decode(model: GenerationMixin, job: Job) -> Iterator[NewToken]:
    """The texts' tokens, step by step."""
    batch, n = job.batch.to(model.device), job.samples
    cache = make_cache(model, pages_for(batch.lengths, job.limits, n, PAGE_SIZE), PAGE_SIZE)
    logits_TV, texts = _start(model, job, batch, cache)
    options = [one for one in job.sampling for _ in range(n)]
    rows = SamplingRows.of(options, [*range(n)] * len(batch), model.device)
    seen_TV = None
    if rows.penalises:
        seen_TV = seen_tokens(batch, logits_TV.shape[1]).repeat_interleave(n, dim=0)
    step = 0
    while texts:
        tokens = choose(logits_TV, rows, step, seen_TV)
        log_probs: list[float | None] = [None] * len(texts)
        if job.log_probs:
            log_probs = log_probabilities(logits_TV, tokens).tolist()
        chosen = tokens.tolist()
        ops.raise_pending()  # the host has just waited for the device
        if min(chosen) < 0:
            bad = texts[chosen.index(min(chosen))].index
            raise ValueError(f"text {bad} has scores that hold NaN or +inf: no token follows")
        going = []
        for i, (text, token) in enumerate(zip(texts, chosen, strict=True)):
            reason = text.add(token)
            if reason is None:
                going.append(i)
            else:
                cache.free(text.sequence)
            yield NewToken(text.index, token, log_probs[i], reason)
        if 0 < len(going) < len(texts):
            kept = torch.tensor(going, device=tokens.device)
            tokens, rows = tokens[kept], rows.take(kept)
            seen_TV = None if seen_TV is None else seen_TV[kept]
        texts = [texts[i] for i in going]
        if texts:
            if seen_TV is not None:
                seen_TV.scatter_(1, tokens[:, None], True)
            logits_TV = read_tokens(model, cache, [text.sequence for text in texts], tokens)
        step += 1


def _start(
    model: GenerationMixin, job: Job, batch: PackedBatch, cache: PagedKVCache
) -> tuple[Tensor, list[_Text]]:
    """Reads the prompts and starts n texts on each."""
    sequences = [cache.allocate(length) for length in batch.lengths]
    logits_BV = read_prompts(model, cache, sequences, batch)
    prompts = job.prompts() if job.stop.strings else [[]] * len(sequences)
    texts: list[_Text] = []
    for sequence, limit, prompt in zip(sequences, job.limits, prompts, strict=True):
        for sample in range(job.samples):
            own = cache.fork(sequence) if sample else sequence
            detector = job.stop.detector(prompt)
            texts.append(_Text(len(texts), own, limit, job.stop.tokens, detector))
    return logits_BV.repeat_interleave(job.samples, dim=0), texts


def _collect(model: GenerationMixin, job: Job) -> tuple[list[list[int]], list[list[float]]]:
    """Each text's tokens and log-probabilities."""
    texts = len(job.batch) * job.samples
    tokens: list[list[int]] = [[] for _ in range(texts)]
    log_probs: list[list[float]] = [[] for _ in range(texts)]
    for new in _decode(model, job):
        tokens[new.text].append(new.token)
        if new.log_prob is not None:
            log_probs[new.text].append(new.log_prob)
    return tokens, log_probs


def _join(prompts: Sequence[Sequence[int]] | Tensor, added: list[list[int]], job: Job) -> Any:
    """The prompts, each n times, with what was added."""
    n = job.samples
    if not isinstance(prompts, Tensor):
        return [[*map(int, prompts[i // n]), *new] for i, new in enumerate(added)]
    candidates = (job.pad_token_id, *job.stop.tokens)
    fill = next((token for token in candidates if token is not None), 0)
    width = max(map(len, added), default=0)
    rows = [new + [fill] * (width - len(new)) for new in added]
    tail = torch.tensor(rows, dtype=prompts.dtype, device=prompts.device)
    return torch.cat([prompts.repeat_interleave(n, dim=0), tail.view(len(added), width)], dim=1)
