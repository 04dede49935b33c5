"""What guards a kernel's memory has teeth: each guard left out, in turn, shows.

Values on a GPU are not checked before a launch, so kernels hold lengths, page ids and slots inside
their buffers by themselves. The calls are those of a launcher that nobody has checked.
"""

import pytest
import torch
from cases import banded_copy, randn
from paged_batch import paged_batch
from test_mutants import ROOT, _mutate

pytest.importorskip("triton")
from bertgpt.kernels import paged_attention, paged_write

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning"),
]


def attend(module, batch, **change):
    arguments = {"causal": True, "window": None, "scale": None, "return_lse": True}
    out, lse = module.paged_attention(**{**batch.__dict__, **arguments, **change})
    return torch.cat([out.flatten(), lse.flatten()])


def wrong_page(module):
    batch = paged_batch((30, 12))
    batch.page_table[0, 1] = -1
    fences = [banded_copy(t.nan_to_num()) for t in (batch.k_pages, batch.v_pages)]
    return attend(module, batch, k_pages=fences[0].view, v_pages=fences[1].view)


def page_past_the_last(module):
    batch = paged_batch((30, 12))
    pages = [t.nan_to_num() for t in (batch.k_pages, batch.v_pages)]
    batch.page_table[0, 1] = len(pages[0]) - 1
    return attend(module, batch, k_pages=pages[0][:-1], v_pages=pages[1][:-1])


def wrong_length(module):
    batch = paged_batch((30, 12))
    return attend(module, batch, page_table=batch.page_table[:, :2], lengths=batch.lengths + 1000)


def negative_length(module):
    batch = paged_batch((30, 12), (2, 2))
    return attend(module, batch, lengths=torch.tensor([-5, 12]))


def long_rows(module):
    """Several blocks of keys, the largest scores last."""
    batch = paged_batch((250, 190), page_size=16)
    for pages in (batch.k_pages, batch.v_pages):
        pages[batch.page_table[0, -3].long()] *= 4
    return attend(module, batch)


def unseen_nan(module):
    batch = paged_batch((30, 12), (2, 3), page_size=16)  # NaN in every slot without a key
    return attend(module, batch, window=(1, 0))


def slots(*values):
    def write(module):
        pages = [banded_copy(torch.zeros(3, 1, 4, 8)) for _ in range(2)]
        k = randn(len(values), 1, 8)
        module.paged_write(k, k, pages[0].view, pages[1].view, torch.tensor(values))
        return torch.cat([p.memory.flatten() for p in pages])

    return write


CASES = (
    ("paged_attention", "& (page >= 0)", "", wrong_page),
    ("paged_attention", "& (page < num_pages)", "", page_past_the_last),
    ("paged_attention", "tl.minimum(tl.maximum(length, 0), max_pages.to(tl.int64) * PAGE_SIZE)",
     "tl.maximum(length, 0)", wrong_length),
    ("paged_attention", "tl.where(visible, scores, float(\"-inf\"))", "scores", unseen_nan),
    ("paged_attention", "keyless[:, None], 0.0, acc / l_safe[:, None]",
     "keyless[:, None], 1.0, acc / l_safe[:, None]", negative_length),
    ("primitives", "l_i * alpha + tl.sum(p, 1)", "l_i + tl.sum(p, 1)", long_rows),
    ("primitives", "alpha = tl.exp2(m_i - shift)", "alpha = tl.exp2(m_i - m_i)", long_rows),
    ("paged_write", "(slot < num_slots)", "(slot < num_slots + 1)", slots(0, 12, 3)),
    ("paged_write", "(slot >= 0)", "(slot >= -9)", slots(0, -3, 3)),
    ("paged_write", "later[None, :] > token[:, None]", "later[None, :] < token[:, None]",
     slots(5, 5, 3)),
)  # fmt: skip


def differ(one, other):
    return not torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))


@pytest.mark.parametrize(
    ("kernel", "text", "replacement", "call"),
    CASES,
    ids=lambda v: getattr(v, "__name__", str(v)[:40]),
)
def test_a_guard_left_out_shows(kernel, text, replacement, call, tmp_path, monkeypatch):
    original = paged_write if kernel == "paged_write" else paged_attention
    expected = call(original)
    assert not differ(call(original), expected)
    mutant = _mutate(ROOT / "kernels" / f"{kernel}.py", text, replacement, tmp_path)
    if kernel == "primitives":  # device functions, which the kernel finds among its own names
        monkeypatch.setattr(original, "softmax_step", mutant.softmax_step)
        mutant = original
    assert differ(call(mutant), expected)
