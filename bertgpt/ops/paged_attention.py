"""`paged_attention`: attention of each sequence's newest tokens to its keys, which lie in pages.

Reading order: the public function, its checks, what the registered operator runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bertgpt import portable, reference
from bertgpt.ops import _checks as checks
from bertgpt.ops._backends import Backend, Call, cuda_backend, triton_backend
from bertgpt.ops._dispatch import Op, check_backend
from bertgpt.ops.paged_write import check_pages, without_gradient


def paged_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    *,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = 1,
    causal: bool = True,
    window: tuple[int, int] | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """Attention over paged keys: one new token a sequence, or a chunk of several.

    The keys of the chunk itself must have been written first. Query i of a chunk of n sits on key
    lengths − n + i; `causal` and `window` count from there. Query head h reads KV head
    h // (H // K). Carries no gradient. Under autocast q takes the pages' dtype.

    Args:
        q: New queries, [T, H, D]; float16, bfloat16, float32 or float64.
        k_pages: Keys, [P, K, N, D], pages of N tokens, H % K == 0; dtype and device of q. Slots
            that hold no key of a sequence may hold anything.
        v_pages: Values, like k_pages.
        page_table: int32 or int64 [B, max_pages], each sequence's pages in order. Entries past a
            sequence's last page are ignored, whatever they hold.
        lengths: int32 or int64 [B], keys of each sequence, this chunk's included.
        cu_seqlens_q: int32 or int64 [B + 1], where each sequence's chunk starts, and T at the end;
            None means one token a sequence, T = B.
        max_seqlen_q: At least the longest chunk; None computes it (one sync on a GPU).
        causal: Query i sees no key past its own.
        window: (left, right): keys within that many places of the query's own; −1 is unbounded.
        scale: Factor on the scores; None means 1/√D.
        return_lse: Also return the log-sum-exp of each query's scores.
        backend: "cuda", "triton", "torch" or "reference"; None takes the first that can.

    Returns:
        out like q; with `return_lse` also float32 lse [H, T], natural logarithm. A query that sees
        no key, such as that of a sequence of length 0, gives zeros and −inf.

    Raises:
        TypeError: A dtype is wrong.
        ValueError: A shape, device or length is wrong, a chunk is longer than its sequence, a
            sequence is longer than its row of the page table, or the backend is unknown.
        IndexError: The id of a page in use lies outside 0 … P − 1.
        BackendUnavailable: The backend asked for refuses this call.
        Values of index tensors on a GPU are checked under `strict()` alone; elsewhere lengths are
        held inside the table and pages out of range are skipped.

    Source: Kwon et al., "Efficient Memory Management for Large Language Model Serving with
        PagedAttention", 2023; Dao et al., "Flash-Decoding", 2023, for the split kernel.
    """
    out, lse = _OP.repeat(
        q, k_pages, v_pages, page_table, lengths,
        cu_seqlens_q, max_seqlen_q, causal, window, scale, return_lse, backend,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def _check(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    *,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = 1,
    causal: bool = True,
    window: tuple[int, int] | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> dict[str, Any]:
    """Everything that shapes and dtypes can tell; returns the registered operator's arguments."""
    check_backend(backend)
    window_left, window_right = checks.check_window(window)
    check_pages(k_pages, v_pages)
    checks.check_tensor("q", q, rank=3)
    q = without_gradient(q, k_pages)
    checks.check_like("q", q, "k_pages", k_pages)
    tokens, heads, head_dim = q.shape
    _check_heads(heads, head_dim, k_pages)
    _check_sequences(q, tokens, page_table, lengths, cu_seqlens_q, max_seqlen_q)
    return {
        "q": q,
        "k_pages": k_pages.detach() if k_pages.requires_grad else k_pages,
        "v_pages": v_pages.detach() if v_pages.requires_grad else v_pages,
        "page_table": page_table,
        "lengths": lengths,
        "cu_seqlens_q": cu_seqlens_q,
        "max_seqlen_q": max_seqlen_q,
        "causal": checks.check_flag("causal", causal),
        "window": [window_left, window_right],
        "scale": head_dim**-0.5 if scale is None else checks.check_number("scale", scale),
        "return_lse": checks.check_flag("return_lse", return_lse),
        "backend": backend,
    }


def _check_heads(heads: int, head_dim: int, k_pages: Tensor) -> None:
    _, kv_heads, _, page_dim = k_pages.shape
    if head_dim != page_dim:
        raise ValueError(f"q has head_dim {head_dim} but the pages have {page_dim}")
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads must be a multiple of {kv_heads} KV heads")


