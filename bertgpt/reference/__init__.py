"""The oracle: each op's definition in plain PyTorch, for any floating dtype up to float64."""

from bertgpt.reference.attention import attention
from bertgpt.reference.paged_attention import paged_attention
from bertgpt.reference.paged_write import paged_write

__all__ = ["attention", "paged_attention", "paged_write"]
