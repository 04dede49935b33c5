"""Packed batches: the tokens of many sequences end to end, with no padding between them.

A batch of B sequences with T tokens in all is one tensor `[T, ...]` and the boundaries
`cu_seqlens` `[B + 1]`: sequence b owns rows `cu_seqlens[b] : cu_seqlens[b + 1]`. Lengths and the
ranges of the ids are also kept on the host, so that a model can size its kernels and refuse a bad
id without asking the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor

Tokens = Sequence[int] | Tensor
_BESIDE = ("token_type_ids", "position_ids", "task_type_ids")  # ids that tokens may bring along


@dataclass(frozen=True, eq=False)
class Grid:
    """The padded tensor that packed tokens came from.

    Attributes:
        rows: B.
        columns: L.
        indices: int64 `[T]`, each token's cell among B·L; None when every cell held a token.
    """

    rows: int
    columns: int
    indices: Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        """(B, L)."""
        return self.rows, self.columns

    def select(self, padded: Tensor) -> Tensor:
        """`[B, L, ...]` → `[T, ...]`."""
        flat = padded.flatten(0, 1)
        return flat if self.indices is None else flat[self.indices]


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """Sequences packed end to end.

    Attributes:
        values: token ids `[T]` (int32 or int64), or per-token features `[T, ...]` of any dtype.
        cu_seqlens: int32 `[B + 1]`, the sequences' boundaries, from 0 to T.
        lengths: the B sequence lengths, on the host.
        token_type_ids: `[T]` integers, or None for all zeros.
        position_ids: `[T]` integers, or None to count from 0 in each sequence.
        grid: where a padded tensor held the tokens, or None for a batch that was never padded.
        ranges: bounds on the values of each id tensor, by field name, on the host. Filled in here
            (one device-to-host copy for CUDA tensors); leave it out when building a batch by hand.
        task_type_ids: `[T]` integers, or None for all zeros; for ERNIE.
        max_seqlen: length of the longest sequence, 0 for an empty batch; not an argument.
        equal_lengths: whether `[T, ...]` may be viewed as `[B, max_seqlen, ...]`; likewise.

    Raises:
        TypeError: a field's dtype is not the one above.
        ValueError: shapes, lengths and boundaries disagree, or the tensors' devices.
    """

    values: Tensor
    cu_seqlens: Tensor
    lengths: tuple[int, ...]
    token_type_ids: Tensor | None = None
    position_ids: Tensor | None = None
    grid: Grid | None = None
    ranges: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    task_type_ids: Tensor | None = None
    max_seqlen: int = field(init=False, repr=False)
    equal_lengths: bool = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("values", "cu_seqlens"):
            if not isinstance(getattr(self, name), Tensor):
                raise TypeError(f"{name} must be a tensor; bertgpt.pack makes a batch from lists")
        if self.cu_seqlens.dtype != torch.int32:
            raise TypeError(f"cu_seqlens must be int32, not {self.cu_seqlens.dtype}")
        tokens = sum(self.lengths)
        if self.cu_seqlens.shape != (len(self.lengths) + 1,):
            raise ValueError(
                f"cu_seqlens must have shape [{len(self.lengths) + 1}] for {len(self.lengths)} "
                f"lengths, not {list(self.cu_seqlens.shape)}"
            )
        if self.values.ndim < 1 or self.values.shape[0] != tokens:
            raise ValueError(
                f"values has shape {list(self.values.shape)}, but the lengths add up to {tokens}"
            )
        if self.cu_seqlens.device.type == "cpu":
            expected = list(accumulate(self.lengths, initial=0))
            if min(self.lengths, default=0) < 0 or self.cu_seqlens.tolist() != expected:
                raise ValueError(
                    "cu_seqlens must start at 0 and step by the lengths, none negative"
                )
        for name in _BESIDE:
            ids = getattr(self, name)
            if ids is None:
                continue
            _check_integers(name, ids)
            if ids.shape != (tokens,):
                raise ValueError(f"{name} must have shape [{tokens}], not {list(ids.shape)}")
        for name in ("cu_seqlens", *_BESIDE):
            _check_device(name, getattr(self, name), "values", self.values)
        object.__setattr__(self, "max_seqlen", max(self.lengths, default=0))
        equal = bool(self.lengths) and min(self.lengths) == self.max_seqlen
        object.__setattr__(self, "equal_lengths", equal)
        missing = {
            name: ids
            for name, ids in self._ids().items()
            if name not in self.ranges and not ids.is_meta
        }
        if missing and tokens:
            object.__setattr__(self, "ranges", {**self.ranges, **_ranges(missing)})

    def _ids(self) -> dict[str, Tensor]:
        ids = {name: getattr(self, name) for name in _BESIDE}
        if not self.values.is_floating_point() and self.values.ndim == 1:
            ids["input_ids"] = self.values
        return {name: tensor for name, tensor in ids.items() if tensor is not None}

    @property
    def input_ids(self) -> Tensor:
        """The packed values under the name that models give them."""
        return self.values

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.lengths)

    def to(self, device: torch.device | str) -> PackedBatch:
        """Returns the batch with every tensor on `device`."""
        # Only towards a device: a copy to the host that nobody waits for may be read too early.
        eager = self.values.device.type == "cpu"
        moved: dict[str, Any] = {
            name: tensor.to(device, non_blocking=eager)
            for name in ("values", "cu_seqlens", *_BESIDE)
            if (tensor := getattr(self, name)) is not None
        }
        if self.grid is not None and self.grid.indices is not None:
            indices = self.grid.indices.to(device, non_blocking=eager)
            moved["grid"] = replace(self.grid, indices=indices)
        return replace(self, **moved)

    def positions(self) -> Tensor:
        """Position of every token `[T]`: `position_ids`, or counted from 0 in each sequence."""
        if self.position_ids is not None:
            return self.position_ids
        tokens = self.values.shape[0]
        starts = self.cu_seqlens[:-1].repeat_interleave(self.cu_seqlens.diff(), output_size=tokens)
        return torch.arange(tokens, device=starts.device) - starts

    def first_tokens(self, values: Tensor) -> Tensor:
        """First row of each sequence: `[T, ...]` → `[B, ...]`, zeros for an empty sequence."""
        return self.take(values, self.cu_seqlens[:-1])

    def take(self, values: Tensor, rows: Tensor) -> Tensor:
        """One row per sequence: `values[rows]` `[B, ...]`, zeros where a sequence is empty."""
        if min(self.lengths, default=1) > 0:
            return values[rows.long()]
        if values.shape[0] == 0:
            return values.new_zeros(len(self), *values.shape[1:])
        empty = (self.cu_seqlens.diff() == 0).view(-1, *[1] * (values.ndim - 1))
        return values[rows.long().clamp(0, values.shape[0] - 1)].masked_fill(empty, 0)


def pack(
    sequences: Sequence[Tokens],
    *,
    token_type_ids: Sequence[Tokens] | None = None,
    position_ids: Sequence[Tokens] | None = None,
    task_type_ids: Sequence[Tokens] | None = None,
    device: torch.device | str | None = None,
) -> PackedBatch:
    """Packs ragged sequences of token ids.

    Args:
        sequences: B lists (or 1-D integer tensors) of token ids; any of them may be empty.
        token_type_ids: segment ids in the same shape, or None for zeros.
        position_ids: positions in the same shape, or None to count from 0 in each sequence.
        task_type_ids: ERNIE's task types in the same shape, or None for zeros.
        device: where the tensors go; by default the CPU.

    Returns:
        The packed batch, with int64 ids.

    Raises:
        TypeError: `sequences` is no sequence of sequences of integers.
        IndexError: an integer exceeds 64 bits.
        ValueError: a second argument's lengths differ from those of `sequences`.
    """
    flat, lengths = _flatten("sequences", sequences)
    extra: dict[str, Any] = {}
    beside = zip(_BESIDE, (token_type_ids, position_ids, task_type_ids), strict=True)
    for name, rows in beside:
        if rows is None:
            continue
        extra[name], other = _flatten(name, rows)
        if other != lengths:
            raise ValueError(f"{name} has lengths {other}, but sequences has {lengths}")
    boundaries = torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32)
    batch = PackedBatch(flat, boundaries, lengths, **extra)
    return batch if device is None else batch.to(device)


def unpad(
    padded: Tensor,
    attention_mask: Tensor,
    *,
    token_type_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    task_type_ids: Tensor | None = None,
) -> PackedBatch:
    """Packs the tokens of a padded batch that its mask keeps, row by row, left to right.

    The mask may pad on the right, on the left, on both sides, or leave holes. One device-to-host
    copy of the B lengths (and the ids' ranges) when the tensors live on a GPU.

    Args:
        padded: `[B, L, ...]`.
        attention_mask: `[B, L]`, bool or numeric; nonzero keeps the token.
        token_type_ids: `[B, L]` integers to pack alongside.
        position_ids: `[B, L]` integers to pack alongside.
        task_type_ids: `[B, L]` integers to pack alongside.

    Raises:
        TypeError: ids that are not int32 or int64, a complex mask.
        ValueError: a shape does not match `attention_mask`, the mask is not `[B, L]`, it holds
            negative values (as additive masks do), or a device differs or is "meta".
    """
    for name, value in (("padded", padded), ("attention_mask", attention_mask)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, not {type(value).__name__}")
    if attention_mask.ndim != 2 or padded.shape[:2] != attention_mask.shape:
        raise ValueError(
            f"attention_mask must have the shape [B, L] of the padded tensor, not "
            f"{list(attention_mask.shape)} beside {list(padded.shape)}"
        )
    given = zip(_BESIDE, (token_type_ids, position_ids, task_type_ids), strict=True)
    ids = {name: tensor for name, tensor in given if tensor is not None}
    for name, tensor in ids.items():
        _check_integers(name, tensor)
        _check_device(name, tensor, "the padded tensor", padded)
        if tensor.shape != attention_mask.shape:
            raise ValueError(
                f"{name} must have shape {list(attention_mask.shape)}, not {list(tensor.shape)}"
            )
    _check_mask(attention_mask, padded)
    batch, length = attention_mask.shape
    keep = attention_mask != 0
    counts = keep.sum(dim=1, dtype=torch.int32)
    checked = dict(ids)
    if padded.ndim == 2 and not padded.is_floating_point():
        checked["input_ids"] = padded
    checked = {name: tensor.masked_fill(~keep, 0) for name, tensor in checked.items()}
    lengths, ranges = _fetch(counts, {"attention_mask": attention_mask, **checked})
    if ranges.pop("attention_mask", (0, 0))[0] < 0:
        raise ValueError("attention_mask holds negative values: give 1 to keep a token, 0 to drop")
    boundaries = torch.zeros(batch + 1, dtype=torch.int32, device=padded.device)
    torch.cumsum(counts, 0, out=boundaries[1:])
    tokens, indices = sum(lengths), None
    if tokens < batch * length:
        # nonzero_static knows its size from that copy; nonzero would wait for the device again.
        indices = torch.nonzero_static(keep.flatten(), size=tokens).squeeze(1)
    grid = Grid(batch, length, indices)
    packed: dict[str, Any] = {name: grid.select(tensor) for name, tensor in ids.items()}
    return PackedBatch(grid.select(padded), boundaries, lengths, grid=grid, ranges=ranges, **packed)


def pad(
    values: Tensor, batch: PackedBatch, *, side: str | None = None, fill: float = 0.0
) -> Tensor:
    """Spreads packed rows over a padded tensor.

    Args:
        values: `[T, ...]`, one row per token of `batch`.
        batch: the batch that the rows belong to.
        side: "right" or "left" pads to the longest sequence on that side; None puts every row back
            where `unpad` took it from, and means "right" for a batch that was never padded.
        fill: what padding cells hold.

    Returns:
        `[B, L, ...]` in the dtype of `values`.

    Raises:
        TypeError: `values` is no tensor or `batch` no `PackedBatch`.
        ValueError: `values` has not one row per token, or `side` is unknown.
    """
    if not isinstance(values, Tensor):
        raise TypeError(f"values must be a tensor, not {type(values).__name__}")
    if not isinstance(batch, PackedBatch):
        raise TypeError(f"batch must be a PackedBatch, not {type(batch).__name__}")
    if values.shape[:1] != batch.values.shape[:1]:
        raise ValueError(
            f"values has {values.shape[0] if values.ndim else 0} rows, but the batch has "
            f"{batch.values.shape[0]} tokens"
        )
    if side not in (None, "right", "left"):
        raise ValueError(f'side must be "right", "left" or None, not {side!r}')
    grid = batch.grid if side is None else None
    rows, columns = grid.shape if grid is not None else (len(batch), batch.max_seqlen)
    tail = values.shape[1:]
    if values.shape[0] == rows * columns:
        return values.reshape(rows, columns, *tail)
    cells = grid.indices if grid is not None else _cells(batch, left=side == "left")
    assert cells is not None  # only a full grid has none, and it has left above
    padded = values.new_full((rows * columns, *tail), fill)
    return padded.index_copy(0, cells, values).view(rows, columns, *tail)


def _cells(batch: PackedBatch, left: bool) -> Tensor:
    """Flat cell of each token in a grid `[B, max_seqlen]` padded on one side."""
    tokens, lengths = batch.values.shape[0], batch.cu_seqlens.diff()
    row_starts = torch.arange(len(batch), device=lengths.device) * batch.max_seqlen
    if left:
        row_starts = row_starts + batch.max_seqlen - lengths
    shift = (row_starts - batch.cu_seqlens[:-1]).repeat_interleave(lengths, output_size=tokens)
    return torch.arange(tokens, device=lengths.device) + shift


def _flatten(name: str, rows: Sequence[Tokens]) -> tuple[Tensor, tuple[int, ...]]:
    if isinstance(rows, str | bytes) or not isinstance(rows, Sequence | Tensor):
        raise TypeError(f"{name} must be a list of lists of token ids, not {type(rows).__name__}")
    for row in rows:
        if isinstance(row, Tensor):
            _check_integers(f"each of {name}", row)
            if row.ndim != 1:
                raise ValueError(f"each of {name} must be 1-D, not {row.ndim}-D")
        elif isinstance(row, str | bytes) or not isinstance(row, Sequence):
            raise TypeError(f"{name} must be a list of lists of token ids, found {row!r}")
    lists = [row.tolist() if isinstance(row, Tensor) else row for row in rows]
    flat = list(chain.from_iterable(lists))
    for item in flat:
        if type(item) is not int and (isinstance(item, bool) or not hasattr(item, "__index__")):
            raise TypeError(f"{name} must hold integers, found {item!r}")
    for item in (min(flat, default=0), max(flat, default=0)):
        if not -(2**63) <= item < 2**63:
            raise IndexError(f"{name} holds {item}, which is no token id: it exceeds 64 bits")
    return torch.tensor(flat, dtype=torch.int64), tuple(map(len, lists))


def _check_mask(attention_mask: Tensor, padded: Tensor) -> None:
    if attention_mask.is_complex():
        raise TypeError(f"attention_mask must be bool or numeric, not {attention_mask.dtype}")
    _check_device("attention_mask", attention_mask, "the padded tensor", padded)
    if attention_mask.is_meta:
        raise ValueError("attention_mask is on meta, which holds no values: move it to a device")


def _check_device(name: str, tensor: Tensor | None, other_name: str, other: Tensor) -> None:
    if tensor is not None and tensor.device != other.device:
        raise ValueError(
            f"{name} is on {tensor.device} but {other_name} is on {other.device}; move one"
        )


def _check_integers(name: str, ids: Any) -> None:
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(ids).__name__}")
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, not {ids.dtype}")


def _ranges(ids: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    """Smallest and largest value of each tensor, none empty, fetched in one copy."""
    return _fetch(torch.empty(0, dtype=torch.int32), ids)[1]


def _fetch(
    counts: Tensor, ids: Mapping[str, Tensor]
) -> tuple[tuple[int, ...], dict[str, tuple[int, int]]]:
    """`counts` and each tensor's extremes on the host, in one copy."""
    ids = {name: tensor for name, tensor in ids.items() if tensor.numel()}
    extremes = [end.long().view(1) for tensor in ids.values() for end in tensor.aminmax()]
    flat = torch.cat([*extremes, counts.to(extremes[0].device if extremes else "cpu")]).tolist()
    ranges = {name: (flat[2 * i], flat[2 * i + 1]) for i, name in enumerate(ids)}
    return tuple(flat[2 * len(ids) :]), ranges
