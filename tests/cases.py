"""Inputs that find mistakes: awkward sizes, odd strides, poisoned and fenced memory."""

import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from hypothesis import settings

HALF_DTYPES = (torch.float16, torch.bfloat16)
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ALL_DTYPES = (*KERNEL_DTYPES, torch.float64)

HEAD_DIMS = (1, 8, 31, 64, 80, 128, 256)

# Packed batches by sequence length: nothing, empty sequences at either end and between, single
# tokens, equal, skewed, around a tile of 64 or 128.
PACKED_LENGTHS: tuple[tuple[int, ...], ...] = (
    (),
    (0,),
    (1,),
    (0, 3, 0),
    (1, 1, 1),
    (5, 5),
    (17, 0, 64, 65, 1),
    (127, 128, 129),
    (200, 3),
)

_BAND = 64  # elements on either side of a fenced buffer
_INTEGER_POISON = 0x5A


def awkward_sizes(tile: int) -> tuple[int, ...]:
    """0, 1, a prime below the tile, the tile ± 1, and a prime above twice the tile."""
    primes = (2, 3, 7, 13, 31, 61, 127, 257, 521)
    below = max((p for p in primes if p < tile), default=1)
    above = min(p for p in primes if p > 2 * tile)
    return tuple(sorted({0, 1, below, tile - 1, tile, tile + 1, above}))


def examples(of_hundred: int, **options: Any) -> settings:
    """Hypothesis settings of a test that draws this many examples where the profile says 100."""
    return settings(max_examples=of_hundred * settings().max_examples // 100, **options)


def cu_seqlens(lengths: Sequence[int], dtype: torch.dtype = torch.int32) -> torch.Tensor:
    """Cumulative sequence lengths [B + 1], starting at 0."""
    return torch.tensor([0, *accumulate(lengths)], dtype=dtype)


def generator(seed: int = 0) -> torch.Generator:
    """A CPU generator of its own, so that no test depends on the order of the others."""
    return torch.Generator().manual_seed(seed)


def randn(
    *shape: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    scale: float = 1.0,
    strided: bool = False,
) -> torch.Tensor:
    """Standard normals × scale, rounded to dtype; `strided` gives odd strides, unit last one."""
    values = (torch.randn(shape, generator=generator(seed)) * scale).to(dtype)
    return with_odd_strides(values, seed=seed) if strided else values


def with_odd_strides(values: torch.Tensor, *, seed: int = 0) -> torch.Tensor:
    """The same values as a view whose outer dimensions are permuted in memory and padded.

    The last dimension keeps stride 1; whatever lies between the rows is NaN (or a large integer).
    """
    outer = values.dim() - 1
    if outer < 1:
        return values
    order = torch.randperm(outer, generator=generator(seed)).tolist()
    gaps = torch.randint(0, 3, (values.dim(),), generator=generator(seed + 1)).tolist()
    memory_dims = [*order, outer]
    padded = [values.shape[d] + gaps[d] for d in memory_dims]
    memory = poisoned(padded, values.dtype)
    view = memory.permute([memory_dims.index(d) for d in range(values.dim())])
    for dim, size in enumerate(values.shape):
        view = view.narrow(dim, 0, size)
    return view.copy_(values)


def poisoned(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of NaN, or of 0x5A bytes for integers: values that nobody may use."""
    if dtype.is_floating_point:
        return torch.full(tuple(shape), float("nan"), dtype=dtype)
    poison = int.from_bytes(bytes([_INTEGER_POISON]) * dtype.itemsize)
    return torch.full(tuple(shape), poison, dtype=dtype)


@dataclass(frozen=True)
class Banded:
    """A contiguous buffer between two bands of poison: reads past it show, writes are found."""

    view: torch.Tensor
    memory: torch.Tensor

    def check(self, what: str = "buffer") -> None:
        """Fails when either band has changed."""
        expected = poisoned((_BAND,), self.memory.dtype).view(torch.uint8)
        for side, band in (("before", self.memory[:_BAND]), ("after", self.memory[-_BAND:])):
            assert torch.equal(band.view(torch.uint8), expected), f"written {side} the {what}"


def banded(shape: Sequence[int], dtype: torch.dtype) -> Banded:
    """A poisoned buffer of this shape between two bands."""
    size = int(torch.Size(shape).numel())
    memory = poisoned((size + 2 * _BAND,), dtype)
    return Banded(memory[_BAND : _BAND + size].view(tuple(shape)), memory)


def banded_copy(values: torch.Tensor) -> Banded:
    """The values, contiguous, between two bands."""
    fenced = banded(values.shape, values.dtype)
    fenced.view.copy_(values)
    return fenced


@contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Within it torch.empty and its kin give NaN (integers: their maximum), not stale zeros.

    So an output or workspace that a kernel forgets to write shows in the result.
    """
    was_enabled = torch.are_deterministic_algorithms_enabled()
    was_warning = torch.is_deterministic_algorithms_warn_only_enabled()
    was_filling = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_enabled, warn_only=was_warning)
        torch.utils.deterministic.fill_uninitialized_memory = was_filling


def rows_far_apart(values: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """The same values 2^30 elements apart along `dim`: a 32-bit offset wraps from row 2 on.

    The memory is reserved, not used; as much lies before it, so that a wrapped offset reads zeros
    rather than ending the process.
    """
    apart, before = 2**30, 2**31
    size = (before + apart * values.shape[dim]) * values.dtype.itemsize
    reserve_nothing = 0x4000  # MAP_NORESERVE, which the mmap module does not name before 3.13
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | reserve_nothing
    memory = torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=values.dtype)
    strides = list(values.contiguous().stride())
    strides[dim] = apart
    return memory[before:].as_strided(values.shape, strides).copy_(values)
