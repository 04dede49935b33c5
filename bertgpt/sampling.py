"""How a next token is chosen from its scores: options, and one function that follows them.

The order is that of transformers: repetition penalty, temperature, top-k, top-p, min-p. A drawn
token depends on its row's scores and options and on (seed, sequence, step) alone, so a text is the
same whatever batch it rides in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bertgpt import ops
from bertgpt.kv_cache import staged
from bertgpt.packing import PackedBatch


@dataclass(frozen=True)
class SamplingOptions:
    """How one text's tokens are chosen.

    Attributes:
        do_sample: Draw each token; by default the likeliest is taken.
        temperature: Divides the scores; 0 takes the likeliest after all.
        top_k: Keep the so many likeliest tokens; 0 keeps all.
        top_p: Keep the fewest likeliest tokens whose share reaches this, in (0, 1].
        min_p: Keep tokens at least this times as likely as the likeliest, in [0, 1].
        repetition_penalty: Above 1, tokens of the prompt and of the text so far become less likely:
            a positive score is divided by it, a negative one multiplied. Also without `do_sample`.
        seed: 64 bits that the draws come from; None draws them from torch's default generator, anew
            for each prompt.

    Raises:
        TypeError: An option is of the wrong type.
        ValueError: An option is out of its range, or set beside `do_sample=False` to no effect.

    Source: Keskar et al., "CTRL", 2019 (repetition penalty); Nguyen et al., "Turning Up the Heat:
        Min-p Sampling", 2024; for the others see `bertgpt.ops.sample`.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.do_sample, bool):
            raise TypeError(f"do_sample must be True or False, not {self.do_sample!r}")
        for name, (low, high, wanted) in _REALS.items():
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise TypeError(f"{name} must be a number, not {value!r}")
            if not low <= value <= high:
                raise ValueError(f"{name} must {wanted}, not {value}")
        for name, (least, most) in _INTEGERS.items():
            number = getattr(self, name)
            if name == "seed" and number is None:
                continue
            if not isinstance(number, int) or isinstance(number, bool):
                raise TypeError(f"{name} must be an integer, not {number!r}")
            if not least <= number <= most:
                raise ValueError(f"{name} must lie in {least} … {most}, not {number}")
        if not self.do_sample:
            for name in ("temperature", "top_k", "top_p", "min_p", "seed"):
                if getattr(self, name) != getattr(type(self), name):
                    raise ValueError(f"{name}={getattr(self, name)} goes with do_sample=True")

    def with_seed(self, seed: int | None) -> SamplingOptions:
        """The same options under another seed."""
        return replace(self, seed=seed)

    def seeded(self) -> SamplingOptions:
        """Itself; if it draws and has no seed, the same with one of torch's default generator."""
        if not self.do_sample or self.seed is not None:
            return self
        return self.with_seed(int(torch.randint(-(2**63), 2**63 - 1, ())))


_TINY, _LARGEST = math.ulp(0.0), torch.finfo(torch.float32).max
_REALS = {
    "temperature": (0.0, _LARGEST, "be 0 or more, and finite in float32"),
    "top_p": (_TINY, 1.0, "lie in (0, 1]"),
    "min_p": (0.0, 1.0, "lie in [0, 1]"),
    "repetition_penalty": (2.0**-126, _LARGEST, "be above 0, and finite in float32"),
}
_INTEGERS = {"top_k": (0, 2**63 - 1), "seed": (-(2**63), 2**64 - 1)}


