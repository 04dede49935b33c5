"""What a training run is told, checked before anything is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

PRECISIONS = ("no", "bf16", "fp16")


@dataclass(frozen=True)
class Settings:
    """The settings of one run.

    Attributes:
        output: folder of the checkpoint, the log, the loss curve and the final model.
        learning_rate: peak of the schedule: a linear rise, then a linear fall to 0.
        warmup: length of the rise, as a fraction of the steps if below 1, else in steps.
        weight_decay: AdamW's, for matrices; biases and LayerNorms have none.
        clip_norm: largest norm of the whole gradient; infinity never clips.
        batch_size: examples of one optimizer step, over all ranks and accumulation steps.
        accumulation: parts that each rank's share of a step is computed in, one after the other.
        epochs: passes over the examples; may be a fraction.
        max_steps: optimizer steps, in place of `epochs`.
        precision: "no" (float32), or autocast to "bf16" or "fp16".
        seed: of the order of examples, of their random inputs, and of dropout.
        checkpoint_every: steps from one checkpoint to the next.
        cpu: stay on the CPU even where there is a GPU.

    Raises:
        TypeError: a number that is none.
        ValueError: a setting out of its range.
    """

    output: Path
    learning_rate: float = 5e-4
    warmup: float = 0.1
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    batch_size: int = 32
    accumulation: int = 1
    epochs: float = 1.0
    max_steps: int | None = None
    precision: str = "no"
    seed: int = 0
    checkpoint_every: int = 100
    cpu: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulation", "checkpoint_every", "max_steps", "seed"):
            value = getattr(self, name)
            if name == "max_steps" and value is None:
                continue
            if type(value) is not int:
                raise TypeError(f"{name} must be an integer, not {value!r}")
            least = 0 if name == "seed" else 1
            if value < least:
                raise ValueError(f"{name} must be {least} or more, not {value}")
            if value >= 2**63:
                raise ValueError(f"{name} must be below 2^63, not {value}")
        for name in ("learning_rate", "warmup", "weight_decay", "clip_norm", "epochs"):
            value = getattr(self, name)
            if type(value) not in (int, float):
                raise TypeError(f"{name} must be a number, not {value!r}")
            positive = name in ("learning_rate", "clip_norm", "epochs")
            finite = name == "clip_norm" or value < math.inf
            if not (value > 0 if positive else value >= 0) or not finite:
                kind = "positive" if positive else "0 or more"
                raise ValueError(f"{name} must be {kind} and finite, not {value}")
        if self.warmup >= 1 and self.warmup != int(self.warmup):
            raise ValueError(f"warmup must be a fraction below 1 or whole steps, not {self.warmup}")
        if self.precision not in PRECISIONS:
            known = ", ".join(PRECISIONS)
            raise ValueError(f"precision must be one of {known}, not {self.precision!r}")

    def steps(self, examples: int) -> int:
        """Optimizer steps of a run over so many examples.

        Raises:
            ValueError: there are no examples, or the warm-up leaves no step to decay in.
        """
        if examples < 1:
            raise ValueError("there is no example to train on: give more data")
        total = self.max_steps or math.ceil(self.epochs * examples / self.batch_size)
        if self.warmup_steps(total) >= total:
            raise ValueError(f"warmup={self.warmup} leaves none of the {total} steps: lower it")
        return total

    def warmup_steps(self, total: int) -> int:
        """Steps of the linear rise, out of `total`."""
        return int(self.warmup if self.warmup >= 1 else self.warmup * total)

    def rate(self, step: int, total: int) -> float:
        """Learning rate of a step, from 0, out of `total`: a rise to the peak, a fall to 0."""
        rise = self.warmup_steps(total)
        left = (total - step) / (total - rise)
        return self.learning_rate * (min((step + 1) / rise, left) if rise else left)
