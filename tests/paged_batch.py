"""Paged batches for tests: pages in random order, NaN in every slot and page that holds no key."""

from dataclasses import dataclass, replace

import torch
from cases import cu_seqlens, generator, poisoned, randn, with_odd_strides
from hypothesis import strategies as st

JUNK = (-1, 2**31 - 1, -(2**31), 10**6)  # what a page table may hold past a sequence's last page


@dataclass(frozen=True)
class PagedBatch:
    """The arguments of `paged_attention`, and where sequence b keeps its tokens."""

    q: torch.Tensor
    k_pages: torch.Tensor
    v_pages: torch.Tensor
    page_table: torch.Tensor
    lengths: torch.Tensor
    cu_seqlens_q: torch.Tensor | None
    max_seqlen_q: int

    @property
    def args(self):
        return self.q, self.k_pages, self.v_pages, self.page_table, self.lengths

    @property
    def chunks(self):
        return {"cu_seqlens_q": self.cu_seqlens_q, "max_seqlen_q": self.max_seqlen_q}

    def double(self):
        q, k, v = (t.double() for t in (self.q, self.k_pages, self.v_pages))
        return replace(self, q=q, k_pages=k, v_pages=v)

    def rows(self, b):
        """The tokens of sequence b in q."""
        if self.cu_seqlens_q is None:
            return slice(b, b + 1)
        return slice(int(self.cu_seqlens_q[b]), int(self.cu_seqlens_q[b + 1]))

    def alone(self, b, width=None):
        """Sequence b by itself, with a page table of another width."""
        table = self.page_table[b : b + 1]
        if width is not None:
            table = torch.nn.functional.pad(table, (0, width - table.shape[1]), value=-1)
        rows = self.rows(b)
        cu = None if self.cu_seqlens_q is None else cu_seqlens([rows.stop - rows.start])
        return replace(
            self, q=self.q[rows], page_table=table, lengths=self.lengths[b : b + 1], cu_seqlens_q=cu
        )

    def keys(self, b):
        """Keys and values of sequence b in order, [S, K, D] each, one token at a time."""
        size = self.k_pages.shape[2]
        places = [
            (int(self.page_table[b, j // size]), j % size) for j in range(int(self.lengths[b]))
        ]
        empty = self.k_pages.new_empty((0, self.k_pages.shape[1], self.k_pages.shape[3]))
        return tuple(
            torch.stack([pages[p, :, o] for p, o in places]) if places else empty
            for pages in (self.k_pages, self.v_pages)
        )

    def repaged(self, page_size, seed=0):
        """The same sequences on other pages."""
        lengths = self.lengths.tolist()
        tokens = [self.keys(b) for b in range(len(lengths))]
        k_pages, v_pages, table = _fill(tokens, lengths, page_size, seed, *self.k_pages.shape[1::2])
        return replace(self, k_pages=k_pages, v_pages=v_pages, page_table=table)


def paged_batch(
    lengths,
    chunks=None,
    *,
    page_size=8,
    heads=2,
    kv_heads=1,
    head_dim=8,
    dtype=torch.float32,
    index=torch.int32,
    strided=False,
    seed=0,
):
    """Sequences of these lengths; `chunks` gives their query counts, None means one each."""
    tokens = [
        (
            randn(n, kv_heads, head_dim, dtype=dtype, seed=seed + 31 * b),
            randn(n, kv_heads, head_dim, dtype=dtype, seed=seed + 31 * b + 1),
        )
        for b, n in enumerate(lengths)
    ]
    k_pages, v_pages, table = _fill(tokens, lengths, page_size, seed, kv_heads, head_dim, dtype)
    total = len(lengths) if chunks is None else sum(chunks)
    q = randn(total, heads, head_dim, dtype=dtype, seed=seed + 2)
    if strided:
        q, k_pages, v_pages = (with_odd_strides(t, seed=seed) for t in (q, k_pages, v_pages))
    return PagedBatch(
        q,
        k_pages,
        v_pages,
        table.to(index),
        torch.tensor(list(lengths), dtype=index),
        None if chunks is None else cu_seqlens(chunks, index),
        1 if chunks is None else max([*chunks, 0]),
    )


def _fill(tokens, lengths, page_size, seed, kv_heads, head_dim, dtype=None):
    """Pages and a table for these tokens; one page and one column more than needed."""
    counts = [-(-n // page_size) for n in lengths]
    ids = torch.randperm(sum(counts) + 1, generator=generator(seed)).tolist()
    dtype = tokens[0][0].dtype if dtype is None else dtype
    shape = (len(ids), kv_heads, page_size, head_dim)
    k_pages, v_pages = poisoned(shape, dtype), poisoned(shape, dtype)
    table = torch.tensor(JUNK)[
        torch.randint(len(JUNK), (len(lengths), max([*counts, 0]) + 1), generator=generator(seed))
    ]
    for b, (k, v) in enumerate(tokens):
        for p in range(counts[b]):
            table[b, p] = page = ids.pop()
            part = slice(p * page_size, (p + 1) * page_size)
            k_pages[page, :, : len(k[part])] = k[part].transpose(0, 1)
            v_pages[page, :, : len(v[part])] = v[part].transpose(0, 1)
    return k_pages, v_pages, table.int()


def problems(dtypes, *, longest, longest_chunk, page_sizes, head_dims):
    """A strategy: a batch, and the masks and scale to attend with."""

    @st.composite
    def draw_problem(draw):
        lengths = draw(st.lists(st.integers(0, longest), max_size=4))
        chunks = None
        if draw(st.booleans()):
            chunks = [draw(st.integers(0, min(n, longest_chunk))) for n in lengths]
        kv_heads = draw(st.integers(1, 3))
        batch = paged_batch(
            lengths,
            chunks,
            page_size=draw(st.sampled_from(page_sizes)),
            heads=kv_heads * draw(st.integers(1, 3)),
            kv_heads=kv_heads,
            head_dim=draw(st.sampled_from(head_dims)),
            dtype=draw(st.sampled_from(dtypes)),
            index=draw(st.sampled_from([torch.int32, torch.int64])),
            strided=draw(st.booleans()),
            seed=draw(st.integers(0, 99)),
        )
        bound = st.sampled_from([-1, -1, 0, 1, 7, 40])
        masks = {
            "causal": draw(st.booleans()),
            "window": draw(st.one_of(st.none(), st.tuples(bound, bound))),
            "scale": draw(st.sampled_from([None, 1.0, 0.05, -0.3, 0.0])),
        }
        return batch, masks

    return draw_problem()