@dataclass(frozen=True)
class SamplingRows:
    """The options of a batch's rows, on the device of its scores.

    Attributes:
        temperature: float32 [B], 0 for a row whose likeliest token is taken.
        top_k: int64 [B].
        top_p: float32 [B].
        min_p: float32 [B].
        repetition_penalty: float32 [B].
        seed: int64 [B].
        sequence: int64 [B], tells texts of one seed apart.
        draws: Whether some row draws.
        penalises: Whether some row has a repetition penalty; `choose` then wants `seen`.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    repetition_penalty: Tensor
    seed: Tensor
    sequence: Tensor
    draws: bool
    penalises: bool

    @classmethod
    def of(
        cls,
        options: Sequence[SamplingOptions],
        sequences: Sequence[int],
        device: torch.device | str = "cpu",
    ) -> SamplingRows:
        """The rows' options and their sequences, as tensors; two copies to the device.

        Rows that draw have a seed. The host waits for neither copy.
        """
        device = torch.device(device)
        temperature = [o.temperature if o.do_sample else 0.0 for o in options]
        reals = staged(
            [
                temperature,
                [max(o.top_p, 2.0**-40) for o in options],  # smaller ones may be 0 in float32
                [o.min_p for o in options],
                [o.repetition_penalty for o in options],
            ],
            torch.float32,
            device,
        ).to(device, non_blocking=True)
        words = staged(
            [
                [o.top_k for o in options],
                [((o.seed or 0) + 2**63) % 2**64 - 2**63 for o in options],  # 64 bits, signed
                list(sequences),
            ],
            torch.int64,
            device,
        ).to(device, non_blocking=True)
        return cls(
            temperature=reals[0],
            top_k=words[0],
            top_p=reals[1],
            min_p=reals[2],
            repetition_penalty=reals[3],
            seed=words[1],
            sequence=words[2],
            draws=any(map(bool, temperature)),
            penalises=any(o.repetition_penalty != 1.0 for o in options),
        )

    def take(self, rows: Tensor) -> SamplingRows:
        """The options of the rows at these int64 indices."""
        kept: dict[str, Any] = {
            k: v[rows] if isinstance(v, Tensor) else v for k, v in vars(self).items()
        }
        return SamplingRows(**kept)


def choose(
    logits: Tensor, rows: SamplingRows, steps: int | Tensor, seen: Tensor | None = None
) -> Tensor:
    """The next token of each row.

    Args:
        logits: [B, V].
        rows: The rows' options.
        steps: How many tokens each row's text has so far, the prompt's not counted: a number or
            int64 [B].
        seen: bool [B, V], the tokens of each row's prompt and text; needed if a row has a
            repetition penalty.

    Returns:
        int64 [B]; −1 for a row that holds NaN, +inf or nothing but −inf.

    Raises:
        ValueError: On a CPU, a row holds NaN or +inf and some row draws.
    """
    if rows.penalises:
        assert seen is not None
        logits = penalise(logits, seen, rows.repetition_penalty)
    if not rows.draws:
        best, tokens = logits.max(dim=-1)
        return tokens.masked_fill(~best.isfinite(), -1)
    return ops.sample(
        logits,
        temperature=rows.temperature,
        top_k=rows.top_k,
        top_p=rows.top_p,
        min_p=rows.min_p,
        seed=rows.seed,
        sequence_ids=rows.sequence,
        steps=steps,
    )


def penalise(scores: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Scores [B, V] (float32 for half types) with those of tokens seen made worse by `penalty` [B].

    Logits and log-probabilities alike: what is positive is divided, what is negative multiplied.
    Finite scores stay finite, and others what they are.
    """
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    factor = penalty.to(scores.dtype)[:, None]
    most = torch.finfo(scores.dtype).max
    worse = torch.where(scores < 0, scores * factor, scores / factor).clamp(-most, most)
    return torch.where(seen & scores.isfinite(), worse, scores)


def seen_tokens(batch: PackedBatch, vocabulary: int) -> Tensor:
    """Which tokens each sequence of a batch holds, bool [B, V]."""
    rows = torch.arange(len(batch), device=batch.values.device)
    owners = rows.repeat_interleave(batch.cu_seqlens.diff(), output_size=batch.values.shape[0])
    seen = torch.zeros(len(batch), vocabulary, dtype=torch.bool, device=rows.device)
    seen[owners, batch.values.long()] = True
    return seen


def log_probabilities(logits: Tensor, tokens: Tensor) -> Tensor:
    """Natural logarithms of the tokens' probabilities under the scores as the model gave them.

    Args:
        logits: [B, V].
        tokens: int64 [B, …], tokens of each row.

    Returns:
        float32 (float64 for float64 logits), like `tokens`.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    chosen = logits.gather(1, tokens.flatten(1) if tokens.dim() > 1 else tokens[:, None])
    return (chosen - logits.logsumexp(dim=-1, keepdim=True)).view(tokens.shape)
