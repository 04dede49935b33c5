"""The C++ kernel of `paged_write`, on the host engine."""

import pytest
import test_paged_write as writes
import torch
from cases import KERNEL_DTYPES, banded_copy, examples
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from test_paged_write import problem as write_problem
from test_paged_write import problems as write_problems
from tolerance import assert_bitwise

from bertgpt import ops
from bertgpt.cuda import extension

pytestmark = pytest.mark.usefixtures("host_engine")
CUDA = {"backend": "cuda"}
ONCE = {"suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]}


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


@pytest.mark.parametrize(
    ("tokens", "pages", "words"),
    [
        (1, (2**28, 1, 8, 8), "the pool has 2147483648 slots, above 2147483647"),
        (2**31, (1, 1, 8, 8), "2147483648 tokens are above 2147483647"),
    ],
)
def test_sizes_past_its_counters_are_refused_in_words(tokens, pages, words):
    from bertgpt.cuda.paged_write import unsupported

    k = torch.empty(tokens, 1, 8, device="meta")
    assert words in unsupported({"k": k, "k_pages": torch.empty(pages, device="meta")})
    assert unsupported({"k": k[:1], "k_pages": torch.empty(2, 1, 8, 8)}) is None


@pytest.mark.parametrize("which", [1, 3, 4])
def test_tensors_on_another_device_are_named(which):
    tensors = list(write_problem(torch.tensor([3, 11]), head_dim=8))
    tensors[which] = tensors[which].to("meta")
    name = ("k", "v", "k_pages", "v_pages", "slots")[which]
    with pytest.raises(ValueError, match=f"{name} is on meta but"):
        ops.paged_write(*tensors, **CUDA)


def test_pages_whose_elements_lie_apart_are_named():
    k, v, k_pages, v_pages, slots = write_problem(torch.tensor([3, 11]), head_dim=8)
    apart = k_pages.mT.contiguous().mT
    with pytest.raises(ValueError, match="k_pages must have last stride 1"):
        ops.paged_write(k, v, apart, v_pages, slots, **CUDA)
