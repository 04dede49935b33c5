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
from bertgpt.benchmarks.case import (
    Case,
    Inputs,
    Provider,
    Run,
    Unavailable,
    compared,
    compiled,
    differentiated,
    ours,
    some_rows,
)

_UNITS = 64  # inner units whose gradients are compared
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


def _arguments(inputs: Inputs) -> tuple[Any, ...]:
    return (*(inputs[name] for name in _TENSORS), inputs["approximate"])


def _call(inputs: Inputs) -> tuple[tuple[Tensor, ...], dict[str, str]]:
    return _arguments(inputs)[:5], {"approximate": inputs["approximate"]}


def _run(function: Any, inputs: Inputs) -> Run:
    """`function` by the op's signature, with gradients where `d_out` is given."""
    args, kwargs = _call(inputs)
    return differentiated(lambda: function(*args, **kwargs), inputs, _TENSORS)


def _expected(inputs: Inputs, dtype: torch.dtype) -> Tensor:
    """Some rows of the result; backward of the gradient of x, and of some inner units' weights.

    A row's gradient depends on that row alone, an inner unit's on that unit alone.
    """
    whole: Inputs = {name: inputs[name].detach().to(dtype) for name in _TENSORS}
    whole["approximate"] = inputs["approximate"]
    rows = whole | {"x": some_rows(inputs, whole["x"])}
    if "d_out" not in inputs:
        return _run(reference.gelu_ffn, rows)()
    d_out, units = inputs["d_out"].to(dtype), _units(inputs)
    rows["d_out"] = some_rows(inputs, d_out)
    narrow = whole | {"w_in": whole["w_in"][units], "b_in": whole["b_in"][units]}
    narrow |= {"w_out": whole["w_out"][:, units], "d_out": d_out}
    d_x = _run(reference.gelu_ffn, rows)()[0]
    _, d_w_in, d_b_in, d_w_out, d_b_out = _run(reference.gelu_ffn, narrow)()
    return _stacked(d_x, d_w_in, d_b_in, d_w_out, d_b_out)


def _units(inputs: Inputs) -> Tensor:
    return compared(inputs, len(inputs["b_in"]), _UNITS)


def _select(inputs: Inputs, result: Any) -> Tensor:
    if not isinstance(result, tuple):
        return some_rows(inputs, result)
    (d_x, d_w_in, d_b_in, d_w_out, d_b_out), units = result, _units(inputs)
    d_x, d_w_in, d_b_in = some_rows(inputs, d_x), d_w_in[units], d_b_in[units]
    return _stacked(d_x, d_w_in, d_b_in, d_w_out[:, units], d_b_out)


def _stacked(
    d_x: Tensor, d_w_in: Tensor, d_b_in: Tensor, d_w_out: Tensor, d_b_out: Tensor
) -> Tensor:
    """All gradients as rows of the model's width."""
    biases = [F.pad(d_b_in, (0, d_x.shape[1] - len(d_b_in))), d_b_out]
    return torch.cat([d_x, d_w_in, d_w_out.t(), torch.stack(biases)])


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
        select=_select,
        flops=4.0 * rows * width * inner * (3 if backward else 1),
        bytes=float(elements * dtype.itemsize),
        tokens=rows,
        value=options.get("value", 1.0),
        factor=6.0 if backward else 4.0,
    )


def _cases() -> Iterator[Case]:
    shapes = product(WIDTHS, (2048, 8192, 32768), ("none", "tanh"), (False, True))
    for (width, inner), rows, form, backward in shapes:
        value = 7 if (rows, width) == (8192, 768) else 2
        yield _case(rows, width, inner, form, backward=backward, value=value)
    yield _case(192, 96, 384, "none", device="cpu")
    yield _case(192, 96, 384, "tanh", device="cpu", backward=True)


def _eager(
    x: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor, approximate: str
) -> Tensor:
    return F.linear(F.gelu(F.linear(x, w_in, b_in), approximate=approximate), w_out, b_out)


def _epilogue(case: Case, inputs: Inputs) -> Run:
    """CuBLASLt's GELU epilogue, which is the tanh form, then the down-projection."""
    if inputs["approximate"] != "tanh":
        raise Unavailable("cuBLASLt has no erf epilogue")
    if case.device != "cuda":
        raise Unavailable("on a CPU it is no fused call")
    if "d_out" in inputs:
        raise Unavailable("it has no gradient")
    x, w_in, b_in, w_out, b_out = (inputs[name] for name in _TENSORS)

    def run() -> Tensor:
        inner = torch._addmm_activation(b_in, x, w_in.t(), use_gelu=True)
        return F.linear(inner, w_out, b_out)

    return run


CASES: tuple[Case, ...] = tuple(_cases())
PROVIDERS: tuple[Provider, ...] = (
    *(ours(ops.gelu_ffn, backend, _call, _TENSORS) for backend in ("cuda", "triton", "torch")),
    Provider("linear, gelu, linear", lambda case, inputs: _run(_eager, inputs)),
    compiled(_eager, _arguments, None, _TENSORS),
    compiled(_eager, _arguments, "max-autotune-no-cudagraphs", _TENSORS),
    Provider("addmm_activation, then linear", _epilogue),
)


def test_gelu_ffn(contest: Any) -> None:
    contest()
