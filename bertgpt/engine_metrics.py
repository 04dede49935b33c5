"""What an engine has done so far, in numbers that cost no memory."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Mean:
    """The mean of numbers that are not kept."""

    total: float = 0.0
    count: int = 0

    def add(self, value: float | None) -> None:
        """Takes one more number, if there is one."""
        if value is not None:
            self.total += value
            self.count += 1

    @property
    def value(self) -> float | None:
        """Their mean; None where there was none."""
        return self.total / self.count if self.count else None


@dataclass(frozen=True)
class EngineMetrics:
    """What an engine has done since it was made. Times are seconds.

    Attributes:
        finished: Requests that came to their end.
        failed: Requests that ended with an error, deadlines among them.
        cancelled: Requests whose client went away.
        waiting: Texts that wait for pages now.
        running: Texts that have pages now.
        prompt_tokens: Tokens read in chunks: prompts, and what was read again.
        reused_tokens: Tokens that were found in the cache instead.
        new_tokens: Tokens chosen.
        preemptions: How often a text gave up its pages for another.
        decode_steps: Steps in which texts were read token by token.
        batch_fill: Of the rows of those steps, the share that was taken up, on average.
        page_use: The share of the cache's pages that texts hold now.
        peak_page_use: The most that it was after a step.
        time_to_first_token: From a request's arrival, on average over requests.
        time_per_token: Between tokens of a text after the first, on average over requests.
    """

    finished: int
    failed: int
    cancelled: int
    waiting: int
    running: int
    prompt_tokens: int
    reused_tokens: int
    new_tokens: int
    preemptions: int
    decode_steps: int
    batch_fill: float | None
    page_use: float
    peak_page_use: float
    time_to_first_token: float | None
    time_per_token: float | None
