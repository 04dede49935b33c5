"""The Triton kernels of `paged_write` and `paged_attention`, in Triton's interpreter."""

from dataclasses import replace

import pytest
import torch
from cases import KERNEL_DTYPES, banded_copy, examples, poisoned_allocations
from hypothesis import given
from paged_batch import paged_batch, problems
from test_paged_attention import check_problem
from test_paged_write import check_write
from test_paged_write import problem as write_problem
from test_paged_write import problems as write_problems
from tolerance import assert_accurate, assert_bitwise

from bertgpt import ops, reference

pytest.importorskip("triton")
from bertgpt.kernels import merge_splits, paged_attention, paged_write

pytestmark = [
    pytest.mark.interpreter,
    # NumPy warns of a maximum over nothing but NaN, which the kernel leaves to the exponentials.
    pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning"),
]
TRITON = {"backend": "triton"}
SMALL_TILES = paged_attention.Config(
    BLOCK_M=16, BLOCK_N=16, SPLIT_KEYS=32, num_warps=4, num_stages=2
)


@pytest.fixture
def small_tiles(monkeypatch):
    """Blocks of 16 keys and splits of 32, so that short sequences cross many of both."""
    monkeypatch.setattr(paged_attention, "pick_config", lambda *args: SMALL_TILES)


@given(
    problem=problems(
        KERNEL_DTYPES,
        longest=100,
        longest_chunk=30,
        page_sizes=[1, 3, 8, 16, 64, 128],
        head_dims=[8, 31, 64],
    )
)
@examples(30)
def test_attention_is_accurate(problem):
    with poisoned_allocations():
        check_problem(problem, "triton")


@given(
    problem=problems(
        KERNEL_DTYPES,
        longest=130,
        longest_chunk=10,
        page_sizes=[8, 16, 48],
        head_dims=[8, 16],
    )
)
@examples(20)
def test_attention_over_many_splits_is_accurate(problem):
    with pytest.MonkeyPatch.context() as patch, poisoned_allocations():
        patch.setattr(paged_attention, "pick_config", lambda *args: SMALL_TILES)
        check_problem(problem, "triton")


@pytest.mark.parametrize("head_dim", [1, 80, 128, 256])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_extreme_heads_are_accurate(head_dim, dtype):
    batch = paged_batch((70, 30), (9, 12), head_dim=head_dim, heads=6, kv_heads=2, dtype=dtype)
    check_problem((batch, {}), "triton")


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("chunks", [None, (3, 1, 0)], ids=["decode", "chunks"])
def test_bits_depend_on_the_sequence_alone(chunks):
    """Not on the batch, the pages, their size, the table's width, or the index type."""
    batch = paged_batch((100, 37, 0), chunks, page_size=16, heads=4, kv_heads=2)
    run = {**batch.chunks, **TRITON, "return_lse": True}
    out, lse = ops.paged_attention(*batch.args, **run)
    for other in (
        batch.repaged(16, seed=3),
        batch.repaged(24),
        replace(batch, page_table=batch.page_table.long(), lengths=batch.lengths.long()),
    ):
        again, again_lse = ops.paged_attention(*other.args, **run)
        assert_bitwise(again, out)
        assert_bitwise(again_lse, lse)
    for b, width in ((0, None), (0, 20), (1, 3), (2, None)):
        one = batch.alone(b, width)
        row, row_lse = ops.paged_attention(*one.args, **{**run, **one.chunks})
        assert_bitwise(row, out[batch.rows(b)], what=f"sequence {b} alone")
        assert_bitwise(row_lse, lse[:, batch.rows(b)], what=f"sequence {b} alone")


@pytest.mark.usefixtures("small_tiles")
def test_a_nan_query_shows_in_its_row_alone():
    batch = paged_batch((100, 40, 7))
    clean = ops.paged_attention(*batch.args, **TRITON)
    batch.q[1, 0] = float("nan")
    out, lse = ops.paged_attention(*batch.args, return_lse=True, **TRITON)
    assert out[1, 0].isnan().all()
    assert lse[0, 1].isnan()
    out[1, 0] = clean[1, 0]
    assert_bitwise(out, clean)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("which", ["k_pages", "v_pages"])
def test_an_attended_nan_shows_in_its_sequence_alone(which):
    batch = paged_batch((100, 40, 7))
    getattr(batch, which)[int(batch.page_table[1, 1]), 0, 3] = float("nan")
    out = ops.paged_attention(*batch.args, **TRITON)
    assert out[1].isnan().any(dim=-1).all()
    assert out[[0, 2]].isfinite().all()


@pytest.mark.usefixtures("small_tiles")
def test_a_key_outside_every_window_may_be_nan():
    batch = paged_batch((100, 90), (2, 3))
    run = {**batch.chunks, **TRITON, "window": (1, 0)}
    out = ops.paged_attention(*batch.args, **run)
    for pages in (batch.k_pages, batch.v_pages):
        pages[batch.page_table[0, :12].long()] = float("nan")  # keys 0 … 95
        pages[int(batch.page_table[0, 12]), :, 0] = float("nan")  # 96; the first query sees 97
    assert_bitwise(ops.paged_attention(*batch.args, **run), out)


