"""How a launcher sees a tensor of any layout: as a matrix of rows with unit last stride."""

import math

from torch import Tensor


def as_rows(tensor: Tensor) -> Tensor:
    """[..., E] as [rows, E] with unit last stride: a view where the strides allow, else a copy."""
    rows = tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()
