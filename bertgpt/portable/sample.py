"""Drawing next tokens with torch's sort and cumulative sums, several rows at once."""

from __future__ import annotations

import torch
from torch import Tensor

from bertgpt.exact_softmax import exact_weights, least_weight, working_dtype
from bertgpt.philox import sample_words

_LOW = 0xFFFFFFFF
_LOGITS_AT_ONCE_CPU = 1 << 17  # some ten int64 temporaries of this many stay in the last cache


def sample(
    logits: Tensor,
    *,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    sequence_ids: Tensor,
    steps: Tensor,
) -> Tensor:
    """What `bertgpt.ops.sample` computes; the arguments are described there, all as tensors."""
    B, V = logits.shape
    settings = [
        t.to(logits.device).expand(B)
        for t in (temperature, top_k, top_p, min_p, seed, sequence_ids, steps)
    ]
    at_once = max(1, _LOGITS_AT_ONCE_CPU // V) if logits.device.type == "cpu" else max(1, B)
    token_B = torch.empty(B, dtype=torch.int64, device=logits.device)
    with torch.no_grad():
        for start in range(0, B, at_once):
            rows = slice(start, start + at_once)
            token_B[rows] = _draw(logits[rows], *(t[rows] for t in settings))
    return token_B


def _draw(
    logits_BV: Tensor,
    temperature_B: Tensor,
    top_k_B: Tensor,
    top_p_B: Tensor,
    min_p_B: Tensor,
    seed_B: Tensor,
    sequence_B: Tensor,
    step_B: Tensor,
) -> Tensor:
    """The rows' tokens, −1 where there is nothing to draw by."""
    x_BV = logits_BV.to(working_dtype(logits_BV))
    top_B = x_BV.amax(dim=1)
    valid_B = top_B.isfinite() & temperature_B.isfinite() & (temperature_B >= 0)
    valid_B &= (top_k_B >= 0) & (top_p_B > 0) & (top_p_B <= 1) & (min_p_B >= 0) & (min_p_B <= 1)
    greedy_B = temperature_B == 0
    if greedy_B.all():
        return _first(x_BV == top_B[:, None]).where(valid_B, -1)

    x_BV = x_BV.masked_fill(~valid_B[:, None], 0)
    weight_BV = exact_weights(x_BV, temperature_B.where(valid_B & ~greedy_B, 1))
    if ((top_k_B > 0) | (top_p_B < 1)).any():
        weight_BV = _head(x_BV, weight_BV, top_k_B.where(valid_B, 0), top_p_B.where(valid_B, 1))
    if (min_p_B > 0).any():
        weight_BV.masked_fill_(weight_BV < least_weight(min_p_B.where(valid_B, 0))[:, None], 0)
    mass_BV = weight_BV.cumsum_(dim=1)
    point_B = _portion(mass_BV[:, -1], *sample_words(seed_B, sequence_B, step_B))
    drawn_B = torch.searchsorted(mass_BV, point_B[:, None], right=True)[:, 0]
    if greedy_B.any():
        drawn_B = _first(x_BV == top_B[:, None]).where(greedy_B, drawn_B)
    return drawn_B.where(valid_B, -1)


def _head(x_BV: Tensor, weight_BV: Tensor, top_k_B: Tensor, top_p_B: Tensor) -> Tensor:
    """The weights of the tokens that top-k and then top-p keep, 0 elsewhere."""
    x_sorted_BV, order_BV = x_BV.sort(dim=1, descending=True, stable=True)
    weight_BV = weight_BV.gather(1, order_BV)
    last_B = top_k_B.where(top_k_B > 0, x_BV.shape[1]).clamp(max=x_BV.shape[1]) - 1
    weight_BV.masked_fill_(x_sorted_BV < x_sorted_BV.gather(1, last_B[:, None]), 0)
    mass_BV = weight_BV.cumsum(dim=1)
    limited_B = top_p_B < 1
    share_B = (top_p_B.where(limited_B, 0).double() * 2**32).long()
    enough_B = _portion(mass_BV[:, -1], share_B, torch.zeros_like(share_B)).clamp_(min=1)
    enough_B = enough_B.where(limited_B, mass_BV[:, -1])
    weight_BV.masked_fill_(mass_BV - weight_BV >= enough_B[:, None], 0)
    return torch.empty_like(weight_BV).scatter_(1, order_BV, weight_BV)


def _first(matches_BV: Tensor) -> Tensor:
    """Index of the first match in each row."""
    return matches_BV.byte().argmax(dim=1)


def _portion(mass: Tensor, high: Tensor, low: Tensor) -> Tensor:
    """⌊mass · (2^32 high + low) / 2^64⌋, where mass < 2^62 and high and low are 32 bits."""
    mass_high, mass_low = mass >> 32, mass & _LOW
    crossed = mass_low * high  # of two 32-bit numbers: all 64 bits, whatever the sign
    carried = ((mass_low * low >> 32) & _LOW) + (crossed & _LOW) + (mass_high * low & _LOW)
    whole = mass_high * high + ((crossed >> 32) & _LOW) + (mass_high * low >> 32)
    return whole + (carried >> 32)
