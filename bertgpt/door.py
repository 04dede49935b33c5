"""The models' door: padded Hugging Face arguments come in, packed tokens go through, padded go out.

Everything that a caller can get wrong about ids is found here, by name, before anything runs. For
padded tensors on a GPU that costs one device-to-host copy; a `PackedBatch` was checked when it was
made and costs none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bertgpt.packing import PackedBatch, pad, unpad


@dataclass(frozen=True)
class Limits:
    """What a model's embedding tables can look up.

    Attributes:
        vocab: number of words.
        positions: length of the position table.
        types: number of token types.
        width: features of an embedding, E.
        tasks: number of task types.
        padding: id of the padding token, where a token's position is its number among those that
            are no padding tokens, from one past this id; a padding token's is this id. None where
            positions are columns.
    """

    vocab: int
    positions: int
    types: int
    width: int
    tasks: int = 0
    padding: int | None = None

    @property
    def longest(self) -> int:
        """Most tokens that a sequence may have."""
        return self.positions - (0 if self.padding is None else self.padding + 1)


def enter(
    limits: Limits,
    input_ids: Tensor | PackedBatch | None,
    attention_mask: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    task_type_ids: Tensor | None = None,
) -> PackedBatch:
    """Packs a model's arguments and checks them.

    Args:
        limits: the model's tables.
        input_ids: token ids `[B, L]`, or a `PackedBatch` of ids `[T]` or embeddings `[T, E]`, which
            comes alone.
        attention_mask: `[B, L]`, nonzero for real tokens, wherever they are; None keeps all.
        token_type_ids: `[B, L]` or broadcastable to it.
        position_ids: likewise; by default each token's column in the padded tensor, or as
            `limits.padding` says.
        inputs_embeds: `[B, L, E]` in place of `input_ids`.
        task_type_ids: as `token_type_ids`.

    Returns:
        The packed batch.

    Raises:
        TypeError: ids that are no integers, embeddings or masks that are no numbers.
        ValueError: shapes that disagree, both or neither of ids and embeddings, a mask that is not
            2-D, or a sequence longer than the position table.
        IndexError: a token, type or position id outside its table.
    """
    rest = {
        "attention_mask": attention_mask,
        "token_type_ids": token_type_ids,
        "position_ids": position_ids,
        "inputs_embeds": inputs_embeds,
        "task_type_ids": task_type_ids,
    }
    for name, value in rest.items():
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, not {type(value).__name__}")
    if isinstance(input_ids, PackedBatch):
        for name, value in rest.items():
            if value is not None:
                raise ValueError(f"{name} beside a PackedBatch: give it to pack() instead")
        _check(input_ids, limits)
        return input_ids
    padded = _one_input(input_ids, inputs_embeds)
    given = position_ids
    if given is None and limits.padding is not None:
        position_ids = _numbers(padded, limits.padding)
    elif given is None and padded.shape[1] > limits.longest:
        raise _too_long(padded.shape[1], limits)
    batch = _unpad(padded, attention_mask, token_type_ids, position_ids, task_type_ids)
    last = batch.ranges.get("position_ids", (0, 0))[1]
    if given is None and last >= limits.positions:
        raise _too_long(last - limits.positions + 1 + limits.longest, limits)
    _check(batch, limits)
    return batch


def positions(batch: PackedBatch, limits: Limits) -> Tensor:
    """Position of every token `[T]`: as given, or counted as `limits.padding` says."""
    padding = limits.padding
    if padding is None or batch.position_ids is not None:
        return batch.positions()
    places = batch.positions() + 1
    if batch.values.ndim > 1:  # embeddings, none of which is known to be padding
        return places + padding
    skipped = (batch.values == padding).long()
    before = nn.functional.pad(skipped.cumsum(0), (1, 0))
    earlier = before[batch.cu_seqlens[:-1].long()]  # in the sequences before each
    earlier = earlier.repeat_interleave(batch.cu_seqlens.diff(), output_size=len(skipped))
    return (places + earlier - before[1:]) * (1 - skipped) + padding


def leave(values: Tensor, batch: PackedBatch, fill: float = 0.0) -> Tensor:
    """Packed rows as the caller's kind of tensor: padded where padded came in."""
    return values if batch.grid is None else pad(values, batch, fill=fill)


