"""Beam search on a paged key-value cache; the sequences are those of transformers.

A prompt's beams share pages: where two go on from one, the cache forks it, and only the pages that
they then write apart are their own. Each prompt's search is its own and ends on its own.

Source: Wu et al., "Google's Neural Machine Translation System", 2016, section 7 (length penalty,
there of another form).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bertgpt import ops
from bertgpt.generation_job import BeamOptions, Job, StopWhen
from bertgpt.kv_cache import PagedKVCache, staged
from bertgpt.paged_forward import make_cache, pages_for, read_prompts, read_tokens
from bertgpt.sampling import penalise, seen_tokens
from bertgpt.text import StopStrings

if TYPE_CHECKING:
    from bertgpt.generation import GenerationMixin


@dataclass(frozen=True)
class Beam:
    """A text, finished or not.

    Attributes:
        score: the sum of its tokens' log-probabilities, repetition penalty applied; of a finished
            one, over length to the power of `length_penalty`.
        tokens: what was added to the prompt.
        log_probs: the tokens' log-probabilities by the scores as the model gave them, if wanted.
        parent: index of the beam that it goes on from.
        stop_strings: its detector.
    """

    score: float = 0.0
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    parent: int = 0
    stop_strings: StopStrings | None = None

    def grow(self, score: float, parent: int, token: int, log_prob: list[float]) -> Beam:
        """This beam with one more token, at most one log-probability with it."""
        tokens, log_probs = [*self.tokens, token], [*self.log_probs, *log_prob]
        detector = self.stop_strings and self.stop_strings.copy()
        return Beam(score, tokens, log_probs, parent, detector)


@dataclass
class Search:
    """One prompt's search: which beams run, which have finished. No tensors.

    Attributes:
        options: the beam search's.
        stop: what ends a text.
        limit: most tokens of a text.
        running: beams that go on, best first.
        finished: the best `num_beams` that have ended, best first.
        done: whether nothing that runs can change `finished` any more.
    """

    options: BeamOptions
    stop: StopWhen
    limit: int
    running: list[Beam]
    finished: list[Beam] = field(default_factory=list)
    done: bool = False

    @property
    def candidates(self) -> int:
        """Continuations to look at: if every stop token is among them, enough still run."""
        return max(2, 1 + len(self.stop.tokens)) * self.options.num_beams

    def advance(self, continuations: list[tuple[float, int, int, list[float]]]) -> None:
        """Takes the best continuations (score, beam, token, log-probability), best first."""
        width = self.options.num_beams
        grown = [self.running[c[1]].grow(*c) for c in continuations]
        ends = [self._ends(beam) for beam in grown]
        self._finish([b for b, end in zip(grown[:width], ends, strict=False) if end])
        self.running = [b for b, end in zip(grown, ends, strict=True) if not end][:width]
        self.done = not self.running or not self._can_improve()

    @property
    def _full(self) -> bool:
        return len(self.finished) == self.options.num_beams

    def _ends(self, beam: Beam) -> bool:
        token = beam.tokens[-1]
        hit = beam.stop_strings is not None and beam.stop_strings.push(token)
        return hit or token in self.stop.tokens or len(beam.tokens) == self.limit

    def _finish(self, ended: list[Beam]) -> None:
        scored = [replace(b, score=self._over_length(b.score, len(b.tokens))) for b in ended]
        best = sorted(self.finished + scored, key=lambda b: -b.score)
        self.finished = best[: self.options.num_beams]

    def _over_length(self, score: float, length: int) -> float:
        return score / length**self.options.length_penalty

    def _can_improve(self) -> bool:
        """Whether the best running beam may come to beat the worst finished one."""
        if not self._full:
            return True
        if self.options.early_stopping is True:
            return False
        best, length = self.running[0], len(self.running[0].tokens)
        if self.options.early_stopping == "never" and self.options.length_penalty > 0:
            length = self.limit
        return self._over_length(best.score, length) > self.finished[-1].score


@torch.no_grad()
def beam_search(model: GenerationMixin, job: Job, page_size: int) -> list[Beam]:
    """The best n texts of each prompt, prompt after prompt, best first."""
    batch, width = job.batch.to(model.device), job.beams.num_beams
    cache = make_cache(model, pages_for(batch.lengths, job.limits, width, page_size), page_size)
    owners = [[cache.allocate(length)] for length in batch.lengths]
    logits = read_prompts(model, cache, [one for (one,) in owners], batch)
    prompts = job.prompts() if job.stop.strings else [[]] * len(batch)
    searches = [
        Search(job.beams, job.stop, limit, [Beam(stop_strings=job.stop.detector(prompt))])
        for limit, prompt in zip(job.limits, prompts, strict=True)
    ]
    penalty = job.sampling[0].repetition_penalty if job.sampling else 1.0
    seen = seen_tokens(batch, logits.shape[1]) if penalty != 1.0 else None
    active = list(range(len(searches)))
    while active:
        running = [searches[i] for i in active]
        _advance(running, logits, seen, penalty, job.log_probs)
        first = 0
        kept: list[int] = []  # rows of this step that the next one's beams go on from
        for i, rows in zip(active, [len(owners[i]) for i in active], strict=True):
            search = searches[i]
            if search.done:
                search.running = []
            parents = [beam.parent for beam in search.running]
            kept += [first + parent for parent in parents]
            owners[i] = _hand_on(cache, owners[i], parents)
            first += rows
        active = [i for i in active if owners[i]]
        if active:
            newest = [b.tokens[-1] for i in active for b in searches[i].running]
            tokens = torch.tensor(newest, device=model.device)
            if seen is not None:
                seen = seen[torch.tensor(kept, device=model.device)]
                seen.scatter_(1, tokens[:, None], True)
            logits = read_tokens(model, cache, [s for i in active for s in owners[i]], tokens)
    return [beam for search in searches for beam in search.finished[: job.samples]]


def _advance(
    searches: list[Search], logits: Tensor, seen: Tensor | None, penalty: float, log_probs: bool
) -> None:
    """One step of each search, whose running beams' scores `[rows, V]` lie one after another."""
    raw = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)
    sums = [beam.score for search in searches for beam in search.running]
    scores = raw
    if seen is not None:
        scores = penalise(raw, seen, raw.new_full((len(raw),), penalty))
    sums_R = staged(sums, raw.dtype, raw.device).to(raw.device, non_blocking=True)
    scores = scores + sums_R[:, None]
    vocabulary, first, parts = raw.shape[1], 0, []
    for search in searches:
        rows = scores[first : first + len(search.running)].flatten()
        best, index = rows.topk(min(search.candidates, len(rows)))
        given = raw[first : first + len(search.running)].flatten()[index]
        parts.append(torch.stack([best.double(), index.double(), given.double()]))
        first += len(search.running)
    every = torch.cat(parts, dim=1).tolist()  # the only wait for the device
    ops.raise_pending()
    if any(map(math.isnan, every[0])):
        raise ValueError("the scores of a beam hold NaN or +inf: no token follows")
    start = 0
    for search, part in zip(searches, parts, strict=True):
        columns = zip(*(row[start : start + part.shape[1]] for row in every), strict=True)
        start += part.shape[1]
        search.advance(
            [
                (score, *divmod(int(index), vocabulary), [given] if log_probs else [])
                for score, index, given in columns
            ]
        )


def _hand_on(cache: PagedKVCache, sequences: list[int], parents: list[int]) -> list[int]:
    """Sequences of the next beams, which go on from these ones; those of no beam are freed."""
    heirs = [
        cache.fork(sequences[parent]) if parent in parents[:i] else sequences[parent]
        for i, parent in enumerate(parents)
    ]
    for sequence in set(sequences) - set(heirs):
        cache.free(sequence)
    return heirs