def _check_sequences(
    q: Tensor,
    tokens: int,
    page_table: Tensor,
    lengths: Tensor,
    cu_seqlens_q: Tensor | None,
    max_seqlen_q: int | None,
) -> None:
    checks.check_index("page_table", page_table, rank=2)
    checks.check_index("lengths", lengths, rank=1)
    batch, _ = page_table.shape
    checks.check_shape("lengths", lengths, (batch,), "[B], a row of page_table each")
    if not (page_table.device == q.device == lengths.device):
        checks.check_device("page_table", page_table, "q", q)
        checks.check_device("lengths", lengths, "q", q)
    checks.check_longest("max_seqlen_q", max_seqlen_q)
    if cu_seqlens_q is None:
        if max_seqlen_q is not None and max_seqlen_q != 1:
            raise ValueError(f"max_seqlen_q {max_seqlen_q} needs cu_seqlens_q beside it")
        if tokens != batch:
            raise ValueError(
                f"q holds {tokens} tokens for {batch} sequences; without cu_seqlens_q each "
                "sequence has one"
            )
        return
    checks.check_index("cu_seqlens_q", cu_seqlens_q, rank=1)
    checks.check_shape("cu_seqlens_q", cu_seqlens_q, (batch + 1,), "[B + 1], beside lengths [B]")
    checks.check_device("cu_seqlens_q", cu_seqlens_q, "q", q)


def _check_values(call: Call) -> None:
    """What only the values of the index tensors can tell."""
    page_table, lengths = call["page_table"], call["lengths"]
    pages, _, page_size, _ = call["k_pages"].shape
    keys = page_table.shape[1] * page_size
    checks.check_range("lengths", lengths, 0, keys, ValueError)
    if not checks.in_range(page_table, 0, pages - 1):  # perhaps in entries that nobody uses
        entry = torch.arange(page_table.shape[1], device=page_table.device)
        used = page_table[entry * page_size < lengths[:, None]]
        checks.check_range("page_table", used, 0, pages - 1, IndexError)
    if call["cu_seqlens_q"] is None:
        return
    chunks = checks.check_cu_seqlens("cu_seqlens_q", call["cu_seqlens_q"], call["q"].shape[0])
    given = call["max_seqlen_q"]
    if given is not None and given < max(chunks, default=0):
        raise ValueError(f"max_seqlen_q is {given}, but a chunk has {max(chunks)} tokens")
    for b, (chunk, length) in enumerate(zip(chunks, lengths.tolist(), strict=True)):
        if chunk > length:
            raise ValueError(
                f"sequence {b} has a chunk of {chunk} tokens but length {length}; lengths count "
                "the chunk"
            )


def _longest(cu_seqlens_q: Tensor | None, given: int | None) -> int:
    if given is not None:
        return given
    if cu_seqlens_q is None:
        return 1
    return int(cu_seqlens_q.diff().amax()) if cu_seqlens_q.shape[0] > 1 else 0


def _run(function: Any, **call: Any) -> tuple[Tensor, Tensor | None]:
    result = function(**_settled(call))
    return result if call["return_lse"] else (result, None)


def _settled(call: dict[str, Any]) -> dict[str, Any]:
    """The call with what all backends want: unit last strides and the longest chunk."""
    for name in ("q", "k_pages", "v_pages"):
        call[name] = checks.with_unit_stride(call[name])
    call["max_seqlen_q"] = _longest(call["cu_seqlens_q"], call["max_seqlen_q"])
    call["window"] = tuple(call["window"])
    return call


def _run_decode(kernels: Any, call: Call) -> tuple[Tensor, Tensor | None]:
    """One token a sequence: the newest, which has no key to its right."""
    settled = checks.with_unit_stride
    return kernels.paged_decode(
        settled(call["q"]), settled(call["k_pages"]), settled(call["v_pages"]),
        call["page_table"], call["lengths"], window_left=call["window"][0], scale=call["scale"],
        return_lse=call["return_lse"],
    )  # fmt: skip


def _fake(call: Call) -> tuple[Tensor, Tensor]:
    q = call["q"]
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    return q.new_empty(q.shape), lse if call["return_lse"] else q.new_empty(0)


_OP = Op(
    "paged_attention(Tensor q, Tensor k_pages, Tensor v_pages, Tensor page_table, Tensor lengths,"
    " Tensor? cu_seqlens_q, SymInt? max_seqlen_q, bool causal, int[] window, float scale,"
    " bool return_lse, str? backend) -> (Tensor, Tensor)",
    check=_check,
    check_values=_check_values,
    backends={
        "cuda": cuda_backend("paged_attention", _run_decode),
        "triton": triton_backend(
            "paged_attention", lambda kernels, **c: kernels.paged_attention(**_settled(c))
        ),
        "torch": Backend(lambda **call: _run(portable.paged_attention, **call)),
        "reference": Backend(lambda **call: _run(reference.paged_attention, **call)),
    },
    fake=_fake,
)


@torch.utils.flop_counter.register_flop_formula(torch.ops.bertgpt.paged_attention)
def paged_attention_flops(q: Any, k_pages: Any, v_pages: Any, page_table: Any, *args: Any,
                          **kwargs: Any) -> int:  # fmt: skip
    """4 · T · keys · H · D, with all the keys the table has room for: an upper bound.

    Lengths are on the device.
    """
    tokens, heads, head_dim = q
    return 4 * tokens * page_table[1] * k_pages[2] * heads * head_dim
