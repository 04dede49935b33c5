"""One autograd rule per op: the backward operator differentiates a recomputed forward.

Saved are the inputs alone. The backward pass is an operator of its own, `<op>_backward`, so a
compiled graph holds one opaque call and a fused gradient kernel has a place to go.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bertgpt.ops._dispatch import LIBRARY, Op


def register_recomputed_backward(op: Op, outputs: int = 1) -> None:
    """Registers `<op>_backward` and the autograd rule that calls it.

    Args:
        op: The forward op; `op.differentiable` names the inputs that receive gradients.
        outputs: How many of its leading outputs carry a gradient.
    """
    name = f"{op.name}_backward"
    schema = str(op.overload._schema)
    arguments = schema[schema.index("(") + 1 : schema.rindex(") ->")]
    LIBRARY.define(
        f"{name}(Tensor[] grads, bool[] wanted, {arguments}) -> Tensor[]",
        tags=(torch.Tag.pt2_compliant_tag,),
    )

    def backward_op(grads: list[Tensor], wanted: list[bool], *values: Any) -> list[Tensor]:
        call = op.bind(values)
        backend = "reference" if call["backend"] == "reference" else "torch"
        names = [n for n, want in zip(op.differentiable, wanted, strict=True) if want]
        with torch.enable_grad():
            leaves = {n: call[n].detach().requires_grad_() for n in names}
            results = op.run(backend, {**call, **leaves})
            results = (results,) if isinstance(results, Tensor) else results
            pairs = [(r, g) for r, g in zip(results, grads, strict=False) if r.requires_grad]
            if not pairs:
                return [torch.zeros_like(leaf) for leaf in leaves.values()]
            gradients = torch.autograd.grad(
                [r for r, _ in pairs],
                list(leaves.values()),
                [g for _, g in pairs],
                materialize_grads=True,
            )
        return [g.contiguous().clone() for g in gradients]

    def backward_fake(grads: list[Tensor], wanted: list[bool], *values: Any) -> list[Tensor]:
        call = op.bind(values)
        names = [n for n, want in zip(op.differentiable, wanted, strict=True) if want]
        return [call[n].new_empty(call[n].shape) for n in names]

    LIBRARY.impl(name, backward_op, "CompositeExplicitAutograd")
    torch.library.register_fake(f"bertgpt::{name}", backward_fake, lib=LIBRARY)
    overload = getattr(torch.ops.bertgpt, name).default

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*(v if isinstance(v, Tensor) else None for v in inputs))
        ctx.plain = tuple(None if isinstance(v, Tensor) else v for v in inputs)

    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        values = [
            plain if tensor is None else tensor
            for tensor, plain in zip(ctx.saved_tensors, ctx.plain, strict=True)
        ]
        needed = dict(zip(op.fields, ctx.needs_input_grad, strict=True))
        wanted = [needed[n] for n in op.differentiable]
        gradients = iter(overload(list(grads[:outputs]), wanted, *values))
        by_name = {
            n: next(gradients) for n, want in zip(op.differentiable, wanted, strict=True) if want
        }
        return tuple(by_name.get(field) for field in op.fields)

    torch.library.register_autograd(
        f"bertgpt::{op.name}", backward, setup_context=setup_context, lib=LIBRARY
    )
