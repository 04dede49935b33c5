"""What models return: fields by attribute, by name or by place among those that are set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

Layers = tuple[Tensor, ...]


class ModelOutput(Mapping[str, Any]):
    """Base of all outputs: a read-only mapping of the fields that are not None.

    `out.logits`, `out["logits"]`, `out[0]` and `out[:2]` all work, as in transformers; iterating
    gives names. `to_tuple()` is what `return_dict=False` returns.
    """

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are set, in order."""
        return tuple(self[name] for name in self)

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, str):
            return self.to_tuple()[key]
        if key not in tuple(self):
            raise KeyError(key)
        return getattr(self, key)

    def __iter__(self) -> Iterator[str]:
        names = (field.name for field in fields(self))  # type: ignore[arg-type]
        return (name for name in names if getattr(self, name) is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)


@dataclass(eq=False)
class BaseModelOutput(ModelOutput):
    """Hidden states `[B, L, E]` (packed: `[T, E]`), with BERT's pooled first tokens `[B, E]`."""

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    past_key_values: None = None
    hidden_states: Layers | None = None
    attentions: None = None
    cross_attentions: None = None


@dataclass(eq=False)
class LogitsOutput(ModelOutput):
    """One head: logits `[B, L, V]` (packed: `[T, V]`), or one row per sequence."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: None = None
    hidden_states: Layers | None = None
    attentions: None = None
    cross_attentions: None = None


@dataclass(eq=False)
class PreTrainingOutput(ModelOutput):
    """Both of BERT's pre-training heads."""

    loss: Tensor | None = None
    prediction_logits: Tensor | None = None
    seq_relationship_logits: Tensor | None = None
    hidden_states: Layers | None = None
    attentions: None = None


@dataclass(eq=False)
class SentenceOrderOutput(ModelOutput):
    """Both of ALBERT's pre-training heads."""

    loss: Tensor | None = None
    prediction_logits: Tensor | None = None
    sop_logits: Tensor | None = None
    hidden_states: Layers | None = None
    attentions: None = None


@dataclass(eq=False)
class QuestionAnsweringOutput(ModelOutput):
    """Scores of each token `[B, L]` (packed: `[T]`) as the start and the end of an answer."""

    loss: Tensor | None = None
    start_logits: Tensor | None = None
    end_logits: Tensor | None = None
    hidden_states: Layers | None = None
    attentions: None = None
