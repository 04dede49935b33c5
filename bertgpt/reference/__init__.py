"""The oracle: each op's definition in plain PyTorch, for any floating dtype up to float64."""

from bertgpt.reference.add_layer_norm import add_layer_norm
from bertgpt.reference.attention import attention
from bertgpt.reference.gelu_ffn import gelu_ffn
from bertgpt.reference.linear_cross_entropy import linear_cross_entropy
from bertgpt.reference.linear_gelu import linear_gelu
from bertgpt.reference.paged_attention import paged_attention
from bertgpt.reference.paged_write import paged_write
from bertgpt.reference.pool import pool
from bertgpt.reference.sample import sample

__all__ = [
    "add_layer_norm",
    "attention",
    "gelu_ffn",
    "linear_cross_entropy",
    "linear_gelu",
    "paged_attention",
    "paged_write",
    "pool",
    "sample",
]
