"""`attention`: softmax(scale · Q Kᵀ + mask) V over padded or packed sequences.

Reading order: the public function, its checks, what the registered operator runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from bertgpt import portable, reference
from bertgpt.ops import _checks as checks
from bertgpt.ops._autograd import register_backward
from bertgpt.ops._backends import Backend, Call, triton_backend
from bertgpt.ops._dispatch import Op, check_backend, needs_grad
from bertgpt.portable.attention_backward import attention_backward

MAX_HEAD_DIM = 256


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    causal: bool = False,
    window: tuple[int, int] | None = None,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """Multi-head attention with grouped heads and every common mask, padded or packed.

    Query head h reads KV head h // (H // K). All of `mask`, `key_lengths`, `causal` and `window`
    that are given apply together. A query that sees no key gives a zero row.

    Args:
        q: Queries, [B, L, H, D] padded or [T, H, D] packed; float16, bfloat16, float32, float64.
        k: Keys, [B, S, K, D] or [T', K, D], with H % K == 0; dtype and device of q.
        v: Values, shaped like k.
        mask: Boolean (True means attend) or additive float, broadcastable to [B, H, L, S]; −inf
            rules a key out, any finite number does not. Padded tensors only.
        key_lengths: int32 or int64 [B]; keys at or past it are ruled out. Padded tensors only.
        causal: Query i sees keys up to i + S − L: the last query sees the last key.
        window: (left, right): keys within that many places of i + S − L; −1 means unbounded.
        scale: Factor on the scores; None means 1/√D.
        cu_seqlens_q: int32 or int64 [B + 1], where each packed sequence starts, and T at the end.
        cu_seqlens_k: The same for the keys; None means self-attention.
        max_seqlen_q: At least the longest query length; None computes it (one sync on a GPU).
        max_seqlen_k: The same for the keys.
        dropout_p: Probability of dropping an attention weight, in [0, 1].
        seed: 64 bits that fix the dropout mask; None draws them from torch's default generator.
        return_lse: Also return the log-sum-exp of each query's scores.
        backend: "cuda", "triton", "torch" or "reference"; None takes the first that can.

    Returns:
        out like q; with `return_lse` also float32 lse, [B, H, L] or [H, T], natural logarithm,
        without dropout, −inf for a query that sees no key; it carries no gradient.

    Raises:
        TypeError: A dtype is wrong.
        ValueError: A shape, device, length or combination is wrong, or the backend is unknown.
        BackendUnavailable: The backend asked for refuses this call.

    Source: Vaswani et al. 2017, equation 1; Dao et al., "FlashAttention", 2022, for the kernels.
    """
    call = _check(
        q, k, v, mask=mask, key_lengths=key_lengths, causal=causal, window=window, scale=scale,
        cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k, dropout_p=dropout_p, seed=seed, return_lse=return_lse,
        backend=backend,
    )  # fmt: skip
    out, lse, _ = _OP(call)
    return (out, lse.detach()) if return_lse else out


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    causal: bool = False,
    window: tuple[int, int] | None = None,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> dict[str, Any]:
    """Everything that shapes and dtypes can tell; returns the registered operator's arguments."""
    check_backend(backend)
    window_left, window_right = checks.check_window(window)
    dropout_p = checks.check_dropout(dropout_p)
    checks.check_tensor("q", q)
    _check_layout(q, cu_seqlens_q, cu_seqlens_k)
    q, k, v = _check_qkv(q, k, v)
    if cu_seqlens_q is None:
        if max_seqlen_q is not None or max_seqlen_k is not None:
            raise ValueError("max_seqlen_q and max_seqlen_k go with packed tensors (cu_seqlens_q)")
        mask = _check_mask(mask, q, k)
        _check_key_lengths(key_lengths, q)
    else:
        if mask is not None or key_lengths is not None:
            raise ValueError("mask and key_lengths go with padded tensors; these are packed")
        if cu_seqlens_k is None:
            cu_seqlens_k = cu_seqlens_q
            max_seqlen_k = max_seqlen_q if max_seqlen_k is None else max_seqlen_k
            checks.check_shape("k", k, (q.shape[0], *k.shape[1:]), "as long as q (no cu_seqlens_k)")
        _check_packed("q", cu_seqlens_q, max_seqlen_q, q)
        _check_packed("k", cu_seqlens_k, max_seqlen_k, k)
        if cu_seqlens_q.shape != cu_seqlens_k.shape:
            raise ValueError(
                f"cu_seqlens_q names {cu_seqlens_q.shape[0] - 1} sequences, "
                f"cu_seqlens_k {cu_seqlens_k.shape[0] - 1}; they must agree"
            )
    grad = needs_grad(q, k, v, mask)
    return {
        "q": q, "k": k, "v": v, "mask": mask, "key_lengths": key_lengths,
        "causal": checks.check_flag("causal", causal),
        "window": [window_left, window_right],
        "scale": q.shape[-1] ** -0.5 if scale is None else checks.check_number("scale", scale),
        "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k,
        "max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k, "dropout_p": dropout_p,
        "seed": checks.as_seed(seed, dropout_p),
        "return_lse": checks.check_flag("return_lse", return_lse),
        "return_stats": grad, "needs_grad": grad, "backend": backend,
    }  # fmt: skip


def _check_layout(q: Tensor, cu_seqlens_q: Any, cu_seqlens_k: Any) -> None:
    if cu_seqlens_q is None:
        if cu_seqlens_k is not None:
            raise ValueError("cu_seqlens_k needs cu_seqlens_q beside it")
        if q.dim() != 4:
            raise ValueError(
                f"q must be [B, L, H, D], or [T, H, D] with cu_seqlens_q, not {tuple(q.shape)}"
            )
    elif q.dim() != 3:
        raise ValueError(f"q must be [T, H, D] with cu_seqlens_q, not {tuple(q.shape)}")


def _check_qkv(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    checks.check_tensor("k", k, rank=q.dim())
    checks.check_tensor("v", v, rank=q.dim())
    q, k, v = checks.autocast(q, k, v)
    checks.check_like("k", k, "q", q)
    checks.check_like("v", v, "q", q)
    checks.check_shape("v", v, k.shape, "shaped like k")
    heads, head_dim = q.shape[-2:]
    if k.shape[-1] != head_dim:
        raise ValueError(f"q has head_dim {head_dim} but k has {k.shape[-1]}; they must agree")
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"head_dim must lie in 1 … {MAX_HEAD_DIM}, not {head_dim}")
    kv_heads = k.shape[-2]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"{heads} query heads must be a multiple of {kv_heads} KV heads")
    if q.dim() == 4 and q.shape[0] != k.shape[0]:
        raise ValueError(f"q holds {q.shape[0]} sequences but k holds {k.shape[0]}")
    return q, k, v