@dataclass(frozen=True)
class Run:
    """A batch that has been through the layers.

    Attributes:
        batch: the batch.
        last: its last hidden states, packed `[T, E]`.
        every_layer: the embeddings and each layer's output in the caller's layout, if asked for.
    """

    batch: PackedBatch
    last: Tensor
    every_layer: tuple[Tensor, ...] | None

    @classmethod
    def of(cls, batch: PackedBatch, states: tuple[Tensor, ...], every_layer: bool) -> Run:
        """From the packed states that a model's layers gave."""
        kept = tuple(leave(state, batch) for state in states) if every_layer else None
        return cls(batch, states[-1], kept)


def _one_input(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    if input_ids is None:
        assert inputs_embeds is not None
        if not inputs_embeds.is_floating_point():
            raise TypeError(f"inputs_embeds must be floating point, not {inputs_embeds.dtype}")
        if inputs_embeds.ndim != 3:
            raise ValueError(f"inputs_embeds must be [B, L, E], not {list(inputs_embeds.shape)}")
        return inputs_embeds
    if not isinstance(input_ids, Tensor):
        raise TypeError(
            f"input_ids must be a tensor [B, L] or a PackedBatch, not {type(input_ids).__name__}; "
            "bertgpt.pack makes one from lists"
        )
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids must be [B, L], not {list(input_ids.shape)}")
    return input_ids


def _unpad(
    padded: Tensor,
    attention_mask: Tensor | None,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
    task_type_ids: Tensor | None,
) -> PackedBatch:
    shape = (padded.shape[0], padded.shape[1])
    given = {
        "token_type_ids": token_type_ids,
        "position_ids": position_ids,
        "task_type_ids": task_type_ids,
    }
    ids: dict[str, Tensor] = {}
    for name, value in given.items():
        if value is None:
            continue
        try:
            ids[name] = value.expand(shape)
        except RuntimeError:
            raise ValueError(
                f"{name} must broadcast to {list(shape)}, not {list(value.shape)}"
            ) from None
    if attention_mask is not None and position_ids is None:
        # As stock models count: columns of the padded row, also where padding comes first.
        ids["position_ids"] = torch.arange(shape[1], device=padded.device).expand(shape)
    if attention_mask is None:
        attention_mask = torch.ones((), dtype=torch.bool, device=padded.device).expand(shape)
    if attention_mask.ndim != 2:
        raise ValueError(
            f"attention_mask must be [B, L], not {attention_mask.ndim}-D: masks per query are for "
            "bertgpt.ops.attention"
        )
    return unpad(padded, attention_mask, **ids)


def _check(batch: PackedBatch, limits: Limits) -> None:
    if batch.values.is_floating_point() and batch.values.ndim > 1:
        if batch.values.shape[1:] != (limits.width,):
            raise ValueError(
                f"embeddings must have {limits.width} features, not {list(batch.values.shape[1:])}"
            )
    elif batch.values.ndim != 1 or batch.values.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"input_ids must be int32 or int64, not {batch.values.dtype}")
    if batch.position_ids is None and batch.max_seqlen > limits.longest:
        raise _too_long(batch.max_seqlen, limits)
    sizes = {
        "input_ids": limits.vocab,
        "token_type_ids": limits.types,
        "position_ids": limits.positions,
        "task_type_ids": limits.tasks,
    }
    for name, (low, high) in batch.ranges.items():
        if not sizes[name]:
            raise ValueError(f"{name}: this model has no embeddings for them, leave them out")
        if low < 0 or high >= sizes[name]:
            worst = low if low < 0 else high
            raise IndexError(f"{name} holds {worst}, outside 0 … {sizes[name] - 1}")


def _too_long(length: int, limits: Limits) -> ValueError:
    return ValueError(
        f"a sequence of {length} tokens is longer than the model's position table, "
        f"{limits.longest}: truncate it"
    )


def _numbers(padded: Tensor, padding: int) -> Tensor:
    """Position of each cell `[B, L]`, padded ids counted past the padding token, embeddings all."""
    real = padded != padding if padded.ndim == 2 else torch.ones_like(padded[..., 0])
    return real.long().cumsum(1) * real.long() + padding
