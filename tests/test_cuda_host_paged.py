"""The C++ kernel of `paged_attention` on the host engine: with bulk copies, and without."""

from dataclasses import replace

import pytest
import torch
from cases import KERNEL_DTYPES, banded_copy, examples, poisoned, poisoned_allocations, randn
from host_engine import lend, plain
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from paged_batch import PagedBatch, paged_batch
from test_paged_attention import check_problem
from tolerance import assert_accurate, assert_bitwise

from bertgpt import ops, reference
from bertgpt.cuda import extension
from bertgpt.cuda.paged_attention import HEAD_DIMS, paged_decode, unsupported

pytestmark = [
    pytest.mark.usefixtures("host_engine"),
    pytest.mark.parametrize("host_engine", [900, 800], indirect=True, ids=["sm_90", "sm_80"]),
]
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


def test_bits_do_not_depend_on_how_a_stage_is_filled(host_engine, monkeypatch):
    batch = _spread(paged_batch((300, 37, 0, 129), heads=4, kv_heads=2, head_dim=80))
    for problem in (batch, batch.repaged(16)):
        out, lse = ops.paged_attention(*problem.args, return_lse=True, **CUDA)
        for arch in (900, 800):
            lend(plain(arch), monkeypatch)
            again, again_lse = ops.paged_attention(*problem.args, return_lse=True, **CUDA)
            assert_bitwise(again, out)
            assert_bitwise(again_lse, lse)


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


def test_arguments_that_contradict_each_other_are_named():
    batch = paged_batch((20,), page_size=8, head_dim=32)
    assert batch.page_table.shape == (1, 4)
    with pytest.raises(ValueError, match="exclude each other"):
        paged_decode(*batch.args, window_left=3, prefix_keys=8)
    with pytest.raises(ValueError, match="prefix_keys is 33, but the page table holds 32 keys"):
        paged_decode(*batch.args, prefix_keys=33)
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


def test_new_rows_that_cannot_be_read_are_named():
    batch = paged_batch((20, 9), heads=2, kv_heads=2, head_dim=32)
    rows = randn(2, 2, 32)
    odd = torch.empty(rows.numel() + 1)[1:].view(rows.shape)
    wrong = {
        r"new_v must be \[B, K, D\] = .* not \(1, ": rows[:1],
        "torch.float32 on cpu, not .* torch.float16": rows.half(),
        "torch.float32 on cpu, not .* on meta": rows.to("meta"),
        "new_v must have last stride 1": rows.mT.contiguous().mT,
        "rows of new_v do not start at multiples of 16 bytes; copy it": odd,
    }
    for words, new_v in wrong.items():
        with pytest.raises(ValueError, match=words):
            paged_decode(*batch.args, new_k=rows, new_v=new_v)


@pytest.mark.parametrize("name", ["k_pages", "v_pages", "page_table", "lengths"])
def test_tensors_on_another_device_are_named(name):
    batch = paged_batch((20, 9), head_dim=32)
    moved = replace(batch, **{name: getattr(batch, name).to("meta")})
    with pytest.raises(ValueError, match=f"{name} is on meta but|v_pages is on cpu but k_pages"):
        ops.paged_attention(*moved.args, **CUDA)


def test_rows_whose_elements_lie_apart_are_copied():
    batch = paged_batch((40, 9), head_dim=32)
    apart = {n: torch.stack([t, t * NAN], -1)[..., 0] for n, t in _read(batch).items()}
    check_problem((replace(batch, **apart), {}), "cuda")


def _read(batch: PagedBatch) -> dict[str, torch.Tensor]:
    return {name: getattr(batch, name) for name in ("q", "k_pages", "v_pages")}


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"k_pages": (2**31, 1, 8, 32)}, "the pool has 2147483648 pages, above 2147483647"),
        ({"page_table": (1, 2**24 + 1)}, "has room for 134217736 keys a sequence, above 134217728"),
        ({"q": (2**20, 2**11, 32)}, "1048576 sequences of 2048 heads are above 2147483647 rows"),
    ],
)
def test_sizes_past_its_counters_are_refused_in_words(shapes, words):
    small = {"q": (1, 1, 32), "k_pages": (1, 1, 8, 32), "page_table": (1, 1)}
    tensors = {n: torch.empty(s, device="meta") for n, s in {**small, **shapes}.items()}
    call = {**tensors, "v_pages": tensors["k_pages"], "cu_seqlens_q": None}
    assert words in unsupported(call)
    assert unsupported({**call, **{n: torch.empty(s) for n, s in small.items()}}) is None


def test_explain_names_it():
    batch = paged_batch((20, 9), head_dim=32)
    assert "cuda" not in ops.explain("paged_attention", *batch.args).refusals
    text = str(ops.explain("paged_attention", randn(2, 2, 8), *paged_batch((20, 9)).args[1:]))
    assert "cuda refuses: head_dim 8 is not one of" in text
