"""One autograd rule per op: its backward operator runs on the backend that ran the forward pass.

The backward pass is an operator of its own, `<op>_backward`, so a compiled graph holds one opaque
call. Where the backend brings a gradient (`Backend.backward`), that runs; where it does not, or not
for this call, the forward pass is computed again on `torch` (or `reference`, where that was asked
for) and differentiated. Saved are the inputs, and those outputs that a gradient asks for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from bertgpt.ops._backends import Call
from bertgpt.ops._dispatch import LIBRARY, Op


def register_backward(op: Op, outputs: int = 1, saved: tuple[int, ...] = ()) -> None:
    """Registers `<op>_backward` and the autograd rule that calls it.

    Args:
        op: The forward op; `op.differentiable` names the inputs that receive gradients.
        outputs: How many of its leading outputs carry a gradient.
        saved: Places of the outputs that a backend's own gradient reads.
    """
    name = f"{op.name}_backward"
    schema = str(op.overload._schema)
    arguments = schema[schema.index("(") + 1 : schema.rindex(") ->")]
    LIBRARY.define(
        f"{name}(Tensor[] grads, Tensor[] saved, bool[] wanted, {arguments}) -> Tensor[]",
        tags=(torch.Tag.pt2_compliant_tag,),
    )

    def backward_op(
        grads: list[Tensor], kept: list[Tensor], wanted: list[bool], *values: Any
    ) -> list[Tensor]:
        call = op.bind(values)
        names = tuple(n for n, want in zip(op.differentiable, wanted, strict=True) if want)
        by_name = op.gradients(call, grads, kept, names)
        if by_name is None:
            by_name = _differentiated(op, call, names, grads)
        return _apart([by_name[n].contiguous() for n in names])

    def backward_fake(
        grads: list[Tensor], kept: list[Tensor], wanted: list[bool], *values: Any
    ) -> list[Tensor]:
        call = op.bind(values)
        names = [n for n, want in zip(op.differentiable, wanted, strict=True) if want]
        return [call[n].new_empty(call[n].shape) for n in names]

    LIBRARY.impl(name, backward_op, "CompositeExplicitAutograd")
    torch.library.register_fake(f"bertgpt::{name}", backward_fake, lib=LIBRARY)
    overload = getattr(torch.ops.bertgpt, name).default

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        tensors = (v if isinstance(v, Tensor) else None for v in inputs)
        ctx.save_for_backward(*(output[place] for place in saved), *tensors)
        ctx.plain = tuple(None if isinstance(v, Tensor) else v for v in inputs)

    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors  # once: checkpointing computes them when asked
        kept = tensors[: len(saved)]
        values = [
            plain if tensor is None else tensor
            for tensor, plain in zip(tensors[len(saved) :], ctx.plain, strict=True)
        ]
        needed = dict(zip(op.fields, ctx.needs_input_grad, strict=True))
        wanted = [needed[n] for n in op.differentiable]
        with torch.no_grad():
            made = overload(list(grads[:outputs]), list(kept), wanted, *values)
        gradients = iter(_once(op.name, made, (*grads, *tensors)))
        by_name = {
            n: next(gradients) for n, want in zip(op.differentiable, wanted, strict=True) if want
        }
        return tuple(by_name.get(field) for field in op.fields)

    torch.library.register_autograd(
        f"bertgpt::{op.name}", backward, setup_context=setup_context, lib=LIBRARY
    )


def _apart(gradients: list[Tensor]) -> list[Tensor]:
    """Each gradient in memory of its own: a compiler may write over one while it needs another."""
    seen: set[int] = set()
    fresh = []
    for gradient in gradients:
        fresh.append(gradient.clone() if id(gradient) in seen else gradient)
        seen.add(id(gradient))
    return fresh


class _Once(torch.autograd.Function):
    """Gradients as they are; to differentiate them in turn is an error, where zeros would pass."""

    @staticmethod
    def forward(ctx: Any, name: str, source: Tensor, *gradients: Tensor) -> tuple[Tensor, ...]:
        ctx.name = name
        return tuple(gradient.view_as(gradient) for gradient in gradients)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            f"{ctx.name} has no second derivative: its gradient kernels have no gradient of their "
            "own; for one, write the function in torch's own operations"
        )


def _once(
    name: str, gradients: Sequence[Tensor], sources: Sequence[Tensor | None]
) -> Sequence[Tensor]:
    """The gradients, marked where autograd records what becomes of them (`create_graph=True`)."""
    if not torch.is_grad_enabled():
        return gradients
    source = next((t for t in sources if t is not None and t.requires_grad), None)
    return gradients if source is None else _Once.apply(name, source, *gradients)


@contextmanager
def _recorded() -> Iterator[None]:
    """Autograd records, also where a dispatch mode (a FLOP counter) has shut it out down here."""
    keys = (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView)
    with ExitStack() as stack:
        for key in keys:
            stack.enter_context(torch._C._SetExcludeDispatchKeyGuard(key, False))
        stack.enter_context(torch.enable_grad())
        yield


def _differentiated(
    op: Op, call: Call, names: tuple[str, ...], grads: list[Tensor]
) -> Mapping[str, Tensor]:
    """The gradients by autograd through the forward pass, computed again."""
    backend = "reference" if call["backend"] == "reference" else "torch"
    with _recorded():
        leaves = {n: call[n].detach().requires_grad_() for n in names}
        results = op.run(backend, {**call, **leaves})
        results = (results,) if isinstance(results, Tensor) else results
        pairs = [(r, g) for r, g in zip(results, grads, strict=False) if r.requires_grad]
        if not pairs:
            return {n: torch.zeros_like(leaf) for n, leaf in leaves.items()}
        gradients = torch.autograd.grad(
            [r for r, _ in pairs],
            list(leaves.values()),
            [g for _, g in pairs],
            materialize_grads=True,
        )
    return {n: g.clone() for n, g in zip(names, gradients, strict=True)}
