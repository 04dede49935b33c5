"""`paged_write`: stores new keys and values in the pages of a KV cache, in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from bertgpt import portable, reference
from bertgpt.ops import _checks as checks
from bertgpt.ops._backends import Backend, Call, cuda_backend, triton_backend
from bertgpt.ops._dispatch import Op, check_backend
from bertgpt.ops.attention import MAX_HEAD_DIM


def paged_write(
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
    *,
    backend: str | None = None,
) -> None:
    """Writes each token's key and value to its slot: page slot // N, place slot % N.

    Carries no gradient. Under autocast k and v take the pages' dtype.

    Args:
        k: New keys, [T, K, D]; float16, bfloat16, float32 or float64.
        v: New values, shaped like k.
        k_pages: [P, K, N, D], pages of N tokens; dtype and device of k; changed in place. Any
            strides with a unit last one whose dimensions nest: no element may overlap another.
        v_pages: Like k_pages.
        slots: int32 or int64 [T], page · N + place in the page. A negative slot skips its token;
            of tokens with the same slot the last one stays.
        backend: "cuda", "triton", "torch" or "reference"; None takes the first that can.

    Raises:
        TypeError: A dtype is wrong.
        ValueError: A shape, stride or device is wrong, or the backend is unknown.
        IndexError: A slot lies past the last page. Seen on a CPU and under `strict()`; elsewhere
            such a token is skipped.
        BackendUnavailable: The backend asked for refuses this call.
        In each case nothing has been written.

    Source: Kwon et al., "Efficient Memory Management for Large Language Model Serving with
        PagedAttention", 2023.
    """
    _OP.repeat(k, v, k_pages, v_pages, slots, backend)


def check_pages(k_pages: Tensor, v_pages: Tensor) -> None:
    """Both are pages [P, K, N, D] of one shape, dtype and device."""
    checks.check_tensor("k_pages", k_pages, rank=4)
    checks.check_tensor("v_pages", v_pages, rank=4)
    checks.check_like("v_pages", v_pages, "k_pages", k_pages)
    shape = k_pages.shape
    checks.check_shape("v_pages", v_pages, shape, "shaped like k_pages")
    _, kv_heads, page_size, head_dim = shape
    if kv_heads == 0 or page_size == 0:
        raise ValueError(f"pages are [P, K, N, D] with K, N ≥ 1, not {tuple(k_pages.shape)}")
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"head_dim must lie in 1 … {MAX_HEAD_DIM}, not {head_dim}")


def without_gradient(tensor: Tensor, pages: Tensor) -> Tensor:
    """`tensor` outside autograd and, under autocast, in the pages' dtype."""
    if tensor.dtype != pages.dtype and torch.is_autocast_enabled(tensor.device.type):
        tensor = tensor.to(pages.dtype)
    return tensor.detach() if tensor.requires_grad else tensor


def _check(
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
    *,
    backend: str | None = None,
) -> dict[str, Any]:
    """Everything that shapes and dtypes can tell; returns the registered operator's arguments."""
    check_backend(backend)
    check_pages(k_pages, v_pages)
    _check_writable("k_pages", k_pages)
    _check_writable("v_pages", v_pages)
    checks.check_tensor("k", k, rank=3)
    (tokens, _, _), (_, kv_heads, _, head_dim) = k.shape, k_pages.shape
    shape = (tokens, kv_heads, head_dim)
    k = _check_tokens("k", k, k_pages, shape)
    checks.check_tensor("v", v, rank=3)
    v = _check_tokens("v", v, k_pages, shape)
    checks.check_index("slots", slots, rank=1)
    checks.check_shape("slots", slots, (tokens,), "[T]")
    checks.check_device("slots", slots, "k", k)
    return {
        "k": k,
        "v": v,
        "k_pages": k_pages.detach() if k_pages.requires_grad else k_pages,
        "v_pages": v_pages.detach() if v_pages.requires_grad else v_pages,
        "slots": slots,
        "backend": backend,
    }


def _check_tokens(name: str, value: Tensor, k_pages: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The tokens' keys or values, in the pages' dtype and outside autograd."""
    value = without_gradient(value, k_pages)
    checks.check_like(name, value, "k_pages", k_pages)
    checks.check_shape(name, value, shape, "[T, K, D] with the pages' K and D")
    return value


def _check_writable(name: str, pages: Tensor) -> None:
    """A copy of the pages would be written in vain, so their layout must do as it is."""
    if pages.is_contiguous() or pages.numel() == 0:
        return
    # Each dimension must step past all that the ones of smaller stride reach.
    reach = 0
    for stride, size in sorted(zip(pages.stride(), pages.shape, strict=True)):
        if size > 1 and stride <= reach:
            raise ValueError(
                f"{name} is {tuple(pages.shape)} with strides {pages.stride()}: it is expanded, or "
                "its elements overlap or interleave, and it is written in place; give pages whose "
                "dimensions nest"
            )
        reach += (size - 1) * stride
    if pages.shape[-1] > 1 and pages.stride(-1) != 1:
        raise ValueError(
            f"{name} must have last stride 1, not strides {pages.stride()}: it is written in place"
        )


def _check_values(call: Call) -> None:
    slots, (pages, _, page_size, _) = call["slots"], call["k_pages"].shape
    if slots.numel() and (largest := int(slots.max())) >= pages * page_size:
        raise IndexError(
            f"slots holds {largest}, but {pages} pages of {page_size} tokens have slots below "
            f"{pages * page_size}"
        )


def _run_kernels(kernels: Any, call: Call) -> None:
    k, v, k_pages, v_pages = call["k"], call["v"], call["k_pages"], call["v_pages"]
    k, v = checks.with_unit_stride(k), checks.with_unit_stride(v)
    kernels.paged_write(k, v, k_pages, v_pages, call["slots"])
    # Autograd counts writes through torch by itself, but does not see a kernel's.
    increment_version((k_pages, v_pages))


_OP = Op(
    "paged_write(Tensor k, Tensor v, Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor slots,"
    " str? backend) -> ()",
    check=_check,
    check_values=_check_values,
    backends={
        "cuda": cuda_backend("paged_write", _run_kernels),
        "triton": triton_backend("paged_write", lambda kernels, **c: _run_kernels(kernels, c)),
        "torch": Backend(portable.paged_write),
        "reference": Backend(reference.paged_write),
    },
    fake=lambda call: None,
)
