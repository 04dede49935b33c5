"""Small calls of every op, with the features that kernels get wrong, for `bertgpt validate`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate, product
from typing import Any

import torch
from torch import Tensor

_RAGGED = (0, 1, 37, 64, 65)  # lengths of a packed batch: empty, single, prime, a tile, one more


@dataclass(frozen=True)
class Sample:
    """One call of an op; tensors on the CPU, floats in the dtype asked for.

    Attributes:
        op: The op's name.
        args: Its arguments by place.
        kwargs: Its arguments by keyword.
        wrt: Places, or names, of the arguments whose gradients are measured too.
    """

    op: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    wrt: tuple[int | str, ...] = ()

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Sample:
        """The same call with every tensor replaced by change(tensor)."""
        return replace(
            self,
            args=tuple(_apply(value, change) for value in self.args),
            kwargs={name: _apply(value, change) for name, value in self.kwargs.items()},
        )

    def differentiable(self) -> Sample:
        """The same call, its arguments of `wrt` asking for gradients where they are tensors."""

        def leaf(place: int | str, value: Any) -> Any:
            wanted = place in self.wrt and value is not None
            return value.detach().requires_grad_() if wanted else value

        return replace(
            self,
            args=tuple(leaf(i, value) for i, value in enumerate(self.args)),
            kwargs={name: leaf(name, value) for name, value in self.kwargs.items()},
        )

    def leaves(self) -> list[Tensor]:
        """The tensors of `wrt`, in its order."""
        named = (self.kwargs[i] if isinstance(i, str) else self.args[i] for i in self.wrt)
        return [tensor for tensor in named if tensor is not None]

    def results(self, function: Callable[..., Any], **options: Any) -> list[Result]:
        """What `function` makes of a copy of this call: its outputs, then the gradients of `wrt`.

        A call that writes in place gives the tensors it wrote. The gradients are those of each
        output weighted by fixed random numbers.
        """
        call = self.mapped(torch.clone).differentiable()
        with torch.set_grad_enabled(bool(self.wrt)):
            outputs = function(*call.args, **call.kwargs, **options)
            if outputs is None:
                outputs = call.args[2:4]  # paged_write's pages
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            leaves = call.leaves()
            if not leaves:
                return [Result(output, 2.0) for output in outputs]
            factors = [3.0] * len(leaves)
            if self.wrt[-1] == "mask":  # single products P (dP − δ): no sum evens out its rounding
                factors[-1] = 5.0
            weights = _Maker(torch.float32, seed=1)
            pulls = [weights.randn(*o.shape).to(o.device, o.dtype) for o in outputs]
            gradients = torch.autograd.grad(outputs, leaves, pulls, materialize_grads=True)
        return [
            *(Result(output.detach(), 2.0) for output in outputs),
            *map(Result, gradients, factors),
        ]


@dataclass(frozen=True)
class Result:
    """A tensor that a call gave, and the factor of the accuracy rule that holds for it."""

    tensor: Tensor
    factor: float


def _apply(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return change(value) if isinstance(value, Tensor) else value


class _Maker:
    """Reproducible tensors of one dtype."""

    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(seed)

    def randn(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=self.generator) * scale).to(self.dtype)

    def randint(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator)


def _attention(make: _Maker) -> Iterator[Sample]:
    padded: list[dict[str, Any]] = [
        {},
        {"return_lse": True},
        {"causal": True, "return_lse": True},
        {"causal": True, "return_lse": True, "scale": -0.1},
        {"causal": True, "return_lse": True, "scale": 0.0},
        {"window": (7, 3)},
        {"window": (51, 35)},  # just short of the farthest key on either side
        {"key_lengths": torch.tensor([0, 50], dtype=torch.int32), "return_lse": True},
        {"mask": make.randint(0, 2, 2, 1, 37, 53).bool(), "causal": True},
        {
            "mask": make.randn(1, 4, 1, 53).masked_fill(make.randint(0, 3, 53) == 0, -torch.inf),
            "causal": True,
            "return_lse": True,
        },
    ]
    for dim, kv_heads, chosen in ((64, 4, padded), (40, 2, padded[2:8]), (128, 1, padded[7:])):
        shape_k = (2, 53, kv_heads, dim)
        for options in chosen:
            q, k, v = make.randn(2, 37, 4, dim), make.randn(*shape_k), make.randn(*shape_k)
            yield Sample("attention", (q, k, v), options)
    q, k, v = (make.randn(1, 200, 2, 64) for _ in range(3))  # several tiles
    yield Sample("attention", (q[:, 70:], k, v), {"window": (90, 20), "return_lse": True})
    cu_seqlens = torch.tensor([0, *accumulate(_RAGGED)], dtype=torch.int32)
    for causal in (False, True):
        q, k, v = (make.randn(sum(_RAGGED), 2, 64) for _ in range(3))
        options = {"cu_seqlens_q": cu_seqlens, "max_seqlen_q": max(_RAGGED), "causal": causal}
        yield Sample("attention", (q, k, v), options)
    for scale in (-0.1, 0.0):  # as many queries as keys, where a fused op may mask before it scales
        q, k, v = (make.randn(1, 37, 2, 64) for _ in range(3))
        yield Sample("attention", (q, k, v), {"causal": True, "scale": scale})
    yield from _attention_gradients(make)


def _attention_gradients(make: _Maker) -> Iterator[Sample]:
    """Every query sees several keys: the gradient of one that sees one is all cancellation."""
    wrt: tuple[int | str, ...] = (0, 1, 2)
    ruled_out = make.randint(0, 3, 53) == 0
    padded: list[tuple[dict[str, Any], tuple[int | str, ...]]] = [
        ({"causal": True}, wrt),
        ({"window": (7, 3), "dropout_p": 0.2, "seed": 5}, wrt),
        ({"mask": make.randint(0, 2, 2, 1, 37, 53).bool()}, wrt),
        ({"mask": make.randn(4, 37, 53), "causal": True}, (*wrt, "mask")),
        (
            {
                "mask": make.randn(2, 1, 1, 53).masked_fill(ruled_out, -torch.inf),
                "key_lengths": torch.tensor([0, 50], dtype=torch.int32),
                "dropout_p": 0.2,
                "seed": 5,
            },
            (*wrt, "mask"),
        ),
    ]
    for options, places in padded:
        q, k, v = make.randn(2, 37, 4, 64), make.randn(2, 53, 2, 64), make.randn(2, 53, 2, 64)
        yield Sample("attention", (q, k, v), options, places)
    lengths_q, lengths_k = (0, 37, 64), (3, 45, 65)
    cu_q, cu_k = (torch.tensor([0, *accumulate(n)]) for n in (lengths_q, lengths_k))
    q, k, v = make.randn(sum(lengths_q), 2, 64), *(make.randn(113, 1, 64) for _ in range(2))
    packed = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
    yield Sample("attention", (q, k, v), {**packed, "window": (-1, 4)}, wrt)


def _linear_gelu(make: _Maker) -> Iterator[Sample]:
    for (rows, width, outputs), approximate in product(
        ((1, 64, 96), (65, 128, 192), (37, 61, 131)), ("none", "tanh")
    ):
        w = make.randn(outputs, width, scale=width**-0.5)
        bias = make.randn(outputs) if rows > 1 else None
        args = (make.randn(rows, width), w, bias)
        yield Sample("linear_gelu", args, {"approximate": approximate})
        if rows > 1:  # of one row, the weight's gradient is products with a slope that cancels
            yield Sample("linear_gelu", args, {"approximate": approximate}, (0, 1, 2))


def _gelu_ffn(make: _Maker) -> Iterator[Sample]:
    for approximate in ("none", "tanh"):
        w_in, w_out = make.randn(256, 64, scale=0.125), make.randn(64, 256, scale=0.0625)
        args = (make.randn(3, 37, 64), w_in, make.randn(256), w_out, make.randn(64))
        options: dict[str, Any] = {"approximate": approximate}
        yield Sample("gelu_ffn", args, options, (0, 1, 2, 3, 4))
        dropped = {**options, "dropout_p": 0.2, "seed": 5}
        yield Sample("gelu_ffn", args, dropped, (0, 1, 2, 3, 4))


def _linear_cross_entropy(make: _Maker) -> Iterator[Sample]:
    for (rows, width, tokens), reduction in product(
        ((1, 64, 96), (140, 64, 2200), (37, 61, 131)), ("mean", "none")
    ):
        hidden = make.randn(rows, width)
        weight = make.randn(tokens, width, scale=2 * width**-0.5)
        labels = make.randint(0, tokens, rows)
        labels[0] = tokens - 1
        bias = None
        if rows > 1:
            bias = make.randn(tokens)
            labels[3::5] = 7  # the label to ignore; nothing of those rows may show
            hidden[3::5] = torch.nan
            bias[11] = -torch.inf
            labels[labels == 11] = 12
        options: dict[str, Any] = {"ignore_index": 7, "reduction": reduction}
        yield Sample("linear_cross_entropy", (hidden, weight, bias, labels), options, (0, 1, 2))


def _add_layer_norm(make: _Maker) -> Iterator[Sample]:
    for width, has_residual in product((1, 61, 384, 1601), (False, True)):
        x = make.randn(3, 3, width)
        residual = make.randn(3, 3, width) if has_residual else None
        bias = make.randn(width) if width != 61 else None
        options = {"eps": 1e-5, "return_sum": has_residual}
        args = (x, residual, make.randn(width), bias)
        yield Sample("add_layer_norm", args, options)
        if width > 1:  # the gradient of a constant is all cancellation
            yield Sample("add_layer_norm", args, options, (0, 1, 2, 3))
            dropped = {**options, "dropout_p": 0.2, "seed": 5}
            yield Sample("add_layer_norm", args, dropped, (0, 1, 2, 3))


def _pool(make: _Maker) -> Iterator[Sample]:
    cu_seqlens = torch.tensor([0, *accumulate(_RAGGED)], dtype=torch.int32)
    for pooling, normalize in product(("cls", "mean", "max"), (False, True)):
        x = make.randn(sum(_RAGGED), 61)
        options = {"pooling": pooling, "normalize": normalize}
        yield Sample("pool", (x, cu_seqlens), options)
        yield Sample("pool", (x, cu_seqlens), options, (0,))


def _paged_write(make: _Maker) -> Iterator[Sample]:
    for dim in (64, 40):
        k, v = make.randn(19, 2, dim), make.randn(19, 2, dim)
        pages = make.randn(6, 2, 16, dim), make.randn(6, 2, 16, dim)
        slots = torch.randperm(6 * 16, generator=make.generator)[:19]
        slots[3] = -1
        yield Sample("paged_write", (k, v, *pages, slots), {})


def _paged_attention(make: _Maker) -> Iterator[Sample]:
    long = torch.tensor([1300], dtype=torch.int32)  # several splits
    pages = make.randn(82, 1, 16, 64), make.randn(82, 1, 16, 64)
    table = torch.randperm(82, generator=make.generator).view(1, 82)
    yield Sample(
        "paged_attention", (make.randn(1, 4, 64), *pages, table, long), {"return_lse": True}
    )
    full = torch.tensor([48], dtype=torch.int32)  # of 48: the farthest key is 47 away
    pages, table = (make.randn(3, 1, 16, 64), make.randn(3, 1, 16, 64)), torch.tensor([[2, 0, 1]])
    yield Sample(
        "paged_attention", (make.randn(1, 4, 64), *pages, table, full), {"window": (46, -1)}
    )
    lengths = torch.tensor([1, 37, 0, 64], dtype=torch.int32)
    chunks = torch.tensor([0, 1, 6, 6, 11], dtype=torch.int32)
    for dim, kv_heads in ((64, 4), (40, 2), (128, 1)):
        table = torch.randperm(20, generator=make.generator).to(torch.int32).view(4, 5)
        pages = make.randn(20, kv_heads, 16, dim), make.randn(20, kv_heads, 16, dim)
        single: list[dict[str, Any]] = [
            {},
            {"return_lse": True},
            {"window": (9, -1)},
            {"scale": -0.1},
            {"scale": 0.0},
        ]
        for options in single:
            args = (make.randn(4, 4, dim), *pages, table, lengths)
            yield Sample("paged_attention", args, options)
        chunked: list[dict[str, Any]] = [
            {},
            {"causal": False},
            {"causal": False, "window": (-1, 3)},
            {"window": (2, -1)},
            {"scale": -0.1},
        ]
        for options in chunked:
            args = (make.randn(11, 4, dim), *pages, table, lengths)
            options = {"cu_seqlens_q": chunks, "max_seqlen_q": 5, **options}
            yield Sample("paged_attention", args, options)


def _sample(make: _Maker) -> Iterator[Sample]:
    for vocabulary in (13, 61, 1601):
        rows = 48
        which = torch.arange(rows)
        settings = {
            "temperature": torch.tensor([0.0, 0.7, 1.0, 1.6])[which % 4],
            "top_k": torch.tensor([0, 0, 1, 5, 2000])[which % 5],
            "top_p": torch.tensor([1.0, 0.95, 0.5])[which % 3],
            "min_p": torch.tensor([0.0, 0.02])[which % 2],
        }
        seeds = {"seed": torch.tensor(11), "sequence_ids": which, "steps": torch.tensor(3)}
        logits = make.randn(rows, vocabulary, scale=3.0)
        yield Sample("sample", (logits,), {**settings, **seeds})
        tied = logits.round().masked_fill(make.randint(0, 4, rows, vocabulary) == 0, -torch.inf)
        tied[:, 0] = 0.0
        yield Sample("sample", (tied,), {**settings, **seeds})


_MAKERS: dict[str, Callable[[_Maker], Iterator[Sample]]] = {
    "attention": _attention,
    "linear_gelu": _linear_gelu,
    "gelu_ffn": _gelu_ffn,
    "linear_cross_entropy": _linear_cross_entropy,
    "add_layer_norm": _add_layer_norm,
    "pool": _pool,
    "paged_write": _paged_write,
    "paged_attention": _paged_attention,
    "sample": _sample,
}
OPS = tuple(_MAKERS)


def samples(op: str, dtype: torch.dtype) -> list[Sample]:
    """The calls of one op, the same at every run."""
    return list(_MAKERS[op](_Maker(dtype, seed=0)))
