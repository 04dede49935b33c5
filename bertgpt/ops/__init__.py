"""The public ops. Each checks its arguments, picks a backend and runs it; `explain` says which."""

from bertgpt.ops._dispatch import BackendUnavailable, Explanation, explain, strict
from bertgpt.ops.attention import attention
from bertgpt.ops.paged_attention import paged_attention
from bertgpt.ops.paged_write import paged_write

__all__ = [
    "BackendUnavailable",
    "Explanation",
    "attention",
    "explain",
    "paged_attention",
    "paged_write",
    "strict",
]