def _check_mask(mask: Any, q: Tensor, k: Tensor) -> Tensor | None:
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a tensor, not {type(mask).__name__}")
    if mask.dtype != torch.bool and mask.dtype not in checks.FLOATS:
        raise TypeError(f"mask must be bool (True attends) or additive float, not {mask.dtype}")
    checks.check_device("mask", mask, "q", q)
    shape = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    aligned = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    # Not `m not in (1, n)`, which torch.compile cannot guard where one of them is symbolic.
    if len(aligned) != 4 or any(m != 1 and m != n for m, n in zip(aligned, shape, strict=True)):
        raise ValueError(f"mask {tuple(mask.shape)} does not broadcast to [B, H, L, S] = {shape}")
    if mask.dtype == torch.float64 and q.dtype != torch.float64:
        # Scores are added up in float32: a finite bias must stay finite there.
        finite = torch.finfo(torch.float32)
        clamped = mask.clamp(finite.min, finite.max).float()
        mask = clamped.masked_fill(mask == -torch.inf, -torch.inf)
    return mask.view(aligned)  # in its own shape, since its gradient has that too


def _check_key_lengths(key_lengths: Any, q: Tensor) -> None:
    if key_lengths is None:
        return
    checks.check_index("key_lengths", key_lengths, rank=1)
    checks.check_shape("key_lengths", key_lengths, (q.shape[0],), "[B]")
    checks.check_device("key_lengths", key_lengths, "q", q)


def _check_packed(side: str, cu_seqlens: Any, max_seqlen: Any, tokens: Tensor) -> None:
    checks.check_index(f"cu_seqlens_{side}", cu_seqlens, rank=1)
    checks.check_device(f"cu_seqlens_{side}", cu_seqlens, side, tokens)
    if cu_seqlens.shape[0] == 0:
        raise ValueError(f"cu_seqlens_{side} must hold B + 1 entries, starting with 0; it is empty")
    checks.check_longest(f"max_seqlen_{side}", max_seqlen)


def _check_values(call: Call) -> None:
    """What only the values of the index tensors can tell."""
    if call["key_lengths"] is not None:
        checks.check_range("key_lengths", call["key_lengths"], 0, call["k"].shape[1], ValueError)
    if call["cu_seqlens_q"] is None:
        return
    for side in ("q", "k"):
        name, tokens = f"cu_seqlens_{side}", call[side].shape[0]
        longest = max(checks.check_cu_seqlens(name, call[name], tokens), default=0)
        given = call[f"max_seqlen_{side}"]
        if given is not None and given < longest:
            raise ValueError(f"max_seqlen_{side} is {given}, but a sequence has {longest} tokens")


