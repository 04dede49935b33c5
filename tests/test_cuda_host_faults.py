"""Faults planted in the C++ kernels: the tests, or the engine, find each by name."""

import pytest
import test_paged_write as writes
import torch
from cases import banded_copy, poisoned_allocations, randn
from host_engine import BUILD, builder, changed, lend, load, skip_unless_buildable
from paged_batch import paged_batch
from test_add_layer_norm import assert_both_accurate, inputs
from test_paged_attention import check_problem
from test_paged_write import problem as write_problem

from bertgpt import ops
from bertgpt.cuda import extension

DECODE = ("paged_decode_float32.cu",)


@pytest.fixture
def plant(monkeypatch, tmp_path):
    """Makes backend "cuda" one with this alteration."""
    skip_unless_buildable()

    def build(name, file, old, new, units, arch=900):
        change = changed(name, file, old, new, units, tmp_path)
        module = load(builder().build_host(BUILD, change=change, arch=arch))
        lend(module, monkeypatch)
        return module

    return build


def test_a_missing_barrier_shows_as_nan_in_shared_memory(plant):
    """Within a few schedules, a warp reads a partial sum before it is there."""
    module = plant(
        "no-barrier", "add_layer_norm.cuh",
        "partial[threadIdx.x / 32] = value;\n  __syncthreads();",
        "partial[threadIdx.x / 32] = value;",
        ("add_layer_norm.cu",),
    )  # fmt: skip
    tensors = inputs((1,), 2048)
    found = 0
    for seed in range(20):
        module.set_schedule(seed)
        y = ops.add_layer_norm(*tensors, backend="cuda")
        found += bool(y.isnan().any())
    assert found >= 18
    with pytest.raises(AssertionError, match="NaN at"):
        assert_both_accurate(ops.add_layer_norm(*tensors, return_sum=True, backend="cuda"), tensors)


def test_a_page_off_by_one_is_told_of(plant):
    plant(
        "next-page", "paged_worker.cuh", "load_index(table, rows.map.entry(key))",
        "load_index(table, rows.map.entry(key) + 1)", DECODE,
    )  # fmt: skip
    batch = paged_batch((40, 9), head_dim=32)  # past a sequence's last page the table holds junk
    with pytest.raises(AssertionError, match="out: "):
        check_problem((batch, {}), "cuda")
    with pytest.raises(IndexError, match="page id in use lies outside the pool"):
        extension.raise_pending()


def test_an_unmasked_tail_shows_the_nan_in_unused_slots(plant):
    plant(
        "no-tail", "paged_decode.cuh", "piece.hi = min(piece.lo + keys, span.hi);",
        "piece.hi = min(piece.lo + keys, (span.hi + 7) / 8 * 8);", DECODE,
    )  # fmt: skip
    batch = paged_batch((45,), head_dim=32)
    with poisoned_allocations(), pytest.raises(AssertionError, match="out: "):
        check_problem((batch, {}), "cuda")


def test_a_bulk_copy_past_the_last_key_is_an_exception(plant):
    plant(
        "past-end", "paged_ring.cuh", "rows.piece.new_key : rows.piece.hi;",
        "rows.piece.new_key : rows.piece.hi + 1;", DECODE,
    )  # fmt: skip
    batch = paged_batch((45,), head_dim=32)
    words = r"bulk copies up to paged_ring.cuh:\d+ bring \d+ bytes more"
    with pytest.raises(RuntimeError, match=words):
        ops.paged_attention(*batch.args, backend="cuda")


def test_bulk_copies_that_may_overtake_stores_are_an_exception(plant):
    """A block's second piece goes where the results of its first were."""
    plant("no-fence", "paged_decode.cuh", "      ring.give_back();\n", "", DECODE)
    batch = paged_batch((300,) * 12, head_dim=32)
    with pytest.raises(RuntimeError, match=r"bulk copy at paged_ring.cuh:\d+ goes where threads"):
        ops.paged_attention(*batch.args, backend="cuda")


def test_a_missing_wait_for_asynchronous_copies_shows_as_nan(plant):
    plant("no-wait", "paged_ring.cuh", "    gpu_copies_wait<kStages - 1>();\n", "", DECODE, 800)
    batch = paged_batch((45,), head_dim=32)
    assert ops.paged_attention(*batch.args, backend="cuda").isnan().all()


