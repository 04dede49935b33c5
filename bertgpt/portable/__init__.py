"""Backend "torch": each op on torch's own fused ops, any device or dtype, refusing nothing."""

from bertgpt.portable.attention import attention

__all__ = ["attention"]
