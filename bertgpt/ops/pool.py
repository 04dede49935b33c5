"""`pool`: the states of each packed sequence to one vector."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bertgpt import portable, reference
from bertgpt.ops import _checks as checks
from bertgpt.ops._autograd import register_backward
from bertgpt.ops._backends import Backend, Call, triton_backend
from bertgpt.ops._dispatch import Op, check_backend, needs_grad

POOLINGS = ("cls", "mean", "max")


def pool(
    x: Tensor,
    cu_seqlens: Tensor,
    *,
    pooling: str = "mean",
    normalize: bool = False,
    backend: str | None = None,
) -> Tensor:
    """One vector a sequence, from the states of its tokens.

    Args:
        x: [T, E], packed; float16, bfloat16, float32 or float64.
        cu_seqlens: int32 or int64 [B + 1], the sequences' boundaries, from 0 to T.
        pooling: "cls" (the first token), "mean" or "max" (of each column).
        normalize: Divide each vector by its length, or by 1e-12 if that is greater.
        backend: "triton", "torch" or "reference"; None takes the first that can.

    Returns:
        [B, E] in x's dtype, contiguous; zeros for an empty sequence. Sums are float32 (float64
        for float64), rounded once.

    Raises:
        TypeError: A dtype is wrong, or a flag.
        ValueError: A shape, device or boundary is wrong, or the pooling or backend is unknown.
        BackendUnavailable: The backend asked for refuses this call.

    Source: Reimers and Gurevych, "Sentence-BERT", 2019, section 3.
    """
    return _OP(_check(x, cu_seqlens, pooling=pooling, normalize=normalize, backend=backend))


def _check(
    x: Tensor,
    cu_seqlens: Tensor,
    *,
    pooling: str = "mean",
    normalize: bool = False,
    backend: str | None = None,
) -> dict[str, Any]:
    check_backend(backend)
    checks.check_tensor("x", x, rank=2)
    checks.check_index("cu_seqlens", cu_seqlens, rank=1)
    checks.check_device("cu_seqlens", cu_seqlens, "x", x)
    if cu_seqlens.shape[0] < 1:
        raise ValueError("cu_seqlens must be [B + 1], not empty: no sequence is [0]")
    if pooling not in POOLINGS:
        raise ValueError(
            f"pooling must be one of {', '.join(map(repr, POOLINGS))}, not {pooling!r}"
        )
    return {
        "x": x, "cu_seqlens": cu_seqlens, "pooling": pooling,
        "normalize": checks.check_flag("normalize", normalize),
        "needs_grad": needs_grad(x), "backend": backend,
    }  # fmt: skip


def _check_values(call: Call) -> None:
    checks.check_cu_seqlens("cu_seqlens", call["cu_seqlens"], call["x"].shape[0])


def _run_triton(kernels: Any, **call: Any) -> Tensor:
    return kernels.pool(**call)


def _fake(call: Call) -> Tensor:
    x = call["x"]
    return x.new_empty(call["cu_seqlens"].shape[0] - 1, x.shape[1])


_OP = Op(
    "pool(Tensor x, Tensor cu_seqlens, str pooling, bool normalize, bool needs_grad,"
    " str? backend) -> Tensor",
    check=_check,
    check_values=_check_values,
    backends={
        "triton": triton_backend("pool", _run_triton),
        "torch": Backend(portable.pool),
        "reference": Backend(reference.pool),
    },
    fake=_fake,
    differentiable=("x",),
)
register_backward(_OP)
