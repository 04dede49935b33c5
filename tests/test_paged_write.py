"""`ops.paged_write` on torch and reference: where tokens land, what stays, what is refused."""

import pytest
import torch
from cases import ALL_DTYPES, banded_copy, examples, randn, with_odd_strides
from hypothesis import given
from hypothesis import strategies as st
from tolerance import assert_bitwise

from bertgpt import ops

BACKENDS = ("torch", "reference")


def problem(slots, *, pages=4, page_size=3, kv_heads=2, head_dim=5, dtype=torch.float32, seed=0):
    """k, v, k_pages, v_pages, slots."""
    tokens = [randn(len(slots), kv_heads, head_dim, dtype=dtype, seed=seed + i) for i in (0, 1)]
    shape = (pages, kv_heads, page_size, head_dim)
    return *tokens, *(randn(*shape, dtype=dtype, seed=seed + i) for i in (2, 3)), slots


def by_hand(k, v, k_pages, v_pages, slots):
    """The pages afterwards, element by element."""
    after = k_pages.clone(), v_pages.clone()
    page_size = k_pages.shape[2]
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            for pages, values in zip(after, (k, v), strict=True):
                for head in range(values.shape[1]):
                    pages[slot // page_size][head][slot % page_size] = values[token][head]
    return after


@st.composite
def problems(draw, dtypes, most_tokens=20):
    pages, page_size = draw(st.integers(1, 4)), draw(st.sampled_from([1, 3, 8, 16]))
    slots = draw(st.lists(st.integers(-2, pages * page_size - 1), max_size=most_tokens))
    index = draw(st.sampled_from([torch.int32, torch.int64]))
    tensors = problem(
        torch.tensor(slots, dtype=index),
        pages=pages,
        page_size=page_size,
        kv_heads=draw(st.integers(1, 3)),
        head_dim=draw(st.sampled_from([1, 5, 8, 31])),
        dtype=draw(st.sampled_from(dtypes)),
        seed=draw(st.integers(0, 99)),
    )
    if draw(st.booleans()):
        tensors = [*(with_odd_strides(t) for t in tensors[:4]), tensors[4]]
    return tensors


def check_write(tensors, backend):
    expected = by_hand(*tensors)
    k, v, k_pages, v_pages, slots = tensors
    inputs = [t.clone() for t in (k, v, slots)]
    assert ops.paged_write(*tensors, backend=backend) is None
    assert_bitwise(k_pages, expected[0], what="k_pages")
    assert_bitwise(v_pages, expected[1], what="v_pages")
    for before, after in zip(inputs, (k, v, slots), strict=True):
        assert_bitwise(after, before, what="an input")


@pytest.mark.parametrize("backend", BACKENDS)
@given(tensors=problems(ALL_DTYPES))
@examples(60)
def test_tokens_land_in_their_slots_and_nothing_else_changes(backend, tensors):
    check_write(tensors, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_of_tokens_with_one_slot_the_last_stays_whole(backend):
    slots = torch.tensor([4, 7] * 2000 + [4, -1, 7])
    k, v, k_pages, v_pages, _ = tensors = problem(slots, head_dim=64)
    ops.paged_write(*tensors, backend=backend)
    for values, pages in ((k, k_pages), (v, v_pages)):
        assert_bitwise(pages[1, :, 1], values[-3])
        assert_bitwise(pages[2, :, 1], values[-1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_band_around_the_pages_stays_intact(backend):
    k, v, k_pages, v_pages, slots = problem(torch.tensor([0, 11, -1, -12]))
    fenced = banded_copy(k_pages), banded_copy(v_pages)
    ops.paged_write(k, v, *(f.view for f in fenced), slots, backend=backend)
    for band, name in zip(fenced, ("k_pages", "v_pages"), strict=True):
        band.check(name)
    assert_bitwise(fenced[0].view[3, :, 2], k[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("slot", [12, 2**31 - 1])
def test_a_slot_past_the_pages_is_found_before_anything_is_written(slot, backend):
    *tensors, slots = problem(torch.tensor([0, slot, 1], dtype=torch.int32))
    before = [t.clone() for t in tensors]
    with pytest.raises(IndexError, match=f"slots holds {slot}, but 4 pages of 3 tokens"):
        ops.paged_write(*tensors, slots, backend=backend)
    for old, new in zip(before, tensors, strict=True):
        assert_bitwise(new, old)


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_that_require_gradients_leave_none_on_the_pages(backend):
    k, v, k_pages, v_pages, slots = problem(torch.tensor([0, 5]))
    version = k_pages._version
    ops.paged_write(k.requires_grad_(), v, k_pages, v_pages, slots, backend=backend)
    assert not k_pages.requires_grad
    assert k_pages._version > version
    assert_bitwise(k_pages[1, :, 2], k[1])


def test_autocast_takes_the_pages_dtype():
    k, v, k_pages, v_pages, slots = problem(torch.tensor([0, 5]))
    with torch.autocast("cpu", torch.bfloat16):
        ops.paged_write(k.bfloat16(), v.bfloat16(), k_pages, v_pages, slots)
    assert_bitwise(k_pages[1, :, 2], k[1].bfloat16().float())


K, V, K_PAGES, V_PAGES, SLOTS = problem(torch.tensor([0, 5]))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": K.half()}, TypeError, "k is torch.float16 but k_pages is torch.float32"),
        ({"v": V.int()}, TypeError, "v must be float16"),
        ({"k": K[0]}, ValueError, "k must have 3 dimensions"),
        ({"v": V[:1]}, ValueError, "v must be"),
        ({"k": K[:, :1]}, ValueError, "k must be"),
        ({"k": K[..., :2], "v": V[..., :2]}, ValueError, "k must be"),
        ({"k": K.to("meta")}, ValueError, "k is on meta"),
        ({"k_pages": K_PAGES[0]}, ValueError, "k_pages must have 4 dimensions"),
        ({"v_pages": V_PAGES[:2]}, ValueError, "v_pages must be shaped like k_pages"),
        ({"v_pages": V_PAGES.half()}, TypeError, "v_pages is torch.float16"),
        ({"k_pages": K_PAGES[:, :, :0], "v_pages": V_PAGES[:, :, :0]}, ValueError, "N ≥ 1"),
        ({"k_pages": K_PAGES.mT.contiguous().mT}, ValueError, "k_pages must have last stride 1"),
        ({"v_pages": V_PAGES[:1].expand(4, -1, -1, -1)}, ValueError, "v_pages is .* expanded"),
        ({"slots": SLOTS.float()}, TypeError, "slots must be int32 or int64"),
        ({"slots": SLOTS.short()}, TypeError, "slots must be int32 or int64"),
        ({"slots": SLOTS[:1]}, ValueError, "slots must be"),
        ({"slots": SLOTS[None]}, ValueError, "slots must have 1"),
        ({"slots": [0, 5]}, TypeError, "slots must be a tensor"),
        ({"backend": "opencl"}, ValueError, "unknown backend"),
    ],
)
def test_bad_input_is_named_and_writes_nothing(change, error, message):
    before = K_PAGES.clone(), V_PAGES.clone()
    arguments = {"k": K, "v": V, "k_pages": K_PAGES, "v_pages": V_PAGES, "slots": SLOTS, **change}
    with pytest.raises(error, match=message):
        ops.paged_write(**arguments)
    assert_bitwise(K_PAGES, before[0])
    assert_bitwise(V_PAGES, before[1])


def test_registration():
    tensors = problem(torch.tensor([0, -1, 5]))
    torch.library.opcheck(torch.ops.bertgpt.paged_write.default, (*tensors, None))


def test_compiles_whole_with_the_read_after_it():
    def step(k, v, k_pages, v_pages, slots, table, lengths):
        ops.paged_write(k, v, k_pages, v_pages, slots)
        return ops.paged_attention(k, k_pages, v_pages, table, lengths)

    table, lengths = torch.tensor([[0], [1]]), torch.tensor([1, 3])
    eager, compiled = (problem(torch.tensor([0, 5])) for _ in range(2))
    expected = step(*eager, table, lengths)
    out = torch.compile(step, fullgraph=True, backend="aot_eager")(*compiled, table, lengths)
    assert_bitwise(out, expected)
    assert_bitwise(compiled[2], eager[2])


def test_explain_names_the_choice():
    text = str(ops.explain("paged_write", K, V, K_PAGES, V_PAGES, SLOTS))
    assert "paged_write: torch would run" in text