def launch(batch, **change):
    """The launcher itself, as on a GPU where nobody has looked at the values of index tensors."""
    arguments = {**batch.__dict__, **change}
    return paged_attention.paged_attention(
        **arguments, causal=True, window=None, scale=None, return_lse=True
    )


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("value", [-1, 10**6, 2**31 - 1])
@pytest.mark.parametrize("page_size", [8, 32])
def test_a_page_id_out_of_range_is_skipped(value, page_size):
    batch = paged_batch((100, 40), page_size=page_size)
    table = batch.page_table.clone()
    table[0, 0] = value
    out, lse = launch(batch, page_table=table)
    rest, rest_lse = launch(
        replace(batch, page_table=table[:, 1:]), lengths=batch.lengths - page_size
    )
    torch.testing.assert_close(out[0], rest[0])  # as if the keys of that page were not there
    torch.testing.assert_close(lse[:, 0], rest_lse[:, 0])


@pytest.mark.usefixtures("small_tiles")
def test_wrong_lengths_stay_inside_the_table():
    batch = paged_batch((100, 40))
    full = replace(batch, page_table=batch.page_table[:, :5])  # room for 40 keys
    out, _ = launch(full, lengths=torch.tensor([100, 2**31 - 1], dtype=torch.int32))
    expected, _ = launch(full, lengths=torch.tensor([40, 40], dtype=torch.int32))
    assert_bitwise(out, expected)
    none, lse = launch(full, lengths=torch.tensor([-5, 40], dtype=torch.int32))
    assert not none[0].any()
    assert (lse[:, 0] == -float("inf")).all()


@pytest.mark.usefixtures("small_tiles")
def test_wrong_chunks_stay_inside_q():
    batch = paged_batch((40, 40), (4, 4))
    fenced = banded_copy(batch.q)
    for cu in ([0, 4, 9], [-3, 4, 8], [0, 9, 3], [2**31 - 1, 0, 8]):
        launch(batch, q=fenced.view, cu_seqlens_q=torch.tensor(cu, dtype=torch.int32))
    launch(batch, max_seqlen_q=1)
    fenced.check("q")
    assert_bitwise(fenced.view, batch.q)


def test_lengths_are_read_at_run_time():
    """What a captured launch needs: the grid and the workspace follow shapes alone."""
    batch = paged_batch((600, 300), page_size=16)
    grown = launch(batch)
    shorter = batch.lengths - 77
    batch.lengths.copy_(shorter)
    out, _ = launch(batch)
    oracle = reference.paged_attention(*batch.double().args)
    assert_accurate(out, oracle, reference.paged_attention(*batch.args))
    assert not torch.equal(out, grown[0])


@pytest.mark.parametrize("live", [0, 1, 8, 9, 20])
def test_the_merge_reads_live_splits_alone(live):
    splits, heads, dim, split_keys = 20, 3, 5, 4
    part = torch.randn(splits, 1, heads, dim)
    part_lse = torch.randn(splits, heads, 1) * 5
    part_lse[1] = -float("inf")  # keys, none of them visible
    part[1] = 0
    part[live:], part_lse[live:] = float("nan"), 1e4  # would outweigh all others
    out, lse = torch.empty(1, heads, dim), torch.empty(heads, 1)
    merge_splits.merge_splits(
        part, part_lse, out, lse,
        lengths=torch.tensor([live * split_keys]), cu_seqlens_q=None, max_seqlen_q=1,
        split_keys=split_keys,
    )  # fmt: skip
    if live == 0:
        assert not out.any()
        assert (lse == -float("inf")).all()
        return
    weight = part_lse[:live].double().softmax(0).transpose(1, 2)[..., None]
    torch.testing.assert_close(out.double(), (weight * part[:live]).sum(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse.double(), part_lse[:live].double().logsumexp(0))
    if live == 1:
        assert_bitwise(out, part[0])
        assert_bitwise(lse, part_lse[0])


@given(tensors=write_problems(KERNEL_DTYPES, most_tokens=40))
@examples(60)
def test_writes_land_in_their_slots_and_nothing_else_changes(tensors):
    check_write(tensors, "triton")


def test_a_long_write_searches_all_later_tokens():
    slots = torch.randint(-2, 400, (1100,), generator=torch.Generator().manual_seed(0))
    check_write(write_problem(slots, pages=50, page_size=8, kv_heads=3, head_dim=8), "triton")


def test_a_write_bumps_the_version_that_autograd_checks():
    tensors = write_problem(torch.tensor([0, 5]))
    version = tensors[2]._version
    ops.paged_write(*tensors, backend="triton")
    assert tensors[2]._version > version


def test_writes_out_of_range_are_skipped():
    k, v, k_pages, v_pages, _ = write_problem(torch.tensor([0, 0, 0]))
    fenced = banded_copy(k_pages), banded_copy(v_pages)
    slots = torch.tensor([12, 2**40, -(2**40)])
    paged_write.paged_write(k, v, fenced[0].view, fenced[1].view, slots)
    for band, pages in zip(fenced, (k_pages, v_pages), strict=True):
        band.check("pages")
        assert_bitwise(band.view, pages)


def test_autograd_is_no_obstacle():
    batch = paged_batch((9, 30), (4, 7))
    batch.q.requires_grad_()
    out = ops.paged_attention(*batch.args, **batch.chunks, **TRITON)
    assert not out.requires_grad


def test_what_the_kernel_refuses():
    batch = paged_batch((9, 30))
    wide = batch.page_table.new_zeros(1, 1).expand(2, 2**28)
    reason = ops.explain("paged_attention", *batch.args[:3], wide, batch.lengths)
    assert "room for 2147483648 keys" in reason.refusals["triton"]
    with pytest.raises(ops.BackendUnavailable, match="float64"):
        ops.paged_attention(*batch.double().args, **TRITON)


def test_a_chunk_may_hold_several_tiles():
    batch = paged_batch((150, 90), (100, 70), heads=2, kv_heads=1, page_size=32)
    check_problem((batch, {"window": (50, -1)}), "triton")