def test_a_store_out_of_bounds_changes_a_band(plant):
    plant(
        "row-after", "paged_write.cuh",
        "place * a.k_page_slot_stride;", "(place + 1) * a.k_page_slot_stride;",
        ("paged_write.cu",),
    )  # fmt: skip
    tensors = write_problem(torch.tensor([11]), head_dim=16)
    fenced = [banded_copy(t) for t in tensors[2:4]]
    with pytest.raises(AssertionError, match="k_pages"):
        writes.check_write((*tensors[:2], *(f.view for f in fenced), tensors[4]), "cuda")
    with pytest.raises(AssertionError, match="written after the k_pages"):
        fenced[0].check("k_pages")


def test_a_tie_too_many_is_a_token_too_high(plant):
    plant("tie", "sample.cuh", "index <= last)", "index <= last + 1)", ("sample.cu",))
    logits = torch.zeros(200, 61)
    run = {"seed": 1, "sequence_ids": torch.arange(200), "steps": 0, "top_p": 0.25}
    assert ops.sample(logits, **run).max() == 15
    assert ops.sample(logits, **run, backend="cuda").max() == 16


def test_a_histogram_read_too_early_gives_another_token(plant):
    """A warp that runs ahead of the others finds their columns empty or not yet cleared."""
    module = plant(
        "no-barrier-sample", "sample.cuh",
        "    });\n    __syncthreads();\n    for (int b = threadIdx.x / 32;",
        "    });\n    for (int b = threadIdx.x / 32;", ("sample.cu",),
    )  # fmt: skip
    logits = randn(4, 2000)
    run = {"seed": 1, "sequence_ids": torch.arange(4), "steps": 0, "top_k": 40, "top_p": 0.5}
    expected, found = ops.sample(logits, **run), 0
    for seed in range(20):
        module.set_schedule(seed)
        found += not torch.equal(ops.sample(logits, **run, backend="cuda"), expected)
    assert found >= 18


def test_divergent_barriers_are_an_exception_with_both_lines(plant):
    plant(
        "divergent", "add_layer_norm.cuh",
        "partial[threadIdx.x / 32] = value;\n  __syncthreads();",
        "partial[threadIdx.x / 32] = value;\n"
        "  if (threadIdx.x < 64) __syncthreads();\n  else\n    __syncthreads();",
        ("add_layer_norm.cu",),
    )  # fmt: skip
    with pytest.raises(RuntimeError, match=r"divergent barriers: .*cuh:\d+ and at .*cuh:\d+"):
        ops.add_layer_norm(*inputs((1,), 2048), backend="cuda")


def test_a_barrier_that_some_threads_never_reach_is_an_exception(plant):
    plant(
        "absent", "add_layer_norm.cuh",
        "if (row >= a.rows) return;",
        "if (row >= a.rows || threadIdx.x == 255) return;",
        ("add_layer_norm.cu",),
    )  # fmt: skip
    with pytest.raises(RuntimeError, match=r"wait at .*cuh:\d+.* that have returned"):
        ops.add_layer_norm(*inputs((1,), 2048), backend="cuda")


def test_a_misaligned_access_is_an_exception_with_its_line(host_engine):
    from bertgpt.cuda.add_layer_norm import add_layer_norm

    x = torch.zeros(65)[1:].view(1, 64)
    run = {"eps": 0.0, "dropout_p": 0.0, "seed": None, "return_sum": False}
    with pytest.raises(RuntimeError, match=r"misaligned 16-byte access at add_layer_norm.cuh:\d+"):
        add_layer_norm(x, None, torch.ones(64), None, **run)


def test_raw_shared_memory_does_not_compile(tmp_path, capfd):
    import subprocess

    skip_unless_buildable()
    change = changed(
        "raw-shared", "paged_write.cuh", "bool replaced = false;",
        "bool replaced = false; __shared__ int raw; (void)raw;", ("paged_write.cu",), tmp_path,
    )  # fmt: skip
    with pytest.raises(subprocess.CalledProcessError):
        builder().build_host(BUILD, change=change)
    assert "use_GPU_SHARED_for_shared_memory" in capfd.readouterr().out
