"""The loss of a vocabulary projection: forward, one a row; and the mean with all its gradients.

GPT-2's 50257 tokens with a label in every row, BERT's 30522 with a bias and labels in 15% of rows.
FLOPs: 2 · labelled rows · V · E, three times that with gradients (scores, and a product for each
gradient; a method that computes the scores again does four). Bytes: inputs and results once each.
Compared with the definition are some rows' losses, or their gradients; of the others, that they are
numbers. The peak of memory is in every report: it is what this op is for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bertgpt import ops, reference
from bertgpt.benchmarks.case import (
    Case,
    Inputs,
    Provider,
    Run,
    Unavailable,
    all_of,
    needs_cuda,
    needs_package,
    not_on_cpu,
    some_rows,
)

_SAMPLED = 96
_WIDTH = 768
_GPT, _BERT = 50257, 30522
_LABELLED = {_GPT: 1.0, _BERT: 0.15}

Loss = Callable[[Tensor, Tensor, Tensor | None, Tensor, str], Tensor]


def _draw(
    generator: torch.Generator,
    device: torch.device,
    *,
    rows: int,
    tokens: int,
    width: int,
    labelled: float,
    dtype: torch.dtype,
    gradients: bool,
) -> Inputs:
    normal = partial(torch.randn, generator=generator, device=device, dtype=dtype)
    labels = torch.randint(0, tokens, (rows,), generator=generator, device=device)
    chance = torch.rand(rows, generator=generator, device=device)
    return {
        "hidden": normal(rows, width),
        "weight": normal(tokens, width) * width**-0.5,
        "bias": normal(tokens) if labelled < 1 else None,
        "labels": labels.masked_fill(chance >= labelled, -100),
        "gradients": gradients,
    }


def _expected(inputs: Inputs, dtype: torch.dtype) -> Tensor:
    """Losses of some rows, or their hidden gradients under the mean over all rows."""
    hidden = some_rows(inputs, inputs["hidden"], _SAMPLED).to(dtype)
    labels = some_rows(inputs, inputs["labels"], _SAMPLED)
    bias = None if inputs["bias"] is None else inputs["bias"].to(dtype)
    parameters = inputs["weight"].to(dtype), bias
    if not inputs["gradients"]:
        return reference.linear_cross_entropy(hidden, *parameters, labels, reduction="none")
    hidden.requires_grad_()
    total = reference.linear_cross_entropy(hidden, *parameters, labels, reduction="sum")
    count = (inputs["labels"] != -100).sum()
    (gradient,) = torch.autograd.grad(total / count, hidden)
    return gradient


def _select(inputs: Inputs, result: Any) -> Tensor:
    rows = result[0] if inputs["gradients"] else result
    return some_rows(inputs, rows, _SAMPLED)


def _case(rows: int, tokens: int, gradients: bool, **options: Any) -> Case:
    device, width = options.get("device", "cuda"), options.get("width", _WIDTH)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    labelled = options.get("labelled", _LABELLED.get(tokens, 1.0))
    elements = rows * width + tokens * width
    return Case(
        op="linear_cross_entropy_backward" if gradients else "linear_cross_entropy",
        name=f"T{rows} V{tokens}{'' if labelled == 1 else f' {labelled:.0%} labelled'}",
        device=device,
        dtype=dtype,
        inputs=partial(
            _draw, rows=rows, tokens=tokens, width=width, labelled=labelled, dtype=dtype,
            gradients=gradients,
        ),
        expected=_expected,
        select=_select,
        # The number of labels is drawn: the floor allows for a tenth fewer.
        flops=(6.0 if gradients else 2.0) * (0.9 if labelled < 1 else 1) * labelled
        * rows * tokens * width,
        bytes=float((2 if gradients else 1) * elements * dtype.itemsize),
        tokens=rows,
        value=options.get("value", 1.0),
        factor=6.0 if gradients else 4.0,
        sets=2,
    )  # fmt: skip


def _cases() -> Iterator[Case]:
    for tokens, rows, gradients in product(
        (_GPT, _BERT), (8192, 16384, 32768, 65536), (False, True)
    ):
        yield _case(rows, tokens, gradients, value=8 if rows == 8192 else 3)
    for gradients, labelled in product((False, True), (1.0, 0.5)):
        yield _case(128, 3000, gradients, width=64, labelled=labelled, device="cpu")


def _leaves(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Hidden, weight, bias and labels, sharing the inputs' memory, ready for their gradients."""
    hidden, weight, bias = (
        None if inputs[name] is None else inputs[name].detach().requires_grad_(inputs["gradients"])
        for name in ("hidden", "weight", "bias")
    )
    assert hidden is not None
    assert weight is not None
    return hidden, weight, bias, inputs["labels"]


def _prepare(make: Callable[[], Loss], case: Case, inputs: Inputs) -> Run:
    loss, leaves = make(), _leaves(inputs)
    if not inputs["gradients"]:
        return lambda: loss(*leaves, "none")
    wanted = [leaf for leaf in leaves[:3] if leaf is not None]
    return lambda: torch.autograd.grad(loss(*leaves, "mean"), wanted)


def _ours(backend: str) -> Provider:
    def prepare(case: Case, inputs: Inputs) -> Run:
        told = ops.explain(ops.linear_cross_entropy, *_leaves(inputs), backend=backend)
        if backend in told.refusals:
            raise Unavailable(told.refusals[backend])
        return _prepare(lambda: loss, case, inputs)

    def loss(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, reduction: str
    ) -> Tensor:
        return ops.linear_cross_entropy(
            hidden, weight, bias, labels, reduction=reduction, backend=backend
        )

    return Provider(f"bertgpt {backend}", prepare, ours=True)


def _eager(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, reduction: str
) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight, bias).float(), labels, reduction=reduction)


def _liger() -> Loss:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return lambda hidden, weight, bias, labels, reduction: liger_fused_linear_cross_entropy(
        hidden, weight, labels, bias, reduction=reduction
    )


def _cut() -> Loss:
    """Its exact form: the default leaves small gradients out."""
    from cut_cross_entropy import linear_cross_entropy

    return lambda hidden, weight, bias, labels, reduction: linear_cross_entropy(
        hidden, weight, labels, bias=bias, reduction=reduction, impl="cce_exact"
    )


CASES: tuple[Case, ...] = tuple(_cases())
PROVIDERS: tuple[Provider, ...] = (
    *(_ours(backend) for backend in ("triton", "torch")),
    Provider("linear, then cross_entropy", partial(_prepare, lambda: _eager)),
    Provider(
        "torch.compile",
        partial(_prepare, lambda: torch.compile(_eager, dynamic=False)),
        not_on_cpu("compiling takes longer than a CPU's small cases"),
    ),
    Provider("Liger", partial(_prepare, _liger), all_of(needs_cuda, needs_package("liger_kernel"))),
    Provider(
        "cut-cross-entropy",
        partial(_prepare, _cut),
        all_of(needs_cuda, needs_package("cut_cross_entropy")),
    ),
)


def test_linear_cross_entropy(contest: Any) -> None:
    contest()
