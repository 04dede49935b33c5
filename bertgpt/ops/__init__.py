"""The public ops. Each checks its arguments, picks a backend and runs it; `explain` says which."""

from bertgpt.ops._dispatch import BackendUnavailable, Explanation, explain, strict
from bertgpt.ops.attention import attention

__all__ = ["BackendUnavailable", "Explanation", "attention", "explain", "strict"]
