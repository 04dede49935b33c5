"""The oracle: each op's definition in plain PyTorch, for any floating dtype up to float64."""

from bertgpt.reference.attention import attention

__all__ = ["attention"]
