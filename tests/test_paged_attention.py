"""`ops.paged_attention` on torch and reference: the definition, its fine print, bad input."""

import math
from dataclasses import replace

import pytest
import torch
from cases import ALL_DTYPES, KERNEL_DTYPES, cu_seqlens, examples
from hypothesis import given
from paged_batch import paged_batch, problems
from tolerance import assert_accurate, assert_bitwise

from bertgpt import ops, reference

INF, NAN = float("inf"), float("nan")
BACKENDS = ("torch", "reference")
MASKS = {
    "causal": {},
    "all keys": {"causal": False},
    "window": {"causal": False, "window": (2, 1)},
    "causal window": {"window": (3, 5)},
    "right only": {"causal": False, "window": (-1, 0)},
    "own key": {"window": (0, 0)},
}


def by_hand(batch, b, i, h, *, scale, causal=True, window=(-1, -1)):
    """One output row and its log-sum-exp from the keys that query i of sequence b sees."""
    k, v = batch.keys(b)
    kv = h // (batch.q.shape[1] // batch.k_pages.shape[1])
    rows, length = batch.rows(b), int(batch.lengths[b])
    own = length - (rows.stop - rows.start) + i
    seen = range(length)
    seen = [j for j in seen if not causal or j <= own]
    seen = [j for j in seen if window[0] < 0 or j >= own - window[0]]
    seen = [j for j in seen if window[1] < 0 or j <= own + window[1]]
    if not seen:
        return torch.zeros(batch.q.shape[2], dtype=torch.float64), -INF
    q = batch.q[rows.start + i, h]
    scores = [float(q @ k[j, kv]) * scale for j in seen]
    top = max(scores)
    weights = [math.exp(s - top) for s in scores]
    row = sum(w * v[j, kv] for w, j in zip(weights, seen, strict=True)) / sum(weights)
    return row, top + math.log(sum(weights))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunks", [None, (2, 0, 1, 9, 0)], ids=["decode", "chunks"])
@pytest.mark.parametrize("name", MASKS)
def test_the_definition_by_hand(name, chunks, backend):
    lengths = (5, 8, 1, 20, 0)
    batch = paged_batch(lengths, chunks, heads=4, kv_heads=2, dtype=torch.float64)
    out, lse = ops.paged_attention(
        *batch.args, **batch.chunks, **MASKS[name], scale=0.3, return_lse=True, backend=backend
    )
    plain = ops.paged_attention(
        *batch.args, **batch.chunks, **MASKS[name], scale=0.3, backend=backend
    )
    torch.testing.assert_close(plain, out)
    assert lse.shape == (4, len(batch.q))
    assert lse.dtype == torch.float32
    for b in range(len(lengths)):
        rows = batch.rows(b)
        for i in range(rows.stop - rows.start):
            for h in range(4):
                row, total = by_hand(batch, b, i, h, scale=0.3, **MASKS[name])
                where = f"sequence {b}, query {i}, head {h}"
                assert (out[rows.start + i, h] - row).abs().max() < 1e-12, where
                assert float(lse[h, rows.start + i]) == pytest.approx(total, abs=1e-5), where


def check_problem(problem, backend):
    """Judges out and lse of one problem by the accuracy rule."""
    batch, masks = problem
    run = {**batch.chunks, **masks, "return_lse": True}
    out, lse = ops.paged_attention(*batch.args, **run, backend=backend)
    oracle, oracle_lse = reference.paged_attention(*batch.double().args, **run)
    baseline, baseline_lse = reference.paged_attention(*batch.args, **run)
    assert_accurate(out, oracle, baseline, what="out")
    assert_accurate(lse, oracle_lse.double(), baseline_lse, what="lse")


@given(
    problem=problems(
        ALL_DTYPES, longest=70, longest_chunk=20, page_sizes=[1, 3, 8, 16, 64], head_dims=[5, 8, 31]
    )
)
@examples(150)
def test_torch_is_accurate(problem):
    check_problem(problem, "torch")


