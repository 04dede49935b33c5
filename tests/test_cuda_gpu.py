"""The C++ kernels on a card: accuracy, and bad indices. (Repeats and captures: test_gpu.py.)"""

import pytest
import torch
from sampling import logits_of, settings_of
from tolerance import assert_accurate, assert_bitwise

from bertgpt import ops, reference
from bertgpt.cuda import extension
from bertgpt.cuda.paged_attention import paged_decode

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(extension.unavailable() is not None, reason="bertgpt._C is not built"),
]
PAGES, SIZE, HEADS, DIM = 40, 16, 4, 64


@pytest.fixture
def decode():
    """q, k_pages, v_pages, page_table, lengths on the card."""
    pages = [torch.randn(PAGES, 2, SIZE, DIM, device="cuda").half() for _ in range(2)]
    q = torch.randn(2, HEADS, DIM, device="cuda").half()
    table = torch.arange(PAGES, device="cuda", dtype=torch.int32).view(2, -1)
    return q, *pages, table, torch.tensor([7, 300], device="cuda", dtype=torch.int32)


def test_decoding_is_accurate_on_the_card(decode):
    out = ops.paged_attention(*decode, backend="cuda")
    doubles = [t.double() for t in decode[:3]]
    oracle = reference.paged_attention(*doubles, *decode[3:])
    assert_accurate(out, oracle, reference.paged_attention(*decode))


@pytest.mark.parametrize("head_dim", [32, 80, 128])
@pytest.mark.parametrize("size", [8, 11, 64])
@pytest.mark.parametrize("apart", [False, True])
def test_pages_of_any_size_and_layout_are_read_to_the_last_key(head_dim, size, apart):
    """Runs of keys end inside pages; past the last key there is NaN; slots may lie apart."""
    pages = [torch.randn(PAGES, 2, size, head_dim, device="cuda").half() for _ in range(2)]
    if apart:
        pages = [p.transpose(1, 2).contiguous().transpose(1, 2) for p in pages]
    q = torch.randn(2, HEADS, head_dim, device="cuda").half()
    table = torch.randperm(PAGES, device="cuda").int().view(2, -1)
    lengths = [size + 3, 9 * size - 1]
    for row, length in enumerate(lengths):
        for tensor in pages:
            tensor[table[row, length // size].long(), :, length % size :] = float("nan")
    call = (q, *pages, table, torch.tensor(lengths, device="cuda", dtype=torch.int32))
    doubles = [t.double() for t in call[:3]]
    oracle = reference.paged_attention(*doubles, *call[3:])
    out = ops.paged_attention(*call, backend="cuda")
    assert_accurate(out, oracle, reference.paged_attention(*call))


def test_bad_indices_are_told_of_and_the_context_survives(decode):
    *_, table, _ = decode
    table[1, 3] = 10**6
    paged_decode(*decode)
    with pytest.raises(IndexError, match="page id in use lies outside the pool"):
        extension.raise_pending()
    assert torch.ones(3, device="cuda").sum().item() == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tokens_drawn_on_the_card_are_those_drawn_on_a_cpu(dtype):
    logits, run = logits_of(64, 50257, dtype, holes=True), settings_of(64)
    there = {name: value.cuda() for name, value in run.items()}
    for backend in ("cuda", "torch"):
        tokens = ops.sample(logits.cuda(), **there, backend=backend)
        assert_bitwise(tokens.cpu(), ops.sample(logits, **run, backend="reference"))
