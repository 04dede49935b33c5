"""`sample`: draws each row's next token by temperature, top-k, top-p and min-p."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bertgpt import portable, reference
from bertgpt.exact_softmax import MAX_VOCABULARY
from bertgpt.ops import _checks as checks
from bertgpt.ops._backends import Backend, Call, cuda_backend, triton_backend
from bertgpt.ops._dispatch import Op, check_backend

_NUMBERS = (int, float)
_MOST = {
    "temperature": torch.finfo(torch.float32).max,
    "top_k": 2**63 - 1,
    "top_p": 1.0,
    "min_p": 1.0,
    "steps": 2**32 - 1,
}


def sample(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    seed: int | Tensor,
    sequence_ids: int | Tensor,
    steps: int | Tensor,
    backend: str | None = None,
) -> Tensor:
    """Draws a token from each row of logits.

    Of the tokens of a row, top-k keeps the likeliest (and those as likely as the last of them),
    then top-p the fewest likeliest whose share of what is left reaches p (of equal logits, the
    lower token first; at least one), then min-p those at least that many times as likely as the
    likeliest. A token is drawn from the kept ones by their softmax at the temperature and by 64
    random bits of (seed, sequence, step): whatever batch the row is in and whichever backend runs,
    it is the same. `docs/sampling.md` is the exact definition. Carries no gradient.

    Each setting is a number for all rows or a tensor with one for each.

    Args:
        logits: [B, V]; float16, bfloat16, float32 or float64; −inf rules a token out.
        temperature: Divides the logits; float32 [B]; 0 takes the largest logit, of equal ones the
            lowest token, whatever the other settings.
        top_k: How many tokens to keep; int32 or int64 [B]; 0 keeps all.
        top_p: The share to keep, in (0, 1]; float32 [B].
        min_p: The least probability to keep, as a share of the largest, in [0, 1]; float32 [B].
        seed: 64 bits; int64 [B].
        sequence_ids: What tells the rows' sequences apart, 64 bits; int32 or int64 [B].
        steps: Which of its sequence's tokens is drawn, below 2^32; int32 or int64 [B].
        backend: "cuda", "triton", "torch" or "reference"; None takes the first that can.

    Returns:
        int64 [B]: the tokens.

    Raises:
        TypeError: A dtype is wrong.
        ValueError: A shape or device is wrong, a setting is out of its range, a row holds NaN, +inf
            or nothing but −inf, or the backend is unknown. Values in tensors are seen on a CPU and
            under `strict()`; elsewhere the token of such a row is −1.
        BackendUnavailable: The backend asked for refuses this call.

    Source: Fan et al., "Hierarchical Neural Story Generation", 2018 (top-k); Holtzman et al., "The
        Curious Case of Neural Text Degeneration", 2020 (top-p); Nguyen et al., "Turning Up the
        Heat: Min-p Sampling for Creative and Coherent LLM Outputs", 2024 (min-p).
    """
    return _OP.repeat(logits, temperature, top_k, top_p, min_p, seed, sequence_ids, steps, backend)


def _check(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    seed: int | Tensor,
    sequence_ids: int | Tensor,
    steps: int | Tensor,
    backend: str | None = None,
) -> dict[str, Any]:
    check_backend(backend)
    checks.check_tensor("logits", logits, rank=2)
    if not 1 <= logits.shape[1] <= MAX_VOCABULARY:
        raise ValueError(f"logits must be [B, V] with V in 1 … {MAX_VOCABULARY}, not shape "
                         f"{tuple(logits.shape)}")  # fmt: skip
    return {
        "logits": logits.detach() if logits.requires_grad else logits,
        "temperature": _fraction("temperature", temperature, logits),
        "top_k": _integer("top_k", top_k, logits),
        "top_p": _fraction("top_p", top_p, logits),
        "min_p": _fraction("min_p", min_p, logits),
        "seed": _integer("seed", seed, logits),
        "sequence_ids": _integer("sequence_ids", sequence_ids, logits),
        "steps": _integer("steps", steps, logits),
        "backend": backend,
    }


def _fraction(name: str, value: Any, logits: Tensor) -> Tensor:
    """A setting as a float32 tensor: a number as a 0-dim one on the CPU, where launchers see it."""
    if isinstance(value, Tensor):
        if value.dtype != torch.float32:
            raise TypeError(f"{name} must be a number or a float32 tensor, not {value.dtype}")
        _check_per_row(name, value, logits)
        return value.detach() if value.requires_grad else value
    if not isinstance(value, _NUMBERS) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number or a float32 tensor, not {value!r}")
    if not (0 <= value <= _MOST[name]) or (name == "top_p" and value == 0):
        raise ValueError(f"{name} {_wanted(name)}, not {value}")
    # A p below 2^-32 keeps one token; float32 would make the smallest ones 0, which is refused.
    value = max(value, 2.0**-40) if name == "top_p" else value
    return torch.scalar_tensor(value, dtype=torch.float32)


def _integer(name: str, value: Any, logits: Tensor) -> Tensor:
    """A setting as an int64 tensor, likewise."""
    if isinstance(value, Tensor):
        if value.dtype not in checks.INDICES or (name == "seed" and value.dtype != torch.int64):
            kinds = "an int64" if name == "seed" else "an int32 or int64"
            raise TypeError(f"{name} must be an int or {kinds} tensor, not {value.dtype}")
        _check_per_row(name, value, logits)
        return value if value.dtype == torch.int64 else value.long()
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int or a tensor of them, not {value!r}")
    if (name in ("top_k", "steps") and value < 0) or value > _MOST.get(name, value):
        raise ValueError(f"{name} {_wanted(name)}, not {value}")
    return checks.as_word(name, value)


def _check_per_row(name: str, value: Tensor, logits: Tensor) -> None:
    rows = logits.shape[:1]
    if value.dim() and value.shape != rows:
        raise ValueError(
            f"{name} must have shape () or [B] = {tuple(rows)}, not {tuple(value.shape)}"
        )
    if value.dim() or not value.is_cpu:
        checks.check_device(name, value, "logits", logits)


def _wanted(name: str) -> str:
    return {
        "temperature": "must be 0 or more, and finite in float32",
        "top_p": "must lie in (0, 1]",
        "min_p": "must lie in [0, 1]",
        "top_k": "must be 0 (keep all) or more, below 2^63",
        "steps": "must lie in 0 … 2^32 - 1",
    }[name]


def _check_values(call: Call) -> None:
    temperature, top_p, min_p = call["temperature"], call["top_p"], call["min_p"]
    steps = call["steps"]
    right = {
        "temperature": (temperature >= 0) & (temperature <= _MOST["temperature"]),
        "top_k": call["top_k"] >= 0,
        "top_p": (top_p > 0) & (top_p <= 1),
        "min_p": (min_p >= 0) & (min_p <= 1),
        "steps": (steps >= 0) & (steps <= _MOST["steps"]),
    }
    for name, is_right in right.items():
        if not is_right.all():
            row = int(is_right.flatten().byte().argmin())
            raise ValueError(f"{name} {_wanted(name)}, not {call[name].flatten()[row]} (row {row})")
    top_B = call["logits"].amax(dim=1)
    if not (finite := top_B.isfinite()).all():
        row = int(finite.byte().argmin())
        what = {torch.inf: "+inf", -torch.inf: "nothing but -inf"}.get(float(top_B[row]), "NaN")
        raise ValueError(f"row {row} of logits holds {what}: it has no softmax to draw from")


def _run_kernel(kernels: Any, call: Call) -> Tensor:
    return kernels.sample(
        call["logits"], temperature=call["temperature"], top_k=call["top_k"], top_p=call["top_p"],
        min_p=call["min_p"], seed=call["seed"], sequence_ids=call["sequence_ids"],
        steps=call["steps"],
    )  # fmt: skip


_OP = Op(
    "sample(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p,"
    " Tensor seed, Tensor sequence_ids, Tensor steps, str? backend) -> Tensor",
    check=_check,
    check_values=_check_values,
    backends={
        "cuda": cuda_backend("sample", _run_kernel),
        "triton": triton_backend("sample", lambda kernels, **c: _run_kernel(kernels, c)),
        "torch": Backend(portable.sample),
        "reference": Backend(reference.sample),
    },
    fake=lambda call: call["logits"].new_empty(call["logits"].shape[0], dtype=torch.int64),
)
