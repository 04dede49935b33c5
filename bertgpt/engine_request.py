"""What an engine is asked for and gives back: requests, their texts, and the checks at the door."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from bertgpt.generation import NewToken
from bertgpt.sampling import SamplingOptions
from bertgpt.text import StopStrings

if TYPE_CHECKING:
    from bertgpt.engine import Engine


class DeadlineExceeded(TimeoutError):
    """A request was not finished by its deadline."""


@dataclass(eq=False)
class Text:
    """One of a request's n texts: what the scheduler schedules.

    Attributes:
        request: The request.
        index: Which of its texts.
        tokens: Prompt and text so far.
        stop_strings: Looks for strings that end it.
        sequence: Its sequence in the cache; None while it holds no pages.
        remembered: Pages of it that later prompts can find.
        seen: bool [V], tokens of prompt and text, where there is a repetition penalty.
        finish_reason: "stop_token", "stop_string", "length", "cancelled", "deadline" or "error";
            None while it goes on.
    """

    request: Request
    index: int
    tokens: list[int]
    stop_strings: StopStrings | None
    sequence: int | None = None
    remembered: int = 0
    seen: Tensor | None = None
    finish_reason: str | None = None

    @property
    def urgency(self) -> tuple[int, int, int]:
        """Texts are served in this order, the least first: by priority, then by arrival."""
        return -self.request.priority, self.request.number, self.index

    @property
    def new_tokens(self) -> list[int]:
        """The text without its prompt."""
        return self.tokens[len(self.request.prompt) :]

    def add(self, token: int) -> str | None:
        """Takes one more token; why the text ends with it, or None."""
        self.tokens.append(token)
        if self.seen is not None:
            self.seen[token] = True
        request = self.request
        if token in request.stop_tokens:
            return "stop_token"
        if self.stop_strings is not None and self.stop_strings.push(token):
            return "stop_string"
        return "length" if len(self.tokens) == request.longest else None


@dataclass(eq=False)
class Request:
    """A prompt that an engine continues.

    Iterating over it runs the engine until it is finished and gives each new token as it comes.
    Leaving such a loop early cancels it.

    Attributes:
        engine: Where it was submitted.
        number: Counts the requests of an engine.
        prompt: Token ids.
        max_new_tokens: Most tokens that a text adds.
        sampling: How tokens are chosen.
        stop_tokens: What ends a text, and stays in it.
        priority: Of two requests the higher is served first.
        log_probs: Whether tokens come with log-probabilities.
        arrived: When it was submitted, on the engine's clock, in seconds.
        deadline: When it ends at the latest, on the same clock.
        texts: Its n texts; all but the first begin as forks of the first, when that has been read.
        forked: Whether they have begun.
        events: Their new tokens, in the order of their choice.
        error: What ended it, if something went wrong.
        first_token_at: When its first token came.
        finished_at: When its last text ended.
    """

    engine: Engine = field(repr=False)
    number: int
    prompt: list[int]
    max_new_tokens: int
    sampling: SamplingOptions
    stop_tokens: list[int]
    priority: int
    log_probs: bool
    arrived: float
    deadline: float | None
    texts: list[Text] = field(default_factory=list, repr=False)
    forked: bool = False
    events: list[NewToken] = field(default_factory=list)
    error: BaseException | None = None
    first_token_at: float | None = None
    finished_at: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.priority, int) or isinstance(self.priority, bool):
            raise TypeError(f"priority must be an int, not {self.priority!r}")

    @property
    def longest(self) -> int:
        """Most tokens of prompt and text together."""
        return len(self.prompt) + self.max_new_tokens

    @property
    def finished(self) -> bool:
        """Whether no more tokens will come."""
        return self.finished_at is not None

    @property
    def tokens(self) -> list[int]:
        """The first text's new tokens."""
        return self.texts[0].new_tokens

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from arrival to the first token."""
        return None if self.first_token_at is None else self.first_token_at - self.arrived

    @property
    def time_per_token(self) -> float | None:
        """Seconds between tokens of a text after the first, on average, once it is finished."""
        later = max((len(text.new_tokens) for text in self.texts), default=0) - 1
        if self.finished_at is None or self.first_token_at is None or later < 1:
            return None
        return (self.finished_at - self.first_token_at) / later

    def seconds_left(self, now: float) -> float | None:
        """Seconds to its deadline, if it has one; 0 where that has passed."""
        return None if self.deadline is None else max(self.deadline - now, 0.0)

    def lateness(self, now: float) -> DeadlineExceeded:
        """The error of a request that is not finished at its deadline, or after."""
        waited = now - self.arrived
        return DeadlineExceeded(f"the request was not finished after {waited:.3f} s")

    def cancel(self) -> None:
        """Ends it and gives its pages back; does nothing if it is finished."""
        self.engine.cancel(self)

    def result(self) -> list[list[int]]:
        """Runs the engine until it is finished; the new tokens of each text.

        Those of a cancelled request are what it had come to.

        Raises:
            BaseException: What ended it: `DeadlineExceeded`, or what went wrong in it.
        """
        for _ in self:
            pass
        return [text.new_tokens for text in self.texts]

    def __iter__(self) -> Iterator[NewToken]:
        """New tokens of all its texts as they come; raises what ended it, if that was an error.

        An iterator that is closed or dropped early cancels the request.
        """
        given = 0
        try:
            while True:
                finished = self.finished  # looked at first: another thread's step may end it now
                while given < len(self.events):
                    given += 1
                    yield self.events[given - 1]
                if finished:
                    break
                self.engine.step()
        finally:
            self.cancel()
        if self.error is not None:
            raise self.error


def check_prompt(prompt: Sequence[int] | Tensor) -> Sequence[int]:
    """Raises TypeError unless it is one sequence; of what is looked at later."""
    if isinstance(prompt, Tensor) and prompt.ndim == 1:
        ids: list[int] = prompt.tolist()
        return ids
    if not isinstance(prompt, Sequence) or isinstance(prompt, str | bytes):
        found = f"{prompt.ndim}-D" if isinstance(prompt, Tensor) else repr(prompt)
        raise TypeError(f"prompt must be a list or 1-D tensor of token ids, not {found}")
    return prompt


def check_deadline(deadline: float | None) -> float | None:
    """Raises unless it is a number of seconds from now, or None."""
    if deadline is None:
        return None
    if not isinstance(deadline, int | float) or isinstance(deadline, bool):
        raise TypeError(f"deadline must be a number of seconds, not {deadline!r}")
    if not 0 < deadline <= sys.float_info.max:
        raise ValueError(f"deadline must be a finite number of seconds from now, not {deadline}")
    return float(deadline)
