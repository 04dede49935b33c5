"""Drawing next tokens by the definition: sort, keep the head, go to a random point of its mass."""

from __future__ import annotations

import torch
from torch import Tensor

from bertgpt.exact_softmax import exact_weights, least_weight, working_dtype
from bertgpt.philox import sample_words


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
    B = len(logits)
    with torch.no_grad():
        x_BV = logits.to(working_dtype(logits))
        seed_B, sequence_B, step_B = (
            t.to(logits.device).expand(B) for t in (seed, sequence_ids, steps)
        )
        words_B2 = torch.stack(sample_words(seed_B, sequence_B, step_B), dim=-1)
        temperature_B = temperature.to(logits.device).expand(B)
        limits = zip(*(t.expand(B).tolist() for t in (top_k, top_p, min_p)), strict=True)
        tokens = [
            _draw(x_BV[b], temperature_B[b], *limits_b, *words_B2[b].tolist())
            for b, limits_b in enumerate(limits)
        ]
    return torch.tensor(tokens, dtype=torch.int64, device=logits.device)


def _draw(
    x_V: Tensor, temperature: Tensor, top_k: int, top_p: float, min_p: float, high: int, low: int
) -> int:
    """One row's token, or −1 where there is nothing to draw by."""
    top = x_V.max()
    in_range = top_k >= 0 and 0 < top_p <= 1 and 0 <= min_p <= 1
    if not (top.isfinite() and 0 <= temperature < torch.inf and in_range):
        return -1
    if temperature == 0:
        return int((x_V == top).nonzero()[0])
    weight_V = exact_weights(x_V, temperature)
    order_V = x_V.argsort(descending=True, stable=True)  # of equal logits, the first comes first
    if 0 < top_k < len(x_V):
        weight_V = weight_V.masked_fill(x_V < x_V[order_V[top_k - 1]], 0)

    mass_V = weight_V[order_V].cumsum(0)
    enough = max(1, int(mass_V[-1]) * int(top_p * 2**32) >> 32)
    head = order_V[: int((mass_V < enough).sum()) + 1]
    kept_V = torch.zeros_like(weight_V)
    kept_V[head] = weight_V[head]
    kept_V = kept_V.masked_fill(kept_V < least_weight(torch.tensor(min_p)), 0)

    mass_V = kept_V.cumsum(0)
    point = int(mass_V[-1]) * (high << 32 | low) >> 64  # uniform below the mass
    return int((mass_V <= point).sum())