@pytest.mark.parametrize("head_dim", [1, 256])
def test_torch_is_accurate_at_extreme_head_dims(head_dim):
    for chunks in (None, (9, 12)):
        batch = paged_batch((70, 30), chunks, head_dim=head_dim, heads=6, kv_heads=2)
        check_problem((batch, {}), "torch")


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("chunks", [None, (1, 40, 3, 0, 7, 64)], ids=["decode", "chunks"])
def test_torch_is_accurate_over_several_lengths(chunks, dtype):
    batch = paged_batch(
        (700, 40, 41, 300, 7, 650), chunks, page_size=16, heads=4, kv_heads=2, dtype=dtype
    )
    check_problem((batch, {}), "torch")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunks", [None, (3, 1, 6)], ids=["decode", "chunks"])
def test_pages_in_another_order_give_the_same_bits(chunks, backend):
    batch = paged_batch((9, 30, 6), chunks, heads=4, kv_heads=2)
    moved = batch.repaged(8, seed=5)
    assert not torch.equal(batch.page_table, moved.page_table)
    out = ops.paged_attention(*batch.args, **batch.chunks, backend=backend)
    assert_bitwise(ops.paged_attention(*moved.args, **batch.chunks, backend=backend), out)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunks", [None, (3, 0, 6)], ids=["decode", "chunks"])
def test_unused_memory_never_shows(chunks, backend):
    batch = paged_batch((9, 30, 6), chunks)  # NaN in every slot without a key, junk in the table
    clean = replace(
        batch,
        k_pages=batch.k_pages.nan_to_num(0),
        v_pages=batch.v_pages.nan_to_num(0),
        page_table=batch.page_table.clamp(0, len(batch.k_pages) - 1),
    )
    out = ops.paged_attention(*clean.args, **batch.chunks, backend=backend)
    assert out.isfinite().all()
    assert_bitwise(ops.paged_attention(*batch.args, **batch.chunks, backend=backend), out)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_key_outside_every_window_may_be_nan(backend):
    batch = paged_batch((20, 12), (2, 3))
    page, place = int(batch.page_table[0, 2]), 1  # key 17 is what query 18 sees first
    out = ops.paged_attention(*batch.args, **batch.chunks, window=(1, 0), backend=backend)
    assert out.isfinite().all()
    for poisoned in (batch.k_pages, batch.v_pages):
        poisoned[batch.page_table[0, :2].long()] = NAN
        poisoned[page, :, :place] = NAN
    again = ops.paged_attention(*batch.args, **batch.chunks, window=(1, 0), backend=backend)
    torch.testing.assert_close(again, out)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("which", ["q", "k_pages", "v_pages"])
