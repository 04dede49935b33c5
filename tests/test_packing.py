"""Packing: layout, round trips under any mask, and bad input by name."""

import dataclasses

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import ragged_mask

from bertgpt.packing import PackedBatch, pack, pad, unpad


def test_layout_of_ragged_lists_with_empty_ones():
    batch = pack([[5, 6, 7], [], [8]], token_type_ids=[[0, 0, 1], [], [1]])
    assert batch.values.tolist() == [5, 6, 7, 8]
    assert batch.input_ids is batch.values
    assert batch.cu_seqlens.tolist() == [0, 3, 3, 4]
    assert batch.cu_seqlens.dtype == torch.int32
    assert (batch.lengths, batch.max_seqlen, len(batch)) == ((3, 0, 1), 3, 3)
    assert batch.token_type_ids.tolist() == [0, 0, 1, 1]
    assert batch.positions().tolist() == [0, 1, 2, 0]
    assert batch.ranges["input_ids"] == (5, 8)


@pytest.mark.parametrize("rows", [[], [[]], [[], []]])
def test_nothing_to_pack(rows):
    batch = pack(rows)
    assert batch.values.shape == (0,)
    assert (len(batch), batch.max_seqlen) == (len(rows), 0)
    assert pad(batch.values, batch).shape == (len(rows), 0)
    assert batch.positions().shape == (0,)


def test_tensors_pack_like_lists():
    rows = [[1, 2], [3]]
    batch = pack([torch.tensor(row, dtype=torch.int32) for row in rows])
    assert batch.values.equal(pack(rows).values)


def test_given_positions_are_kept():
    assert pack([[4, 5]], position_ids=[[7, 3]]).positions().tolist() == [7, 3]


@given(
    mask=st.integers(0, 4).flatmap(
        lambda width: st.lists(
            st.lists(st.booleans(), min_size=width, max_size=width), min_size=1, max_size=5
        )
    ),
    features=st.sampled_from([(), (3,)]),
)
def test_unpad_then_pad_restores_every_kept_cell(mask, features):
    keep = torch.tensor(mask, dtype=torch.bool).view(len(mask), -1)
    cells = torch.arange(1, keep.numel() + 1).view(keep.shape)
    values = cells.view(*keep.shape, *[1] * len(features)).expand(*keep.shape, *features)
    batch = unpad(values, keep.long())
    assert batch.lengths == tuple(keep.sum(1).tolist())
    assert batch.values.equal(values[keep])
    shown = keep.view(*keep.shape, *[1] * len(features))
    assert pad(batch.values, batch, fill=0).equal(values * shown)


def test_pad_on_either_side():
    batch = pack([[1], [2, 3, 4], []])
    right = [[1, 9, 9], [2, 3, 4], [9, 9, 9]]
    assert pad(batch.values, batch, fill=9).tolist() == right
    assert pad(batch.values, batch, side="left", fill=9).tolist() == [[9, 9, 1], right[1], right[2]]
    batch = unpad(torch.tensor([[0, 1], [2, 3]]), torch.tensor([[0, 1], [1, 1]]))
    assert pad(batch.values, batch, side="right").tolist() == [[1, 0], [2, 3]]
    assert pad(batch.values, batch).tolist() == [[0, 1], [2, 3]]


def test_a_full_mask_gathers_nothing():
    padded = torch.arange(6).view(2, 3)
    batch = unpad(padded, torch.ones(2, 3, dtype=torch.bool))
    assert batch.values.data_ptr() == padded.data_ptr()
    assert batch.equal_lengths


def test_pad_is_differentiable():
    batch = pack([[1], [2, 3]])
    rows = torch.randn(3, 2, requires_grad=True)
    pad(rows, batch).sum().backward()
    assert rows.grad.equal(torch.ones(3, 2))


def test_first_tokens_are_zero_for_empty_sequences():
    values = torch.arange(1.0, 4.0)[:, None]
    assert pack([[], [1, 1], [1], []]).first_tokens(values).flatten().tolist() == [0, 1, 3, 0]
    assert pack([[], []]).first_tokens(values[:0]).tolist() == [[0], [0]]


def test_moving_keeps_everything_and_reads_nothing():
    batch = unpad(torch.ones(2, 3, dtype=torch.long), ragged_mask("left", (1, 2), 3))
    moved = batch.to("meta")  # a copy to the host would raise there
    assert moved.values.is_meta
    assert moved.cu_seqlens.is_meta
    assert moved.grid.indices.is_meta
    assert (moved.lengths, moved.ranges) == (batch.lengths, batch.ranges)
    assert pad(moved.values, moved).shape == (2, 3)


def test_it_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        pack([[1]]).lengths = (2,)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "list of lists", lambda: pack([1, 2])),
        (TypeError, "list of lists", lambda: pack("word")),
        (TypeError, "integers", lambda: pack([[1.5]])),
        (TypeError, "integers", lambda: pack([[True]])),
        (TypeError, "integers", lambda: pack([[numpy.int64(1), 2.5]])),
        (TypeError, "int32 or int64", lambda: pack([torch.tensor([1.0])])),
        (ValueError, "1-D", lambda: pack([torch.ones(1, 1, dtype=torch.long)])),
        (ValueError, "token_type_ids", lambda: pack([[1, 2]], token_type_ids=[[0]])),
        (ValueError, "position_ids", lambda: pack([[1], [2]], position_ids=[[0]])),
        (ValueError, "attention_mask", lambda: unpad(torch.ones(2, 3), torch.ones(2, 4))),
        (ValueError, "attention_mask", lambda: unpad(torch.ones(2, 3), torch.ones(2))),
        (ValueError, "negative", lambda: unpad(torch.ones(1, 2), torch.tensor([[0.0, -1e4]]))),
        (ValueError, "rows", lambda: pad(torch.ones(3), pack([[1], [2]]))),
        (ValueError, "side", lambda: pad(torch.ones(1), pack([[1]]), side="middle")),
        (TypeError, "int32", lambda: PackedBatch(torch.ones(1), torch.tensor([0, 1]), (1,))),
        (ValueError, "add up", lambda: by_hand([0, 2], (2,))),
        (ValueError, "shape", lambda: by_hand([0, 3], (1, 2))),
        (ValueError, "start at 0", lambda: by_hand([1, 3], (3,))),
        (ValueError, "start at 0", lambda: by_hand([0, 4, 3], (4, -1))),
    ],
)
def test_mistakes_are_named(error, message, call):
    with pytest.raises(error, match=message):
        call()


def by_hand(boundaries, lengths):
    return PackedBatch(torch.ones(3), torch.tensor(boundaries, dtype=torch.int32), lengths)
