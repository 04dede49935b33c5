"""Backend "torch": each op on torch's own fused ops, any device or dtype, refusing nothing."""

from bertgpt.portable.add_layer_norm import add_layer_norm
from bertgpt.portable.attention import attention
from bertgpt.portable.gelu_ffn import gelu_ffn
from bertgpt.portable.linear_gelu import linear_gelu
from bertgpt.portable.paged_attention import paged_attention
from bertgpt.portable.paged_write import paged_write
from bertgpt.portable.pool import pool
from bertgpt.portable.sample import sample

__all__ = [
    "add_layer_norm",
    "attention",
    "gelu_ffn",
    "linear_gelu",
    "paged_attention",
    "paged_write",
    "pool",
    "sample",
]
