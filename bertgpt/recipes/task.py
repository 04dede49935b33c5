"""What a run trains: a model, batches made of examples, and the losses of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from bertgpt.packing import PackedBatch
from bertgpt.pretrained import PreTrainedModel


@dataclass(frozen=True)
class Batch:
    """Packed examples with their labels.

    Attributes:
        tokens: the model's input.
        labels: the model's other arguments, by name.
        counts: of each loss, how many labels it is the mean of. Losses are weighted by these over
            ranks and accumulated parts, so that any split of a step gives the same gradient.
    """

    tokens: PackedBatch
    labels: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def to(self, device: torch.device) -> Batch:
        """The batch with every tensor on `device`."""
        labels = {name: labels.to(device) for name, labels in self.labels.items()}
        return replace(self, tokens=self.tokens.to(device), labels=labels)


# (examples, a seed for each one's random inputs) → batch, on the CPU. An example's part of the
# batch depends on it and its seed alone.
Collate = Callable[[Sequence[Any], Sequence[int]], Batch]


class Task(nn.Module):
    """A model and its loss, as one module: what `accelerate` wraps.

    Args:
        model: what is trained, in place.
        collate: makes batches, whose `counts` name what `forward` returns.
    """

    # Submodules whose weights FSDP gathers together: all of a layer but its norms, which GPT-2
    # calls from outside its layers.
    _no_split_modules = ("SelfAttention", "FeedForward")

    def __init__(self, model: PreTrainedModel, collate: Collate) -> None:
        super().__init__()
        self.model, self.collate = model, collate

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Each loss's mean over its labels, by name; their sum is trained."""
        return {"loss": self.model(batch.tokens, **batch.labels, return_dict=True).loss}
