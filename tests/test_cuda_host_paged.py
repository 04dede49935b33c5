"""The C++ kernels of `paged_write` and `paged_attention`, on the host engine."""

from dataclasses import replace

import pytest
import test_paged_write as writes
import torch
from cases import KERNEL_DTYPES, banded_copy, examples, poisoned, poisoned_allocations, randn
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from paged_batch import PagedBatch, paged_batch
from test_paged_attention import check_problem
from test_paged_write import problem as write_problem
from test_paged_write import problems as write_problems
from tolerance import assert_accurate, assert_bitwise

from bertgpt import ops, reference
from bertgpt.cuda import extension
from bertgpt.cuda.paged_attention import HEAD_DIMS, paged_decode

pytestmark = pytest.mark.usefixtures("host_engine")
CUDA = {"backend": "cuda"}
ONCE = {"suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]}
INF, NAN = float("inf"), float("nan")


@st.composite
def decodes(draw):
    kv_heads = draw(st.integers(1, 3))
    batch = paged_batch(
        draw(st.lists(st.integers(0, 300), min_size=1, max_size=4)),
        page_size=draw(st.sampled_from([8, 11, 16, 64, 256])),
        heads=kv_heads * draw(st.sampled_from([1, 2, 4, 5, 9])),
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from(HEAD_DIMS)),
        dtype=draw(st.sampled_from(KERNEL_DTYPES)),
        index=draw(st.sampled_from([torch.int32, torch.int64])),
        seed=draw(st.integers(0, 99)),
    )
    masks = {
        "causal": draw(st.booleans()),
        "window": draw(st.sampled_from([None, (-1, 0), (0, 0), (7, -1), (130, 3)])),
        "scale": draw(st.sampled_from([None, 1.0, -0.3, 0.0])),
    }
    return batch, masks


@given(problem=decodes(), schedule=st.integers(0, 2**32))
@examples(60, **ONCE)
def test_decoding_is_accurate(host_engine, problem, schedule):
    host_engine.set_schedule(schedule)
    with poisoned_allocations():
        check_problem(problem, "cuda")


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_long_contexts_and_skewed_lengths_are_accurate(dtype):
    """Splits of 128 keys, and of 256 past 4,096; several of them a block."""
    batch = paged_batch((4500, 3, 0, 700), page_size=64, head_dim=64, dtype=dtype)
    with poisoned_allocations():
        check_problem((batch, {}), "cuda")


def test_more_sequences_than_threads_in_a_block():
    lengths = [(7 * b) % 40 for b in range(300)]
    check_problem((paged_batch(lengths, head_dim=32), {}), "cuda")


def test_bits_depend_on_the_sequence_alone(host_engine):
    """Not on the batch, the pages, the table's width, the index type or the schedule."""
    batch = paged_batch((300, 37, 0, 129), page_size=16, heads=4, kv_heads=2, head_dim=64)
    run = {**CUDA, "return_lse": True}
    out, lse = ops.paged_attention(*batch.args, **run)
    others = (
        batch,
        batch.repaged(16, seed=3),
        batch.repaged(24),
        replace(batch, page_table=batch.page_table.long(), lengths=batch.lengths.long()),
    )
    for seed, other in enumerate(others):
        host_engine.set_schedule(seed)
        again, again_lse = ops.paged_attention(*other.args, **run)
        assert_bitwise(again, out)
        assert_bitwise(again_lse, lse)
    for b, width in ((0, None), (0, 400), (1, 3), (2, None), (3, 60)):
        one = batch.alone(b, width)
        row, row_lse = ops.paged_attention(*one.args, **run)
        assert_bitwise(row, out[batch.rows(b)], what=f"sequence {b} alone")
        assert_bitwise(row_lse, lse[:, batch.rows(b)], what=f"sequence {b} alone")


@pytest.mark.parametrize("which", ["q", "k_pages", "v_pages"])
def test_an_attended_nan_shows_in_its_sequence_alone(which):
    batch = paged_batch((200, 40, 7), head_dim=32)
    if which == "q":
        batch.q[1] = NAN
    else:
        getattr(batch, which)[int(batch.page_table[1, 1]), 0, 3] = NAN
    out = ops.paged_attention(*batch.args, **CUDA)
    assert out[1].isnan().any(dim=-1).all()
    assert out[[0, 2]].isfinite().all()


