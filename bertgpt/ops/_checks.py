"""Checks shared by the ops: what a tensor must be, and what an index tensor may hold.

Each raises TypeError, ValueError or IndexError with the argument's name, what it is and what it
should be.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INDICES = (torch.int32, torch.int64)
_HALVES = (torch.float16, torch.bfloat16)
# Here, since `a | b` makes an object each time it runs.
_BOOLS = (bool, torch.SymBool)
_INTS = (int, torch.SymInt)
_NUMBERS = (int, float, torch.SymFloat)
_WIDEST = 2**62  # of a window: added to a position, a larger bound would wrap


def check_tensor(name: str, value: Any, rank: int | None = None) -> None:
    """`value` is a floating tensor, of `rank` dimensions where that is given."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(value).__name__}")
    if value.dtype not in FLOATS:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, not {value.dtype}")
    if rank is not None and value.dim() != rank:
        raise ValueError(f"{name} must have {rank} dimensions, not shape {tuple(value.shape)}")


def check_rows(name: str, value: Any) -> None:
    """`value` is a floating tensor of rows: [..., E]."""
    check_tensor(name, value)
    if value.dim() == 0:
        raise ValueError(f"{name} must be [..., E], not a scalar")


def check_parameter(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """`value`, a weight or bias, has the dtype of `other`, or float32 beside half; its device."""
    beside_half = value.dtype == torch.float32 and other.dtype in _HALVES
    if value.dtype != other.dtype and not beside_half:
        check_like(name, value, other_name, other)
    check_device(name, value, other_name, other)


def check_shape(name: str, value: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    """`value` has exactly `shape`, which the message calls `meaning`."""
    if value.shape != shape:
        raise ValueError(f"{name} must be {meaning} = {tuple(shape)}, not {tuple(value.shape)}")


def check_like(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """`value` has the dtype and device of `other`."""
    if value.dtype != other.dtype:
        raise TypeError(f"{name} is {value.dtype} but {other_name} is {other.dtype}; convert one")
    if value.device != other.device:
        check_device(name, value, other_name, other)


def check_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """`value` lies where `other` does."""
    if value.device != other.device:
        raise ValueError(
            f"{name} is on {value.device} but {other_name} is on {other.device}; move one"
        )


def check_index(name: str, value: Any, rank: int) -> None:
    """`value` is an int32 or int64 tensor of `rank` dimensions."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(value).__name__}")
    if value.dtype not in INDICES:
        raise TypeError(f"{name} must be int32 or int64, not {value.dtype}")
    if value.dim() != rank:
        raise ValueError(f"{name} must have {rank} dimensions, not shape {tuple(value.shape)}")


def with_unit_stride(tensor: Tensor) -> Tensor:
    """`tensor`, copied where its last stride is not 1."""
    if tensor.is_contiguous() or tensor.stride(-1) == 1:
        return tensor
    return tensor.contiguous()


def check_cu_seqlens(name: str, cu_seqlens: Tensor, total: int) -> list[int]:
    """The values of `cu_seqlens` start at 0, never fall and end at `total`.

    Returns:
        The length of each sequence.
    """
    values = cu_seqlens.tolist()
    if values[0] != 0:
        raise ValueError(f"{name} must start at 0, not {values[0]}")
    lengths = [after - before for before, after in pairwise(values)]
    for i, length in enumerate(lengths):
        if length < 0:
            raise ValueError(
                f"{name} must not fall: entry {i} is {values[i]}, {i + 1} is {values[i + 1]}"
            )
    if values[-1] != total:
        raise ValueError(f"{name} must end at {total}, the packed tokens' number, not {values[-1]}")
    return lengths


def check_range(name: str, values: Tensor, low: int, high: int, error: type[Exception]) -> None:
    """Every element lies in [low, high]."""
    if not in_range(values, low, high):
        least, greatest = (int(v) for v in torch.aminmax(values))
        wrong = least if least < low else greatest
        raise error(f"{name} holds {wrong}, outside {low} … {high}")


def in_range(values: Tensor, low: int, high: int) -> bool:
    """Whether every element lies in [low, high]."""
    if values.numel() == 0:
        return True
    least, greatest = torch.aminmax(values)
    return low <= least.item() and greatest.item() <= high


def check_flag(name: str, value: Any) -> bool:
    """`value` is True or False: "no" or 0 would pass for one by its truth."""
    if not isinstance(value, _BOOLS):
        raise TypeError(f"{name} must be True or False, not {value!r}")
    return bool(value)


def check_longest(name: str, value: Any) -> None:
    """`value`, a bound on sequence lengths, is None or an integer that is not negative."""
    if value is None:
        return
    if not isinstance(value, _INTS) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, not {value!r}")
    if value < 0:
        raise ValueError(f"{name} must not be negative, it is {value}")


def check_window(window: Any) -> tuple[int, int]:
    """`window` is None or (left, right), each −1 (unbounded) or more; returns the pair."""
    if window is None:
        return (-1, -1)
    if not isinstance(window, tuple | list) or len(window) != 2:
        raise ValueError(f"window must be (left, right), not {window!r}")
    left, right = window
    if any(not isinstance(bound, int) or isinstance(bound, bool) for bound in (left, right)):
        raise TypeError(f"window bounds must be integers, not {window!r}")
    if not (-1 <= left < 2**63 and -1 <= right < 2**63):
        raise ValueError(
            f"window bounds must be -1 (unbounded) or more and fit 64 bits, not {window!r}"
        )
    return (min(left, _WIDEST), min(right, _WIDEST))


def check_number(name: str, value: Any) -> float:
    """`value` is a number, and not NaN."""
    if not isinstance(value, _NUMBERS) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, not {value!r}")
    if value != value:
        raise ValueError(f"{name} must be a number, not NaN")
    return float(value)


def check_dropout(dropout_p: float) -> float:
    """`dropout_p` is a probability."""
    dropout_p = check_number("dropout_p", dropout_p)
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p must lie in [0, 1], not {dropout_p}")
    return dropout_p


def as_seed(seed: int | Tensor | None, dropout_p: float) -> Tensor | None:
    """The seed as a 0-dim int64 tensor: given, drawn from torch, or None when not needed."""
    if dropout_p == 0.0:
        return None
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.dim() != 0:
            raise TypeError(f"seed must be an int or a 0-dim int64 tensor, not {seed!r}")
        return seed
    if not isinstance(seed, int):
        raise TypeError(f"seed must be an int or a 0-dim int64 tensor, not {seed!r}")
    return as_word("seed", seed)


def as_word(name: str, value: int) -> Tensor:
    """64 bits, signed or not, as a 0-dim int64 tensor."""
    if not -(2**63) <= value < 2**64:
        raise ValueError(f"{name} must fit 64 bits, not {value}")
    return torch.scalar_tensor(value - 2**64 if value >= 2**63 else value, dtype=torch.int64)


def autocasting(device_type: str) -> bool:
    """Whether autocast is on for such a device; on meta tensors it never is."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Under autocast, floating tensors (float64 aside) in its dtype; otherwise as they are."""
    if not torch._C._is_any_autocast_enabled():
        return tensors
    device_type = next(t.device.type for t in tensors if t is not None)
    if not autocasting(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    )
