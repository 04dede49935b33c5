"""Attention inputs, and a call of each kind of mask, for the kernels' tests."""

import torch
from cases import randn

INF = float("inf")


def qkv(B=1, L=20, S=37, H=2, K=1, D=16, dtype=torch.float32, strided=False):
    q = randn(B, L, H, D, dtype=dtype, strided=strided)
    k, v = (randn(B, S, K, D, dtype=dtype, seed=i, strided=strided) for i in (1, 2))
    return q, k, v


def additive(*shape):
    """Biases that are ordinary, −inf, and as large as float32 holds."""
    bias = randn(*shape, seed=5)
    choice = randn(*shape, seed=6)
    bias = bias.masked_fill(choice > 1.0, -INF)
    return bias.masked_fill(choice < -1.5, torch.finfo(torch.float32).min)


MASKS = {
    "none": {},
    "causal": {"causal": True},
    "window": {"window": (5, 3)},
    "left": {"window": (0, -1)},
    "right": {"window": (-1, 9)},
    "causal window": {"causal": True, "window": (17, 4)},
    "lengths": {"key_lengths": torch.tensor([21, 0])},
    "bool": {"mask": randn(2, 1, 20, 37, seed=3) > 0},
    "per key": {"mask": randn(2, 1, 1, 37, seed=3) > 0},
    "per query": {"mask": randn(20, 1, seed=3) > 0},
    "additive": {"mask": additive(2, 20, 37)},
    "additive per key": {"mask": additive(37)},
    "all": {
        "causal": True,
        "window": (25, 2),
        "key_lengths": torch.tensor([33, 18], dtype=torch.int32),
        "mask": randn(2, 2, 20, 37, seed=4) > -0.7,
    },
    "all additive": {
        "causal": True,
        "key_lengths": torch.tensor([36, 9]),
        "mask": additive(20, 37),
    },
}
