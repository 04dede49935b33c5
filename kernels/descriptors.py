"""Tensor descriptors (TMA) of keys and values, made by the launcher."""

import torch
from triton.tools.tensor_descriptor import TensorDescriptor


def describable(x: torch.Tensor) -> bool:
    """Whether x [..., D] meets what a descriptor asks of address, strides and coordinates."""
    steps = [stride * x.element_size() for stride in x.stride()[:-1]]
    aligned = x.data_ptr() % 16 == 0 and all(step > 0 and step % 16 == 0 for step in steps)
    return aligned and x.shape[-3] < 2**31


def describe_heads(x: torch.Tensor, rows: int, dims: int) -> TensorDescriptor:
    """Tiles [1, rows, 1, dims] of x [B, S, K, D] or [1, T, K, D]; zeros past either end."""
    x = x if x.dim() == 4 else x.unsqueeze(0)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, rows, 1, dims])
