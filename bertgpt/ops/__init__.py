"""The public ops. Each checks its arguments, picks a backend and runs it; `explain` says which."""

from bertgpt.cuda.extension import own_flags, raise_pending
from bertgpt.ops._dispatch import BackendUnavailable, Explanation, explain, strict
from bertgpt.ops.add_layer_norm import add_layer_norm
from bertgpt.ops.attention import attention
from bertgpt.ops.gelu_ffn import gelu_ffn
from bertgpt.ops.linear_cross_entropy import linear_cross_entropy
from bertgpt.ops.linear_gelu import linear_gelu
from bertgpt.ops.paged_attention import paged_attention
from bertgpt.ops.paged_write import paged_write
from bertgpt.ops.pool import pool
from bertgpt.ops.sample import sample

__all__ = [
    "BackendUnavailable",
    "Explanation",
    "add_layer_norm",
    "attention",
    "explain",
    "gelu_ffn",
    "linear_cross_entropy",
    "linear_gelu",
    "own_flags",
    "paged_attention",
    "paged_write",
    "pool",
    "raise_pending",
    "sample",
    "strict",
]