def test_strides_are_honoured():
    batch = paged_batch((40, 9), page_size=16, heads=4, kv_heads=2, head_dim=64)
    check_problem((_spread(batch), {}), "cuda")


def _spread(batch: PagedBatch) -> PagedBatch:
    """The same values in views with NaN between the rows, which stay 16-byte aligned."""

    def spread(tensor):
        wide = poisoned((*tensor.shape[:-1], tensor.shape[-1] + 8), tensor.dtype)
        view = wide.transpose(0, 1).contiguous().transpose(0, 1)[..., : tensor.shape[-1]]
        return view.copy_(tensor)

    return replace(
        batch, q=spread(batch.q), k_pages=spread(batch.k_pages), v_pages=spread(batch.v_pages)
    )


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_new_keys_are_attended_to_and_stored_in_one_launch(dtype, group):
    batch = paged_batch((130, 1, 0, 64), heads=2 * group, kv_heads=2, head_dim=64, dtype=dtype)
    whole = reference.paged_attention(*batch.args, return_lse=True)
    doubled = reference.paged_attention(*batch.double().args, return_lse=True)
    before = batch.k_pages.clone(), batch.v_pages.clone()
    new = poisoned((2, 4, 2, 64), dtype)
    for b, length in enumerate(batch.lengths.tolist()):
        if length:
            page, place = int(batch.page_table[b, (length - 1) // 8]), (length - 1) % 8
            for side, pages in enumerate((batch.k_pages, batch.v_pages)):
                new[side, b] = pages[page, :, place]
                pages[page, :, place] = NAN
    fenced = banded_copy(batch.k_pages), banded_copy(batch.v_pages)
    out, lse = paged_decode(
        batch.q, fenced[0].view, fenced[1].view, batch.page_table, batch.lengths,
        return_lse=True, new_k=new[0], new_v=new[1],
    )  # fmt: skip
    assert_accurate(out, doubled[0], whole[0])
    assert_accurate(lse, doubled[1].double(), whole[1])
    for band, pages in zip(fenced, before, strict=True):
        band.check("pages")
        assert_bitwise(band.view, pages)


@pytest.mark.parametrize("prefix", [16, 300])
@pytest.mark.parametrize("group", [1, 4])
def test_a_shared_prefix_is_read_for_several_sequences(prefix, group):
    lengths = (prefix + 1, prefix + 40, prefix, prefix + 200, prefix + 7)
    batch = paged_batch(lengths, page_size=8, heads=2 * group, kv_heads=2, head_dim=32)
    shared = -(-prefix // 8)
    own = prefix // 8  # a page that holds keys past the prefix is each sequence's own
    for b in range(1, len(lengths)):
        for page in range(shared):
            mine, first = int(batch.page_table[b, page]), int(batch.page_table[0, page])
            places = slice(0, min(8, prefix - page * 8))
            for pages in (batch.k_pages, batch.v_pages):
                pages[mine, :, places] = pages[first, :, places]
    run = {"return_lse": True}
    expected, baseline = (
        reference.paged_attention(*args, **run) for args in (batch.double().args, batch.args)
    )
    table = batch.page_table.clone()
    table[1:, :own] = -1  # the prefix is found through the first row alone
    with poisoned_allocations():
        out, lse = paged_decode(
            batch.q, batch.k_pages, batch.v_pages, table, batch.lengths, prefix_keys=prefix, **run
        )
    assert_accurate(out, expected[0], baseline[0])
    assert_accurate(lse, expected[1].double(), baseline[1])
    extension.raise_pending()


def test_a_window_and_a_prefix_exclude_each_other():
    batch = paged_batch((20,), head_dim=32)
    with pytest.raises(ValueError, match="exclude each other"):
        paged_decode(*batch.args, window_left=3, prefix_keys=8)
    with pytest.raises(ValueError, match="go together"):
        paged_decode(*batch.args, new_k=batch.q)


@pytest.mark.parametrize("page", [-1, 10**6, 2**31 - 1])
def test_a_page_out_of_range_is_skipped_and_told_of(page):
    batch = paged_batch((40, 9), head_dim=32)
    kept = paged_batch((40, 9), head_dim=32)
    batch.page_table[0, 2] = page
    out, _ = paged_decode(*batch.args)
    assert out.isfinite().all()
    assert_bitwise(out[1], paged_decode(*kept.args)[0][1])
    with pytest.raises(IndexError, match=r"page id in use lies outside the pool"):
        extension.raise_pending()
    extension.raise_pending()  # told once


@pytest.mark.parametrize("length", [-3, 10**6])
def test_a_length_out_of_range_is_clamped_and_told_of(length):
    batch = paged_batch((40, 9), head_dim=32)
    batch.lengths[1] = length
    batch.page_table[1] = batch.page_table[0]
    paged_decode(*batch.args)
    with pytest.raises(IndexError, match="length is negative"):
        extension.raise_pending()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"head_dim": 48}, "head_dim 48 is not one of 32, 64, 80, 96, 128"),
        ({"page_size": 4}, "pages of 4 tokens are outside 8 … 256"),
        ({"chunks": (1, 2)}, "not chunks"),
        ({"dtype": torch.float64}, "float64"),
    ],
)
def test_what_it_does_not_do_is_refused_in_words(change, words):
    batch = paged_batch((20, 9), **{"head_dim": 32, **change})
    with pytest.raises(ops.BackendUnavailable, match=words):
        ops.paged_attention(*batch.args, **batch.chunks, **CUDA)


