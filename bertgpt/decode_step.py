"""One decoding step of many texts, on a GPU one replay of a CUDA graph.

Everything that a step reads lies in tensors that stay where they are, so a step captured once is
right for all that follow. There is a graph for each bucket of rows: 1, 2, 4, … and the most. The
rows of a bucket that no text takes up have length 0 and no slot.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bertgpt import ops
from bertgpt.decode_batch import DecodeBatch
from bertgpt.kv_cache import PagedKVCache, staged
from bertgpt.paged_forward import ReadPages, forward

if TYPE_CHECKING:
    from bertgpt.generation import GenerationMixin

Step = Callable[[], Tensor]
Capture = Callable[[Step], Step]

# A wait for a whole device breaks a capture that another thread has begun, and is refused itself.
_whole_device = threading.Lock()


class DecodeStep:
    """The decoding steps of an engine.

    Args:
        model: The language model.
        cache: Its cache.
        max_batch: Most texts in a step.
        max_tokens: Longest text with its prompt.

    Attributes:
        max_batch: Most texts in a step.
        buckets: Rows of the steps that a graph is captured for.
        refusal: Why steps are not replayed from graphs; None where they are.
    """

    def __init__(
        self, model: GenerationMixin, cache: PagedKVCache, max_batch: int, max_tokens: int
    ) -> None:
        self.max_batch = max_batch
        self.buckets = _buckets(max_batch)
        self._model = model
        self._cache = cache
        self._batch = DecodeBatch(cache, max_batch, max_tokens)
        with torch.inference_mode(False):  # as the batch's tensors
            self._tokens = torch.zeros(max_batch, dtype=torch.int64, device=cache.device)
        self._captured: dict[int, Step] = {}
        self._new_capture: Callable[[], Capture] = CudaCapture
        self._capture: Capture = self._new_capture()
        self.refusal = self._why_not()

    def advance(self, sequences: Sequence[int]) -> None:
        """Makes room for one more token of each sequence.

        Raises:
            OutOfPages: There are too few free pages; nothing has changed.
        """
        self._batch.advance(sequences)

    def run(self, tokens: Sequence[int]) -> Tensor:
        """Reads the next token of each sequence that was advanced.

        Returns:
            `[B, V]`: the scores of the tokens after them. The next step may write over them.
        """
        count = len(tokens)
        padded = [*tokens, *[0] * (self.max_batch - count)]
        self._tokens.copy_(staged(padded, torch.int64, self._tokens.device), non_blocking=True)
        if self.refusal is not None:
            return self._forward(count)
        bucket = next(size for size in self.buckets if size >= count)
        if bucket not in self._captured:
            # What a capture launches does not run, so the first step of its size runs by itself.
            scores = self._forward(bucket)
            try:
                self._captured[bucket] = self._capture(partial(self._forward, bucket))
            except RuntimeError as error:
                self.refusal = f"capturing a step of {bucket} texts failed: {error}"
            return scores[:count]
        return self._captured[bucket]()[:count]

    def recapture(self) -> None:
        """Drops the graphs: they read weights where these no longer lie."""
        self._captured.clear()
        self._capture = self._new_capture()

    def _forward(self, rows: int) -> Tensor:
        batch = self._batch
        attend = ReadPages(
            self._cache, batch.slots[:rows], batch.page_table[:rows], batch.lengths[:rows]
        )
        hidden = forward(self._model, self._tokens[:rows], batch.positions[:rows], attend)
        scores: Tensor = self._model.lm_head(hidden)
        return scores

    def _why_not(self) -> str | None:
        device = self._cache.device
        if device.type != "cuda":
            name = "CPU" if device.type == "cpu" else device.type
            return f"the model is on the {name}, which has no CUDA graphs"
        k_pages, v_pages = self._cache.layers[0]
        q = k_pages.new_empty(self.max_batch, k_pages.shape[1], k_pages.shape[3])
        for op, call in (
            ("paged_write", (q, q, k_pages, v_pages, self._batch.slots)),
            ("paged_attention", (q, k_pages, v_pages, self._batch.page_table, self._batch.lengths)),
        ):
            plan = ops.explain(op, *call)
            if plan.backend not in ("cuda", "triton"):
                return f"{op} runs on backend {plan.backend!r}, which waits for the device:\n{plan}"
        return None


class CudaCapture:
    """Captures steps into CUDA graphs that share one pool of memory, as one runs at a time."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, step: Step) -> Step:
        """A function that replays what `step` launches; it gives the same tensor each time."""
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on using the device meanwhile. Entering waits for all of it.
        mode = "thread_local"
        with _whole_device, torch.cuda.graph(graph, pool=self._pool, capture_error_mode=mode):
            output = step()
        self._pool = graph.pool()

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay


def wait_for_device(device: torch.device) -> None:
    """Waits for what a GPU was asked for on any stream; on a CPU there is nothing to wait for."""
    if device.type == "cuda":
        with _whole_device:
            torch.cuda.synchronize(device)


def _buckets(most: int) -> tuple[int, ...]:
    """1, 2, 4, … below `most`, and `most`."""
    return (*(1 << i for i in range((most - 1).bit_length())), most)
