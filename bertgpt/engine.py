"""Serving many requests at once: continuous batching over a paged key-value cache.

Each step reads one token of every text that is being written and a limited number of prompt tokens.
Which texts those are is the scheduler's matter (`scheduler.py`), what happens in a step
`engine_loop.py`'s, and how a decoding step runs on a GPU `decode_step.py`'s.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from time import monotonic
from typing import Any

from torch import Tensor

from bertgpt.engine_async import SharedSteps
from bertgpt.engine_loop import EngineLoop
from bertgpt.engine_metrics import EngineMetrics
from bertgpt.engine_request import DeadlineExceeded, Request, Text, check_deadline, check_prompt
from bertgpt.generation import GenerationMixin, NewToken
from bertgpt.generation_job import BeamOptions, Length, make_job
from bertgpt.kv_cache import PagedKVCache
from bertgpt.page_allocator import check_int
from bertgpt.sampling import SamplingOptions

__all__ = ["DeadlineExceeded", "Engine", "EngineMetrics", "Request"]


class Engine:
    """Continues the prompts of many clients at once.

    Requests come at any time. Their texts share every step, and a text is what it would be alone:
    its draws depend on its own seed, and its scores on no other text, but for the last bits of
    sums. When pages run out, the text that is served last gives up its pages, and is read again
    later.

    Requests may be submitted and cancelled from any thread; steps run one at a time. A request that
    ends with an error, of its own or of the step that it was in, takes no other along.

    Attributes:
        model: The language model.
        cache: The pages.
    """

    def __init__(
        self,
        model: GenerationMixin,
        *,
        num_pages: int,
        page_size: int = 16,
        max_batch: int = 64,
        prefill_tokens: int = 512,
        prefix_reuse: bool = False,
        salt: bytes | None = None,
        zero_on_free: bool = False,
    ) -> None:
        """Makes the cache, on the model's device and in its dtype.

        Args:
            model: A language model of this library, in eval mode.
            num_pages: Pages of the cache; each takes 2 · layers · page_size · hidden size elements.
            page_size: Tokens of a page.
            max_batch: Most texts that are written at once.
            prefill_tokens: Most tokens of prompts in a step. Longer prompts are cut at its
                multiples, and read over several steps.
            prefix_reuse: Whether a prompt may begin with pages of an earlier one; see
                `PagedKVCache`, as for the next two.
            salt: Mixed into the keys of prefixes.
            zero_on_free: Whether pages are zeroed when they are given back.

        Raises:
            TypeError: `model` is no language model of this library, or a size no int.
            ValueError: The model is in training mode or split over ranks, or a size out of its
                range.
        """
        if not isinstance(model, GenerationMixin):
            raise TypeError(
                f"model must be a language model such as bertgpt.GPT2LMHeadModel, not "
                f"{type(model).__name__}"
            )
        if model.training:
            raise ValueError("the model is in training mode: call model.eval() first")
        if model.mesh is not None:
            raise ValueError("engines of a model split over ranks would part: call its generate()")
        for name, size in (("max_batch", max_batch), ("prefill_tokens", prefill_tokens)):
            check_int(name, size)
            if size < 1:
                raise ValueError(f"{name} must be at least 1, not {size}")
        config = model.config
        self.model = model
        self.cache = PagedKVCache(
            num_pages,
            page_size,
            num_layers=max(config.num_hidden_layers, 1),
            num_kv_heads=config.num_attention_heads,
            head_dim=config.hidden_size // config.num_attention_heads,
            dtype=model.dtype,
            device=model.device,
            prefix_reuse=prefix_reuse,
            salt=salt,
            zero_on_free=zero_on_free,
        )
        self._loop = EngineLoop(model, self.cache, max_batch, prefill_tokens)
        self._numbers = itertools.count()
        self._arrivals: deque[Request] = deque()
        self._departures: deque[tuple[Request, str, Exception | None]] = deque()
        self._live: dict[int, Request] = {}
        self._lock = threading.Lock()  # held during a step
        self._steps = SharedSteps(self.step)

    def submit(
        self,
        prompt: Sequence[int] | Tensor,
        max_new_tokens: int,
        *,
        sampling: SamplingOptions | None = None,
        num_return_sequences: int = 1,
        eos_token_id: int | Sequence[int] | None = None,
        stop_strings: str | Sequence[str] | None = None,
        tokenizer: Any = None,
        return_log_probs: bool = False,
        priority: int = 0,
        deadline: float | None = None,
    ) -> Request:
        """Lets a prompt wait for its turn. Nothing runs before `step`.

        Args:
            prompt: Token ids.
            max_new_tokens: Most tokens that a text adds.
            sampling: How tokens are chosen, and the seed; by default the likeliest.
            num_return_sequences: n, texts for the prompt, which share its pages.
            eos_token_id: Token or tokens that end a text (kept in it); None takes the config's, an
                empty sequence never stops.
            stop_strings: String or strings that end a text with the token that completes one.
            tokenizer: Anything with `decode(ids) -> str`; needed for `stop_strings`.
            return_log_probs: Whether tokens come with their log-probabilities.
            priority: Of two requests the higher is served first, and may take the other's pages.
            deadline: Seconds from now after which it ends with `DeadlineExceeded`.

        Returns:
            The request: iterate over it, or call `result`, or look at it between steps.

        Raises:
            TypeError: An argument of the wrong type.
            ValueError: An empty prompt, one that leaves no room for `max_new_tokens` in the model's
                context, an option out of its range or beside one that it excludes, more texts than
                `max_batch`, or more tokens than the whole cache holds.
            IndexError: A token, or a stop token, outside the vocabulary. In each case nothing has
                changed.
        """
        (request,) = self._requests(
            [prompt],
            max_new_tokens,
            sampling=sampling,
            num_return_sequences=num_return_sequences,
            eos_token_id=eos_token_id,
            stop_strings=stop_strings,
            tokenizer=tokenizer,
            return_log_probs=return_log_probs,
            priority=priority,
            deadline=deadline,
        )
        self._arrivals.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """Ends a request and gives its pages back: at once, or after the step that is running.

        Raises:
            TypeError: It is no request.
            ValueError: It is another engine's.
        """
        if not isinstance(request, Request):
            raise TypeError(f"request must be what submit returned, not {request!r}")
        if request.engine is not self:
            raise ValueError("the request was submitted to another engine")
        if not request.finished:
            self._departures.append((request, "cancelled", None))
            self._settle()

    def step(self) -> bool:
        """Runs one step.

        Weights that have changed since the last one are heeded: texts that are being written are
        read again with them, and nothing that was read before is reused. Where they change before
        every step, a text that has grown longer than `prefill_tokens` waits until they rest.

        Returns:
            Whether some request is not finished.

        Raises:
            RuntimeError: The model is in training mode, or has another dtype or device than it had.
                The requests wait until it is fit again.
        """
        try:
            with self._lock, self._loop.turn():
                self._sweep()
                self._loop.step()
                self._drop_finished()
                return bool(self._live or self._arrivals)
        finally:
            self._settle()

    def run(self) -> None:
        """Runs steps until every request is finished."""
        while self.step():
            pass

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, **options: Any
    ) -> list[list[int]]:
        """Continues prompts, beside whatever else was submitted, until they are all finished.

        Args:
            prompts: Lists of token ids.
            max_new_tokens: Most tokens that a text adds.
            **options: `submit`'s, for all prompts.

        Returns:
            Each prompt with what was added, n times in a row.

        Raises:
            TypeError, ValueError, IndexError: As `submit`; then none of the prompts has begun.
            Exception: What ended one of them; the others are finished.
        """
        if isinstance(prompts, Tensor):
            raise TypeError("prompts must be a list of lists: a tensor's rows may be padded")
        requests = self._requests(prompts, max_new_tokens, **options)
        self._arrivals.extend(requests)
        try:
            while not all(request.finished for request in requests):
                self.step()
        finally:  # after Ctrl-C nobody waits for them
            for request in requests:
                self.cancel(request)
        for request in requests:
            if request.error is not None:
                raise request.error
        return [text.tokens for request in requests for text in request.texts]

    def stream(
        self, prompt: Sequence[int] | Tensor, max_new_tokens: int, **options: Any
    ) -> AsyncIterator[NewToken]:
        """Continues a prompt for an asyncio program: `async for new in engine.stream(…)`.

        Steps run in a thread while somebody waits for a token. An iterator that is closed, or whose
        task is cancelled, cancels its request. Whoever waits at its deadline hears of it then.

        Args:
            prompt: Token ids.
            max_new_tokens: Most tokens that a text adds.
            **options: `submit`'s.

        Returns:
            An iterator over the new tokens. It raises what ended the request, if that was an error.

        Raises:
            TypeError, ValueError, IndexError: As `submit`, at once.
        """
        (request,) = self._requests([prompt], max_new_tokens, **options)
        return self._follow(request)

    def forget(self) -> None:
        """Before the next step, all that was read so far is forgotten.

        No later prompt begins with pages of an earlier one, and texts that are being written are
        read again. A step does this by itself when it sees that weights have changed; this is for
        changes that torch does not count, such as a write to `weight.data`.
        """
        self._loop.forget()

    def explain(self) -> str:
        """Says what of a decoding step is replayed from CUDA graphs and, if nothing, why."""
        step = self._loop.decode_step
        if step.refusal is not None:
            return f"decoding steps launch their kernels one by one: {step.refusal}"
        sizes = ", ".join(map(str, step.buckets))
        return (
            "the forward pass of decoding steps, up to the scores, is replayed from one CUDA graph "
            f"for each batch of {sizes} texts; choosing the tokens follows outside the graph"
        )

    def metrics(self) -> EngineMetrics:
        """What the engine has done so far."""
        done = self._loop.metrics()
        arrived = sum(not request.finished for request in tuple(self._arrivals))
        return replace(done, waiting=done.waiting + arrived)

    def _requests(
        self, prompts: Sequence[Sequence[int] | Tensor], max_new_tokens: int, **options: Any
    ) -> list[Request]:
        """Requests whose arguments are right, not yet among the others; then they draw seeds."""
        requests = [self._request(prompt, max_new_tokens, **options) for prompt in prompts]
        for request in requests:
            request.sampling = request.sampling.seeded()
        return requests

    def _request(
        self,
        prompt: Sequence[int] | Tensor,
        max_new_tokens: int,
        *,
        sampling: SamplingOptions | None = None,
        num_return_sequences: int = 1,
        eos_token_id: int | Sequence[int] | None = None,
        stop_strings: str | Sequence[str] | None = None,
        tokenizer: Any = None,
        return_log_probs: bool = False,
        priority: int = 0,
        deadline: float | None = None,
    ) -> Request:
        """A request whose arguments are right, still without a seed if none was given."""
        if max_new_tokens is None:
            raise TypeError("max_new_tokens must be an integer, not None")
        job = make_job(
            self.model,
            [check_prompt(prompt)],
            Length(max_new_tokens, None),
            attention_mask=None,
            eos_token_id=eos_token_id,
            pad_token_id=None,
            stop_strings=stop_strings,
            tokenizer=tokenizer,
            sampling=SamplingOptions() if sampling is None else sampling,
            seed=None,
            beams=BeamOptions(),
            num_return_sequences=num_return_sequences,
            return_log_probs=return_log_probs,
        )
        ids = job.prompts()[0]
        self._loop.scheduler.check_fits(len(ids) + max_new_tokens, job.samples)
        now, seconds = monotonic(), check_deadline(deadline)
        request = Request(
            engine=self,
            number=next(self._numbers),
            prompt=ids,
            max_new_tokens=max_new_tokens,
            sampling=job.sampling[0],
            stop_tokens=job.stop.tokens,
            priority=priority,
            log_probs=return_log_probs,
            arrived=now,
            deadline=None if seconds is None else now + seconds,
        )
        request.texts = [
            Text(request, i, list(ids), job.stop.detector(ids)) for i in range(job.samples)
        ]
        return request

    def _sweep(self) -> None:
        """Lets in who has come, and ends whoever has gone or is late. Only under the lock."""
        while self._arrivals:
            request = self._arrivals.popleft()
            self._live[request.number] = request
            self._loop.scheduler.add(request.texts[0])
        while self._departures:
            self._loop.end(*self._departures.popleft())
        now = monotonic()
        for request in self._live.values():
            if request.deadline is not None and now >= request.deadline:
                self._loop.end(request, "deadline", request.lateness(now))
        self._drop_finished()

    def _drop_finished(self) -> None:
        for number in [n for n, request in self._live.items() if request.finished]:
            del self._live[number]

    def _settle(self) -> None:
        """Ends cancelled requests, unless a step is running: then that calls this at its end."""
        while self._departures and self._lock.acquire(blocking=False):
            try:
                with self._loop.turn():
                    self._sweep()
            finally:
                self._lock.release()

    async def _follow(self, request: Request) -> AsyncIterator[NewToken]:
        self._arrivals.append(request)
        given = 0
        try:
            while True:
                finished = request.finished  # looked at first: a step in a thread may end it now
                while given < len(request.events):
                    given += 1
                    yield request.events[given - 1]
                if finished:
                    break
                ended = await self._steps.wait(request.seconds_left(monotonic()))
                if not (ended or request.finished):
                    late = request.lateness(monotonic())
                    self._departures.append((request, "deadline", late))
                    raise late
        finally:
            self.cancel(request)
        if request.error is not None:
            raise request.error
