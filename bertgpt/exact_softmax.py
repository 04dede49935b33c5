"""Softmax weights as integers: the same on every backend, and summed exactly in any order.

A token's weight is 2^40 · exp((x − max x) / temperature), rounded down by the steps below, each of
which is exact or correctly rounded wherever it runs. `docs/sampling.md` is the written definition.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

WEIGHT_BITS = 40  # the likeliest token weighs 2^40
MAX_VOCABULARY = 1 << 22  # so a sum of weights stays below 2^62

# 2^-f for f in [0, 1) as 1 − f q(f), in units of 2^-31 and with alternating signs: q interpolates
# (1 − 2^-f) / f at the seven Chebyshev nodes of [0, 1]. Off by less than 2^-28 of the value.
COEFFICIENTS = (
    0x80000000, 0x58B90BFC, 0x1EBFBDE5, 0x071AC093, 0x013B20D4, 0x002B9458, 0x0004E100, 0x00005ED3,
)  # fmt: skip
_LOG2_E = math.log2(math.e)


def working_dtype(logits: Tensor) -> torch.dtype:
    """The dtype in which logits are compared and scaled: float32, or float64 for float64."""
    return torch.promote_types(logits.dtype, torch.float32)


def least_weight(min_p: Tensor) -> Tensor:
    """The least integer weight that min-p keeps, int64: exact, a float32 times a power of two."""
    return (min_p.double() * 2.0**WEIGHT_BITS).ceil().long()


def exact_weights(x: Tensor, temperature: Tensor) -> Tensor:
    """The integer weights of logits.

    Args:
        x: [..., V], float32 or float64; −inf rules a token out. The largest of a row is finite.
        temperature: float32 [...], positive and finite.

    Returns:
        int64 [..., V]: 2^40 for a row's largest logit, 0 from 2^41 times less likely downwards.
    """
    log2_e = torch.full_like(temperature, _LOG2_E, dtype=x.dtype)  # a scalar would be multiplied
    rate = (log2_e / temperature.to(x.dtype)).clamp(max=torch.finfo(torch.float32).max)
    y = (x.amax(dim=-1, keepdim=True) - x).mul_(rate[..., None])  # bits less likely than the top
    whole = y.clamp_(max=WEIGHT_BITS + 1).floor()
    fraction = y.sub_(whole).mul_(2.0**32).long()  # of 2^-32, rounded down
    mantissa = torch.full_like(fraction, COEFFICIENTS[-1])
    for coefficient in reversed(COEFFICIENTS[:-1]):
        mantissa.mul_(fraction).bitwise_right_shift_(32).neg_().add_(coefficient)
    return mantissa.bitwise_left_shift_(WEIGHT_BITS - 31).bitwise_right_shift_(whole.long())