@pytest.mark.parametrize("chunks", [None, (1, 1, 1)], ids=["decode", "chunks"])
def test_nan_that_is_attended_shows_in_its_sequence_alone(which, chunks, backend):
    batch = paged_batch((9, 30, 6), chunks)
    if which == "q":
        batch.q[1] = NAN
    else:
        getattr(batch, which)[int(batch.page_table[1, 1]), 0, 3] = NAN
    out = ops.paged_attention(*batch.args, **batch.chunks, backend=backend)
    assert out[1].isnan().any(dim=-1).all()
    assert out[[0, 2]].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sequence_of_length_zero_gives_zeros(backend):
    batch = paged_batch((0, 3, 0))
    out, lse = ops.paged_attention(*batch.args, return_lse=True, backend=backend)
    assert not out[[0, 2]].any()
    assert out[1].all()
    assert (lse[:, [0, 2]] == -INF).all()
    assert lse[:, 1].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("lengths", "chunks"), [((), None), ((), ()), ((0,), (0,)), ((4, 0), (0, 0))]
)
def test_nothing_to_compute(lengths, chunks, backend):
    batch = paged_batch(lengths, chunks)
    out, lse = ops.paged_attention(*batch.args, **batch.chunks, return_lse=True, backend=backend)
    assert out.shape == (0, 2, 8)
    assert lse.shape == (2, 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_longest_chunk_is_computed_when_not_given(backend):
    batch = paged_batch((9, 30), (4, 7))
    out = ops.paged_attention(*batch.args, **batch.chunks, backend=backend)
    run = {"cu_seqlens_q": batch.cu_seqlens_q, "max_seqlen_q": None, "backend": backend}
    assert_bitwise(ops.paged_attention(*batch.args, **run), out)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_layout_is_read_and_no_input_changes(backend):
    batch = paged_batch((9, 30), page_size=3, heads=4, kv_heads=2)
    out = ops.paged_attention(*batch.args, backend=backend)
    turned = [t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in batch.args[:3]]
    copies = [t.clone() for t in turned]
    assert_accurate(
        ops.paged_attention(*turned, *batch.args[3:], backend=backend), out.double(), out
    )
    for before, after in zip(copies, turned, strict=True):
        assert_bitwise(after, before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_there_is_no_gradient(backend):
    batch = paged_batch((9, 30))
    for tensor in batch.args[:3]:
        tensor.requires_grad_()
    out, lse = ops.paged_attention(*batch.args, return_lse=True, backend=backend)
    assert not out.requires_grad
    assert not lse.requires_grad


def test_autocast_takes_the_pages_dtype():
    batch = paged_batch((9, 30), dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.paged_attention(batch.q.float(), *batch.args[1:])
    assert_bitwise(out, ops.paged_attention(*batch.args))


BATCH = paged_batch((9, 30), (4, 7), heads=4, kv_heads=2)
DECODE = paged_batch((9, 30), heads=4, kv_heads=2)


def table_with(entry, value, dtype=torch.int64):
    table = BATCH.page_table.to(dtype).clone()
    table[entry] = value
    return table


@pytest.mark.parametrize(
    ("batch", "change", "error", "message"),
    [
        (BATCH, {"page_table": table_with((0, 1), 7)}, IndexError, r"page_table holds 7, .* 0 … 6"),
        (BATCH, {"page_table": table_with((1, 0), -1)}, IndexError, "page_table holds -1"),
        (BATCH, {"page_table": table_with((1, 3), 2**40)}, IndexError, "page_table holds"),
        (BATCH, {"lengths": torch.tensor([9, -1])}, ValueError, "lengths holds -1"),
        (BATCH, {"lengths": torch.tensor([9, 41])}, ValueError, "lengths holds 41, outside 0 … 40"),
        (BATCH, {"lengths": torch.tensor([3, 30])}, ValueError, "chunk of 4 tokens but length 3"),
        (BATCH, {"max_seqlen_q": 6}, ValueError, "max_seqlen_q is 6, but a chunk has 7"),
        (BATCH, {"max_seqlen_q": -1}, ValueError, "must not be negative"),
        (BATCH, {"cu_seqlens_q": cu_seqlens((4, 6))}, ValueError, "must end at 11"),
        (BATCH, {"cu_seqlens_q": torch.tensor([1, 4, 11])}, ValueError, "must start at 0"),
        (BATCH, {"cu_seqlens_q": torch.tensor([0, 12, 11])}, ValueError, "must not fall"),
        (BATCH, {"cu_seqlens_q": cu_seqlens((11,))}, ValueError, "cu_seqlens_q must be"),
        (BATCH, {"cu_seqlens_q": torch.tensor([0.0, 4, 11])}, TypeError, "cu_seqlens_q must be"),
        (BATCH, {"page_table": BATCH.page_table.short()}, TypeError, "page_table must be int32"),
        (BATCH, {"page_table": BATCH.page_table[0]}, ValueError, "page_table must have 2"),
        (BATCH, {"lengths": BATCH.lengths.float()}, TypeError, "lengths must be int32"),
        (BATCH, {"lengths": BATCH.lengths[:1]}, ValueError, "lengths must be"),
        (BATCH, {"window": (-2, 0)}, ValueError, "window bounds"),
        (BATCH, {"backend": "opencl"}, ValueError, "unknown backend"),
        (BATCH, {"q": BATCH.q.half()}, TypeError, "q is torch.float16 but k_pages is"),
        (BATCH, {"q": BATCH.q.int()}, TypeError, "q must be float16"),
        (BATCH, {"q": BATCH.q[0]}, ValueError, "q must have 3 dimensions"),
        (BATCH, {"q": BATCH.q[..., :4]}, ValueError, "head_dim 4 but the pages have 8"),
        (BATCH, {"q": BATCH.q[:, :3]}, ValueError, "3 query heads must be a multiple of 2"),
        (BATCH, {"q": BATCH.q.to("meta")}, ValueError, "q is on meta"),
        (BATCH, {"v_pages": BATCH.v_pages[:3]}, ValueError, "v_pages must be shaped like"),
        (BATCH, {"v_pages": BATCH.v_pages.half()}, TypeError, "v_pages is torch.float16"),
        (BATCH, {"k_pages": BATCH.k_pages[0]}, ValueError, "k_pages must have 4"),
        (DECODE, {"q": DECODE.q[:1]}, ValueError, "1 tokens for 2 sequences"),
        (DECODE, {"max_seqlen_q": 2}, ValueError, "max_seqlen_q 2 needs cu_seqlens_q"),
    ],
)
def test_bad_input_is_named(batch, change, error, message):
    arguments = {**batch.__dict__, **change}
    with pytest.raises(error, match=message):
        ops.paged_attention(**arguments)


def test_registration():
    options = (True, [3, -1], 0.3)
    for batch, return_lse in ((DECODE, True), (BATCH, False)):
        torch.library.opcheck(
            torch.ops.bertgpt.paged_attention.default,
            (*batch.args, *batch.chunks.values(), *options, return_lse, None),
        )


def test_compiles_whole():
    def step(q, *rest):
        return ops.paged_attention(q * 2, *rest) + 1

    eager = step(*DECODE.args)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert_bitwise(compiled(*DECODE.args), eager)


def test_explain_names_the_choice():
    text = str(ops.explain(ops.paged_attention, *DECODE.args))
    assert "paged_attention: torch would run" in text
    assert "triton refuses" in text


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_flops_are_counted(dtype):
    batch = paged_batch((9, 30), heads=4, kv_heads=2, dtype=dtype)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        ops.paged_attention(*batch.args)
    assert counter.get_total_flops() == 4 * 2 * 40 * 4 * 8


def test_configs_depend_on_neither_the_batch_nor_the_machine_size():
    """A pure function of what its documentation names, within every architecture's limits."""
    kernels = pytest.importorskip("bertgpt.kernels.paged_attention")
    for capability in (80, 89, 90, 100, 103, 120):
        for head_dim in (1, 64, 96, 128, 256):
            for size in (2, 4):
                for rows in (1, 12, 16, 17, 33, 64, 65, 4096):
                    for keys in (16, 512, 2**15, 2**15 + 1, 2**20):
                        config = kernels.pick_config(capability, head_dim, size, rows, keys)
                        assert rows <= config.BLOCK_M or config.SPLIT_KEYS == 0
                        assert config.SPLIT_KEYS % config.BLOCK_N == 0
                        if config.SPLIT_KEYS:
                            splits = -(-keys // config.SPLIT_KEYS)
                            assert splits * config.BLOCK_M <= 1024
    narrow, wide = (kernels.pick_config(90, 64, 2, 1, keys) for keys in (16, 2**15))
    assert narrow == wide  # a table's width changes nothing below 32,768 keys


def test_tensors_that_change_in_place_between_calls_are_read_anew():
    """As in a decoding loop that keeps its tables; what is worked out once a step must not stay."""
    batch = paged_batch((24, 17, 20), dtype=torch.float64)
    for name, order in (("page_table", [1, 0, 2]), ("lengths", [2, 1, 0])):
        before = ops.paged_attention(*batch.args, backend="torch")
        getattr(batch, name).copy_(getattr(batch, name)[order])
        found, want = (ops.paged_attention(*batch.args, backend=b) for b in BACKENDS)
        torch.testing.assert_close(found, want, equal_nan=True)
        assert not torch.equal(found, before)
