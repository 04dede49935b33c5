"""Backend "torch": each op on torch's own fused ops, any device or dtype, refusing nothing."""

from bertgpt.portable.attention import attention
from bertgpt.portable.paged_attention import paged_attention
from bertgpt.portable.paged_write import paged_write

__all__ = ["attention", "paged_attention", "paged_write"]
