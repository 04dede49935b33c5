"""The whole feed-forward block: up-projection, GELU, down-projection; and its gradients.

FLOPs: 4 · M · E · F, backward twice that again. Bytes: x, both weights and biases and the result;
backward also the result's gradient and the gradients of x and the weights. The inner activations
need not touch memory, so they are not counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bertgpt import ops, reference
from bertgpt.benchmarks.bench_linear_gelu import WIDTHS
from bertgpt.benchmarks.case import Case, Inputs, Provider, Run, Unavailable, not_on_cpu

_SAMPLED = 96
_TENSORS = ("x", "w_in", "b_in", "w_out", "b_out")


def _draw(
    generator: torch.Generator,
    device: torch.device,
    *,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    approximate: str,
    backward: bool,
) -> Inputs:
    rows, width, inner = shape
    normal = partial(torch.randn, generator=generator, device=device, dtype=dtype)
    inputs: Inputs = {
        "x": normal(rows, width),
        "w_in": normal(inner, width) * width**-0.5,
        "b_in": normal(inner),
        "w_out": normal(width, inner) * inner**-0.5,
        "b_out": normal(width),
        "approximate": approximate,
    }
    if backward:
        inputs["d_out"] = normal(rows, width)
    return inputs


def _ends(rows: Tensor) -> Tensor:
    return torch.cat([rows[:_SAMPLED], rows[-_SAMPLED:]])


def _run(function: Any, inputs: Inputs) -> Run:
    """The forward call, or forward and backward to x and the weights where `d_out` is given."""
    if "d_out" not in inputs:
        return lambda: function(*_arguments(inputs))
    leaves = [inputs[name].requires_grad_() for name in _TENSORS]
    return lambda: torch.autograd.grad(function(*_arguments(inputs)), leaves, inputs["d_out"])


def _arguments(inputs: Inputs) -> tuple[Any, ...]:
    return (*(inputs[name] for name in _TENSORS), inputs["approximate"])


def _reference(*arguments: Any) -> Tensor:
    return reference.gelu_ffn(*arguments[:5], approximate=arguments[5])


def _expected(inputs: Inputs, dtype: torch.dtype) -> Tensor:
    """The result's ends, or the gradient of x there: each row's depends on that row alone."""
    part: Inputs = {name: inputs[name].detach().to(dtype) for name in _TENSORS}
    part |= {"x": _ends(part["x"]), "approximate": inputs["approximate"]}
    if "d_out" in inputs:
        part["d_out"] = _ends(inputs["d_out"]).to(dtype)
    return _first(_run(_reference, part)())


def _first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def _case(rows: int, width: int, inner: int, approximate: str, **options: Any) -> Case:
    device, backward = options.get("device", "cuda"), options.get("backward", False)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    weights = 2 * width * inner + width + inner
    elements = (2 * weights + 4 * rows * width) if backward else (weights + 2 * rows * width)
    kind = "forward + backward" if backward else "forward"
    return Case(
        op="gelu_ffn",
        name=f"{kind} M{rows} {width}→{inner} {'erf' if approximate == 'none' else 'tanh'}",
        device=device,
        dtype=dtype,
        inputs=partial(
            _draw,
            shape=(rows, width, inner),
            dtype=dtype,
            approximate=approximate,
            backward=backward,
        ),
        expected=_expected,
        select=lambda inputs, result: _ends(_first(result)),
        flops=4.0 * rows * width * inner * (3 if backward else 1),
        bytes=float(elements * dtype.itemsize),
        tokens=rows,
        value=options.get("value", 1.0),
        factor=6.0 if backward else 4.0,
    )


def _cases() -> Iterator[Case]:
    for (width, inner), rows, backward in product(WIDTHS, (2048, 8192, 32768), (False, True)):
        form = "none" if width == 768 else "tanh"
        value = 7 if (rows, width) == (8192, 768) else 2
        yield _case(rows, width, inner, form, backward=backward, value=value)
    for backward in (False, True):
        yield _case(192, 96, 384, "none", device="cpu", backward=backward)


def _eager(
    x: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor, approximate: str
) -> Tensor:
    return F.linear(F.gelu(F.linear(x, w_in, b_in), approximate=approximate), w_out, b_out)


def _provider(name: str, mode: str | None) -> Provider:
    def prepare(case: Case, inputs: Inputs) -> Run:
        return _run(torch.compile(_eager, mode=mode, dynamic=False), inputs)

    return Provider(name, prepare, not_on_cpu("compiling takes longer than a CPU's small cases"))


def _ours(backend: str) -> Provider:
    def call(*arguments: Any) -> Tensor:
        return ops.gelu_ffn(*arguments[:5], approximate=arguments[5], backend=backend)

    def prepare(case: Case, inputs: Inputs) -> Run:
        run, given = _run(call, inputs), _arguments(inputs)
        explanation = ops.explain(ops.gelu_ffn, *given[:5], approximate=given[5], backend=backend)
        if backend in explanation.refusals:
            raise Unavailable(explanation.refusals[backend])
        return run

    return Provider(f"bertgpt {backend}", prepare, ours=True)


CASES: tuple[Case, ...] = tuple(_cases())
PROVIDERS: tuple[Provider, ...] = (
    *(_ours(backend) for backend in ("cuda", "triton", "torch")),
    Provider("linear, gelu, linear", lambda case, inputs: _run(_eager, inputs)),
    _provider("torch.compile", None),
    _provider("torch.compile max-autotune", "max-autotune-no-cudagraphs"),
)


def test_gelu_ffn(contest: Any) -> None:
    contest()