def test_misaligned_rows_are_refused_in_words():
    batch = paged_batch((20, 9), head_dim=32, dtype=torch.float16)
    shifted = torch.empty(batch.q.numel() + 1, dtype=torch.float16)[1:].view(batch.q.shape)
    with pytest.raises(ops.BackendUnavailable, match="rows of q do not start at multiples of 16"):
        ops.paged_attention(shifted.copy_(batch.q), *batch.args[1:], **CUDA)


@given(tensors=write_problems(KERNEL_DTYPES), schedule=st.integers(0, 2**32))
@examples(60, **ONCE)
def test_tokens_land_in_their_slots_and_nothing_else_changes(host_engine, tensors, schedule):
    host_engine.set_schedule(schedule)
    writes.check_write(tensors, "cuda")


@pytest.mark.parametrize("head_dim", [64, 80, 6, 7])
def test_rows_are_written_in_accesses_of_every_width(head_dim):
    slots = torch.tensor([0, 11, -1, 5, 5, -12])
    for dtype in KERNEL_DTYPES:
        tensors = write_problem(slots, head_dim=head_dim, dtype=dtype)
        fenced = [banded_copy(t) for t in tensors[2:4]]
        writes.check_write((*tensors[:2], *(f.view for f in fenced), slots), "cuda")
        for band in fenced:
            band.check("pages")


def test_of_tokens_with_one_slot_the_last_stays():
    slots = torch.tensor([4, 7] * 200 + [4, -1, 7])
    k, v, k_pages, v_pages, _ = tensors = write_problem(slots, head_dim=64)
    ops.paged_write(*tensors, **CUDA)
    for values, pages in ((k, k_pages), (v, v_pages)):
        assert_bitwise(pages[1, :, 1], values[-3])
        assert_bitwise(pages[2, :, 1], values[-1])


def test_a_slot_past_the_last_page_is_skipped_and_told_of():
    from bertgpt.cuda import paged_write

    tensors = write_problem(torch.tensor([3, 12]), head_dim=8)
    before = tensors[2].clone()
    paged_write.paged_write(*tensors)
    before[1, :, 0] = tensors[0][0]
    assert_bitwise(tensors[2], before)
    with pytest.raises(IndexError, match="slot lies past the last page"):
        extension.raise_pending()


def test_explain_names_it():
    batch = paged_batch((20, 9), head_dim=32)
    assert "cuda" not in ops.explain("paged_attention", *batch.args).refusals
    text = str(ops.explain("paged_attention", randn(2, 2, 8), *paged_batch((20, 9)).args[1:]))
    assert "cuda refuses: head_dim 8 is not one of" in text
