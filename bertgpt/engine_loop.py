"""An engine's steps: texts are read, their next tokens chosen, and handed to their requests.

What goes wrong in a step ends the requests that were in it; what goes wrong with one text ends its
request. Nothing here waits or locks: `engine.py` does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import monotonic

import torch
from torch import Tensor

from bertgpt import ops
from bertgpt.decode_step import DecodeStep, wait_for_device
from bertgpt.engine_metrics import EngineMetrics, Mean
from bertgpt.engine_request import Request, Text
from bertgpt.engine_turn import Turn
from bertgpt.generation import GenerationMixin, NewToken
from bertgpt.kv_cache import OutOfPages, PagedKVCache, staged
from bertgpt.paged_forward import read_chunks
from bertgpt.sampling import SamplingRows, choose, log_probabilities
from bertgpt.scheduler import Scheduler
from bertgpt.weight_watch import WeightWatch


class EngineLoop:
    """Texts that are being written, and the steps that write them.

    Args:
        model: The language model.
        cache: A cache for it.
        max_batch: Most texts at once.
        prefill_tokens: Most prompt tokens in a step.

    Attributes:
        turn: The context that all work is done in, whoever asks for it.
    """

    def __init__(
        self, model: GenerationMixin, cache: PagedKVCache, max_batch: int, prefill_tokens: int
    ) -> None:
        self.cache = cache
        self.scheduler = Scheduler(cache, max_batch, prefill_tokens)
        self.decode_step = DecodeStep(model, cache, max_batch, model.config.max_position_embeddings)
        self.turn = Turn(cache.device)
        self._model = model
        self._watch = WeightWatch(model)
        self._misfit: str | None = None
        self._prefill_tokens = prefill_tokens
        self._rows: tuple[list[Text], SamplingRows] | None = None
        self._ended = {"finished": 0, "failed": 0, "cancelled": 0}
        self._prompt_tokens = self._new_tokens = 0
        self._fill, self._first, self._later = Mean(), Mean(), Mean()
        self._peak = 0.0

    def metrics(self) -> EngineMetrics:
        """What has been done so far."""
        return EngineMetrics(
            **self._ended,
            waiting=len(self.scheduler.waiting),
            running=len(self.scheduler.running),
            prompt_tokens=self._prompt_tokens,
            reused_tokens=self.scheduler.reused_tokens,
            new_tokens=self._new_tokens,
            preemptions=self.scheduler.preemptions,
            decode_steps=self._fill.count,
            batch_fill=self._fill.value,
            page_use=self._page_use(),
            peak_page_use=self._peak,
            time_to_first_token=self._first.value,
            time_per_token=self._later.value,
        )

    def end(self, request: Request, reason: str, error: Exception | None = None) -> None:
        """Ends what is unfinished of a request's texts, and frees their pages."""
        if request.finished:
            return
        request.error = error
        for text in request.texts:
            if text.finish_reason is None:
                self._finish(text, reason)

    def forget(self) -> None:
        """Before the next step, all that was read is forgotten."""
        self._watch.tell()

    def step(self) -> None:
        """Reads a token of each text that is being written, then some of the prompts.

        Raises:
            RuntimeError: The model is not fit to be served from; no request has ended.
        """
        self._look_at_model()
        self._decode()
        self._admit()
        self._peak = max(self._peak, self._page_use())
        self._prefill()

    def _look_at_model(self) -> None:
        """What was read with other weights is read again; graphs of other weights are dropped."""
        change = self._watch.look()
        if change == "moved":
            self.decode_step.recapture()
            self._misfit = self._why_misfit()
        if change is not None:
            # The new weights may still be on their way, on a stream that is a client's own.
            wait_for_device(self.cache.device)
            self.cache.forget()
            for text in list(self.scheduler.running):
                self.scheduler.preempt(text)
            self._watch.heeded()
        if self._watch.training:
            raise RuntimeError(
                "the model, or a part of it, is in training mode, where dropout applies: call "
                "model.eval() before the next step; the requests wait"
            )
        if self._misfit is not None:
            raise RuntimeError(self._misfit)

    def _why_misfit(self) -> str | None:
        """Why the weights do not go with the cache, if they do not."""
        wanted = f"{self.cache.layers[0][0].dtype} on {self.cache.device}"
        found = f"{self._model.dtype} on {self._model.device}"
        if found == wanted:
            return None
        return (
            f"the model is {found} now, and the cache of this engine {wanted}: move it back, or "
            "make another engine"
        )

    def _decode(self) -> None:
        texts = self.scheduler.decoding()
        with self._guard(texts):
            texts = self._advance()
            if texts:
                self._fill.add(len(texts) / self.decode_step.max_batch)
                self._take(texts, self.decode_step.run([text.tokens[-1] for text in texts]))

    def _advance(self) -> list[Text]:
        """The texts that have room for one more token, after others have made way."""
        while texts := self.scheduler.decoding():
            try:
                self.decode_step.advance(_sequences(texts))
                return texts
            except OutOfPages:
                self.scheduler.preempt(self.scheduler.least_urgent())
        return []

    def _admit(self) -> None:
        """Lets waiting texts run, the most urgent first, until one finds no room."""
        while self.scheduler.waiting:
            text = self.scheduler.waiting[0]
            try:
                if not self.scheduler.admit(text):
                    return
            except Exception as error:  # such as a launch that was to clear its pages
                self.end(text.request, "error", error)

    def _prefill(self) -> None:
        chunks = self.scheduler.chunks()
        if not chunks:
            return
        texts, tokens = [text for text, _ in chunks], []
        for text, count in chunks:
            start = len(text.tokens) - self.scheduler.unread(text)
            tokens.append(text.tokens[start : start + count])
        with self._guard(texts):
            scores = read_chunks(
                self._model, self.cache, _sequences(texts), tokens, self._prefill_tokens
            )
            self._prompt_tokens += sum(map(len, tokens))
            self._take(texts, scores)

    @contextmanager
    def _guard(self, texts: list[Text]) -> Iterator[None]:
        """An error within ends the requests of these texts, but for those that made way before."""
        try:
            yield
        except Exception as error:
            for text in texts:
                if text.sequence is not None:
                    self.end(text.request, "error", error)
        except BaseException:  # such as Ctrl-C: nobody knows what their pages hold
            for request in {text.request: None for text in texts}:  # and so of their forks
                self.scheduler.restart(request)
            raise

    def _take(self, texts: list[Text], scores: Tensor) -> None:
        """Chooses the next token of each text that has been read to its end."""
        read: list[Text] = []
        rows: list[int] = []
        for row, text in enumerate(texts):
            if self.scheduler.unread(text):
                continue
            born = self._fork(text)
            read += [text, *born]
            rows += [row] * (1 + len(born))
        if not read:
            return
        if rows != list(range(len(scores))):
            scores = scores[self._on_device(rows)]
        chosen = self._choose(read, scores)
        now = monotonic()
        for text, (token, log_prob) in zip(read, chosen, strict=True):
            if text.finish_reason is None:  # its request may have ended with the text before
                if token >= 0:  # the device has done all that was asked, and the scores are finite
                    self._remember(text)
                self._deliver(text, token, log_prob, now)

    def _fork(self, text: Text) -> list[Text]:
        """The texts that begin where a request's first has come to the end of its prompt."""
        request = text.request
        if request.forked:
            return []
        request.forked = True
        for other in request.texts[1:]:
            self.scheduler.add_fork(text, other)
        return request.texts[1:]

    def _choose(self, texts: list[Text], scores: Tensor) -> list[tuple[int, float | None]]:
        """Next tokens and their log-probabilities; −1 where there is no choosing by the scores."""
        sane = scores.amax(dim=-1).isfinite()
        if scores.is_cuda or not sane.all():  # asking a GPU would be to wait for it
            scores = scores.masked_fill(~sane[:, None], 0)
        rows = self._sampling_rows(texts)
        steps = [len(text.tokens) - len(text.request.prompt) for text in texts]
        seen = self._seen(texts, scores) if rows.penalises else None
        tokens = choose(scores, rows, self._on_device(steps), seen)
        log_probs: list[float | None] = [None] * len(texts)
        if any(text.request.log_probs for text in texts):
            log_probs = log_probabilities(scores, tokens).tolist()
        chosen = tokens.masked_fill(~sane, -1).tolist()
        ops.raise_pending()  # the host has just waited for the device
        return list(zip(chosen, log_probs, strict=True))

    def _sampling_rows(self, texts: list[Text]) -> SamplingRows:
        """The texts' options; made anew when the texts are others than the last time."""
        if self._rows is None or self._rows[0] != texts:
            options = [text.request.sampling for text in texts]
            indices = [text.index for text in texts]
            self._rows = texts, SamplingRows.of(options, indices, self.cache.device)
        return self._rows[1]

    def _seen(self, texts: list[Text], scores: Tensor) -> Tensor:
        """The tokens, bool [B, V], of the prompts and texts that have a repetition penalty."""
        nothing = torch.zeros(scores.shape[1], dtype=torch.bool, device=scores.device)
        for text in texts:
            if text.request.sampling.repetition_penalty != 1.0 and text.seen is None:
                text.seen = nothing.clone()
                text.seen[self._on_device(text.tokens)] = True
        return torch.stack([nothing if text.seen is None else text.seen for text in texts])

    def _deliver(self, text: Text, token: int, log_prob: float | None, now: float) -> None:
        request = text.request
        try:
            if token < 0:
                raise ValueError("the scores of the next token hold NaN, +inf or nothing but -inf")
            reason = text.add(token)
        except Exception as error:  # of the tokenizer that looks for stop strings, for one
            self.end(request, "error", error)
            return
        self._new_tokens += 1
        if request.first_token_at is None:
            request.first_token_at = now
        request.events.append(
            NewToken(text.index, token, log_prob if request.log_probs else None, reason)
        )
        if reason is not None:
            self._finish(text, reason)

    def _finish(self, text: Text, reason: str) -> None:
        self.scheduler.remove(text)
        text.finish_reason, text.seen = reason, None
        self._rows = None  # which holds on to the texts
        request = text.request
        if any(other.finish_reason is None for other in request.texts):
            return
        request.finished_at = monotonic()
        ended = "cancelled" if reason == "cancelled" else "finished"
        self._ended["failed" if request.error is not None else ended] += 1
        self._first.add(request.time_to_first_token)
        self._later.add(request.time_per_token)

    def _remember(self, text: Text) -> None:
        """Lets later prompts find the pages that a text has filled."""
        assert text.sequence is not None
        full = self.cache.length(text.sequence) // self.cache.page_size
        if full > text.remembered:
            self.cache.remember(text.sequence, text.tokens[: full * self.cache.page_size])
            text.remembered = full

    def _on_device(self, values: list[int]) -> Tensor:
        device = self.cache.device
        return staged(values, torch.int64, device).to(device, non_blocking=True)

    def _page_use(self) -> float:
        return 1 - self.cache.num_free_pages / self.cache.num_pages


def _sequences(texts: Sequence[Text]) -> list[int]:
    return [text.sequence for text in texts if text.sequence is not None]