def _longest(cu_seqlens: Tensor | None, given: int | None) -> int | None:
    if cu_seqlens is None or given is not None:
        return given
    return int(cu_seqlens.diff().amax()) if cu_seqlens.shape[0] > 1 else 0


def _prepared(call: dict[str, Any]) -> dict[str, Any]:
    """The call with what all backends want: unit last strides, longest lengths, a whole mask."""
    for name in ("q", "k", "v"):
        if call[name].stride(-1) != 1:
            call[name] = call[name].contiguous()
    for side in ("q", "k"):
        longest = _longest(call[f"cu_seqlens_{side}"], call[f"max_seqlen_{side}"])
        call[f"max_seqlen_{side}"] = longest
    if call["mask"] is not None:
        q, k = call["q"], call["k"]
        call["mask"] = call["mask"].expand(q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    call["window"] = tuple(call["window"])
    return call


Outputs = tuple[Tensor, Tensor | None, Tensor | None]  # out, lse and the statistics, if wanted


def _run(function: Any, *, return_stats: bool, **call: Any) -> Outputs:
    """Calls a PyTorch backend; its gradient computes the forward pass again, without statistics."""
    result = function(**_prepared(call))
    out, lse = result if call["return_lse"] else (result, None)
    stats = out.new_zeros(_row_shape(out, 2), dtype=torch.float32) if return_stats else None
    return out.contiguous(), None if lse is None else lse.contiguous(), stats


def _differentiate_torch(
    grads: Sequence[Tensor],
    saved: Sequence[Tensor],
    names: Sequence[str],
    *,
    return_lse: bool,
    return_stats: bool,
    **call: Any,
) -> Mapping[str, Tensor] | None:
    return attention_backward(grads[0], **_prepared(call))


def _run_triton(kernels: Any, **call: Any) -> Outputs:
    return kernels.attention_fwd(**_prepared(call))


def _differentiate_triton(
    kernels: Any,
    grads: Sequence[Tensor],
    saved: Sequence[Tensor],
    names: Sequence[str],
    *,
    return_lse: bool,
    return_stats: bool,
    **call: Any,
) -> Mapping[str, Tensor]:
    mask_shape = call["mask"].shape if "mask" in names else None
    return kernels.attention_bwd(*grads, *saved, mask_shape=mask_shape, **_prepared(call))


def _row_shape(q: Tensor, *last: int) -> tuple[int, ...]:
    """[B, H, L] or [H, T], then `last`: values of each query and head."""
    *batch, length, heads, _ = q.shape
    return (*batch, heads, length, *last)


def _fake(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    q = call["q"]
    lse, stats = (q.new_empty(0) for _ in range(2))
    if call["return_lse"]:
        lse = q.new_empty(_row_shape(q), dtype=torch.float32)
    if call["return_stats"]:
        stats = q.new_empty(_row_shape(q, 2), dtype=torch.float32)
    return q.new_empty(q.shape), lse, stats


_OP = Op(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? key_lengths, bool causal,"
    " int[] window, float scale, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt? max_seqlen_q,"
    " SymInt? max_seqlen_k, float dropout_p, Tensor? seed, bool return_lse, bool return_stats,"
    " bool needs_grad, str? backend) -> (Tensor, Tensor, Tensor)",
    check=_check,
    check_values=_check_values,
    backends={
        "triton": triton_backend("attention", _run_triton, _differentiate_triton),
        "torch": Backend(
            lambda **call: _run(portable.attention, **call), backward=_differentiate_torch
        ),
        "reference": Backend(lambda **call: _run(reference.attention, **call)),
    },
    fake=_fake,
    differentiable=("q", "k", "v", "mask"),
)
register_backward(_OP, saved=(0, 2))


@register_flop_formula(torch.ops.bertgpt.attention)
def attention_flops(q: Any, k: Any, *args: Any, **kwargs: Any) -> int:
    """4 · queries · keys · H · D: two matrix products; causal and windows are not discounted.

    Packed sequences are counted as one, since their lengths are on the device: an upper bound.
    """
    *batch, queries, heads, head_dim = q
    keys = k[-3]
    return 4 * (batch[0] if batch else 1) * queries * keys * heads * head_dim


@register_flop_formula(torch.ops.bertgpt.attention_backward)
def attention_backward_flops(
    grads: Any, saved: Any, wanted: Any, q: Any, k: Any, *args: Any, **kwargs: Any
) -> int:
    """Five products to the forward pass's two: the scores again, dO · vᵀ, and a gradient each."""
    return attention_flops(q, k) * 5 // 2
